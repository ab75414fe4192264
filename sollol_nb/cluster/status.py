"""A snapshot of a cluster: workers, coordinators with their layers, and Ollama nodes, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from sollol_nb.cluster.cards.cards import cards_of
from sollol_nb.cluster.cards.views import as_html, as_text
from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.cluster.live_figures import LiveFigures
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.text.tables import format_bytes


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All workers, coordinators and Ollama nodes of a router at one moment.

    Attributes:
        live: what events have reported. A gateway does not send it, since it sends the events.
    """

    workers: tuple[WorkerStatus, ...]
    coordinators: tuple[CoordinatorStatus, ...]
    nodes: tuple[NodeStatus, ...] = ()
    invitations: tuple[OpenInvitation, ...] = ()
    live: LiveFigures = field(default_factory=LiveFigures, compare=False, metadata={"sent": False})

    def __str__(self) -> str:
        return self.describe()

    @property
    def problems(self) -> list[str]:
        """What needs attention, one line each, the worst first."""
        return [problem.text for problem in cards_of(self).problems if problem.role != "idle"]

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
