"""The router: small models go to Ollama, large ones to a llama-server over RPC workers.

`Router` can be awaited from any event loop, since its work runs on the process's I/O loop (`runtime/io_loop.py`).
Making a router does no I/O: Ollama nodes are asked, workers probed and engines started when a request needs them.
It works with its own engines (`own_engines.py`), or with those of a gateway (`remote/engines.py`). In its own,
`RouteFinder` decides where a request goes, `ActiveRequest` is the life of one request, and `ClusterControl` shows
and changes workers and coordinators. The methods that ask a model are in `requests.py`.
"""

from __future__ import annotations

import asyncio
import functools
import html
import os
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from sollol_nb.cluster.state import LiveState
from sollol_nb.errors import ConfigError
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.llama_cpp.workers.calibrations import calibrations_frame
from sollol_nb.models.listing import models_frame
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import DISTRIBUTED, LOCAL, OLLAMA, Route
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.router.own_engines import OwnEngines
from sollol_nb.router.remote.calls import GatewayCoordinator, GatewayInfo
from sollol_nb.router.remote.engines import GatewayEngines
from sollol_nb.router.requests import RouterRequests
from sollol_nb.router.settings import check_amounts, check_gateway_arguments, latency_log, request_options
from sollol_nb.runtime.io_loop import (
    hold_io_loop,
    io_bound,
    is_of_parent,
    on_io_loop,
    release_io_loop,
    run_blocking,
    submit,
)
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_COORDINATOR_PORT, DEFAULT_RPC_PORT
from sollol_nb.settings.kinds import SECRET, checked_gateway
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_COORDINATOR_TIMEOUT_S = 1200.0

P = ParamSpec("P")
R = TypeVar("R")


