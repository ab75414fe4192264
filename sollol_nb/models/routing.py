"""The route: where a request goes, and why, in words. A pure decision over what is known."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import ConfigError, ModelNotFoundError
from sollol_nb.models.profiles import ModelProfile

OLLAMA = "ollama-pool"
DISTRIBUTED = "llama.cpp-distributed"
LOCAL = "llama.cpp-local"

BACKEND_NAMES: dict[str, str | None] = {
    "auto": None,
    "ollama": OLLAMA,
    "sharded": DISTRIBUTED,
    "local": LOCAL,
    OLLAMA: OLLAMA,
    DISTRIBUTED: DISTRIBUTED,
    LOCAL: LOCAL,
}
"""What a person may write for a backend -> the backend; None leaves the choice to the router."""


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


def checked_backend(backend: str | None) -> str | None:
    """The backend that a person names, in full; None where the router is to choose.

    Raises:
        ConfigError: there is no such backend.
    """
    if backend is None or (isinstance(backend, str) and backend.lower() in BACKEND_NAMES):
        return BACKEND_NAMES[backend.lower()] if backend is not None else None
    near = difflib.get_close_matches(str(backend).lower(), BACKEND_NAMES, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(BACKEND_NAMES)}"
    raise ConfigError(f"backend={backend!r} is unknown; {hint}")


def decide_route(
    profile: ModelProfile,
    *,
    in_ollama: bool,
    ollama_words: str,
    model_path: Path | None,
    backend: str | None = None,
    enable_distributed: bool = True,
    model_filter: Collection[str] | None = None,
) -> Route:
    """Large models are sharded; small ones go to Ollama, or to a local llama-server where no node has them.

    A backend that was asked for is taken whatever the model's size, if the model can run there at all.

    Args:
        in_ollama: whether a reachable Ollama node has the model.
        ollama_words: state of Ollama for the reason, such as "no Ollama node answers".
        model_path: the model's GGUF file on this machine, if any.
        backend: the backend that was asked for, if any.
        enable_distributed: whether sharding is allowed at all.
        model_filter: if given, only these models are sharded.

    Raises:
        ModelNotFoundError: no place has the model, or not the one that was asked for.
        ConfigError: it is to be sharded, and this router may not shard it.
    """
    model = profile.model
    if backend is not None:
        return _asked_for(profile, backend, in_ollama, ollama_words, model_path, enable_distributed, model_filter)
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


def _asked_for(
    profile: ModelProfile,
    backend: str,
    in_ollama: bool,
    ollama_words: str,
    model_path: Path | None,
    enable_distributed: bool,
    model_filter: Collection[str] | None,
) -> Route:
    """The route to the backend that was asked for; the errors are those of `decide_route`."""
    model = profile.model
    asked = f"{backend} was asked for {model}, but"
    if backend == OLLAMA:
        if in_ollama:
            return Route(model, OLLAMA, f"asked for; {ollama_words}", profile, None)
        if model.endswith(".gguf"):
            raise ModelNotFoundError(f"{asked} Ollama knows no files; make a model of it with `ollama create`")
        raise ModelNotFoundError(
            f"{asked} {ollama_words}; see that `ollama serve` runs, and fetch it with `ollama pull {model}`"
        )
    if backend == DISTRIBUTED and not enable_distributed:
        raise ConfigError(f"{asked} enable_distributed is off")
    if backend == DISTRIBUTED and model_filter is not None and model not in model_filter:
        raise ConfigError(f"{asked} this router's model_filter allows only {', '.join(model_filter)}")
    if model_path is None:
        raise ModelNotFoundError(
            f"{asked} its GGUF file is not on this machine; "
            f"fetch it with `ollama pull {model}`, or give gguf_path="
        )
    return Route(model, backend, "asked for", profile, model_path)
