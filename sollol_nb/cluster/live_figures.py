"""What only events report of a cluster: requests, round trips, loads under way, and the events themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text.tables import format_ms

ROUND_TRIPS_KEPT = 20
EVENTS_KEPT = 30
MEMORY_STEPS = 50
"""Free memory is rounded down to a multiple of 1/50 of the total: a step is visible, less is noise."""

_NOT_LOGGED = (
    EventKind.REQUEST_STARTED,
    EventKind.REQUEST_FINISHED,
    EventKind.ENGINE_BUILDING,
    EventKind.COORDINATOR_LOADING,
    EventKind.LINK_CONNECTING,
    EventKind.PROBE_DONE,
    EventKind.WORKER_CALIBRATING,
)
"""Kinds that are shown as numbers, not in the event log."""
_LOAD_ENDED = (EventKind.COORDINATOR_READY, EventKind.COORDINATOR_ADOPTED, EventKind.COORDINATOR_FAILED)


@dataclass(slots=True)
class RequestCounts:
    """How many requests a router has received, counted from its first one, since the bus keeps only recent events.

    Attributes:
        total, failed: so far.
        running: now.
    """

    total: int = 0
    failed: int = 0
    running: int = 0

    def count(self, event: Event) -> None:
        """Count the event if it is about a request."""
        if event.kind == EventKind.REQUEST_STARTED:
            self.total += 1
            self.running += 1
        elif event.kind == EventKind.REQUEST_FINISHED:
            self.running -= 1
            self.failed += event.data.get("status") in ("error", "timeout")


@dataclass(slots=True)
class LiveFigures:
    """What only events report, and as much of it as a view shows.

    Attributes:
        requests: the counts.
        round_trips_ms: of each worker and Ollama node, by the number of the probe.
        free_bytes: of each worker's memory at its last probe. Local workers share their machine's memory, which
            changes for all of them at the same time; views get the new value of a few workers at a time.
        last_error: of each worker: why it was last lost.
        last_answer: a description, by the URL of the coordinator or node.
        starting: models that are being loaded: a description, and the share that is done.
        events: by number, the oldest first.
    """

    requests: RequestCounts = field(default_factory=RequestCounts)
    round_trips_ms: dict[str, dict[int, float]] = field(default_factory=dict)
    free_bytes: dict[str, int] = field(default_factory=dict)
    last_error: dict[str, str] = field(default_factory=dict)
    last_answer: dict[str, str] = field(default_factory=dict)
    starting: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    events: dict[int, Event] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[Event]) -> LiveFigures:
        """What these events have reported, the oldest first."""
        figures = cls()
        for number, event in enumerate(events):
            figures.record(number, event)
        return figures

    def record(self, number: int, event: Event) -> None:
        """Add what an event reports; `number` is higher than those of the events before."""
        match event.kind:
            case EventKind.PROBE_DONE:
                if event.data.get("round_trip_ms") is not None:
                    self.record_round_trip(event.subject, number, event.data["round_trip_ms"])
            case EventKind.WORKER_LOST:
                self.last_error[event.subject] = event.message
            case EventKind.WORKER_REMOVED | EventKind.WORKER_STOPPED:
                self.last_error.pop(event.subject, None)
                self.round_trips_ms.pop(event.subject, None)
                self.free_bytes.pop(event.subject, None)
            case EventKind.COORDINATOR_STARTING | EventKind.COORDINATOR_LOADING:
                self.starting[event.subject] = (event.message, event.data.get("share"))
            case EventKind.GATEWAY_LOST:
                self.starting.clear()  # a gateway that was started again does not report how these loads ended
            case EventKind.REQUEST_FINISHED:
                if event.data.get("place") and (description := describe_answer(event.data)):
                    self.last_answer[event.data["place"]] = description
        if event.kind in _LOAD_ENDED:
            self.starting.pop(event.subject, None)
        if event.kind not in _NOT_LOGGED and not self._was_only_looked_for(event):
            self.events[number] = event
            _keep_last(self.events, EVENTS_KEPT)

    def _was_only_looked_for(self, event: Event) -> bool:
        """Whether it reports that this machine's Ollama, which nobody named, does not run, and none has run."""
        if event.kind != EventKind.NODE_ABSENT or event.data.get("is_named") is not False:
            return False
        return (EventKind.NODE_READY, event.subject) not in [
            (each.kind, each.subject) for each in self.events.values()
        ]

    def record_round_trip(self, name: str, number: int, round_trip_ms: float) -> None:
        """Add the result of a probe of a worker or Ollama node."""
        round_trips_ms = self.round_trips_ms.setdefault(name, {})
        round_trips_ms[number] = round_trip_ms
        _keep_last(round_trips_ms, ROUND_TRIPS_KEPT)

    def copy(self) -> LiveFigures:
        """As they are now. Any thread may copy them while events are recorded."""
        return LiveFigures(
            replace(self.requests),
            {name: round_trips_ms.copy() for name, round_trips_ms in self.round_trips_ms.copy().items()},
            self.free_bytes.copy(),
            self.last_error.copy(),
            self.last_answer.copy(),
            self.starting.copy(),
            self.events.copy(),
        )


def describe_answer(figures: Mapping[str, Any]) -> str | None:
    """Speed and delay of a finished answer, from its event's data; None if the event has neither."""
    known = []
    if figures.get("tokens_per_s"):
        known.append(f"{figures['tokens_per_s']:.3g} tokens/s")
    if figures.get("ttft_ms") is not None:
        known.append(f"first token after {format_ms(figures['ttft_ms'])}")
    return ", ".join(known) or None


def _keep_last(numbered: dict[int, Any], count: int) -> None:
    while len(numbered) > count:
        del numbered[next(iter(numbered))]
