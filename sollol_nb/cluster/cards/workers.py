"""Workers and Ollama nodes as rows: one line each, and many of a kind folded into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sollol_nb.cluster.cards.shapes import NodeRow, Pill, WorkerRow
from sollol_nb.cluster.live_figures import MEMORY_STEPS, LiveFigures
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeState, NodeStatus
from sollol_nb.settings.endpoints import is_target
from sollol_nb.text.palette import Role
from sollol_nb.text.short_names import short_name, without_domains, without_home
from sollol_nb.text.tables import counted, format_bytes

UNFOLDED = 3
"""More workers with a problem than this are folded."""
ROWS = 12
"""More workers without a problem than this are folded."""
FOLDED_BAD, FOLDED_MORE = "bad", "more"

ROLES: Mapping[str, Role] = {
    "free": "ok",
    "held": "busy",
    "busy": "busy",
    "connecting": "busy",
    "installing": "busy",
    "duplicate": "idle",
    "unknown": "idle",
    NodeState.READY: "ok",
}
"""Of the state of a worker or node; of others `bad`."""
WORDS = {"unknown": "not checked yet", NodeState.ABSENT: "down", NodeState.COOLING: "failed"}
"""States that the views name differently."""


def role_of(state: str) -> Role:
    """What a worker's or node's state means."""
    return ROLES.get(state, "bad")


def worker_rows(
    workers: Sequence[WorkerStatus], live: LiveFigures
) -> tuple[tuple[WorkerRow, ...], Mapping[str, str]]:
    """The rows, and a line for each group of them that is folded."""
    names = without_domains(worker.label for worker in workers)
    rows = [_worker(worker, names[worker.label], live) for worker in workers]
    folds: dict[str, str] = {}
    bad = [row for row in rows if row.pill.role == "bad"]
    if len(bad) > UNFOLDED:
        rows = [replace(row, fold=FOLDED_BAD) if row.pill.role == "bad" else row for row in rows]
        folds[FOLDED_BAD] = _states_of(bad, "worker", "workers")
    more = [row for row in rows if row.pill.role != "bad"][ROWS:]
    if more:
        keys = {row.key for row in more}
        rows = [replace(row, fold=FOLDED_MORE) if row.key in keys else row for row in rows]
        folds[FOLDED_MORE] = _states_of(more, "more worker", "more workers")
    return tuple(rows), folds


def summary_of(rows: Sequence[WorkerRow] | Sequence[NodeRow], noun: str) -> str:
    """`12 workers: 2 held, 10 down`; "" without any."""
    return _states_of(rows, noun, noun + "s") if rows else ""


def _states_of(rows: Iterable[WorkerRow | NodeRow], singular: str, plural: str) -> str:
    counts = Counter(row.pill.text for row in rows)
    total = sum(counts.values())
    if len(counts) == 1:
        return f"{total:,} {singular if total == 1 else plural}: {'all ' if total > 1 else ''}{next(iter(counts))}"
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items())
    return f"{total:,} {plural}: {states}"


def used_share(worker: WorkerStatus, live: LiveFigures) -> float | None:
    """How much of its memory is used, 0 to 1; None if not known."""
    if worker.state not in ("free", "held") or worker.probe is None or not worker.probe.total_bytes:
        return None
    return round(1 - _free_bytes(worker, live) / worker.probe.total_bytes, 2)


def _free_bytes(worker: WorkerStatus, live: LiveFigures) -> int:
    """Its free memory, in visible steps."""
    step = max(1, (worker.probe.total_bytes if worker.probe else 0) // MEMORY_STEPS)
    return live.free_bytes.get(worker.endpoint, worker.capacity.free_bytes) // step * step


def _worker(worker: WorkerStatus, name: str, live: LiveFigures) -> WorkerRow:
    probe, is_well, role = worker.probe, worker.state in ("free", "held"), role_of(worker.state)
    memory, round_trip, protocol = "", "", ""
    word = WORDS.get(worker.state, worker.state)
    if worker.state == "unknown" and is_target(worker.endpoint):
        word = "not connected"
    if is_well and probe is not None and probe.total_bytes:
        memory = f"{_of(format_bytes(_free_bytes(worker, live)), format_bytes(probe.total_bytes))} free"
    if is_well:
        round_trip = _round_trip(worker.endpoint, probe.round_trip_ms if probe else None, live)
    if probe is not None and probe.protocol:
        protocol = "RPC " + ".".join(map(str, probe.protocol))
    held_by = short_name(worker.held_by) if worker.held_by else ""
    held_by += " (standby)" if held_by and worker.detail.startswith("held by the standby ") else ""
    last_error = live.last_error.get(worker.endpoint, "") if is_well else ""
    return WorkerRow(
        key=worker.endpoint,
        name=name,
        tooltip="\n".join(
            filter(
                None,
                (
                    worker.endpoint if name != worker.endpoint else "",
                    "started on this machine" if worker.is_local else "",
                    without_home(worker.detail) if worker.state == "held" or role == "bad" else "",
                    protocol,
                    f"calibrated: {worker.calibration.describe()}" if worker.calibration else "",
                    f"last error: {without_home(last_error)}" if last_error else "",
                ),
            )
        ),
        pill=Pill(word, role),
        used=used_share(worker, live),
        memory=memory,
        round_trip=round_trip,
        held_by=held_by,
        detail="" if is_well or role == "bad" else worker.detail.removeprefix(f"{word}; "),
    )


def node_row(node: NodeStatus, live: LiveFigures) -> NodeRow:
    """An Ollama node as a row."""
    is_ready = node.state == NodeState.READY
    pill = Pill(WORDS.get(node.state, node.state), role_of(node.state))
    if node.running:
        waiting = f", {node.waiting} waiting" if node.waiting else ""
        pill = Pill(f"answering {node.running} of {node.slots}{waiting}", "busy")
    figures = []
    if is_ready:
        figures += [] if node.ms_per_token is None else [f"{1000 / node.ms_per_token:.3g} tokens/s"]
        figures += [f"{format_bytes(node.loaded_bytes)} loaded"] if node.loaded_bytes else []
        figures += [counted(len(node.models), "model") + " on disk"]
    answer = live.last_answer.get(node.url)
    return NodeRow(
        key=node.url,
        name=node.url.removeprefix("http://"),
        pill=pill,
        loaded=tuple(map(short_name, node.loaded_models)),
        tooltip="\n".join(node.loaded_models) if is_ready else node.last_error or "",
        figures=(*figures, f"last answer: {answer}") if answer and is_ready else tuple(figures),
        round_trip=_round_trip(node.url, node.round_trip_ms, live) if is_ready else "",
    )


def _of(part: str, whole: str) -> str:
    """`22.4 of 23.5 GiB`; with both units where they differ."""
    unit = whole.rpartition(" ")[2]
    return f"{part.removesuffix(f' {unit}')} of {whole}"


def _round_trip(name: str, seen_ms: float | None, live: LiveFigures) -> str:
    """The newest one."""
    newest_ms = next(reversed(live.round_trips_ms.get(name, {}).values()), seen_ms)
    return "" if newest_ms is None else f"{newest_ms:.2g} ms" if newest_ms < 99.5 else f"{newest_ms:.0f} ms"
