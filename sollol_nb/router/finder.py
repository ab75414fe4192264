"""Finding the route of a model: its profile, who has it, and the decision of `models/routing.py`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sollol_nb.chat.option_checks import SAMPLING_OPTIONS, check_llama_cpp_options, check_options
from sollol_nb.chat.plain_data import checked_text
from sollol_nb.errors import (
    ConfigError,
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    OllamaResponseError,
    OllamaUnavailableError,
)
from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings, file_identity
from sollol_nb.models.files import (
    DEMO_MODEL_PATH,
    DEMO_NAMES,
    DEMO_NOTE,
    OllamaGGUFResolver,
    find_model_file,
    names_file,
)
from sollol_nb.models.found_files import found_files
from sollol_nb.models.listing import ListedModel, list_models
from sollol_nb.models.modelfile import Modelfile, modelfile_of
from sollol_nb.models.names import ModelName, key_of
from sollol_nb.models.profiles import ModelProfile, profile_of
from sollol_nb.models.routing import DISTRIBUTED, LOCAL, OLLAMA, Route, decide_route
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.amounts import shown
from sollol_nb.settings import config
from sollol_nb.settings.models import SavedModel, model_text
from sollol_nb.text.nearest import nearest
from sollol_nb.text.short_names import short_name

# The messages of Ollama and its engine when a model does not fit (Ollama's llm/server.go, ggml's allocators).
_OUT_OF_MEMORY = re.compile(
    r"requires more system memory|out of memory|(unable|failed) to allocate", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSlots:
    """How many requests for a model run at the same time.

    Attributes:
        identity: what distinguishes the model from another of the same name.
        slots: the number of requests.
        keeps: whether a request finds in its slot what it has in common with the last one there: those of
            llama.cpp that are not deterministic do. Of Ollama's nodes it is not known.
        saves: whether a slot can begin with what another one has processed, once that is saved.
    """

    identity: dict[str, Any]
    slots: int
    keeps: bool = False
    saves: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a model without Ollama.

    Attributes:
        saved: what the settings say about it.
        path: its file; None if it has none, and where Ollama is asked first.
        trouble: why its file cannot be used.
        modelfile: what Ollama adds to the file; None without a file.
    """

    saved: SavedModel
    profile: ModelProfile
    path: Path | None
    trouble: str
    modelfile: Modelfile | None


