"""A snapshot of a router's cluster: workers and coordinators with their layers, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.model_files import DEMO_MODEL_PATH, DEMO_NOTE
from sollol_nb.units import format_bytes

if TYPE_CHECKING:
    import jinja2

    from sollol_nb.coordinator import Coordinator
    from sollol_nb.workers import WorkerStatus

TEMPLATES = Path(__file__).parent / "templates"
COLORS = 8  # of the colour-blind-safe palette in the template


@dataclass(frozen=True, slots=True)
class LayerSegment:
    """The layers that one worker runs of one model.

    Attributes:
        place: the worker's endpoint.
        layers: planned layers in words, such as `0-4` or `10-11 + output`.
        units: planned units (blocks and the output layer).
        actual_units: what the engine says it placed; None when it did not tell.
        weight_bytes: planned weights.
        actual_weight_bytes: weights as the engine says; None when it did not tell.
        kv_bytes: planned KV cache.
        share: part of all units, 0 to 1.
        color: index of its colour in the palette.
    """

    place: str
    layers: str
    units: int
    actual_units: int | None
    weight_bytes: int
    actual_weight_bytes: int | None
    kv_bytes: int
    share: float
    color: int

    @property
    def words(self) -> str:
        """Predicted beside actual, for a tooltip."""
        actual = "the engine did not tell" if self.actual_units is None else f"actual {self.actual_units} units"
        if self.actual_weight_bytes is not None:
            actual += f", {format_bytes(self.actual_weight_bytes)}"
        return (
            f"{self.place}: layers {self.layers}; planned {self.units} units, {format_bytes(self.weight_bytes)} "
            f"weights, {format_bytes(self.kv_bytes)} KV; {actual}"
        )


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """One running coordinator; `note` says what is special about its model."""

    model: str
    note: str
    url: str
    log_path: str
    strategy: str
    context_tokens: int
    running: int
    waiting: int
    slots: int
    uptime_s: float
    load_ms: float
    segments: tuple[LayerSegment, ...]
    differences: tuple[str, ...]

    @classmethod
    def of(cls, coordinator: Coordinator, remark: str = "") -> CoordinatorStatus:
        """The status of a coordinator now."""
        demo = DEMO_NOTE if coordinator.settings.model_path == DEMO_MODEL_PATH else ""
        plan, placement = coordinator.plan, coordinator.placement
        segments = []
        for position, shard in enumerate(plan.shards if plan else ()):
            placed = placement.of(shard.endpoint) if placement else None
            segments.append(
                LayerSegment(
                    shard.endpoint,
                    shard.layers,
                    shard.unit_count,
                    len(placed.units) if placed else None,
                    shard.weight_bytes,
                    placed.model_bytes if placed else None,
                    shard.kv_bytes,
                    shard.unit_count / (coordinator.settings.facts.layer_count + 1),
                    position % COLORS,
                )
            )
        return cls(
            coordinator.model,
            "; ".join(filter(None, (demo, remark))),
            coordinator.base_url,
            str(coordinator.log_path),
            plan.strategy if plan else "this machine only",
            coordinator.settings.context_tokens,
            coordinator.gate.running,
            coordinator.gate.waiting,
            coordinator.gate.slots,
            coordinator.uptime_s,
            coordinator.load_ms,
            tuple(segments),
            tuple(coordinator.placement_differences),
        )


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All workers and coordinators of a router at one moment."""

    workers: tuple[WorkerStatus, ...]
    coordinators: tuple[CoordinatorStatus, ...]

    def __str__(self) -> str:
        lines = []
        for one in self.coordinators:
            lines.append(
                f"{one.model} at {one.url} ({one.strategy}, {one.context_tokens} tokens of context, "
                f"{one.running}/{one.slots} slots busy, {one.waiting} waiting)" + f" {one.note}" * bool(one.note)
            )
            lines += [f"  {_bar(segment.share)} {segment.words}" for segment in one.segments]
            lines += [f"  differs from the plan: {difference}" for difference in one.differences]
        if not self.coordinators:
            lines.append("no coordinator is running")
        lines.append(f"{len(self.workers)} workers" if self.workers else "no worker is known")
        lines += [f"  {worker.endpoint:<22} {worker.state:<12} {self._facts(worker)}" for worker in self.workers]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return str(
            _environment()
            .get_template("cluster.html.j2")
            .render(status=self, facts=self._facts, bytes=format_bytes)
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._repr_html_()}

    @staticmethod
    def _facts(worker: WorkerStatus) -> str:
        """Memory, round trip and protocol of a worker when last seen, or what is wrong with it."""
        seen = worker.probe
        if worker.state not in ("free", "held") or seen is None or seen.round_trip_ms is None:
            return worker.detail
        version = ".".join(map(str, seen.protocol or ()))
        free = f"{format_bytes(worker.capacity.free_bytes)} free of {format_bytes(seen.total_bytes)}"
        by = f"{worker.detail}; " if worker.held_by else ""
        return f"{by}{free}, {seen.round_trip_ms:.2f} ms, RPC {version}"


def _bar(share: float, width: int = 20) -> str:
    filled = max(1, round(share * width))
    return "█" * filled + "·" * (width - filled)


@lru_cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
