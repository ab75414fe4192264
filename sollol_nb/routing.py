"""The route: where a request goes, and why, in words. A pure decision over what is known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import ConfigError, ModelNotFoundError
from sollol_nb.profiles import ModelProfile

OLLAMA = "ollama-pool"
DISTRIBUTED = "llama.cpp-distributed"
LOCAL = "llama.cpp-local"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model's requests go.

    Attributes:
        model: the name.
        backend: `ollama-pool`, `llama.cpp-distributed` or `llama.cpp-local`.
        reason: why, in words.
        profile: what is known of the model, and from where.
        model_path: the GGUF file; None where Ollama has the model.
    """

    model: str
    backend: str
    reason: str
    profile: ModelProfile
    model_path: Path | None

    def __str__(self) -> str:
        return f"{self.model} → {self.backend}: {self.reason}"


def decide_route(
    profile: ModelProfile,
    *,
    in_ollama: bool,
    ollama_words: str,
    model_path: Path | None,
    enable_distributed: bool = True,
    model_filter: Collection[str] | None = None,
) -> Route:
    """Large models are sharded; small ones go to Ollama, or to a local llama-server where no node has them.

    Args:
        in_ollama: whether a reachable Ollama node has the model.
        ollama_words: state of Ollama for the reason, such as "no Ollama node answers".
        model_path: the model's GGUF file on this machine, if any.
        enable_distributed: whether sharding is allowed at all.
        model_filter: if given, only these models are sharded.

    Raises:
        ModelNotFoundError: no place has the model.
        ConfigError: it needs sharding, and this router may not shard it.
    """
    model = profile.model
    if profile.requires_distributed:
        if enable_distributed and model_filter is not None and model not in model_filter:
            raise ConfigError(
                f"{model} needs sharding, but this router's model_filter allows only {', '.join(model_filter)}"
            )
        if enable_distributed and model_path is not None:
            return Route(model, DISTRIBUTED, profile.reason, profile, model_path)
        if not enable_distributed and in_ollama:
            reason = f"{profile.reason}, but enable_distributed is off, so Ollama tries"
            return Route(model, OLLAMA, reason, profile, None)
        if not enable_distributed:
            raise ConfigError(f"{model} needs sharding ({profile.reason}), but enable_distributed is off")
        raise ModelNotFoundError(
            f"{model} needs sharding, but its GGUF file is not on this machine ({ollama_words}); "
            f"fetch it with `ollama pull {model}`, or give gguf_path="
        )
    if in_ollama:
        return Route(model, OLLAMA, f"{profile.reason}; {ollama_words}", profile, None)
    if model_path is not None:
        reason = f"{profile.reason}; {ollama_words}, so a local llama-server runs {model_path.name}"
        return Route(model, LOCAL, reason, profile, model_path)
    raise ModelNotFoundError(
        f"no place has {model} ({ollama_words}); fetch it with `ollama pull {model}`, give gguf_path=, "
        "or try the built-in model: demo"
    )
