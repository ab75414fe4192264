"""The engines of a router in this process: workers, coordinators and Ollama nodes, and the requests to them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.journaling import JournalEntry
from sollol_nb.chat.option_checks import speculation_of
from sollol_nb.chat.request import ChatRequest
from sollol_nb.cluster.state import ClusterState
from sollol_nb.errors import ConfigError
from sollol_nb.latency.log import LatencyLog
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.llama_cpp.processes.running import Ended, end_engines, engine_log
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.listing import ListedModel
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import DISTRIBUTED, OLLAMA, Route, checked_backend
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.router.active_request import ActiveRequest, RequestServices
from sollol_nb.router.cluster_control import ClusterControl
from sollol_nb.router.direct_requests import count_tokens, embed
from sollol_nb.router.finder import ModelSlots, RouteFinder
from sollol_nb.router.settings import check_amounts, endpoints, pool_arguments, pool_settings, request_options
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import io_bound
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings import config
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.models import model_text


class OwnEngines(ClusterControl):
    """The engines of a router without a gateway. Making it does no I/O.

    Attributes:
        events, latency, state: as of the router.
        counts: requests that have ended, by backend; "" where none was found.
    """

    def __init__(
        self,
        ollama: OllamaPool | None,
        settings: PoolSettings,
        *,
        workers: Iterable[str],
        enable_distributed: bool,
        threshold_params: float | None,
        model_filter: Collection[str] | None,
        gguf_path: str | Path | None,
        latency: LatencyLog,
        options: Mapping[str, Any],
        timeout_s: float,
    ) -> None:
        """Arguments are those of `Router`, checked; `options` and `timeout_s` are of requests that have none."""
        events = EventBus()
        known = Workers(workers, events)
        ollama = ollama or OllamaPool.auto_configure(events=events)
        coordinators = CoordinatorPool(settings, known, events)
        state = ClusterState(coordinators, known, ollama, events)
        super().__init__(coordinators, known, ollama, state=state, events=events)
        self.events = events
        self.latency = latency
        self.state = state
        self.counts: Counter[str] = Counter()
        self._options = options
        self._timeout_s = timeout_s
        self._routes = RouteFinder(
            ollama,
            enable_distributed=enable_distributed,
            threshold_params=threshold_params,
            model_filter=[model_filter] if isinstance(model_filter, str) else model_filter,
            gguf_path=gguf_path,
        )
        self._services = RequestServices(
            routes=self._routes,
            ollama=ollama,
            coordinators=coordinators,
            latency=latency,
            events=events,
            counts=self.counts,
            options=options,
        )

    @classmethod
    def of(
        cls,
        ollama_pool: OllamaPool | None,
        *,
        enable_distributed: bool,
        rpc_backends: Iterable[str | Mapping[str, Any]] | None,
        num_rpc_backends: int | None,
        auto_setup_rpc: bool | None,
        coordinator_timeout: float,
        distributed_threshold_params: float | None,
        model_filter: Collection[str] | None,
        gguf_path: str | Path | None,
        layer_strategy: str | None,
        context_tokens: int | None,
        slots: int | None,
        recovery: str | None,
        deterministic: bool | None,
        speculation: str | None,
        replan: str | None,
        standby: bool | None,
        draft: str | Path | None,
        keep_alive: float | str | Mapping[str, float | str] | None,
        latency: LatencyLog,
        timeout_s: float,
        **others: Any,
    ) -> OwnEngines:
        """The engines for these arguments of `Router`, and for the settings where they are None.

        Args:
            others: fields of `PoolSettings`.

        Raises:
            ConfigError: an argument cannot be used.
        """
        options = request_options(recovery=recovery, deterministic=deterministic)
        threshold_params = config.or_default(distributed_threshold_params, "threshold_params")
        check_amounts(
            coordinator_timeout=coordinator_timeout,
            distributed_threshold_params=threshold_params,
        )
        settings = pool_settings(
            num_rpc_backends=config.or_default(num_rpc_backends, "num_workers"),
            auto_setup_rpc=config.or_default(auto_setup_rpc, "auto_setup"),
            coordinator_timeout=coordinator_timeout,
            layer_strategy=config.or_default(layer_strategy, "strategy"),
            context_tokens=config.or_default(context_tokens, "context_tokens"),
            slots=config.or_default(slots, "slots"),
            keep_alive=config.or_default(keep_alive, "keep_alive"),
            replan=config.or_default(replan, "replan"),
            standby=config.or_default(standby, "standby"),
            speculation=speculation_of(options) or config.or_default(speculation, "speculation"),
            draft=config.or_default(draft, "draft"),
            **others,
        )
        return cls(
            ollama_pool,
            settings,
            workers=endpoints(rpc_backends),
            enable_distributed=enable_distributed,
            threshold_params=threshold_params,
            model_filter=model_filter,
            gguf_path=gguf_path,
            latency=latency,
            options=options,
            timeout_s=timeout_s,
        )

    def chunks(
        self,
        model: str,
        check: Callable[[], ChatRequest],
        *,
        router: object,
        interrupted: Answer | None = None,
        entry: JournalEntry | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a request; arguments are those of `ActiveRequest`."""
        request = ActiveRequest(self._services, model, check, router=router, interrupted=interrupted, entry=entry)
        return request.chunks()

    # --- deciding -------------------------------------------------------------------------------

    def should_use_distributed(self, model: str | Path) -> bool:
        """Whether this router would shard the model, by its profile; contacts no node or worker."""
        return self._routes.would_shard(model)

    def profile(self, model: str | Path) -> ModelProfile:
        """What is known about a model, and from where; contacts no node or worker.

        Raises:
            ModelFileError, ConfigError: its file or its entry in `MODEL_PROFILES` cannot be used.
        """
        return self._routes.profile(model)

    @io_bound
    async def route(self, model: str | Path, *, backend: str | None = None) -> Route:
        """Where a request for this model would go now, and why.

        Args:
            backend: as for `route_request`.

        Raises:
            ModelError, ConfigError: no backend, or not this one, can answer; the message says why.
        """
        return await self._routes.find(model, checked_backend(backend))

    @io_bound
    async def plan(self, model: str | Path, *, backend: str | None = None) -> LayerPlan | None:
        """The layer plan of a sharded model: that of its coordinator, or the one that a start would make now over
        the workers as last seen. Contacts no worker and starts nothing.

        Args:
            backend: as for `route_request`.

        Returns:
            The plan with its `reasons`; None for a model that is not sharded.

        Raises:
            ModelError, ConfigError: as for `route`.
            WorkersUnavailableError, ModelDoesNotFitError: there is no plan, as far as workers are known.
        """
        route = await self.route(model, backend=backend)
        return await self._coordinators.plan(route) if route.backend == DISTRIBUTED else None

    @io_bound
    async def standby_of(self, model: str | Path, *, backend: str | None = None, even_if_off: bool = True) -> str:
        """One line about the standby of a model: what it takes, or would take over the workers as last seen, or
        why none is possible. Starts nothing.

        Args:
            backend: as for `route_request`.
            even_if_off: also where the setting `standby` is off; without it, the line is "" there.

        Raises:
            ModelError, ConfigError: as for `route`.
        """
        route = await self.route(model, backend=backend)
        return await self._coordinators.standbys.describe(route, even_if_off=even_if_off)

    @io_bound
    async def slots_for(self, model: str | Path, *, backend: str | None = None) -> ModelSlots:
        """How many requests for this model would run at the same time now, and which model that is.

        Args:
            backend: as for `route_request`.

        Raises:
            ModelError, ConfigError: as for `route`.
        """
        route = await self.route(model, backend=backend)
        if route.backend == OLLAMA:
            slots = self._routes.ollama_slots(route.model)
        else:
            slots = self._coordinators.gate(route).slots
        identity, saved = await self._routes.identity(route), config.saved_model(route.model)
        defaults = {**saved.options, **({"system": saved.system} if saved.system else {})}
        keeps = route.backend != OLLAMA and not self._options.get("deterministic")
        return ModelSlots(
            identity=identity | ({"defaults": defaults} if defaults else {}),
            slots=slots,
            keeps=keeps,
            saves=keeps and config.default("context_cache_gb") > 0,
        )

    @io_bound
    async def listed_models(self) -> list[ListedModel]:
        """The rows of `models`, without pandas."""
        return await self._routes.models([coordinator.settings for coordinator in self.coordinators])

    @io_bound
    async def preload(self, model: str | Path | Route, *, keep_alive: float | str | None = None) -> str:
        """Load a model where a request for it would go; returns the place, such as `in Ollama`.

        Args:
            model: its name, or a route that it is to take.
            keep_alive: how long it lives without a request from now on, as in `Router`; None changes nothing.

        Raises:
            SollolError: it cannot be loaded; of the kind that fits, as for `route_request`.
        """
        route = model if isinstance(model, Route) else await self.route(model)
        seconds = None if keep_alive is None else keep_alive_seconds(keep_alive)
        if route.backend == OLLAMA:
            sent = -1 if keep_alive is not None and seconds is None else seconds  # Ollama's "forever"
            await self._ollama.generate(route.model, "", max_tokens=1, keep_alive=sent)
            return "in Ollama"
        coordinator, _ = await self._coordinators.get(route)
        if keep_alive is not None:
            await coordinator.keep_alive(seconds)
        return f"at {coordinator.base_url}"

    @io_bound
    async def save_contexts(self) -> int:
        """Save now what the slots of the coordinators hold, where that is worth it: a request that begins alike
        finds it in any slot, and on the next coordinator of its model. Nothing is saved where a slot is busy.

        Returns:
            How many contexts were saved.
        """
        return await self._coordinators.save_contexts()

    @io_bound
    async def count_tokens(
        self,
        model: str | Path,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        think: bool | str | None = None,
        system: str | None = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
    ) -> int:
        """How many tokens the model reads for these messages, with its chat template; it is loaded if necessary.

        Ollama reports them only with an answer, so there one token is generated.

        Args:
            messages: as for `route_request`; llama.cpp counts no images.
            tools: what the model may call.
            think: whether it thinks first; some chat templates say so in the prompt.
            system: a system message, if the messages have none.
            backend, priority, timeout: as for `route_request`; loading does not count.

        Raises:
            SollolError: as for `route_request`.
        """
        return await count_tokens(
            self._services,
            model_text(model),
            messages,
            tools=tools,
            think=think,
            system=system,
            backend=backend,
            priority=priority,
            timeout_s=self._timeout_s if timeout is None else timeout,
        )

    @io_bound
    async def embed(
        self,
        model: str | Path,
        inputs: str | Sequence[str],
        *,
        dimensions: int | None = None,
        truncate: bool | None = None,
        keep_alive: float | str | None = None,
        options: Mapping[str, Any] | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """The embeddings of texts, from the Ollama node that has the model and is the least busy.

        Args:
            inputs: a text, or a list of texts.
            dimensions: of each vector, for models that can shorten them.
            truncate: whether texts that do not fit the model's context are cut, as Ollama does by default; False
                refuses them.
            keep_alive: how long the model stays loaded.
            options: Ollama's own dict of options.
            priority, timeout: as for `route_request`.

        Returns:
            Ollama's answer: `embeddings` (one vector for each text), `model`, `prompt_eval_count` (tokens),
            `total_duration` and `load_duration` (nanoseconds), and `_routing` (see `ollama/pool.py`).

        Raises:
            ConfigError: an argument is invalid, or the model is routed to llama.cpp, which has no embeddings here.
            SollolError: as for `route_request`.
        """
        return await embed(
            self._services,
            model_text(model),
            inputs,
            dimensions=dimensions,
            truncate=truncate,
            keep_alive=keep_alive,
            options=options,
            priority=priority,
            timeout_s=self._timeout_s if timeout is None else timeout,
        )

    @io_bound
    async def unload(self, model: str | Path) -> None:
        """Have a model unloaded where it is loaded: by the Ollama nodes, or by ending its coordinators, unless
        another process uses them. Nothing happens if it is not loaded.

        Raises:
            ModelError, ConfigError: as for `route`.
        """
        route = await self.route(model)
        if route.backend == OLLAMA:
            await self._ollama.unload(route.model)
        else:
            await self.end_coordinators(route.model)

    # --- engines of this user on this machine -----------------------------------------------------

    @io_bound
    async def end_engines(self, names: Sequence[str] = (), *, force: bool = False) -> list[Ended]:
        """Stop the engines of this user on this machine, of all kernels, that have these names, or all.

        Args:
            names: models, and workers as `host:port`.
            force: also those that another process uses.

        Raises:
            ConfigError: no engine has one of the names.
        """
        return await end_engines(names, force=force)

    @io_bound
    async def engine_log(self, name: str | None = None, *, last: int = 20, grep: str | None = None) -> str:
        """The last lines of the log of an engine.

        Args:
            name: a model, or a worker as `host:port`; None is the coordinator used last.
            last: number of lines.
            grep: only lines that contain this text, ignoring case.

        Raises:
            ConfigError: no engine has this name, or none runs.
        """
        if name is None:
            if not self.coordinators:
                raise ConfigError("no coordinator of this router is running; name a model or a worker")
            name = self.coordinators[-1].model
        return await asyncio.to_thread(engine_log, name, last=last, grep=grep)

    # --- what is known now ------------------------------------------------------------------------

    @property
    def coordinators(self) -> list[Coordinator]:
        """All running coordinators, local ones too, the most recently used last."""
        return self._coordinators.coordinators

    @property
    def worker_endpoints(self) -> list[str]:
        """All known workers as `host:port`, in the order in which they became known."""
        return self._workers.endpoints

    @property
    def worker_targets(self) -> list[str]:
        """What gives another router the same workers: `ssh://host` and the like for those that are reached through
        links, `host:port` for all others."""
        return self._workers.given

    @property
    def settings(self) -> PoolSettings:
        """How coordinators are started."""
        return self._coordinators.settings

    @settings.setter
    def settings(self, settings: PoolSettings) -> None:
        self._coordinators.settings = settings

    @property
    def layer_strategy(self) -> str:
        """How the layers of the next models are spread."""
        return self.settings.layer_strategy

    def route_of(self, coordinator: Coordinator) -> Route:
        """The route that one of the coordinators was started for."""
        return self._coordinators.route_of(coordinator)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Router` that give other engines like these, over the same workers and Ollama nodes."""
        return {
            "ollama_pool": OllamaPool([node.url for node in self._ollama.nodes]),
            "rpc_backends": self._workers.given,
            **self._options,
            "latency": self.latency,
            "enable_distributed": self._routes.enable_distributed,
            "distributed_threshold_params": self._routes.threshold_params,
            "model_filter": self._routes.model_filter,
            "gguf_path": self._routes.gguf_path,
            **pool_arguments(self.settings),
        }
