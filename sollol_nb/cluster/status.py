"""A snapshot of a cluster: workers, coordinators with their layers, and Ollama nodes, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass

from sollol_nb.cluster.cards.cards import cards_of
from sollol_nb.cluster.cards.views import as_html, as_text
from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.text.tables import format_bytes


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
            verbose: all reasons of each plan instead of the first one, and all that is folded.
        """
        return as_text(cards_of(self), verbose=verbose)

    def _repr_html_(self) -> str:
        return as_html(cards_of(self))

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
