"""The models that can be asked: those of Ollama's nodes and storage, those that run, those that have a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ModelError
from sollol_nb.models.files import DEMO_NAMES
from sollol_nb.models.profiles import MODEL_PROFILES, ModelProfile
from sollol_nb.models.profiles import profile_of as profile_of_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model.

    Attributes:
        model: its name.
        where: who has it: URLs of Ollama nodes, `this machine`, `built in`, or "" where nobody has.
        parameters_b: billions of parameters; None when unknown.
        memory_gb: estimated memory in 1e9 bytes; None when unknown.
        sharded: whether its requests are spread over workers; None when its size is unknown.
        running: URL of the coordinator that runs it, `loaded` if an Ollama node has it loaded, or "".
    """

    model: str
    where: str
    parameters_b: float | None
    memory_gb: float | None
    sharded: bool | None
    running: str

    @classmethod
    def of(cls, profile: ModelProfile, where: str, running: str) -> ListedModel:
        """A model by its profile."""
        memory_gb = None if profile.memory_bytes is None else round(profile.memory_bytes / 1e9, 2)
        sharded = profile.requires_distributed
        return cls(profile.model, where, profile.parameter_count_b, memory_gb, sharded, running)


def list_models(
    profile_of: Callable[[str], ModelProfile],
    *,
    in_ollama: Iterable[Mapping[str, Any]],
    loaded: Iterable[Mapping[str, Any]],
    in_storage: Iterable[str],
    coordinators: Mapping[str, str],
) -> list[ListedModel]:
    """All models, those that can be asked at once first, then by name.

    Args:
        profile_of: gives a model's profile.
        in_ollama: entries of `OllamaPool.list`.
        loaded: entries of `OllamaPool.ps`.
        in_storage: names found in Ollama's storage on this machine.
        coordinators: model to URL of the coordinators that run.
    """
    where: dict[str, list[str]] = {name: [] for name in MODEL_PROFILES}
    for entry in in_ollama:
        where.setdefault(_short(str(entry["name"])), []).extend(entry["nodes"])
    for name in in_storage:
        places = where.setdefault(_short(name), [])
        if not places:  # a node on this machine says so by itself
            places.append("this machine")
    for name in coordinators:
        where.setdefault(name, [])
    for name in DEMO_NAMES:
        where.setdefault(name, []).append("built in")

    def listed(name: str, places: list[str]) -> ListedModel:
        try:
            profile = profile_of(name)
        except ModelError:  # one that is damaged must not hide the others
            profile = profile_of_name(name)
        return ListedModel.of(profile, ", ".join(places), running.get(name, ""))

    running = {_short(str(entry["name"])): "loaded" for entry in loaded} | dict(coordinators)
    models = [listed(name, places) for name, places in where.items()]
    return sorted(models, key=lambda one: (not one.running, not one.where, one.model))


def models_frame(models: Iterable[ListedModel]) -> pd.DataFrame:
    """The models as a frame, one row each; columns are the attributes of `ListedModel`."""
    import pandas as pd

    dtypes = {
        "model": "string",
        "where": "string",
        "parameters_b": "Float64",
        "memory_gb": "Float64",
        "sharded": "boolean",
        "running": "string",
    }
    rows = [[getattr(one, field.name) for field in fields(ListedModel)] for one in models]
    return pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)


def _short(name: str) -> str:
    return name.removesuffix(":latest")
