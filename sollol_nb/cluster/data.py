"""A cluster's state as plain data for a live view: dicts keyed by endpoint or URL, so that changes are small patches.

| key | holds, by |
|---|---|
| `workers` | endpoint: `n` (order), `name` and `target` (of those that are reached through links), `state`, `held_by`, `used` memory (0 to 1), `rtt` (ms, by probe number), `last_error`, `local` (1 if started on this machine) |
| `coordinators` | URL: `n`, `model`, `path`, `token_ms` (measured), `predicted_ms`, `advice` (`text`, and `layout` as pairs of endpoint and units), `segments` by endpoint (`n`, `layers`, `units`, `actual` units), `running`, `waiting`, `slots`, `own` (1 if this router started or adopted it), `standby` (of a standby: `starting` or `ready`) |
| `nodes` | URL of an Ollama node: `n`, `state`, `rtt` (as for workers), `running`, `waiting`, `slots` |
| `starting` | model that is being loaded: `share` (0 to 1) |
| `events` | number of the event: `at`, `kind`, `message` |
| `totals` | requests: `running`, `waiting`, `total`, `failed` |
| `cards` | all of it as people look at it (`cards/shapes.py`): `models`, `workers`, `nodes`, `problems`, `events` by key with their order as `n`, `summary`, `workers_summary`, `nodes_summary`, `folds`, `invitations` |
| `closed` | present once the router was closed: nothing changes any more |
| `unreachable` | while a notebook's gateway does not answer: one line about it |

Numbers are rounded to what a view shows, so that noise causes no traffic. Unknown values are left out.

`patch_between` gives the difference of two states as a JSON merge patch (RFC 7396). In a patch, a key with None is
removed, a dict is a patch of the dict at that key, and any other value (lists too) replaces the old one. That is why a
state never holds None.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from sollol_nb.cluster.cards.cards import cards_of
from sollol_nb.cluster.cards.shapes import as_data
from sollol_nb.cluster.cards.workers import used_share
from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment
from sollol_nb.cluster.live_figures import LiveFigures
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.runtime.events import Event


def cluster_data(status: ClusterStatus, own: Iterable[str]) -> dict[str, Any]:
    """The state as plain data.

    Args:
        status: the cluster now.
        own: URLs of this router's coordinators; the others belong to other kernels and cannot be controlled.
    """
    own, live = set(own), status.live
    backends: list[CoordinatorStatus | NodeStatus] = [*status.coordinators, *status.nodes]
    return {
        "workers": {worker.endpoint: _worker(n, worker, live) for n, worker in enumerate(status.workers)},
        "coordinators": {
            coordinator.url: _coordinator(n, coordinator, live, is_own=coordinator.url in own)
            for n, coordinator in enumerate(status.coordinators)
        },
        "nodes": {node.url: _node(n, node, live) for n, node in enumerate(status.nodes)},
        "starting": {model: _known(share=share) for model, (_, share) in live.starting.items()},
        "events": {str(number): _event(event) for number, event in live.events.items()},
        "totals": {
            "running": sum(backend.running for backend in backends),
            "waiting": sum(backend.waiting for backend in backends),
            "total": live.requests.total,
            "failed": live.requests.failed,
        },
        "cards": as_data(cards_of(status, own=own)),
    }


def patch_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The patch that turns `before` into `after`; empty when they are equal."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = patch_between(old, value)
            if inner:
                patch[key] = inner
        elif key not in before or old != value:
            patch[key] = value
    return patch


def patched(before: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch turns `before` into; parts that it does not touch stay the same objects."""
    after = dict(before)
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        elif isinstance(value, Mapping):
            old = after.get(key)
            after[key] = patched(old if isinstance(old, Mapping) else {}, value)
        else:
            after[key] = value
    return after


def _worker(number: int, worker: WorkerStatus, live: LiveFigures) -> dict[str, Any]:
    return _known(
        n=number,
        name=worker.name or None,
        target=worker.target or None,
        state=worker.state,
        held_by=worker.held_by,
        used=used_share(worker, live),
        rtt=_round_trips(worker.endpoint, live) if worker.state not in ("down", "lost") else None,
        last_error=live.last_error.get(worker.endpoint),
        local=1 if worker.is_local else None,
    )


def _round_trips(name: str, live: LiveFigures) -> dict[str, float] | None:
    """Milliseconds of the last probes of a worker or node, by their number; None without any."""
    round_trips_ms = live.round_trips_ms.get(name, {})
    return {str(number): _rounded(ms, 2) for number, ms in round_trips_ms.items()} or None


def _coordinator(
    number: int, coordinator: CoordinatorStatus, live: LiveFigures, *, is_own: bool
) -> dict[str, Any]:
    return _known(
        n=number,
        model=coordinator.model,
        path=coordinator.model_path or None,
        token_ms=_digits(coordinator.token_ms, 3),
        predicted_ms=_digits(coordinator.predicted_token_ms, 3),
        running=coordinator.running,
        waiting=coordinator.waiting,
        slots=coordinator.slots,
        own=1 if is_own else None,
        standby=coordinator.standby or None,
        segments={segment.endpoint: _segment(n, segment) for n, segment in enumerate(coordinator.segments)},
        advice=_advice(coordinator),
    )


def _advice(coordinator: CoordinatorStatus) -> dict[str, Any] | None:
    if not coordinator.advice:
        return None
    return {"text": coordinator.advice, "layout": [[*part] for part in coordinator.advised_layout]}


def _segment(number: int, segment: LayerSegment) -> dict[str, Any]:
    return _known(n=number, layers=segment.layers, units=segment.units, actual=segment.actual_units)


def _node(number: int, node: NodeStatus, live: LiveFigures) -> dict[str, Any]:
    return _known(
        n=number,
        state=node.state,
        rtt=_round_trips(node.url, live),
        running=node.running,
        waiting=node.waiting,
        slots=node.slots,
    )


def _event(event: Event) -> dict[str, str]:
    at = time.strftime("%H:%M:%S", time.localtime(event.at))
    return {"at": at, "kind": event.kind, "message": event.message}


def _digits(number: float | None, digits: int) -> float | None:
    return None if number is None else _rounded(number, digits)


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