class RouteFinder:
    """Finds routes for one router. Lives on the I/O loop.

    Args:
        ollama: the Ollama nodes.
        enable_distributed: whether large models are sharded.
        threshold_params: models of more billions of parameters are sharded too.
        model_filter: if given, only these models are sharded.
        gguf_path: the file for models on llama.cpp, instead of looking into Ollama's storage.
    """

    def __init__(
        self,
        ollama: OllamaPool,
        *,
        enable_distributed: bool,
        threshold_params: float | None,
        model_filter: Collection[str] | None,
        gguf_path: str | Path | None,
    ) -> None:
        self._ollama = ollama
        self.enable_distributed = enable_distributed
        self.threshold_params = threshold_params
        self.model_filter = model_filter
        self.gguf_path = gguf_path

    def would_shard(self, model: str | Path) -> bool:
        """Whether the model is sharded by its profile; contacts no node or worker."""
        model = checked_model(model)
        return self._may_shard(model) and bool(self.profile(model).requires_distributed)

    async def find(self, model: str | Path, backend: str | None) -> Route:
        """Where a request for this model goes now, and why.

        Args:
            backend: the requested one, by its full name; None where the router chooses.

        Raises:
            ModelError, ConfigError: no backend, or not this one, can answer; the message says why.
        """
        return (await self.find_with_settings(model, backend))[0]

    async def find_with_settings(self, model: str | Path, backend: str | None) -> tuple[Route, SavedModel]:
        """As `find`; also what the settings say about the model."""
        model = checked_model(model)
        known = await asyncio.to_thread(self._known, model, backend)
        profile, path, in_ollama, state = known.profile, known.path, False, ""
        if backend in (None, OLLAMA) and path is None and not names_file(model):
            in_ollama, state = await self._in_ollama(model)
        if backend is None and path is None and not in_ollama:
            path = DEMO_MODEL_PATH
            if model not in DEMO_NAMES:
                path, _ = await asyncio.to_thread(self._file, model, LOCAL)
        try:
            route = decide_route(
                profile,
                in_ollama=in_ollama,
                ollama_state=state,
                model_path=path,
                file_trouble=known.trouble,
                backend=backend,
                enable_distributed=self.enable_distributed,
                model_filter=self.model_filter,
                names_file=names_file(model),
            )
        except ModelNotFoundError as error:
            near = nearest(model, config.saved_models())
            if near is None:
                raise
            raise ModelNotFoundError(f"{error}; did you mean {near}?") from None
        if route.model_path == DEMO_MODEL_PATH:
            return replace(route, reason=f"{route.reason} ({DEMO_NOTE})"), known.saved
        if route.model_path is None:
            return route, known.saved
        modelfile = known.modelfile
        if modelfile is None:
            modelfile = await asyncio.to_thread(self._modelfile, route.model)
        return _with_modelfile(route, modelfile), known.saved

    async def sharded_instead(self, route: Route, error: OllamaResponseError) -> Route | None:
        """The route over workers for a model that Ollama has too little memory for; None if there is none, or if
        the error has another cause."""
        if not _OUT_OF_MEMORY.search(str(error)) or not self._may_shard(route.model):
            return None
        path, _ = await asyncio.to_thread(self._file, route.model, None)
        if path is None:
            return None
        reason = f"{route.reason}, but Ollama has too little memory for it, so it is sharded"
        route = replace(route, backend=DISTRIBUTED, model_path=path, reason=reason)
        return _with_modelfile(route, await asyncio.to_thread(self._modelfile, route.model))

    def _modelfile(self, model: str) -> Modelfile:
        """What Ollama adds to a model that llama.cpp runs."""
        return modelfile_of(model, self.gguf_path, _checked_sampling_option)

    async def identity(self, route: Route) -> dict[str, Any]:
        """What distinguishes the model of a route from another of the same name: its file and Modelfile, or
        Ollama's digest."""
        if route.model_path is not None:
            identity = await asyncio.to_thread(file_identity, route.model_path)
            digest = route.modelfile.digest
            return {**identity, "modelfile": digest} if digest else identity
        key = ModelName.parse(route.model).key
        try:
            models = (await self._ollama.list())["models"]
        except OllamaUnavailableError:  # the requests will say so
            return {}
        named = [model for model in models if key_of(model.get("name")) == key]
        digests = {str(model.get("digest")) for model in named}
        return {"digests": sorted(digests)}

    def ollama_slots(self, model: str) -> int:
        """How many requests to the model the Ollama nodes that have it serve at the same time; at least 1."""
        key = ModelName.parse(model).key
        slots = [
            node.slots
            for node in self._ollama.nodes
            if any(ModelName.parse(name).key == key for name in node.models)
        ]
        return max(1, sum(slots))

    async def models(self, coordinators: Iterable[CoordinatorSettings]) -> list[ListedModel]:
        """The available models, as `list_models` gives them, without those of Ollama nodes that do not answer.

        Args:
            coordinators: what the running ones run.
        """
        running = {settings.model: settings for settings in coordinators}

        def profile(model: str) -> ModelProfile:
            settings = running.get(model)
            if settings is None or model in DEMO_NAMES or model != short_name(settings.model_path):
                return self.profile(model)
            return self.profile(settings.model_path)

        try:
            in_ollama = (await self._ollama.list())["models"]
            loaded = (await self._ollama.ps())["models"]
        except OllamaUnavailableError:
            in_ollama, loaded = [], []
        in_storage = await asyncio.to_thread(OllamaGGUFResolver().installed)
        return await asyncio.to_thread(
            list_models,
            profile,
            in_ollama=in_ollama,
            loaded=loaded,
            in_storage=in_storage,
            coordinators={model: settings.describe_workers() for model, settings in running.items()},
            are_sharded={model: settings.plan is not None for model, settings in running.items()},
            saved=await asyncio.to_thread(config.saved_models),
            found=(await asyncio.to_thread(found_files, fresh=True)).by_name,
        )

    def profile(self, model: str | Path, backend: str | None = None) -> ModelProfile:
        """What is known of a model, and from where.

        A file in Ollama's storage that cannot be used leaves the size unknown: Ollama may serve the model
        nevertheless.

        Args:
            backend: the requested backend; Ollama needs no file.

        Raises:
            ConfigError: see `profile_of`.
            ModelFileError: the user names the file (the model, or `gguf_path`), and it cannot be used.
        """
        model = checked_model(model)
        saved = config.saved_model(model)
        profile = profile_of(model, threshold_params=self.threshold_params, saved=saved)
        if profile.is_stated and saved.gguf is None:
            return profile
        try:
            path = find_model_file(model, self.gguf_path)
            facts = None if path is None else read_facts(path)
        except ModelError as error:
            if self._is_named_file(model) and backend != OLLAMA:
                raise
            if profile.parameter_count_b is None:
                profile = replace(profile, reason=f"{profile.reason} ({error})")
            return profile
        if facts is None:
            return profile
        return profile_of(model, facts=facts, threshold_params=self.threshold_params, saved=saved)

    def _is_named_file(self, model: str) -> bool:
        """Whether the user names the model's file."""
        return self.gguf_path is not None or names_file(model)

    def _known(self, model: str, backend: str | None) -> _Known:
        """What is known of a model without Ollama. All in one call, since each thread hop costs a request time.

        A model that is sharded need not wait for Ollama, unless there is no file to shard.
        """
        saved = config.saved_model(model)
        profile = self.profile(model, backend)
        shards = bool(profile.requires_distributed) and self.enable_distributed
        path, trouble = None, ""
        if shards if backend is None else backend != OLLAMA:
            path, trouble = self._file(model, backend)
        elif backend is None and names_file(model):
            path, trouble = self._file(model, LOCAL)
        modelfile = None
        if path is not None and path != DEMO_MODEL_PATH:
            modelfile = self._modelfile(model)
        return _Known(saved, profile, path, trouble, modelfile)

    def _file(self, model: str, backend: str | None) -> tuple[Path | None, str]:
        """The model's file on this machine, if any, and why it cannot be used. Raises ModelFileError instead
        where a backend needs the file."""
        try:
            return find_model_file(model, self.gguf_path), ""
        except ModelFileError as error:
            if backend is not None or self._is_named_file(model):
                raise
            return None, str(error)

    def _may_shard(self, model: str) -> bool:
        return self.enable_distributed and (self.model_filter is None or model in self.model_filter)

    async def _in_ollama(self, model: str) -> tuple[bool, str]:
        if await self._ollama.has_model(model):
            return True, "an Ollama node has it"
        return False, self._ollama.describe_state()


def _with_modelfile(route: Route, modelfile: Modelfile) -> Route:
    reason = "; ".join(filter(None, (route.reason, modelfile.describe())))
    return replace(route, modelfile=modelfile, reason=reason)


def checked_model(model: object) -> str:
    """A model as a caller names it, as text.

    Raises:
        ConfigError: it is neither a name nor the path of a file.
    """
    text = model_text(model)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"model={shown(model)} is not a model name; try demo or llama3.2")
    if "\0" in text:
        raise ConfigError(f"model={shown(model)} contains a NUL character; no model and no file has such a name")
    try:
        return checked_text(text, "it")
    except ConfigError:
        raise ConfigError(
            f"model={shown(model)} has characters that are not Unicode; rename the file, in UTF-8"
        ) from None


def _checked_sampling_option(name: str, value: Any) -> Any:
    """The value of a sampling option. Raises ConfigError if it is none, or not one that llama.cpp applies."""
    if name not in SAMPLING_OPTIONS:
        raise ConfigError(f"{name} is not a sampling option of llama.cpp")
    checked = check_options({name: value})
    check_llama_cpp_options(checked)
    return checked[name]
