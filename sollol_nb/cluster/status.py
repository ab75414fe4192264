"""A snapshot of a cluster: workers, coordinators with their layers, and Ollama nodes, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.layers.plan import reason_lines
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.text import palette
from sollol_nb.text.tables import counted, format_bytes

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All workers, coordinators and Ollama nodes of a router at one moment."""

    workers: tuple[WorkerStatus, ...]
    coordinators: tuple[CoordinatorStatus, ...]
    nodes: tuple[NodeStatus, ...] = ()
    invitations: tuple[OpenInvitation, ...] = ()

    def __str__(self) -> str:
        return self.describe()

    def describe(self, *, verbose: bool = False) -> str:
        """As text.

        Args:
            verbose: all reasons of each plan, instead of the first one.
        """
        lines = []
        for coordinator in self.coordinators:
            note = f" {coordinator.note}" if coordinator.note else ""
            slots = f", {coordinator.running}/{coordinator.slots} slots busy, {coordinator.waiting} waiting"
            lines.append(
                f"{coordinator.model} at {coordinator.url} ({coordinator.strategy}, "
                f"{coordinator.context_tokens} tokens of context{'' if coordinator.standby else slots}){note}"
            )
            lines += [f"  {coordinator.token_time_description}"] if coordinator.token_time_description else []
            lines += [f"  {coordinator.drafts}"] if coordinator.drafts else []
            lines += [f"  {line}" for line in reason_lines(coordinator.reasons, verbose=verbose)]
            lines += [f"  ⚠ {coordinator.advice}"] if coordinator.advice else []
            lines += [f"  {_bar(segment.share)} {segment.description}" for segment in coordinator.segments]
            lines += [f"  {part.description}" for part in coordinator.local]
            lines += [f"  differs from the plan: {difference}" for difference in coordinator.differences]
        if not self.coordinators:
            lines.append("no coordinator is running")
        lines.append(counted(len(self.workers), "worker") if self.workers else "no worker is known")
        lines += [
            f"  {worker.label:<22} {worker.state:<12} {describe_worker(worker)}" + " (local)" * worker.is_local
            for worker in self.workers
        ]
        lines += map(str, self.invitations)
        if self.nodes:
            lines.append(counted(len(self.nodes), "Ollama node"))
        lines += [f"  {node.url:<22} {node.state:<12} {describe_node(node)}" for node in self.nodes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return str(
            _environment()
            .get_template("cluster.html.j2")
            .render(
                status=self,
                describe_worker=describe_worker,
                describe_node=describe_node,
                format_bytes=format_bytes,
                segment_text=palette.SEGMENT_TEXT,
                state_color=palette.state_color,
            )
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._repr_html_()}


def describe_worker(worker: WorkerStatus) -> str:
    """Memory, round trip and protocol of a worker at its last probe, or what is wrong with it."""
    probe = worker.probe
    if worker.state not in ("free", "held") or probe is None or probe.round_trip_ms is None:
        return worker.detail
    version = ".".join(map(str, probe.protocol or ()))
    free = f"{format_bytes(worker.capacity.free_bytes)} free of {format_bytes(probe.total_bytes)}"
    holder = f"{worker.detail}; " if worker.held_by else ""
    speed = f"; calibrated: {worker.calibration.describe()}" if worker.calibration else ""
    return f"{holder}{free}, {probe.round_trip_ms:.2f} ms, RPC {version}{speed}"


def describe_node(node: NodeStatus) -> str:
    """What an Ollama node has loaded and does, or what is wrong with it and what to do."""
    if node.state == "ready":
        loaded = ", ".join(node.loaded_models) or "nothing"
        size = f" ({format_bytes(node.loaded_bytes)})" if node.loaded_bytes else ""
        speed = "" if node.ms_per_token is None else f", {node.ms_per_token:.3g} ms per token"
        return f"{loaded} loaded{size}, {node.running}/{node.slots} slots busy, {node.waiting} waiting{speed}"
    if node.state == "unknown":
        return "not checked yet"
    what_to_do = (
        "start it there with: ollama serve" if node.state == "absent" else "it will be tried again automatically"
    )
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
