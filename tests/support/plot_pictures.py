"""Frames and statuses for the plots' tests, and their reference pictures.

`python -m tests.support.plot_pictures` draws them anew; look at them before you commit them. They are small,
fonts and style are pinned, and the test allows for what differs between versions of matplotlib.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sollol_nb import plots
from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.latency.frames import frame_of
from sollol_nb.latency.schema import COLUMNS
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text.palette import SEGMENTS

if TYPE_CHECKING:
    from sollol_nb.llama_cpp.workers.status import WorkerStatus

PICTURES = Path(__file__).parents[1] / "data" / "plots"
DPI = 60
GIB = 2**30
NOON_S = 1772366400.0  # 2026-03-01 12:00 UTC
MODELS = (
    "llama3.1:70b",
    "llama3.2",
    "qwen3:8b",
    "mistral-nemo:12b-instruct-2407-q4_K_M",
    "phi4",
    "gemma3",
    "demo",
)


def empty_frame() -> pd.DataFrame:
    """The frame of a log without a row."""
    return frame_of([])


def frame_with(**columns: Any) -> pd.DataFrame:
    """A frame of the latency log with these columns; the others as of a request that just went well."""
    count = max(len(values) for values in columns.values())
    usual = {"string": "", "float64": np.nan, "Int64": None, "datetime64[ms, UTC]": NOON_S}
    cells = {column.name: [usual[column.dtype]] * count for column in COLUMNS}
    cells |= {"status": ["ok"] * count, "failovers": [0] * count, "total_ms": [1000.0] * count}
    cells |= {name: list(values) for name, values in columns.items()}
    return frame_of(zip(*(cells[column.name] for column in COLUMNS), strict=True))


def busy_frame(count: int = 400, models: int = 1, places: int = 3, seed: int = 1) -> pd.DataFrame:
    """A log as a busy quarter of an hour leaves it."""
    random = np.random.default_rng(seed)
    number = np.arange(count)
    place_of = random.integers(0, places, count)
    backends = np.array(["ollama-pool", "llama.cpp-distributed", "llama.cpp-local"])[place_of % 3]
    layouts = np.where(place_of % 3 == 1, np.where(place_of // 3 % 2 == 0, "27/27/27", "41/40"), "")
    speed = random.lognormal(3.4 - 0.5 * (place_of % 3 == 1) - 0.1 * place_of, 0.15)
    priority = random.choice([1, 5, 8], count, p=[0.3, 0.5, 0.2])
    waits = random.random(count) < 0.5
    queue_ms = np.where(waits, random.exponential(4000 / priority**1.5), 0.02)
    ttft_ms = queue_ms + random.lognormal(5 + 0.8 * (place_of % 3 == 1), 0.5)
    status = np.where(number % 29 == 7, "error", np.where(number % 41 == 9, "cancelled", "ok"))
    started_at = NOON_S + np.cumsum(random.exponential(900 / count, count))
    lost = number % 61 == 30
    details = [
        json.dumps([{"what": "lost", "when": at + 1.5, "lost_workers": ["10.0.0.2:50052"]}]) if was_lost else ""
        for at, was_lost in zip(started_at, lost, strict=True)
    ]
    predicted = np.where(place_of % 3 == 1, 1000 / speed * random.normal(0.95, 0.08, count), np.nan)
    return frame_with(
        started_at=started_at,
        model=np.array(MODELS)[random.integers(0, models, count)].tolist(),
        backend=backends.tolist(),
        layout=layouts.tolist(),
        place=[f"http://10.0.0.{node + 1}:11434" for node in place_of],
        queue_ms=queue_ms,
        ttft_ms=ttft_ms,
        total_ms=ttft_ms + random.lognormal(7.5, 0.6, count),
        tokens_per_s=speed,
        status=status.tolist(),
        failovers=lost.astype(int).tolist(),
        failover_details=details,
        priority=priority.tolist(),
        predicted_ms_per_token=predicted,
    )


def coordinator_status(
    model: str, units: list[int], actual: list[int] | None = None, first_worker: int = 1
) -> CoordinatorStatus:
    """A coordinator whose workers have so many units each; the last has the output layer."""
    total, first, segments = sum(units), 0, []
    for position, count in enumerate(units):
        last = first + count - 1
        layers = f"{first}-{last}" if position < len(units) - 1 else f"{first}-{last - 1} + output"
        segments.append(
            LayerSegment(
                endpoint=f"10.0.0.{first_worker + position}:50052",
                layers=layers,
                units=count,
                actual_units=actual[position] if actual else None,
                weight_bytes=int(count * 0.48 * GIB),
                actual_weight_bytes=None,
                kv_bytes=GIB // 4,
                share=count / total,
                color=SEGMENTS[(first_worker + position - 1) % 8],
            )
        )
        first += count
    return CoordinatorStatus(
        model=model,
        note="",
        url="http://127.0.0.1:18080",
        log_path="log",
        strategy="memory_aware",
        context_tokens=8192,
        running=0,
        waiting=0,
        slots=4,
        uptime_s=9.0,
        load_ms=1250.0,
        segments=tuple(segments),
        differences=(),
    )


def cluster(*coordinators: CoordinatorStatus) -> ClusterStatus:
    """A cluster with these coordinators."""
    workers: tuple[WorkerStatus, ...] = ()
    return ClusterStatus(workers, coordinators)


def faults() -> list[Event]:
    """Events of a cluster that lost a worker, and found it again."""
    return [
        Event(EventKind.WORKER_LOST, "10.0.0.2:50052", "lost the worker", at=NOON_S + 451.0),
        Event(EventKind.WORKER_RETURNED, "10.0.0.2:50052", "the worker is back", at=NOON_S + 500.0),
        Event(EventKind.COORDINATOR_LOST, "llama3.1:70b", "ended", at=NOON_S + 3600.0),
    ]


DRAWINGS: dict[str, Callable[[Axes], Axes]] = {
    "layer_map": lambda ax: plots.layer_map(
        cluster(
            coordinator_status("llama3.1:70b", [27, 27, 27], [27, 30, 24]),
            coordinator_status("demo:sharded", [4, 3], [4, 3], first_worker=4),
        ),
        ax,
    ),
    "ttft_ecdf": lambda ax: plots.ttft_ecdf(busy_frame(), ax),
    "total_ecdf": lambda ax: plots.total_ecdf(busy_frame(), ax),
    "tokens_per_s_by_layout": lambda ax: plots.tokens_per_s_by_layout(busy_frame(places=6), ax),
    "timeline": lambda ax: plots.timeline(busy_frame(60), faults(), ax),
    "predicted_vs_measured": lambda ax: plots.predicted_vs_measured(busy_frame(models=2), ax),
    "queue_wait_by_priority": lambda ax: plots.queue_wait_by_priority(busy_frame(), ax),
    "no_requests": lambda ax: plots.ttft_ecdf(empty_frame(), ax),
}
"""One picture of each plot."""


@contextmanager
def pinned_style(background: str = "default") -> Iterator[None]:
    """matplotlib's own style and the font that it carries, whatever the user's settings are."""
    font = {"font.family": "DejaVu Sans", "text.hinting": "none", "text.antialiased": True}
    with warnings.catch_warnings(), mpl.style.context(["default", background], after_reset=True):
        warnings.simplefilter("error")
        with mpl.rc_context(font):
            yield


def draw(drawing: Callable[[Axes], Axes], path: Path, *, dpi: int = DPI, background: str = "default") -> Axes:
    """Draw at the default size, and save as PNG."""
    with pinned_style(background):
        figure = Figure(layout="constrained")
        ax = drawing(figure.subplots())
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
    return ax


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        draw(drawing, PICTURES / f"{name}.png")
        print(PICTURES / f"{name}.png")
