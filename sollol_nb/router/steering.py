"""The cluster side of a router: its workers and coordinators, seen and steered; and its end."""

from __future__ import annotations

import html
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from sollol_nb.cluster.state import ClusterState
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.layers.plan import check_strategy
from sollol_nb.layers.what_if import Forecast
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import DISTRIBUTED, LOCAL, OLLAMA
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.io_loop import done_with_io_loop, io_bound, on_io_loop, run_blocking, submit, uses_io_loop
from sollol_nb.settings.endpoints import format_endpoint, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds


class RouterCluster:
    """What `HybridRouter` is, apart from asking.

    Attributes:
        events: the event bus of this router's workers, coordinators and requests.
        state: its cluster, live, for whoever watches.
    """

    def __init__(
        self, coordinators: CoordinatorPool, workers: Workers, ollama: OllamaPool, events: EventBus
    ) -> None:
        self.events = events
        self._coordinators = coordinators
        self._workers = workers
        self._ollama = ollama
        self.state = ClusterState(coordinators, workers, ollama, events)
        self._counts = {OLLAMA: 0, DISTRIBUTED: 0, LOCAL: 0, "": 0}
        uses_io_loop(self)
        # A router that nobody holds any more must not hold workers. Its engines live on for their keep_alive, so
        # that the next router, or this kernel after a restart, finds the model loaded.
        weakref.finalize(self, _let_go_later, self.state, coordinators, workers, ollama).atexit = False

    @property
    def coordinator(self) -> Coordinator | None:
        """The running coordinator that shards over workers, the last used if several; None if there is none."""
        sharded = [one for one in self._coordinators.coordinators if one.plan is not None]
        return sharded[-1] if sharded else None

    @property
    def coordinator_model(self) -> str | None:
        """The model of `coordinator`."""
        return self.coordinator.model if self.coordinator else None

    @property
    def coordinators(self) -> list[Coordinator]:
        """All running coordinators, local ones too, the most recently used last."""
        return self._coordinators.coordinators

    @property
    def worker_endpoints(self) -> list[str]:
        """All known workers as `host:port`, in the order in which they became known."""
        return self._workers.endpoints

    @io_bound
    async def cluster(self) -> ClusterStatus:
        """Look at all workers and Ollama nodes, and tell their state and the layers of each coordinator, other
        kernels' too."""
        return await self.state.refresh()

    @io_bound
    async def start_workers(self, count: int) -> list[str]:
        """Start workers on this machine, on loopback from `rpc_port` upward; returns their endpoints."""
        engine = await self._coordinators.engine()
        settings = self._coordinators.settings
        return await self._workers.start_local(
            engine, count, first_port=settings.rpc_port, keep_alive_s=settings.keep_alive_s
        )

    @io_bound
    async def discover_workers(self) -> list[str]:
        """Look for workers on this machine's usual ports; returns the endpoints that are new."""
        return await self._workers.discover()

    @io_bound
    async def add_worker(self, endpoint: str) -> WorkerStatus:
        """Make a worker (`host:port`) known, and look at it."""
        endpoint = self._workers.add(endpoint)
        return next(one for one in await self._workers.refresh() if one.endpoint == endpoint)

    @io_bound
    async def take_workers(self, endpoints: Sequence[str]) -> None:
        """Make workers known that another router of this process knows; local ones are held as its own."""
        for endpoint in endpoints:
            self._workers.add(endpoint)
        await self._workers.adopt_local(endpoints)

    @io_bound
    async def remove_worker(self, endpoint: str) -> None:
        """Forget a worker; one that was started here is stopped.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        endpoint = format_endpoint(*parse_endpoint(endpoint))
        self._workers.remove(endpoint)
        await self._workers.stop_local([endpoint])

    @io_bound
    async def stop_coordinator(self, model: str | None = None) -> list[str]:
        """Stop the coordinators of a model, or all; returns the models stopped."""
        return await self._coordinators.stop(model)

    @io_bound
    async def apply_plan(self, model: str, counts: Mapping[str, int]) -> None:
        """Lay a running model out anew; its answers go on over the new layout.

        Args:
            model: one that this router runs sharded.
            counts: units (blocks, then the output layer) of each worker, in the order of their layers; they sum
                to the model's blocks plus one, and 0 leaves a worker out: `{"10.0.0.1:50052": 20, ...}`.

        Raises:
            ConfigError: no coordinator of this router shards the model, or this is no layout of it.
            ModelDoesNotFitError: a worker's memory does not hold what it would get; the running one goes on.
            WorkersUnavailableError: a worker is not free; the running one goes on. Or it was taken or lost while
                the new one started.
            CoordinatorError: the new one could not be started; the old one has ended.
        """
        await self._coordinators.lay_out(model, counts)

    @io_bound
    async def what_if(self, model: str, counts: Mapping[str, int]) -> Forecast:
        """What another layout of a running model would need and bring; nothing is changed.

        Args:
            model, counts: as in `apply_plan`; a layout that does not fit is told in the forecast.

        Raises:
            ConfigError: no coordinator of this router shards the model, or this is no layout of it.
        """
        return self._coordinators.what_if(model, counts)

    @property
    def layer_strategy(self) -> str:
        """How the layers of the next models are spread."""
        return self._coordinators.settings.layer_strategy

    @io_bound
    async def configure(self, *, layer_strategy: str | None = None, keep_alive: float | str | None = None) -> None:
        """Change how coordinators are started from now on.

        Args:
            layer_strategy: how layers are spread, a name in `plan.STRATEGIES`.
            keep_alive: how long they live without a request, as in `HybridRouter`; also of those that run.

        Raises:
            ConfigError: one of them cannot be used.
        """
        settings = self._coordinators.settings
        if layer_strategy is not None:
            check_strategy(layer_strategy)
            settings = replace(settings, layer_strategy=layer_strategy)
        if keep_alive is not None:
            settings = replace(settings, keep_alive_s=keep_alive_seconds(keep_alive), keep_alive_of={})
        self._coordinators.settings = settings
        if layer_strategy is not None:
            words = f"models that are started from now on are spread by strategy {layer_strategy!r}"
            self.events.publish(EventKind.ROUTER_CHANGED, "layer_strategy", words)
        if keep_alive is not None:
            for coordinator in self.coordinators:
                await coordinator.keep_alive(settings.keep_alive_s)
            words = f"coordinators live for {keep_alive} without a request"
            self.events.publish(EventKind.ROUTER_CHANGED, "keep_alive", words)

    @io_bound
    async def status(self) -> ClusterStatus:
        """The same as `cluster`, as known now; asks no worker and no node."""
        await self._workers.refresh_holders()
        return self.state.status()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        status = self.state.status() if on_io_loop() else run_blocking(self.status())
        shown = status._repr_mimebundle_()
        title = html.escape(repr(self))
        return {
            "text/plain": f"{self!r}\n{shown['text/plain']}",
            "text/html": f"<p><code>{title}</code></p>{shown['text/html']}",
        }

    def get_stats(self) -> dict[str, Any]:
        """Counts and states of this router.

        Keys: `distributed_requests`, `ollama_requests`, `local_requests`, `failed_requests` (found no place),
        `coordinator_uptime_seconds` (of `coordinator`; 0 without), `active_rpc_backends` (workers held),
        `known_rpc_backends`, `coordinators` (model to URL).
        """
        running = self.coordinators
        return {
            "distributed_requests": self._counts[DISTRIBUTED],
            "ollama_requests": self._counts[OLLAMA],
            "local_requests": self._counts[LOCAL],
            "failed_requests": self._counts[""],
            "coordinator_uptime_seconds": round(self.coordinator.uptime_s, 3) if self.coordinator else 0,
            "active_rpc_backends": sum(len(one.rpc_backends) for one in running),
            "known_rpc_backends": len(self._workers.endpoints),
            "coordinators": {one.model: one.base_url for one in running},
        }

    @io_bound
    async def close(self, *, keep: bool = False) -> None:
        """End the coordinators and workers that no other process uses, and close connections. Twice is fine.

        Args:
            keep: leave the engines running for their keep_alive, for whoever comes next.
        """
        done_with_io_loop(self)
        if keep:
            await _let_go(self.state, self._coordinators, self._workers, self._ollama)
            return
        await self.state.close()
        await self._coordinators.close()
        await self._workers.close()
        await self._ollama.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _let_go(
    state: ClusterState, coordinators: CoordinatorPool, workers: Workers, ollama: OllamaPool
) -> None:
    await state.close()
    await coordinators.detach()
    workers.detach()
    await ollama.close()


def _let_go_later(
    state: ClusterState, coordinators: CoordinatorPool, workers: Workers, ollama: OllamaPool
) -> None:
    submit(_let_go(state, coordinators, workers, ollama))
