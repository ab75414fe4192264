"""Draft models: small models that can draft tokens for a larger one.

A draft model must have the vocabulary of the model: llama.cpp checks the kind of tokenizer, which tokens begin and
end a text, and the texts of the tokens, of which the larger vocabulary may have a few more at its end
(`common_speculative_are_compatible` in common/speculative.cpp). If they differ, it starts without drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from sollol_nb.errors import ModelError, SollolError
from sollol_nb.gguf.facts import ModelFacts, first_part, model_keys, read_facts
from sollol_nb.gguf.header import check_file
from sollol_nb.gguf.vocabulary import Vocabulary, read_vocabulary
from sollol_nb.models.files import OllamaGGUFResolver
from sollol_nb.settings import config

logger = logging.getLogger(__name__)

MOST_OF_MODEL = 1 / 5
"""A larger draft model is hardly faster than the model."""
SIZE_DIFFERENCE = 128
_FIRST_CHECKED = 5
"""Tokens before this one may differ, as llama.cpp allows."""
_STATE_KEYS = (".ssm.", ".wkv.", ".shortconv.", ".linear_attention.", ".time_mix_extra_dim")


def keeps_a_state(path: Path) -> bool:
    """Whether blocks of a model keep a state that changes with each token, as recurrent ones do.

    Raises:
        ModelFileError: its header cannot be read.
    """
    return any(part in key for key in model_keys(path) for part in _STATE_KEYS)


def draft_problem(model: Path, draft: Path) -> str:
    """Why a model cannot draft for another; "" if it can.

    Raises:
        ModelFileError: a header cannot be read.
    """
    if keeps_a_state(draft):
        return "it keeps a state that cannot be taken back after a wrong draft"
    return _difference(_vocabulary(model), _vocabulary(draft))


def find_draft_model(model: Path, facts: ModelFacts) -> Path | None:
    """The smallest model on this machine that can draft for this one; None if there is none.

    Args:
        facts: the model's.
    """
    candidates = []
    for path in _files_at_hand():
        try:
            draft = read_facts(path)
        except ModelError:
            continue
        is_near = abs(draft.vocabulary_size - facts.vocabulary_size) <= SIZE_DIFFERENCE
        if is_near and draft.file_bytes <= facts.file_bytes * MOST_OF_MODEL and draft.path != model:
            candidates.append((draft.file_bytes, draft.path))
    for _, path in sorted(candidates):
        try:
            if not draft_problem(model, path):
                return path
        except ModelError as error:
            logger.debug("%s cannot draft: %s", path, error)
    return None


def _files_at_hand() -> Iterator[Path]:
    """Model files that the settings name, and those in Ollama's storage."""
    for saved in config.saved_models().values():
        if saved.gguf is not None:
            yield saved.gguf
    storage = OllamaGGUFResolver()
    for name in storage.installed():
        try:
            yield storage.resolve(name)
        except SollolError as error:
            logger.debug("%s cannot draft: %s", name, error)


def _vocabulary(path: Path) -> Vocabulary:
    return read_vocabulary(check_file(first_part(path), advice="check the path"))


def _difference(model: Vocabulary, draft: Vocabulary) -> str:
    if model.kind != draft.kind:
        return f"its tokenizer is of another kind ({draft.kind} instead of {model.kind})"
    for name in ("begin", "end"):
        first, second = getattr(model, name), getattr(draft, name)
        if None not in (first, second) and first != second:
            return f"another token {name}s its texts"
    if abs(len(model.tokens) - len(draft.tokens)) > SIZE_DIFFERENCE:
        return f"its vocabulary has {len(draft.tokens):,} tokens instead of {len(model.tokens):,}"
    both = min(len(model.tokens), len(draft.tokens))
    if model.tokens[_FIRST_CHECKED:both] != draft.tokens[_FIRST_CHECKED:both]:
        return "its vocabulary is another one"
    return ""
