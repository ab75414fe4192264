"""The hybrid router: small models go to Ollama, large ones to a llama-server over RPC workers.

`HybridRouter` is the async API; it can be awaited from any event loop, since its work runs on the process's
I/O loop (`io_loop.py`). `sync_wrapper.HybridRouter` is its blocking twin. Making a router does no I/O: nodes are
looked at, workers probed and engines started when a request needs them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.batch.batch import Batch
from sollol_nb.batch.store import BatchStore
from sollol_nb.bench.bench import bench as bench_router
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.router.asking import RouterAsking
from sollol_nb.router.finder import RouteFinder
from sollol_nb.router.settings import check_amounts, endpoints, pool_settings
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_COORDINATOR_PORT, DEFAULT_RPC_PORT

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.batch.rows import Rows, RowTemplate
    from sollol_nb.widget.cluster_widget import ClusterWidget

__all__ = ["MODEL_PROFILES", "HybridRouter"]

DEFAULT_COORDINATOR_TIMEOUT_S = 1200.0


class HybridRouter(RouterAsking):
    """Routes chat requests by the model's profile, and keeps what it started warm.

    What is not given here is taken from the settings (`settings.py`): an environment variable, then
    `sollol_nb.toml`, then the default told below.

    Args:
        ollama_pool: the Ollama nodes; by default those of `OLLAMA_HOST`, or this machine's.
        enable_distributed: whether large models are sharded.
        rpc_backends: workers as `"host:port"` or `{"host": ..., "port": ...}`; by default those of the
            setting `workers`.
        num_rpc_backends: how many workers a model is spread over; by default 3, or as many as its size takes.
        auto_discover_rpc: look for workers on this machine's ports 50052 to 50067 where more are needed.
        auto_setup_rpc: start workers on this machine where more are needed.
        coordinator_timeout: seconds that a coordinator may take to load its model.
        coordinator_port: the first port to try for a coordinator.
        rpc_port: the first port to try for workers started here.
        distributed_threshold_params: models of more billions of parameters are sharded too.
        model_filter: only these models are sharded by this router.
        gguf_path: the GGUF file for models on llama.cpp, instead of looking into Ollama's storage.
        layer_strategy: how layers are spread, by default `memory_aware`.
        context_tokens: context of a coordinator, shared by its slots; by default the model's own, at most 8192.
        slots: requests that a coordinator serves at the same time, by default 4.
        timeout: limit of a request in seconds, from when its place is ready; by default 600.
        llama_cpp: folder with the llama.cpp binaries.
        keep_alive: how long a coordinator (and a worker started here) lives without a request: seconds, `"10m"`,
            0 (ends with its request) or `"forever"`; or a dict of such by model, with `"*"` for all others. By
            default 10 minutes. It lives on when the kernel ends.
        latency: the latency log; by default the one in the state folder.

    Raises:
        ConfigError: an argument cannot be used.

    Attributes:
        events: the event bus of this router's workers, coordinators and requests.
        latency: the latency log.
        batch_store: the answers of batches; `batch_store.clear()` forgets them.
    """

    def __init__(
        self,
        ollama_pool: OllamaPool | None = None,
        *,
        enable_distributed: bool = True,
        rpc_backends: Iterable[str | Mapping[str, Any]] | None = None,
        num_rpc_backends: int | None = None,
        auto_discover_rpc: bool = True,
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
        llama_cpp: str | Path | None = None,
        keep_alive: float | str | Mapping[str, float | str] | None = None,
        latency: LatencyLog | None = None,
    ) -> None:
        timeout = config.or_default(timeout, "timeout")
        distributed_threshold_params = config.or_default(distributed_threshold_params, "threshold_params")
        check_amounts(
            coordinator_timeout=coordinator_timeout,
            timeout=timeout,
            distributed_threshold_params=distributed_threshold_params,
        )
        settings = pool_settings(
            num_rpc_backends=config.or_default(num_rpc_backends, "num_workers"),
            auto_discover_rpc=auto_discover_rpc,
            auto_setup_rpc=config.or_default(auto_setup_rpc, "auto_setup"),
            coordinator_timeout_s=coordinator_timeout,
            coordinator_port=coordinator_port,
            rpc_port=rpc_port,
            layer_strategy=config.or_default(layer_strategy, "strategy"),
            context_tokens=config.or_default(context_tokens, "context_tokens"),
            slots=config.or_default(slots, "slots"),
            llama_cpp=llama_cpp,
            keep_alive=config.or_default(keep_alive, "keep_alive"),
        )
        events = EventBus()
        workers = Workers(endpoints(rpc_backends), events)
        ollama = ollama_pool if ollama_pool is not None else OllamaPool.auto_configure(events=events)
        routes = RouteFinder(
            ollama,
            enable_distributed=enable_distributed,
            threshold_params=distributed_threshold_params,
            model_filter=[model_filter] if isinstance(model_filter, str) else model_filter,
            gguf_path=gguf_path,
        )
        super().__init__(
            CoordinatorPool(settings, workers, events),
            workers,
            ollama,
            events,
            routes=routes,
            latency=latency if latency is not None else _own_log(),
            timeout_s=timeout,
        )
        self.batch_store = BatchStore()

    def __repr__(self) -> str:
        models = ", ".join(one.model for one in self._coordinators.coordinators) or "none"
        return f"<HybridRouter: {len(self._workers.endpoints)} workers, coordinators: {models}>"

    bench = bench_router

    def widget(self) -> ClusterWidget:
        """The live cluster with its controls, for a notebook; the same one each time. Needs ipywidgets."""
        from sollol_nb.widget.cluster_widget import cluster_widget

        return cluster_widget(self)

    # --- a batch --------------------------------------------------------------------------------

    async def map(
        self,
        /,
        rows: Rows,
        template: RowTemplate,
        *,
        model: str | None = None,
        schema: object = None,
        system: str | None = None,
        backend: str | None = None,
        concurrency: int | None = None,
        priority: int = Priority.BATCH,
        timeout: float | None = None,
        fresh: bool = False,
        progress: bool = True,
        prefix: str = "",
        **options: Any,
    ) -> pd.DataFrame:
        """Ask the same of each row, over all slots of the places that have the model; `batch.py` tells the rules.

        Args:
            rows: a DataFrame or Series, or any iterable of dicts or values; it is read to its end first.
            template: a text with `{{ column }}` in it, or a function of a row (a dict, or the value) that gives
                the prompt or the messages. All rows are filled in before the first request.
            model: a model's name or file; by default that of the setting `model`.
            schema: what each answer must fit, as for `route_request`.
            system: a system message before each prompt; taken as it is.
            backend: as for `route_request`.
            concurrency: requests under way at once; by default the slots of all places that have the model.
            priority: as for `route_request`; by default all other requests go first.
            timeout: limit of each request in seconds, from when its place is ready.
            fresh: ask again also what an earlier batch was answered.
            progress: show a progress bar.
            prefix: before the name of each new column.
            **options: those of `route_request`, for each row.

        Returns:
            The rows as they came (values of an iterable as the column `item`), in their order, with the columns
            `answer`, the fields of the schema, `value`, `status`, `error`, `backend`, `finish_reason`, `ttft_ms`,
            `total_ms`, `tokens_per_s` and `completion_tokens`; see `batch/frame.py`.

        Raises:
            ConfigError: an argument, or a row that cannot be filled in; nothing was sent.
            SollolError: what would fail every row: an unknown model, no workers, no Ollama.
            BatchInterrupted: Ctrl-C or the stop button, in the blocking twin; what is done is kept.
        """
        batch = Batch(
            self,
            rows,
            template,
            model=model,
            schema=schema,
            system=system,
            backend=backend,
            concurrency=concurrency,
            priority=priority,
            timeout=timeout,
            fresh=fresh,
            progress=progress,
            prefix=prefix,
            **options,
        )
        return await batch.run()


def _own_log() -> LatencyLog:
    """The latency log of the state folder, with the retention that is set."""
    keep_rows = config.default("latency_keep_rows") or None
    return LatencyLog(keep_days=config.default("latency_keep_days"), keep_rows=keep_rows)
