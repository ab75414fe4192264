"""The route of a request: its backend, and why. A pure function of the model's profile and where the model is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from sollol_nb.errors import ConfigError, ModelFileError, ModelNotFoundError
from sollol_nb.models.modelfile import NO_MODELFILE, Modelfile
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.nearest import nearest
from sollol_nb.text.short_names import is_file_name, short_name

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

_SHORT_NAMES = {OLLAMA: "ollama", DISTRIBUTED: "sharded", LOCAL: "local"}
BACKENDS = ("auto", *_SHORT_NAMES.values())
"""The short names of all backends, and `auto`."""
_DESCRIPTIONS = {OLLAMA: "Ollama", DISTRIBUTED: "sharded llama-server", LOCAL: "local llama-server"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a model's requests go.

    Attributes:
        model: the name.
        backend: `ollama-pool`, `llama.cpp-distributed` or `llama.cpp-local`.
        reason: why, as one line.
        profile: what is known about the model.
        model_path: the GGUF file; None where Ollama serves the model.
        modelfile: what llama.cpp adds to the file; Ollama itself does it where it serves the model.
        needs_worker: whether at least one worker takes part, since a person wants the model sharded. Where the
            router shards it for its size, all layers may be on this machine if that is faster.
    """

    model: str
    backend: str
    reason: str
    profile: ModelProfile
    model_path: Path | None
    modelfile: Modelfile = NO_MODELFILE
    needs_worker: bool = False

    @property
    def name(self) -> str:
        """The model's name for display."""
        return short_name(self.model)

    def __str__(self) -> str:
        """`demo → local llama-server: listed in MODEL_PROFILES as not needing sharding`."""
        return f"{self.name} → {_DESCRIPTIONS[self.backend]}: {self.reason}"


def checked_backend(backend: str | None) -> str | None:
    """The full name of a backend that a person names; None where the router chooses.

    Raises:
        ConfigError: there is no such backend.
    """
    if backend is None or (isinstance(backend, str) and backend.lower() in BACKEND_NAMES):
        return BACKEND_NAMES[backend.lower()] if backend is not None else None
    near = nearest(backend, BACKEND_NAMES) if isinstance(backend, str) else None
    hint = f"did you mean {near!r}?" if near else f"known backends: {', '.join(BACKEND_NAMES)}"
    raise ConfigError(f"backend={shown(backend)} is unknown; {hint}")


def decide_route(
    profile: ModelProfile,
    *,
    in_ollama: bool,
    ollama_state: str,
    model_path: Path | None,
    file_trouble: str = "",
    backend: str | None = None,
    enable_distributed: bool = True,
    model_filter: Collection[str] | None = None,
    names_file: bool = False,
) -> Route:
    """Large models are sharded; small ones go to Ollama, or to a local llama-server where no node has them.

    A large model whose file is not on this machine, or cannot be sharded, goes to Ollama if a node has it.

    A requested backend is used whatever the model's size, if the model can run there at all.

    Args:
        in_ollama: whether a reachable Ollama node has the model.
        ollama_state: for the reason, such as "no Ollama node is running"; "" where Ollama does not matter.
        model_path: the model's GGUF file on this machine, if any.
        file_trouble: why its file on this machine cannot be used; "" where it can, or there is none.
        backend: the requested backend, if any.
        enable_distributed: whether sharding is allowed at all.
        model_filter: if given, only these models are sharded.
        names_file: whether the model's name stands for a file on this machine, which Ollama does not know.

    Raises:
        ModelNotFoundError: the model is neither in Ollama nor on this machine, or not where the backend needs it.
        ConfigError: the model needs sharding, and this router may not shard it.
    """
    model = profile.model
    if backend is not None:
        return _requested_route(
            profile,
            backend,
            in_ollama,
            ollama_state,
            model_path,
            enable_distributed,
            model_filter,
            names_file,
        )
    if profile.requires_distributed:
        if enable_distributed:
            _check_filter(model, model_filter)
            if model_path is not None:
                route = _route(profile, DISTRIBUTED, profile.reason, model_path)
                return replace(route, needs_worker=profile.is_listed_as_sharded)
            if in_ollama:
                why = f"cannot be sharded ({file_trouble})" if file_trouble else "is not on this machine"
                return _route(profile, OLLAMA, f"{profile.reason}, but its GGUF file {why}, so Ollama runs it")
            if file_trouble:
                raise ModelFileError(file_trouble)
            raise ModelNotFoundError(f"{model} needs sharding, but {_no_file(model)}")
        if in_ollama:
            return _route(profile, OLLAMA, f"{profile.reason}, but enable_distributed is off, so Ollama runs it")
        raise ConfigError(f"{model} needs sharding ({profile.reason}), but enable_distributed is off")
    reason = "; ".join(filter(None, (profile.reason, ollama_state)))
    if in_ollama:
        return _route(profile, OLLAMA, reason)
    if model_path is not None:
        return _route(profile, LOCAL, reason, model_path)
    raise ModelNotFoundError(
        f"{model} is not available: {ollama_state}, and its GGUF file is not on this machine. "
        f"{_advice(model, ollama_state)}, or use the path of a .gguf file as the model, or try the built-in "
        "model: demo"
    )


def _requested_route(
    profile: ModelProfile,
    backend: str,
    in_ollama: bool,
    ollama_state: str,
    model_path: Path | None,
    enable_distributed: bool,
    model_filter: Collection[str] | None,
    names_file: bool,
) -> Route:
    """The route to a requested backend; the errors are those of `decide_route`."""
    model = profile.model
    reason = f"chosen with backend={_SHORT_NAMES[backend]}"
    if backend == OLLAMA:
        if in_ollama:
            return _route(profile, OLLAMA, f"{reason}; {ollama_state}")
        if names_file or is_file_name(model):
            raise ModelNotFoundError(
                f"Ollama cannot run the file {model}; create a model from it with `ollama create`"
            )
        raise ModelNotFoundError(f"Ollama cannot run {model}: {ollama_state}. {_advice(model, ollama_state)}")
    if backend == DISTRIBUTED:
        if not enable_distributed:
            raise ConfigError(f"cannot shard {model}: enable_distributed is off")
        _check_filter(model, model_filter)
    if model_path is None:
        verb = "shard" if backend == DISTRIBUTED else "run"
        raise ModelNotFoundError(f"cannot {verb} {model}: {_no_file(model)}")
    return replace(_route(profile, backend, reason, model_path), needs_worker=backend == DISTRIBUTED)


def _route(profile: ModelProfile, backend: str, reason: str, model_path: Path | None = None) -> Route:
    return Route(model=profile.model, backend=backend, reason=reason, profile=profile, model_path=model_path)


def _check_filter(model: str, model_filter: Collection[str] | None) -> None:
    if model_filter is not None and model not in model_filter:
        raise ConfigError(
            f"cannot shard {model}: this router's model_filter allows only {', '.join(model_filter)}"
        )


def _advice(model: str, ollama_state: str) -> str:
    """How to get the model into Ollama."""
    if "can be used" in ollama_state:
        return "Correct the address of the node, or name another one in OLLAMA_HOST"
    if "is running" in ollama_state:
        return f"Start Ollama with `ollama serve`, and run `ollama pull {model}`"
    return f"Run `ollama pull {model}`"


def _no_file(model: str) -> str:
    return (
        f"its GGUF file is not on this machine. Run `ollama pull {model}` here, or use the path of a .gguf file "
        "as the model"
    )
