"""What only events report of a cluster: requests, round trips, loads under way, and the events themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from sollol_nb.runtime.events import Event, EventKind

MEMORY_STEPS = 50
"""Free memory is rounded down to a multiple of 1/50 of the total: a step is visible, less is noise."""


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

    requests: RequestCounts
    round_trips_ms: dict[str, dict[int, float]] = field(default_factory=dict)
    free_bytes: dict[str, int] = field(default_factory=dict)
    last_error: dict[str, str] = field(default_factory=dict)
    last_answer: dict[str, str] = field(default_factory=dict)
    starting: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    events: dict[int, Event] = field(default_factory=dict)
