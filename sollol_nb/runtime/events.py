"""The event bus: each change of a worker, coordinator, node or request, published once to all subscribers.

Events are published on the I/O loop. A subscriber is called there and must be quick; if it has work to do, it puts
the event into a queue. A subscriber that raises is dropped, so that a broken view never breaks a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

logger = logging.getLogger(__name__)

KEPT_EVENTS = 500


class EventKind(StrEnum):
    """All kinds of events. The part before the dot is what the event is about, see `source`."""

    ENGINE_BUILDING = "engine.building"
    """llama.cpp is being built; `share` is how much of it is done, 0 to 1."""

    WORKER_ADDED = "worker.added"
    """A worker was added by its address."""
    WORKER_REMOVED = "worker.removed"
    """A worker is not used any more."""
    WORKER_DISCOVERED = "worker.discovered"
    """A worker was found that was not known before."""
    WORKER_STARTED = "worker.started"
    """A worker was started on this machine."""
    WORKER_ADOPTED = "worker.adopted"
    """A worker that another kernel started on this machine is used here too."""
    WORKER_STOPPED = "worker.stopped"
    """A worker on this machine was stopped, or ended in the normal way."""
    WORKER_LOST = "worker.lost"
    """A worker died or is not reachable any more."""
    WORKER_RETURNED = "worker.returned"
    """A lost worker is reachable again."""
    LINK_CONNECTING = "link.connecting"
    """Another machine is being connected, or llama.cpp installed there. Comes often and is not kept."""
    WORKER_CALIBRATING = "worker.calibrating"
    """A worker is being measured. Comes often and is not kept."""
    WORKER_CALIBRATED = "worker.calibrated"
    """A worker was measured, or could not be: `error`."""
    WORKER_SEEDED = "worker.seeded"
    """The caches of a machine's workers were filled from its own copy of a model, or could not be: `error`."""
    LINK_READY = "link.ready"
    """Another machine is connected; its workers can be used."""
    LINK_LOST = "link.lost"
    """The connection to another machine was lost, or could not be made."""
    LINK_STOPPED = "link.stopped"
    """The connection to another machine was ended on request."""
    PROBE_DONE = "probe.done"
    """A worker was probed; `round_trip_ms`. Comes often and is not kept."""

    COORDINATOR_PLANNED = "coordinator.planned"
    """A model has a new layer plan."""
    COORDINATOR_STARTING = "coordinator.starting"
    """A coordinator is being started for a model."""
    COORDINATOR_LOADING = "coordinator.loading"
    """A coordinator has loaded more of its model; the data are those of `LoadProgress`. Comes often, not kept."""
    COORDINATOR_READY = "coordinator.ready"
    """A coordinator has loaded its model; `load_ms`, `bytes_sent` to its workers (None where not known)."""
    COORDINATOR_ADOPTED = "coordinator.adopted"
    """A coordinator that another kernel started is used here too; `load_ms`, `bytes_sent`."""
    COORDINATOR_PLACED_OTHERWISE = "coordinator.placed_otherwise"
    """llama.cpp has put layers elsewhere than the plan says."""
    COORDINATOR_FAILED = "coordinator.failed"
    """A coordinator could not be started; `cancelled` is True if nobody wanted it any more."""
    COORDINATOR_ADVICE = "coordinator.advice"
    """A better layout for a running model is known: `layout` as pairs of endpoint and units, and which workers are
    `slow`."""
    COORDINATOR_MADE_ROOM = "coordinator.made_room"
    """A coordinator was stopped, so that another model has workers or memory."""
    COORDINATOR_STOPPED = "coordinator.stopped"
    """A coordinator was stopped on request, or because it was idle or silent for too long."""
    COORDINATOR_LOST = "coordinator.lost"
    """A coordinator ended by itself, or one of its workers was lost."""
    STANDBY_STARTING = "standby.starting"
    """A standby of a running coordinator is being started; the message says what it takes."""
    STANDBY_READY = "standby.ready"
    """A standby can take over at once; `load_ms`."""
    STANDBY_TAKEN = "standby.taken"
    """A coordinator was lost, and its standby is the coordinator of the model from now on."""
    STANDBY_MISSING = "standby.missing"
    """No standby is possible now; the message says why."""
    STANDBY_ENDED = "standby.ended"
    """A standby was stopped, or ended by itself."""

    ANSWER_CONTINUED = "answer.continued"
    """An interrupted answer continues on another coordinator."""

    CONTEXT_SAVED = "context.saved"
    """The context of a conversation was saved; `tokens`, `bytes`, `ms`."""
    CONTEXT_RESTORED = "context.restored"
    """A saved context was restored; `tokens`, `bytes`, `ms`."""
    CONTEXT_REFUSED = "context.refused"
    """A saved context was not used, or one was not saved; the message says why."""

    NODE_READY = "node.ready"
    """An Ollama node answers."""
    NODE_ABSENT = "node.absent"
    """Nothing listens at an Ollama node's address; `error`."""
    NODE_COOLING = "node.cooling"
    """An Ollama node failed or went silent, and is not used for a while; `error`."""

    GATEWAY_LOST = "gateway.lost"
    """The gateway that a notebook uses no longer answers."""
    GATEWAY_RETURNED = "gateway.returned"
    """A lost gateway answers again."""

    ROUTER_CHANGED = "router.changed"
    """A setting of the router was changed."""
    REQUEST_STARTED = "request.started"
    """The router has received a request."""
    REQUEST_FINISHED = "request.finished"
    """A request has ended, well or not; `status`, and timings as in the latency log."""

    ACTION_DONE = "action.done"
    """An action of the cluster widget was carried out."""
    ACTION_FAILED = "action.failed"
    """An action of the cluster widget failed."""

    @property
    def source(self) -> str:
        """What the event is about: `worker`, `coordinator`, `request`, ..."""
        return self.partition(".")[0]

    def __repr__(self) -> str:
        return repr(self.value)  # as in lists and dicts of texts, which a cell may show


@dataclass(frozen=True, slots=True)
class Event:
    """One state change.

    Attributes:
        kind: one of `EventKind`.
        subject: what it happened to: an endpoint, a model.
        message: one line for a person.
        data: plain values for a view.
        at: `time.time()`.
    """

    kind: EventKind
    subject: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


class EventBus:
    """Publish and subscribe; the last events are kept for later subscribers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[Event], None]] = []
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def publish(self, kind: EventKind, subject: str, message: str, **data: Any) -> None:
        """Send an event to all subscribers, and keep it for `recent`."""
        event = Event(kind, subject, message, data)
        with self._lock:
            self._kept.append(event)
        self._send(event)

    def report(self, kind: EventKind, subject: str, message: str, **data: Any) -> None:
        """Send an event without keeping it: for values that change often, such as a round trip."""
        self._send(Event(kind, subject, message, data))

    def pass_on(self, event: Event, *, keep: bool) -> None:
        """Send an event of another process, such as a gateway, to all subscribers."""
        if keep:
            self.keep([event])
        self._send(event)

    def keep(self, events: Iterable[Event]) -> None:
        """Keep earlier events of another process for `recent`; subscribers do not get them."""
        with self._lock:
            self._kept.extend(events)

    def _send(self, event: Event) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber of the event bus failed and was dropped")
                self._unsubscribe(subscriber)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event from now on. Returns a function that unsubscribes it."""
        with self._lock:
            self._subscribers.append(subscriber)
        return lambda: self._unsubscribe(subscriber)

    def recent(self) -> list[Event]:
        """The last events, oldest first."""
        with self._lock:
            return list(self._kept)

    def _unsubscribe(self, subscriber: Callable[[Event], None]) -> None:
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
