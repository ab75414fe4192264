"""The event bus: state changes of workers, coordinators and requests, told once, to whoever subscribed.

Events are published on the I/O loop; a subscriber is called there and must be quick (hand over to a queue if it
has work to do). A subscriber that raises is dropped, so that a broken view never breaks a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

KEPT_EVENTS = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One state change.

    Attributes:
        kind: dotted, the room first: `worker.started`, `coordinator.ready`, `request.finished`.
        subject: what it happened to: an endpoint, a model.
        words: one line for a person.
        data: plain values for a view.
        at: `time.time()`.
    """

    kind: str
    subject: str
    words: str
    data: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


class EventBus:
    """Publish and subscribe, with the last events kept for late comers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[Event], None]] = []
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def publish(self, kind: str, subject: str, words: str, **data: Any) -> None:
        """Tell an event to all subscribers, and keep it for late comers."""
        event = Event(kind, subject, words, data)
        with self._lock:
            self._kept.append(event)
        self._tell(event)

    def report(self, kind: str, subject: str, words: str, **data: Any) -> None:
        """Tell what changes all the time (a round trip, memory): late comers do not want what it was before."""
        self._tell(Event(kind, subject, words, data))

    def _tell(self, event: Event) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber of the event bus failed and was dropped")
                self._unsubscribe(subscriber)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event from now on; returns the function that ends it."""
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
