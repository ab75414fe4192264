"""`HybridRouter`: a router with batches, benchmarks and a cluster widget; `sync_wrapper` has its blocking twin."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from sollol_nb.batch.batch import Batch
from sollol_nb.batch.rows import Rows, RowTemplate
from sollol_nb.batch.store import BatchStore
from sollol_nb.bench.bench import bench as bench_router
from sollol_nb.chat.options import ChatOptions
from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.router.router import Router
from sollol_nb.runtime.priority import Priority

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.widget.cluster_widget import ClusterWidget

__all__ = ["MODEL_PROFILES", "HybridRouter"]


class HybridRouter(Router):
    """Routes chat requests by the model's profile, and keeps the engines that it started warm; async.

    Besides what every `Router` does, it asks about many rows (`map`), measures (`bench`) and shows its cluster
    (`widget`).

    Attributes:
        events: the event bus of this router's workers, coordinators and requests.
        latency: the latency log.
        state: its cluster, live, for watchers such as the widget.
    """

    @cached_property
    def batch_store(self) -> BatchStore:
        """The answers of batches; `batch_store.clear()` forgets them."""
        return BatchStore()

    bench = bench_router

    def widget(self) -> ClusterWidget:
        """The live cluster with its controls, for a notebook; the same one each time. Needs ipywidgets."""
        from sollol_nb.widget.cluster_widget import cluster_widget  # ipywidgets takes long to load

        return cluster_widget(self)

    async def map(
        self,
        /,
        rows: Rows,
        template: RowTemplate,
        *,
        model: str | Path | None = None,
        schema: object = None,
        system: str | None = None,
        backend: str | None = None,
        concurrency: int | None = None,
        priority: int = Priority.BATCH,
        timeout: float | None = None,
        fresh: bool = False,
        progress: bool = True,
        prefix: str = "",
        **options: Unpack[ChatOptions],
    ) -> pd.DataFrame:
        """Ask the same of each row, over all slots that serve the model; `batch/batch.py` has the rules.

        Args:
            rows: a DataFrame or Series (also a table of polars or pyarrow), or any iterable of dicts or values; it
                is read to its end first. A row of which the template inserts a missing or blank value is not asked
                (status `skipped`).
            template: a text with `{{ column }}` in it, or a function of a row (a dict, or the value) that returns
                the prompt or the messages. All rows are filled in before the first request.
            model: a model's name or file; by default that of the setting `model`.
            schema: what each answer must match, as for `route_request`.
            system: a system message before each prompt; nothing is filled into it.
            backend: as for `route_request`.
            concurrency: requests at the same time; by default the slots of all servers that have the model.
            priority: as for `route_request`; by default below all other requests.
            timeout: limit of each request in seconds, from when its coordinator is ready; loading in
                Ollama counts.
            fresh: ask every row, also where an earlier batch has an answer.
            progress: show a progress bar.
            prefix: before the name of each new column.
            **options: those of `route_request`, for each row.

        Returns:
            The rows (values of an iterable as the column `item`), in their order, with the columns
            `answer`, the fields of the schema, `value`, `status`, `error`, `backend`, `finish_reason`, `ttft_ms`,
            `total_ms`, `tokens_per_s` and `completion_tokens`; see `batch/frame.py`.

        Raises:
            ConfigError: an argument cannot be used, or a row cannot be filled in; nothing was sent.
            SollolError: what would fail every row: an unknown model, no workers, no Ollama.
            BatchInterrupted: Ctrl-C or the stop button, in the blocking twin; the answers so far are kept.
        """
        batch = Batch(
            self,
            self.batch_store,
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