def _of_engines(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """A method of the router's engines, as a method of the router, which lives at least until it has ended."""

    async def delegate(self: Router, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await getattr(self._engines, method.__name__)(*args, **kwargs)
        return result

    functools.update_wrapper(delegate, method)
    return delegate


class Router(RouterRequests):
    """Routes chat requests by the model's profile, and keeps the engines that it started warm.

    Attributes:
        events: the event bus of this router's workers, coordinators and requests.
        latency: the latency log.
        state: its cluster, live, for watchers such as the widget.
    """

    def __init__(
        self,
        ollama_pool: OllamaPool | None = None,
        *,
        enable_distributed: bool = True,
        rpc_backends: Iterable[str | Mapping[str, Any]] | None = None,
        num_rpc_backends: int | None = None,
        auto_discover_rpc: bool | None = None,
        auto_setup_rpc: bool | None = None,
        coordinator_timeout: float = DEFAULT_COORDINATOR_TIMEOUT_S,
        coordinator_port: int = DEFAULT_COORDINATOR_PORT,
        rpc_port: int = DEFAULT_RPC_PORT,
        distributed_threshold_params: float | None = None,
        model_filter: Collection[str] | None = None,
        gguf_path: str | Path | None = None,
        layer_strategy: str | None = None,
        context_tokens: int | None = None,
        slots: int | None = None,
        timeout: float | None = None,
        recovery: str | None = None,
        deterministic: bool | None = None,
        speculation: str | None = None,
        replan: str | None = None,
        standby: bool | None = None,
        draft: str | Path | None = None,
        llama_cpp: str | Path | None = None,
        keep_alive: float | str | Mapping[str, float | str] | None = None,
        adopt_only: bool = False,
        latency: LatencyLog | None = None,
        gateway: str | None = None,
        gateway_key: str | None = None,
    ) -> None:
        """What is not given here is taken from the settings (`settings/table.py`): an environment variable, then
        `sollol_nb.toml`, then the default named below.

        Args:
            ollama_pool: the Ollama nodes; by default those of `OLLAMA_HOST`, or this machine's.
            enable_distributed: whether large models are sharded.
            rpc_backends: workers as `"host:port"` or `{"host": ..., "port": ...}`; by default those of the
                setting `workers`.
            num_rpc_backends: how many workers a model is spread over; by default as the strategy chooses: by
                memory or count 3, or as many as its size takes.
            auto_discover_rpc: what to do where no worker is named and more are needed. By default, workers on this
                machine are used that this user's notebooks and scripts started; True: also others, whoever started
                them, that listen on its ports 50052 to 50067 (except those of other users); False: none.
            auto_setup_rpc: start workers on this machine where more are needed.
            coordinator_timeout: seconds that a coordinator may take to load its model.
            coordinator_port: the first port to try for a coordinator.
            rpc_port: the first port to try for workers started here.
            distributed_threshold_params: models with more parameters than this, in billions, are sharded too.
            model_filter: only these models are sharded by this router.
            gguf_path: the GGUF file for models on llama.cpp; by default the one in Ollama's storage.
            layer_strategy: how layers are spread, by default `auto`: for the shortest predicted time per token
                where the workers are calibrated, else by free memory.
            context_tokens: context of a coordinator, shared by its slots; by default the model's own, at most
                8192.
            slots: requests that a coordinator serves at the same time, by default 4.
            timeout: limit of a request in seconds, from when its coordinator is ready; at Ollama, loading counts.
                By default 600.
            recovery: how answers of llama.cpp continue when their coordinator is lost, by default `fast`: at once,
                after which the text may differ from an undisturbed answer; `exact` generates the known tokens
                again first.
            deterministic: whether llama.cpp gives the same answer each time, at temperature 0 or with a seed: each
                request runs alone, with all slots empty, and with exact recovery.
            replan: what happens when another layout of a running model has become faster: by default `"say"`
                (it is shown); `"auto"` moves there between two requests, `"off"` does nothing.
            standby: whether a second coordinator of each model over workers is kept ready, on workers that are
                free or on this machine: where the first is lost, the second takes over at once. It takes as much
                memory once more, and ends where another model needs its workers. Off by default.
            speculation: whether llama.cpp drafts several tokens, which the model verifies at once: `"auto"` (the
                default) chooses at the start of a coordinator, from round trips and from what drafts brought
                before; `"ngram"` drafts from the text so far, `"draft"` with a small model, `"off"` never. With
                exact recovery or `deterministic` it is off, since verified tokens may round differently.
            draft: the draft model, by name or path, with the vocabulary of the model; by default one found among
                the models on this machine.
            llama_cpp: folder with the llama.cpp binaries.
            keep_alive: how long a coordinator (and a worker started here) lives without a request: seconds,
                `"10m"`, 0 (ends with its request) or `"forever"`; or a dict of these by model, with `"*"` for all
                others. By default 10 minutes. It lives on when the kernel ends.
            adopt_only: start no coordinator: requests use those that other processes have started, also with other
                settings, and fail where none runs. Ollama loads models all the same.
            latency: the latency log; by default the one in the state folder.
            gateway: use the engines of the gateway at this address, such as `http://head:11440`, instead of own
                ones; `local` uses own ones, whatever the setting `gateway` says. Of the other arguments, only
                `timeout`, `recovery`, `deterministic` and `latency` go together with a gateway.
            gateway_key: the gateway's key, where it needs one.

        Raises:
            ConfigError: an argument cannot be used.
        """
        self._timeout_s = config.or_default(timeout, "timeout")
        check_amounts(timeout=self._timeout_s)
        latency = latency if latency is not None else latency_log()
        where = checked_gateway(config.or_default(gateway, "gateway"))
        if where is None:
            self._engines = OwnEngines.of(
                ollama_pool,
                enable_distributed=enable_distributed,
                rpc_backends=rpc_backends,
                num_rpc_backends=num_rpc_backends,
                auto_discover_rpc=auto_discover_rpc,
                auto_setup_rpc=auto_setup_rpc,
                coordinator_timeout=coordinator_timeout,
                coordinator_port=coordinator_port,
                rpc_port=rpc_port,
                distributed_threshold_params=distributed_threshold_params,
                model_filter=model_filter,
                gguf_path=gguf_path,
                layer_strategy=layer_strategy,
                context_tokens=context_tokens,
                slots=slots,
                recovery=recovery,
                deterministic=deterministic,
                speculation=speculation,
                replan=replan,
                standby=standby,
                draft=draft,
                llama_cpp=llama_cpp,
                keep_alive=keep_alive,
                adopt_only=adopt_only,
                latency=latency,
                timeout_s=self._timeout_s,
            )
        else:
            check_gateway_arguments(
                where,
                ollama_pool=ollama_pool,
                enable_distributed=None if enable_distributed else False,
                rpc_backends=rpc_backends,
                num_rpc_backends=num_rpc_backends,
                auto_discover_rpc=auto_discover_rpc,
                auto_setup_rpc=auto_setup_rpc,
                distributed_threshold_params=distributed_threshold_params,
                model_filter=model_filter,
                gguf_path=gguf_path,
                layer_strategy=layer_strategy,
                context_tokens=context_tokens,
                slots=slots,
                speculation=speculation,
                replan=replan,
                standby=standby,
                draft=draft,
                llama_cpp=llama_cpp,
                keep_alive=keep_alive,
                adopt_only=adopt_only or None,
            )
            key = config.or_default(gateway_key, "gateway_key")
            key = None if key is None else SECRET.checked(key, "gateway_key")
            options = request_options(recovery=recovery, deterministic=deterministic, only_given=True)
            self._engines = GatewayEngines(where, key, latency=latency, options=options)
        self.events = self._engines.events
        self.latency = self._engines.latency
        self.state: LiveState = self._engines.state
        hold_io_loop(self)
        # A router that is garbage must not hold workers. Its engines live on for their keep_alive, so that the
        # next router, or this kernel after a restart, finds the model loaded.
        weakref.finalize(self, _release, self._engines, os.getpid()).atexit = False

    def __repr__(self) -> str:
        models = ", ".join(coordinator.model for coordinator in self.coordinators) or "none"
        workers = counted(len(self.worker_endpoints), "worker")
        workers = f"over {self.gateway}, {workers}" if self.gateway else workers
        return f"<{type(self).__name__}: {workers}, coordinators: {models}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        status = self.state.status() if on_io_loop() else run_blocking(self.status())
        shown = status._repr_mimebundle_()
        title = html.escape(repr(self))
        return {
            "text/plain": f"{self!r}\n{shown['text/plain']}",
            "text/html": f"<p><code>{title}</code></p>{shown['text/html']}",
        }

    # --- deciding -------------------------------------------------------------------------------

    def should_use_distributed(self, model: str | Path) -> bool:
        """Whether this router would shard the model, by its profile; contacts no node or worker (a gateway is
        asked)."""
        return self._engines.should_use_distributed(model)

    def profile(self, model: str | Path) -> ModelProfile:
        """What is known about a model, and from where; contacts no node or worker (a gateway is asked).

        Raises:
            ModelFileError, ConfigError: its file or its entry in `MODEL_PROFILES` cannot be used.
        """
        return self._engines.profile(model)

    route = _of_engines(OwnEngines.route)
    plan = _of_engines(OwnEngines.plan)
    standby_of = _of_engines(OwnEngines.standby_of)
    slots_for = _of_engines(OwnEngines.slots_for)
    preload = _of_engines(OwnEngines.preload)
    unload = _of_engines(OwnEngines.unload)
    save_contexts = _of_engines(OwnEngines.save_contexts)
    count_tokens = _of_engines(OwnEngines.count_tokens)
    embed = _of_engines(OwnEngines.embed)
    listed_models = _of_engines(OwnEngines.listed_models)

    @io_bound
    async def models(self) -> pd.DataFrame:
        """The available models, one row each (see `models/listing.py`), without those of Ollama nodes that do not
        answer."""
        return await asyncio.to_thread(models_frame, await self.listed_models())

    # --- workers and coordinators ---------------------------------------------------------------

    cluster = _of_engines(OwnEngines.cluster)
    status = _of_engines(OwnEngines.status)
    check_workers = _of_engines(OwnEngines.check_workers)
    start_workers = _of_engines(OwnEngines.start_workers)
    ensure_workers = _of_engines(OwnEngines.ensure_workers)
    stop_workers = _of_engines(OwnEngines.stop_workers)
    share_workers = _of_engines(OwnEngines.share_workers)
    wait_started = _of_engines(OwnEngines.wait_started)
    end_coordinators = _of_engines(OwnEngines.end_coordinators)
    discover_workers = _of_engines(OwnEngines.discover_workers)
    find_workers = _of_engines(OwnEngines.find_workers)
    calibrate = _of_engines(OwnEngines.calibrate)
    kept_calibrations = _of_engines(OwnEngines.kept_calibrations)

    @io_bound
    async def calibrations(self) -> pd.DataFrame:
        """How fast each worker was when it was measured, a row each (see `workers/calibrations.py`)."""
        return await asyncio.to_thread(calibrations_frame, await self.kept_calibrations())

    add_worker = _of_engines(OwnEngines.add_worker)
    add_workers = _of_engines(OwnEngines.add_workers)
    take_workers = _of_engines(OwnEngines.take_workers)
    remove_worker = _of_engines(OwnEngines.remove_worker)
    invite = _of_engines(OwnEngines.invite)
    revoke = _of_engines(OwnEngines.revoke)
    invitations = _of_engines(OwnEngines.invitations)
    stop_coordinator = _of_engines(OwnEngines.stop_coordinator)
    apply_plan = _of_engines(OwnEngines.apply_plan)
    replan = _of_engines(OwnEngines.replan)
    what_if = _of_engines(OwnEngines.what_if)
    configure = _of_engines(OwnEngines.configure)
    use_standbys = _of_engines(OwnEngines.use_standbys)
    forget_contexts = _of_engines(OwnEngines.forget_contexts)
    end_engines = _of_engines(OwnEngines.end_engines)
    engine_log = _of_engines(OwnEngines.engine_log)

    def route_of(self, coordinator: Coordinator) -> Route:
        """The route that one of this router's coordinators was started for."""
        return self._own("a coordinator has no route").route_of(coordinator)

    @property
    def worker_endpoints(self) -> list[str]:
        """All known workers as `host:port`, in the order in which they became known."""
        return self._engines.worker_endpoints

    @property
    def worker_targets(self) -> list[str]:
        """What gives another router the same workers: `ssh://host` and the like for those that are reached through
        links, `host:port` for all others."""
        return self._engines.worker_targets

    @property
    def coordinator(self) -> Coordinator | GatewayCoordinator | None:
        """The running coordinator with a layer plan, the last used if several; None if there is none. Its plan may
        have all layers on this machine."""
        sharded = [coordinator for coordinator in self.coordinators if coordinator.plan is not None]
        return sharded[-1] if sharded else None

    @property
    def coordinator_model(self) -> str | None:
        """The model of `coordinator`."""
        return self.coordinator.model if self.coordinator else None

    @property
    def coordinators(self) -> Sequence[Coordinator | GatewayCoordinator]:
        """All running coordinators, local ones too, the most recently used last."""
        return self._engines.coordinators

    @property
    def own_coordinators(self) -> list[Coordinator]:
        """`coordinators`, where they belong to this router; over a gateway none does."""
        return self._engines.coordinators if isinstance(self._engines, OwnEngines) else []

    @property
    def layer_strategy(self) -> str:
        """How the layers of the next models are spread."""
        return self._engines.layer_strategy

    def get_stats(self) -> dict[str, Any]:
        """Counts and states of this router.

        Keys: `distributed_requests`, `ollama_requests`, `local_requests`, `failed_requests` (no backend was
        found), `coordinator_uptime_seconds` (of `coordinator`; 0 without), `active_rpc_backends` (workers held),
        `known_rpc_backends`, `coordinators` (model to URL).
        """
        running, counts = self.coordinators, self._engines.counts
        return {
            "distributed_requests": counts[DISTRIBUTED],
            "ollama_requests": counts[OLLAMA],
            "local_requests": counts[LOCAL],
            "failed_requests": counts[""],
            "coordinator_uptime_seconds": round(self.coordinator.uptime_s, 3) if self.coordinator else 0,
            "active_rpc_backends": sum(len(coordinator.rpc_backends) for coordinator in running),
            "known_rpc_backends": len(self.worker_endpoints),
            "coordinators": {coordinator.model: coordinator.base_url for coordinator in running},
        }

    # --- the gateway ------------------------------------------------------------------------------

    @property
    def gateway(self) -> str | None:
        """The URL of the gateway whose engines it uses; None where it has its own."""
        return self._engines.url if isinstance(self._engines, GatewayEngines) else None

    async def connect(self) -> GatewayInfo:
        """Connect to the gateway now, instead of with the first request; returns what it says of itself.

        Raises:
            ConfigError: this router has its own engines.
            GatewayError: no gateway answers there, or it refuses the key.
        """
        if not isinstance(self._engines, GatewayEngines):
            raise ConfigError("this router has its own engines; give gateway= the address of a gateway")
        return await self._engines.connect()

    # --- settings, siblings, the end ------------------------------------------------------------

    @property
    def settings(self) -> PoolSettings:
        """How coordinators are started; `configure` changes it."""
        return self._own("the settings of coordinators are those of the gateway; they cannot be read").settings

    @property
    def timeout_s(self) -> float:
        """Limit of a request in seconds, from when its backend is ready."""
        return self._timeout_s

    def sibling(self, *, exact: bool = False, **changes: Any) -> Self:
        """Another router over the same workers and Ollama nodes, with the same latency log.

        Args:
            exact: it uses no running coordinator that was started with other settings than its own.
            **changes: arguments of the class; all others are as they are here now.
        """
        arguments = {**self._engines.arguments(), "timeout": self.timeout_s}
        sibling = type(self)(**{**arguments, **changes})
        if exact:
            own = sibling._own("all routers use the same coordinators")
            own.settings = replace(own.settings, exact=True)
        return sibling

    def _own(self, otherwise: str) -> OwnEngines:
        """The engines of this process. Raises ConfigError with this reason where they are a gateway's."""
        if isinstance(self._engines, GatewayEngines):
            self._engines.refuse(otherwise)
        return self._engines

    async def close(self, *, keep: bool = False) -> None:
        """End the coordinators and workers that no other process uses, and close connections. Twice is fine; in a
        forked child, whose parent owns them, it does nothing.

        Args:
            keep: leave the engines running for their keep_alive, so that the next router finds them.
        """
        if not is_of_parent(self):
            await self._close(keep)

    @io_bound
    async def _close(self, keep: bool) -> None:
        release_io_loop(self)
        await self._engines.close(keep=keep)
        await asyncio.to_thread(self.latency.flush)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _release(engines: OwnEngines | GatewayEngines, process_id: int) -> None:
    if process_id == os.getpid():  # else it is the copy in a forked child, and the connections are not the child's
        submit(engines.close(keep=True))
