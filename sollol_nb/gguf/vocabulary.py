"""The vocabulary in a model's GGUF header."""

from __future__ import annotations

from dataclasses import dataclass

from sollol_nb.errors import ModelFileError
from sollol_nb.gguf.header import GgufFile, Keys, read_tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        kind: of the tokenizer, such as `gpt2`; "" if not stated.
        tokens: their texts, by id.
        begin, end: ids of the tokens that begin and end each text, or -1 if none does; None if not stated.
    """

    kind: str
    tokens: tuple[bytes, ...]
    begin: int | None
    end: int | None


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The vocabulary of a model's (first) file.

    Raises:
        ModelFileError: as for `read_header`; or it has no vocabulary.
    """
    keys = read_tokenizer(file)
    tokens = keys.get("tokens")
    if not isinstance(tokens, tuple):
        raise ModelFileError(f"{file.path} has no vocabulary; give a model that writes text")
    return Vocabulary(str(keys.get("model", "")), tokens, _added(keys, "bos"), _added(keys, "eos"))


def _added(keys: Keys, name: str) -> int | None:
    """The id of a token that is added to each text; -1 if none is, None if the header does not say."""
    adds, token = keys.get(f"add_{name}_token"), keys.get(f"{name}_token_id")
    if adds is None:
        return None
    return token if adds and isinstance(token, int) else -1
