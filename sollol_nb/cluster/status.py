"""A snapshot of a cluster: workers, coordinators with their layers, and Ollama nodes, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.layers.token_time import TokenTime
from sollol_nb.models.files import DEMO_MODEL_PATH, DEMO_NOTE
from sollol_nb.text import palette
from sollol_nb.text.tables import counted, format_bytes

if TYPE_CHECKING:
    import jinja2

    from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
    from sollol_nb.llama_cpp.workers.status import WorkerStatus
    from sollol_nb.ollama.nodes import NodeStatus

TEMPLATES = Path(__file__).parent / "templates"


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
        color: its colour wherever the layers are drawn, one of `palette.SEGMENTS`.
        actual_kv_bytes: KV cache as the engine says; None when it did not tell.
        token_ms: its part of a token's time, as told by what was measured; None where that is unknown.
        time_share: the same as a part of the token, 0 to 1.
    """

    place: str
    layers: str
    units: int
    actual_units: int | None
    weight_bytes: int
    actual_weight_bytes: int | None
    kv_bytes: int
    share: float
    color: str
    actual_kv_bytes: int | None = None
    token_ms: float | None = None
    time_share: float | None = None

    @property
    def words(self) -> str:
        """Predicted beside actual, for a tooltip."""
        actual = "the engine did not tell" if self.actual_units is None else f"actual {self.actual_units} units"
        if self.actual_weight_bytes is not None:
            actual += f", {format_bytes(self.actual_weight_bytes)}"
        if self.actual_kv_bytes is not None:
            actual += f", {format_bytes(self.actual_kv_bytes)} KV"
        time = "" if self.token_ms is None else f"; {self.token_ms:.3g} ms of each token ({self.time_share:.0%})"
        return (
            f"{self.place}: layers {self.layers}; planned {self.units} units, {format_bytes(self.weight_bytes)} "
            f"weights, {format_bytes(self.kv_bytes)} KV; {actual}{time}"
        )


@dataclass(frozen=True, slots=True)
class LocalPart:
    """What the engine put on a device of the coordinator's own machine, such as `CPU`: the input embedding, or
    everything where nothing is sharded.

    Attributes:
        place: the engine's name of the device.
        units: blocks and output layer there.
        weight_bytes, kv_bytes: as the engine says.
    """

    place: str
    units: int
    weight_bytes: int
    kv_bytes: int

    @property
    def words(self) -> str:
        """One line."""
        units = f"{self.units} units, " if self.units else ""
        kv = f", {format_bytes(self.kv_bytes)} KV" if self.kv_bytes else ""
        return f"{self.place} of this machine: {units}{format_bytes(self.weight_bytes)} weights{kv}"


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """One running coordinator; `note` says what is special about its model.

    `predicted_token_ms` was told when the layers were planned, `token_ms` is measured; None where unknown.
    """

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
    local: tuple[LocalPart, ...] = ()
    predicted_token_ms: float | None = None
    token_ms: float | None = None

    @property
    def token_words(self) -> str:
        """Predicted beside measured; "" while neither is known."""
        known = []
        if self.predicted_token_ms is not None:
            known.append(f"predicted {self.predicted_token_ms:.3g} ms a token")
        if self.token_ms:
            known.append(f"measured {self.token_ms:.3g} ms a token ({1000 / self.token_ms:.3g} tokens/s)")
        return ", ".join(known)

    @classmethod
    def of(
        cls,
        coordinator: Coordinator,
        remark: str = "",
        *,
        token_ms: float | None = None,
        token: TokenTime | None = None,
    ) -> CoordinatorStatus:
        """The status of a coordinator now.

        Args:
            remark: added to its note.
            token_ms: measured time of a token.
            token: how that time is thought to be made up of its workers' parts.
        """
        demo = DEMO_NOTE if coordinator.settings.model_path == DEMO_MODEL_PATH else ""
        plan, placement = coordinator.plan, coordinator.placement
        part_ms = token.part_ms if token else ()
        shares = token.shares if token else ()
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
                    palette.SEGMENTS[position % len(palette.SEGMENTS)],
                    placed.kv_bytes if placed else None,
                    part_ms[position] if part_ms else None,
                    shares[position] if shares else None,
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
            _local_parts(coordinator),
            plan.predicted_token_ms if plan else None,
            token_ms,
        )


