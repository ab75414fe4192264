"""A whole cluster as cards, from its status."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from sollol_nb.cluster.cards.events import event_lines
from sollol_nb.cluster.cards.models import model_cards
from sollol_nb.cluster.cards.problems import problems_of
from sollol_nb.cluster.cards.shapes import ClusterCards
from sollol_nb.cluster.cards.workers import node_row, summary_of, worker_rows
from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.cluster.live_figures import LiveFigures, RequestCounts
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.text.tables import counted


class Snapshot(Protocol):
    """A cluster at one moment: a `ClusterStatus`."""

    @property
    def workers(self) -> Sequence[WorkerStatus]: ...

    @property
    def coordinators(self) -> Sequence[CoordinatorStatus]: ...

    @property
    def nodes(self) -> Sequence[NodeStatus]: ...

    @property
    def invitations(self) -> Sequence[OpenInvitation]: ...

    @property
    def live(self) -> LiveFigures: ...


def cards_of(status: Snapshot, *, own: Collection[str] | None = None) -> ClusterCards:
    """The cards of a cluster.

    Args:
        own: URLs of this router's coordinators; by default all of them.
    """
    live = status.live
    workers, folds = worker_rows(status.workers, live)
    nodes = tuple(node_row(node, live) for node in status.nodes)
    return ClusterCards(
        summary=_summary(status, live.requests),
        problems=problems_of(status.workers, status.coordinators, status.nodes, live.events.values()),
        models=model_cards(status.coordinators, live.starting, live.last_answer, own),
        workers=workers,
        workers_summary=summary_of(workers, "worker"),
        folds=folds,
        nodes=nodes,
        nodes_summary=summary_of(nodes, "Ollama node"),
        invitations=tuple(map(str, status.invitations)),
        events=event_lines(live.events),
    )


def _summary(status: Snapshot, requests: RequestCounts) -> str:
    """`2 running, 1 waiting, 14 requests so far, 1 failed`."""
    places: list[CoordinatorStatus | NodeStatus] = [*status.coordinators, *status.nodes]
    running, waiting = sum(place.running for place in places), sum(place.waiting for place in places)
    if not (running or waiting or requests.total):
        return ""
    parts = [f"{running} running"] if running else []
    parts += [f"{waiting} waiting"] if waiting else []
    parts += [f"{counted(requests.total, 'request')} so far"] if requests.total else []
    parts += [f"{requests.failed} failed"] if requests.failed else []
    return " · ".join(parts)
