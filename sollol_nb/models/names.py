"""A model's name, taken apart by Ollama's own rules (`types/model/name.go`).

Names look like `model`, `model:tag`, `user/model:tag`, `hf.co/user/repo:quant`, `host:port/user/model:tag`; a
missing tag is `latest`, and case does not matter. A part may hold letters, digits, `_`, `-` and, except in the
namespace, `.`; it starts with a letter, a digit or `_`, so no name can lead out of a folder. A digest
(`model@sha256:<hex>`, or `sha256:<hex>` alone) pins the content.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sollol_nb.errors import ModelNotFoundError
from sollol_nb.runtime.amounts import shown

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_HOST_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model's name, with defaults for the parts that users leave out."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Parse a name as Ollama does.

        Raises:
            ModelNotFoundError: no model can have this name.
        """
        rest, tag = text.strip(), DEFAULT_TAG
        if rest.rfind(":") > rest.rfind("/"):
            rest, _, tag = rest.rpartition(":")
        parts = rest.rsplit("/", 2)
        model = parts[-1]
        namespace = parts[-2] if len(parts) > 1 else DEFAULT_NAMESPACE
        host = parts[0].split("://")[-1] if len(parts) > 2 else DEFAULT_HOST
        checks = ((_HOST_PART, host), (_NAMESPACE_PART, namespace), (_NAME_PART, model), (_NAME_PART, tag))
        if not all(pattern.fullmatch(part) for pattern, part in checks):
            raise ModelNotFoundError(
                f"{shown(text)} is not the name of an Ollama model; use a name such as llama3.1:70b, "
                "user/model:tag or hf.co/user/repo:quant"
            )
        return cls(host, namespace, model, tag)

    def __str__(self) -> str:
        """The name as `ollama list` shows it."""
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """The same for all spellings of one name."""
        return str(self).lower()


def split_digest(model: str) -> tuple[str, str]:
    """A name without its digest, and the hex digits of the digest; either may be empty.

    Raises:
        ModelNotFoundError: the digest is malformed.
    """
    text, at, digest = model.strip().partition("@")
    if not at and DIGEST.fullmatch(text):
        text, at, digest = "", "@", text
    match = DIGEST.fullmatch(digest)
    if at and match is None:
        raise ModelNotFoundError(f"the digest in {model!r} must be sha256: and 64 hex digits")
    return text, match[1].lower() if match else ""


def key_of(name: object) -> str | None:
    """The key of a name that somebody else wrote, such as a node; None if it is not a model's name."""
    try:
        return ModelName.parse(name).key if isinstance(name, str) else None
    except ModelNotFoundError:
        return None
