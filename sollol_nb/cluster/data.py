"""A cluster's state as plain data for a live view: dicts keyed by endpoint or URL, so that changes are small patches.

| key | holds, by |
|---|---|
| `workers` | endpoint: `n` (order), `state`, `color`, `words`, `free` and `total` memory, `used` (0 to 1), `rtt` (ms, by number of look), ... |
| `coordinators` | URL: `model`, `words`, `time`, `segments` by endpoint, `local` by device, `running`, `waiting`, ... |
| `nodes` | URL of an Ollama node: `state`, `words`, `rtt` (as of workers), `running`, `waiting`, `slots` |
| `starting` | model that is being loaded: `words`, `share` (0 to 1) |
| `events` | number of the event: `at`, `kind`, `words` |
| `totals` | requests: `running`, `waiting`, `asked`, `failed` |
| `closed` | there when the router was closed: nothing changes any more |

Numbers are rounded to what a view shows, so that noise makes no traffic. What is not known is left out.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.cluster.status import (
    ClusterStatus,
    CoordinatorStatus,
    LayerSegment,
    LocalPart,
    node_words,
)
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text.palette import state_color
from sollol_nb.text.tables import format_bytes

MEMORY_STEPS = 50
"""Memory is told in so many steps of the whole: one is seen, less is noise."""


@dataclass(slots=True)
class RequestCounts:
    """How many requests a router has got: counted from its first on, since the bus keeps only its last events.

    Attributes:
        asked, failed: so far.
        under_way: now.
    """

    asked: int = 0
    failed: int = 0
    under_way: int = 0

    def note(self, event: Event) -> None:
        """Count, if it is of a request."""
        if event.kind == EventKind.REQUEST_STARTED:
            self.asked += 1
            self.under_way += 1
        elif event.kind == EventKind.REQUEST_FINISHED:
            self.under_way -= 1
            self.failed += event.data.get("status") in ("error", "timeout")


@dataclass(slots=True)
class Live:
    """What only the bus tells, of as much as a view shows.

    Attributes:
        requests: the counts.
        round_trips_ms: of each worker and Ollama node, by the number of the look.
        free_bytes: of each worker's memory when it was its turn to be looked at: what local workers share changes
            for all of them at once, and is told of a few at a time.
        last_error: of each worker: why it was last lost.
        last_answer: of each place, in words.
        starting: models that are being loaded: words, and the share that is done.
        events: by number, the oldest first.
    """

    requests: RequestCounts
    round_trips_ms: dict[str, dict[int, float]] = field(default_factory=dict)
    free_bytes: dict[str, int] = field(default_factory=dict)
    last_error: dict[str, str] = field(default_factory=dict)
    last_answer: dict[str, str] = field(default_factory=dict)
    starting: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    events: dict[int, Event] = field(default_factory=dict)


def cluster_data(status: ClusterStatus, live: Live, own: Iterable[str]) -> dict[str, Any]:
    """The plain state.

    Args:
        status: what is.
        live: what the bus has told.
        own: URLs of the coordinators of this router; others can only be looked at.
    """
    mine = set(own)
    places: list[CoordinatorStatus | NodeStatus] = [*status.coordinators, *status.nodes]
    return {
        "workers": {one.endpoint: _worker(n, one, live) for n, one in enumerate(status.workers)},
        "coordinators": {
            one.url: _coordinator(n, one, live, is_own=one.url in mine)
            for n, one in enumerate(status.coordinators)
        },
        "nodes": {one.url: _node(n, one, live) for n, one in enumerate(status.nodes)},
        "starting": {model: _known(words=words, share=share) for model, (words, share) in live.starting.items()},
        "events": {str(number): _event(event) for number, event in live.events.items()},
        "totals": {
            "running": sum(one.running for one in places),
            "waiting": sum(one.waiting for one in places),
            "asked": live.requests.asked,
            "failed": live.requests.failed,
        },
    }


def _worker(number: int, worker: WorkerStatus, live: Live) -> dict[str, Any]:
    seen = worker.probe
    is_well = worker.state in ("free", "held")
    free = total = used = protocol = None
    if is_well and seen is not None and seen.total_bytes:
        step, known_bytes = max(1, seen.total_bytes // MEMORY_STEPS), live.free_bytes.get(worker.endpoint)
        free_bytes = (worker.capacity.free_bytes if known_bytes is None else known_bytes) // step * step
        free, total = format_bytes(free_bytes), format_bytes(seen.total_bytes)
        used = round(1 - free_bytes / seen.total_bytes, 2)
    if seen is not None and seen.protocol:
        protocol = "RPC " + ".".join(map(str, seen.protocol))
    return _known(
        n=number,
        state=worker.state,
        color=state_color(worker.state),
        words="" if worker.state == "free" else worker.detail,
        held_by=worker.held_by,
        free=free,
        total=total,
        used=used,
        protocol=protocol,
        rtt=_round_trips(worker.endpoint, live),
        last_error=live.last_error.get(worker.endpoint),
        local=1 if worker.is_local else None,
    )


def _round_trips(place: str, live: Live) -> dict[str, float] | None:
    """Milliseconds of the last looks, by their number; None without any."""
    looks = live.round_trips_ms.get(place, {})
    return {str(number): _rounded(ms, 2) for number, ms in looks.items()} or None


def _coordinator(number: int, one: CoordinatorStatus, live: Live, *, is_own: bool) -> dict[str, Any]:
    return _known(
        n=number,
        model=one.model,
        words=f"{one.strategy} · {one.context_tokens} tokens of context · ready in {one.load_ms / 1000:.2f} s",
        note=one.note or None,
        time=one.token_words or None,
        answer=live.last_answer.get(one.url),
        running=one.running,
        waiting=one.waiting,
        slots=one.slots,
        own=1 if is_own else None,
        segments={segment.place: _segment(n, segment) for n, segment in enumerate(one.segments)},
        local={part.place: _local_part(n, part) for n, part in enumerate(one.local)},
        differences=list(one.differences) or None,
    )


def _segment(number: int, segment: LayerSegment) -> dict[str, Any]:
    return _known(
        n=number,
        layers=segment.layers,
        units=segment.units,
        actual=segment.actual_units,
        color=segment.color,
        weights=_beside(segment.weight_bytes, segment.actual_weight_bytes),
        kv=_beside(segment.kv_bytes, segment.actual_kv_bytes),
        ms=_digits(segment.token_ms, 3),
        part=_digits(segment.time_share, 2),
    )


def _local_part(number: int, part: LocalPart) -> dict[str, Any]:
    return {"n": number, "units": part.units, "weights": part.weight_bytes, "words": part.words}


def _node(number: int, node: NodeStatus, live: Live) -> dict[str, Any]:
    return _known(
        n=number,
        state=node.state,
        color=state_color(node.state),
        words=node_words(node),
        rtt=_round_trips(node.url, live),
        answer=live.last_answer.get(node.url),
        running=node.running,
        waiting=node.waiting,
        slots=node.slots,
    )


def _event(event: Event) -> dict[str, str]:
    at = time.strftime("%H:%M:%S", time.localtime(event.at))
    return {"at": at, "kind": event.kind, "message": event.message}


def _beside(planned_bytes: int, actual_bytes: int | None) -> str:
    actual = "?" if actual_bytes is None else format_bytes(actual_bytes)
    return f"{format_bytes(planned_bytes)} / {actual}"


def _digits(number: float | None, digits: int) -> float | None:
    return None if number is None else _rounded(number, digits)


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def answer_words(facts: Mapping[str, Any]) -> str | None:
    """A finished answer in words, from its event's data; None where it told nothing."""
    told = []
    if facts.get("tokens_per_s"):
        told.append(f"{facts['tokens_per_s']:.3g} tokens/s")
    if facts.get("ttft_ms") is not None:
        told.append(f"first token after {facts['ttft_ms']:.3g} ms")
    return ", ".join(told) or None
