"""The blocking twins: the same names and methods as the async API, for scripts, threads and notebook cells.

They are generated from the async classes (`io_loop.blocking`), work inside a running event loop too (their work
runs on the I/O thread), may be called from several threads at the same time, and cancel on KeyboardInterrupt.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from sollol_nb import hybrid_router
from sollol_nb.batch.batch import Batch
from sollol_nb.batch.store import BatchStore
from sollol_nb.bench.bench import bench_blocking
from sollol_nb.chat.chunk import Chunk
from sollol_nb.cluster.state import LiveState
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.ollama import pool as ollama_pool
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.router.remote.calls import GatewayCoordinator
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import blocking, blocking_stream, delegate

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.widget.cluster_widget import ClusterWidget

__all__ = ["HybridRouter", "OllamaPool"]


P = ParamSpec("P")
R = TypeVar("R")


def _from_this_thread(
    function: Callable[..., R], method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
) -> Callable[Concatenate[Any, P], R]:
    """The blocking twin of a method that shows a progress bar: the calling thread draws it.

    Args:
        function: the blocking form of the method; it takes the async router.
    """

    def twin(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self._async, *args, **kwargs)

    functools.update_wrapper(twin, method)
    return twin


def _map_blocking(router: hybrid_router.HybridRouter, *args: Any, **kwargs: Any) -> pd.DataFrame:
    return Batch(router, router.batch_store, *args, **kwargs).run_blocking()


class HybridRouter:
    """The blocking `HybridRouter`; arguments are those of `hybrid_router.HybridRouter`."""

    def __init__(self, ollama_pool: OllamaPool | ollama_pool.OllamaPool | None = None, **settings: Any) -> None:
        pool = ollama_pool._async if isinstance(ollama_pool, OllamaPool) else ollama_pool
        self._async = hybrid_router.HybridRouter(pool, **settings)

    def __repr__(self) -> str:
        return repr(self._async)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self._async._repr_mimebundle_(include, exclude)

    def widget(self) -> ClusterWidget:
        """The live cluster with its controls, for a notebook; the same one each time. Needs ipywidgets."""
        return self._async.widget()

    route_request = blocking(hybrid_router.HybridRouter.route_request)
    resume = blocking(hybrid_router.HybridRouter.resume)
    resumed = blocking_stream(hybrid_router.HybridRouter.resumed)
    stream = blocking_stream(hybrid_router.HybridRouter.stream)
    generate = blocking(hybrid_router.HybridRouter.generate)
    count_tokens = blocking(hybrid_router.HybridRouter.count_tokens)
    embed = blocking(hybrid_router.HybridRouter.embed)
    stream_generate = blocking_stream(hybrid_router.HybridRouter.stream_generate)
    route = blocking(hybrid_router.HybridRouter.route)
    cluster = blocking(hybrid_router.HybridRouter.cluster)
    status = blocking(hybrid_router.HybridRouter.status)
    check_workers = blocking(hybrid_router.HybridRouter.check_workers)
    start_workers = blocking(hybrid_router.HybridRouter.start_workers)
    ensure_workers = blocking(hybrid_router.HybridRouter.ensure_workers)
    stop_workers = blocking(hybrid_router.HybridRouter.stop_workers)
    share_workers = blocking(hybrid_router.HybridRouter.share_workers)
    wait_started = blocking(hybrid_router.HybridRouter.wait_started)
    end_coordinators = blocking(hybrid_router.HybridRouter.end_coordinators)
    discover_workers = blocking(hybrid_router.HybridRouter.discover_workers)
    find_workers = blocking(hybrid_router.HybridRouter.find_workers)
    calibrate = blocking(hybrid_router.HybridRouter.calibrate)
    calibrations = blocking(hybrid_router.HybridRouter.calibrations)
    kept_calibrations = blocking(hybrid_router.HybridRouter.kept_calibrations)
    add_worker = blocking(hybrid_router.HybridRouter.add_worker)
    add_workers = blocking(hybrid_router.HybridRouter.add_workers)
    remove_worker = blocking(hybrid_router.HybridRouter.remove_worker)
    invite = blocking(hybrid_router.HybridRouter.invite)
    revoke = blocking(hybrid_router.HybridRouter.revoke)
    invitations = blocking(hybrid_router.HybridRouter.invitations)
    models = blocking(hybrid_router.HybridRouter.models)
    listed_models = blocking(hybrid_router.HybridRouter.listed_models)
    take_workers = blocking(hybrid_router.HybridRouter.take_workers)
    stop_coordinator = blocking(hybrid_router.HybridRouter.stop_coordinator)
    preload = blocking(hybrid_router.HybridRouter.preload)
    unload = blocking(hybrid_router.HybridRouter.unload)
    save_contexts = blocking(hybrid_router.HybridRouter.save_contexts)
    apply_plan = blocking(hybrid_router.HybridRouter.apply_plan)
    replan = blocking(hybrid_router.HybridRouter.replan)
    what_if = blocking(hybrid_router.HybridRouter.what_if)
    configure = blocking(hybrid_router.HybridRouter.configure)
    forget_contexts = blocking(hybrid_router.HybridRouter.forget_contexts)
    use_standbys = blocking(hybrid_router.HybridRouter.use_standbys)
    end_engines = blocking(hybrid_router.HybridRouter.end_engines)
    engine_log = blocking(hybrid_router.HybridRouter.engine_log)
    connect = blocking(hybrid_router.HybridRouter.connect)
    close = blocking(hybrid_router.HybridRouter.close)
    plan = blocking(hybrid_router.HybridRouter.plan)
    standby_of = blocking(hybrid_router.HybridRouter.standby_of)
    slots_for = blocking(hybrid_router.HybridRouter.slots_for)
    map = _from_this_thread(_map_blocking, hybrid_router.HybridRouter.map)
    bench = _from_this_thread(bench_blocking, hybrid_router.HybridRouter.bench)

    should_use_distributed = delegate(hybrid_router.HybridRouter.should_use_distributed)
    profile = delegate(hybrid_router.HybridRouter.profile)
    get_stats = delegate(hybrid_router.HybridRouter.get_stats)
    route_of = delegate(hybrid_router.HybridRouter.route_of)

    @property
    def stream_async(self) -> Callable[..., AsyncGenerator[Chunk, None]]:
        """The async `stream`, for a caller that waits in its own way."""
        return self._async.stream

    @property
    def preload_async(self) -> Callable[..., Coroutine[Any, Any, str]]:
        """The async `preload`, for a caller that waits in its own way."""
        return self._async.preload

    @property
    def resumed_async(self) -> Callable[..., AsyncGenerator[Chunk, None]]:
        """The async `resumed`, for a caller that waits in its own way."""
        return self._async.resumed

    @property
    def gateway(self) -> str | None:
        """The URL of the gateway whose engines it uses; None where it has its own."""
        return self._async.gateway

    @property
    def layer_strategy(self) -> str:
        """How the layers of the next models are spread."""
        return self._async.layer_strategy

    @property
    def worker_endpoints(self) -> list[str]:
        """All known workers as `host:port`, in the order in which they became known."""
        return self._async.worker_endpoints

    @property
    def worker_targets(self) -> list[str]:
        """What gives another router the same workers: `ssh://host` and the like for those that are reached through
        links, `host:port` for all others."""
        return self._async.worker_targets

    @property
    def coordinator(self) -> Coordinator | GatewayCoordinator | None:
        """The running coordinator with a layer plan, the last used if several; None if there is none. Its plan may
        have all layers on this machine."""
        return self._async.coordinator

    @property
    def coordinator_model(self) -> str | None:
        """The model of `coordinator`."""
        return self._async.coordinator_model

    @property
    def coordinators(self) -> Sequence[Coordinator | GatewayCoordinator]:
        """All running coordinators, local ones too, the most recently used last."""
        return self._async.coordinators

    @property
    def own_coordinators(self) -> list[Coordinator]:
        """`coordinators`, where they belong to this router; over a gateway none does."""
        return self._async.own_coordinators

    @property
    def settings(self) -> PoolSettings:
        """How coordinators are started; `configure` changes it."""
        return self._async.settings

    @property
    def timeout_s(self) -> float:
        """Limit of a request in seconds, from when its backend is ready."""
        return self._async.timeout_s

    def sibling(self, *, exact: bool = False, **changes: Any) -> Self:
        router = type(self).__new__(type(self))
        router._async = self._async.sibling(exact=exact, **changes)
        return router

    sibling.__doc__ = hybrid_router.HybridRouter.sibling.__doc__

    @property
    def latency(self) -> LatencyLog:
        """The latency log."""
        return self._async.latency

    @property
    def batch_store(self) -> BatchStore:
        """The answers of batches; `batch_store.clear()` forgets them."""
        return self._async.batch_store

    @property
    def state(self) -> LiveState:
        """The router's cluster, live, for watchers such as the widget."""
        return self._async.state

    @property
    def events(self) -> EventBus:
        """The event bus of this router's workers, coordinators and requests."""
        return self._async.events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OllamaPool:
    """The blocking `OllamaPool`; arguments are those of `sollol_nb.ollama.pool.OllamaPool`."""

    def __init__(self, nodes: Sequence[str | Mapping[str, Any]] | None = None, **settings: Any) -> None:
        self._async = ollama_pool.OllamaPool(nodes, **settings)

    @classmethod
    def auto_configure(cls, nodes: Sequence[str | Mapping[str, Any]] | None = None, **settings: Any) -> Self:
        """A pool of the given nodes, else of those in `OLLAMA_HOST`, else of localhost. No node is contacted
        yet."""
        return cls(nodes, **settings)

    def __repr__(self) -> str:
        return repr(self._async)

    refresh = blocking(ollama_pool.OllamaPool.refresh)
    chat = blocking(ollama_pool.OllamaPool.chat)
    stream_chat = blocking_stream(ollama_pool.OllamaPool.stream_chat)
    generate = blocking(ollama_pool.OllamaPool.generate)
    stream_generate = blocking_stream(ollama_pool.OllamaPool.stream_generate)
    embed = blocking(ollama_pool.OllamaPool.embed)
    has_model = blocking(ollama_pool.OllamaPool.has_model)
    list = blocking(ollama_pool.OllamaPool.list)
    ps = blocking(ollama_pool.OllamaPool.ps)
    show = blocking(ollama_pool.OllamaPool.show)
    unload = blocking(ollama_pool.OllamaPool.unload)
    versions = blocking(ollama_pool.OllamaPool.versions)
    pull = blocking_stream(ollama_pool.OllamaPool.pull)
    close = blocking(ollama_pool.OllamaPool.close)

    def pull_with_bar(self, /, model: str, *, node: str | None = None, **options: Any) -> None:
        """`pull`, showing a progress bar. Errors are those of `pull`."""
        # Not the twin of the async one: this thread draws the bar, since front ends may not take it from another.
        with ollama_pool.PullBar(model) as bar:
            for step in self.pull(model, node=node, **options):
                bar.show(step)

    @property
    def nodes(self) -> Sequence[NodeStatus]:
        """Every node as seen now, in the order given."""
        return self._async.nodes

    def describe_state(self) -> str:
        """Why no node can answer, as known now: none runs, none can be used (with addresses and reasons), or none
        has the model."""
        return self._async.describe_state()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