def _local_parts(coordinator: Coordinator) -> tuple[LocalPart, ...]:
    planned = coordinator.plan.endpoints if coordinator.plan else ()
    return tuple(
        LocalPart(device.place, len(device.units), device.model_bytes, device.kv_bytes)
        for device in (coordinator.placement.devices if coordinator.placement else ())
        if device.place not in planned and (device.units or device.model_bytes or device.kv_bytes)
    )


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All workers, coordinators and Ollama nodes of a router at one moment."""

    workers: tuple[WorkerStatus, ...]
    coordinators: tuple[CoordinatorStatus, ...]
    nodes: tuple[NodeStatus, ...] = ()

    def __str__(self) -> str:
        lines = []
        for one in self.coordinators:
            lines.append(
                f"{one.model} at {one.url} ({one.strategy}, {one.context_tokens} tokens of context, "
                f"{one.running}/{one.slots} slots busy, {one.waiting} waiting)" + f" {one.note}" * bool(one.note)
            )
            lines += [f"  {one.token_words}"] if one.token_words else []
            lines += [f"  {_bar(segment.share)} {segment.words}" for segment in one.segments]
            lines += [f"  {part.words}" for part in one.local]
            lines += [f"  differs from the plan: {difference}" for difference in one.differences]
        if not self.coordinators:
            lines.append("no coordinator is running")
        lines.append(counted(len(self.workers), "worker") if self.workers else "no worker is known")
        lines += [
            f"  {one.endpoint:<22} {one.state:<12} {worker_words(one)}" + " (local)" * one.is_local
            for one in self.workers
        ]
        if self.nodes:
            lines.append(counted(len(self.nodes), "Ollama node"))
        lines += [f"  {one.url:<22} {one.state:<12} {node_words(one)}" for one in self.nodes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return str(
            _environment()
            .get_template("cluster.html.j2")
            .render(
                status=self,
                worker_words=worker_words,
                node_words=node_words,
                bytes=format_bytes,
                segment_text=palette.SEGMENT_TEXT,
                state_color=palette.state_color,
            )
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._repr_html_()}


def worker_words(worker: WorkerStatus) -> str:
    """Memory, round trip and protocol of a worker when last seen, or what is wrong with it."""
    seen = worker.probe
    if worker.state not in ("free", "held") or seen is None or seen.round_trip_ms is None:
        return worker.detail
    version = ".".join(map(str, seen.protocol or ()))
    free = f"{format_bytes(worker.capacity.free_bytes)} free of {format_bytes(seen.total_bytes)}"
    by = f"{worker.detail}; " if worker.held_by else ""
    return f"{by}{free}, {seen.round_trip_ms:.2f} ms, RPC {version}"


def node_words(node: NodeStatus) -> str:
    """What an Ollama node has loaded and does, or what is wrong with it and what to do."""
    if node.state == "ready":
        loaded = ", ".join(node.loaded_models) or "nothing"
        size = f" ({format_bytes(node.loaded_bytes)})" if node.loaded_bytes else ""
        speed = "" if node.ms_per_token is None else f", {node.ms_per_token:.3g} ms a token"
        return f"{loaded} loaded{size}, {node.running}/{node.slots} slots busy, {node.waiting} waiting{speed}"
    if node.state == "unknown":
        return "not looked at yet"
    what_to_do = "start it there: ollama serve" if node.state == "absent" else "it is tried again by itself"
    return f"{node.last_error}; {what_to_do}" if node.last_error else what_to_do


def _bar(share: float, width: int = 20) -> str:
    filled = max(1, round(share * width))
    return "█" * filled + "·" * (width - filled)


@lru_cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
