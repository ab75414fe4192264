"""The list of models: those of Ollama's nodes and storage, those that run or have a profile, files of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ModelError
from sollol_nb.models.files import DEMO_NAMES
from sollol_nb.models.found_files import FoundFile
from sollol_nb.models.profiles import MODEL_PROFILES, ModelProfile
from sollol_nb.models.profiles import profile_of as profile_of_name
from sollol_nb.settings.models import SavedModel
from sollol_nb.text.short_names import is_file_name, short_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """One model.

    Attributes:
        model: its name.
        where: URLs of the Ollama nodes that have it, `this machine`, `built in`, the program or folder whose file
            it is, such as `LM Studio`, or "" for none.
        parameters_b: billions of parameters; None when unknown.
        memory_gb: estimated memory in 1e9 bytes; None when unknown.
        sharded: whether it is sharded, if a coordinator runs it, else whether it needs sharding; None when its
            size is unknown.
        running: where a coordinator runs it, such as `on 3 workers`, `loaded` if an Ollama node has it loaded, or
            "".
    """

    model: str
    where: str
    parameters_b: float | None
    memory_gb: float | None
    sharded: bool | None
    running: str

    @classmethod
    def of(cls, profile: ModelProfile, where: str, running: str) -> ListedModel:
        """The entry of a model, from its profile."""
        memory_gb = None if profile.memory_bytes is None else round(profile.memory_bytes / 1e9, 2)
        return cls(
            model=profile.model,
            where=where,
            parameters_b=profile.parameter_count_b,
            memory_gb=memory_gb,
            sharded=profile.requires_distributed,
            running=running,
        )


def list_models(
    profile_of: Callable[[str], ModelProfile],
    *,
    in_ollama: Iterable[Mapping[str, Any]],
    loaded: Iterable[Mapping[str, Any]],
    in_storage: Iterable[str],
    coordinators: Mapping[str, str],
    are_sharded: Mapping[str, bool] = MappingProxyType({}),
    saved: Mapping[str, SavedModel] = MappingProxyType({}),
    found: Mapping[str, FoundFile] = MappingProxyType({}),
) -> list[ListedModel]:
    """All models: the running ones first, then the available ones, each by name.

    Args:
        profile_of: returns a model's profile.
        in_ollama: entries of `OllamaPool.list`.
        loaded: entries of `OllamaPool.ps`.
        in_storage: names found in Ollama's storage on this machine.
        coordinators: model -> where its running coordinator runs.
        are_sharded: model -> whether its running coordinator shards it.
        saved: what the settings say about models, by name.
        found: files of other programs, by name. Where the name is that of another model, the file is listed by its
            path.
    """
    where: dict[str, list[str]] = {name: [] for name in MODEL_PROFILES}
    for entry in in_ollama:
        where.setdefault(_short(str(entry["name"])), []).extend(entry["nodes"])
    for name in in_storage:
        owners = where.setdefault(_short(name), [])
        if not owners:  # otherwise a node on this machine may be among them
            owners.append("this machine")
    paths: dict[str, str] = {}
    for name, model in saved.items():
        file = Path(name) if is_file_name(name) else model.gguf
        is_here = file is not None and file.is_file()
        if short_name(name) != name:
            paths.setdefault(short_name(name), name)
        where.setdefault(short_name(name), []).extend(["this machine"] if is_here else [])
    named = {path.resolve() for path in (model.gguf for model in saved.values()) if path is not None}
    taken = {name.lower() for name in (*where, *DEMO_NAMES)}
    for name, other in found.items():
        if other.path.resolve() not in named:
            where.setdefault(str(other.path) if name.lower() in taken else name, []).append(other.place)
    for name in coordinators:
        owners = where.setdefault(name, [])
        if not owners and name not in DEMO_NAMES:  # the coordinator has its file
            owners.append("this machine")
    for name in DEMO_NAMES:
        where.setdefault(name, []).append("built in")

    def listed(name: str, owners: list[str]) -> ListedModel:
        try:
            profile = profile_of(name if name in saved or name in MODEL_PROFILES else paths.get(name, name))
        except ModelError:  # a damaged model must not hide the others
            profile = profile_of_name(name)
        model = ListedModel.of(profile, ", ".join(owners), running.get(name, ""))
        return replace(model, model=name, sharded=are_sharded.get(name, model.sharded))

    running = {_short(str(entry["name"])): "loaded" for entry in loaded} | dict(coordinators)
    models = [listed(name, owners) for name, owners in where.items()]
    return sorted(models, key=lambda model: (not model.running, not model.where, model.model))


def models_frame(models: Iterable[ListedModel]) -> pd.DataFrame:
    """The models as a frame, a row each; its columns are the attributes of `ListedModel`."""
    import pandas as pd

    dtypes = {
        "model": "string",
        "where": "string",
        "parameters_b": "Float64",
        "memory_gb": "Float64",
        "sharded": "boolean",
        "running": "string",
    }
    rows = [[getattr(model, field.name) for field in fields(ListedModel)] for model in models]
    return pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)


def _short(name: str) -> str:
    return name.removesuffix(":latest")
