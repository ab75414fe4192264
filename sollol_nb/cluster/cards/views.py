"""Cards as text, and as HTML for saved notebooks and for front ends without widgets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.cluster.cards.shapes import ClusterCards, EventLine, ModelCard, NodeRow, Problem, WorkerRow
from sollol_nb.layers.plan import reason_lines
from sollol_nb.text import palette
from sollol_nb.text.short_names import fitted_name

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parents[1] / "templates"
GLYPHS = {
    "added": "+",
    "removed": "−",  # noqa: RUF001 - as wide as the plus
    "lost": "✕",
    "ready": "✓",
    "loading": "…",
    "changed": "⇄",
    "warning": "⚠",
    "info": "·",
}
"""For icons of events, where there are no pictures."""
LABELLED_SHARE, NAMED_SHARE = 0.03, 0.12
"""Narrower segments of a layer bar have no layers, or no name, in them."""
BAR_CHARS = 20
LAST_EVENTS = 5
"""So many lines of events are shown, and earlier ones only on request."""
NAME_CHARS = 32
"""Of a longer name in a row of the HTML, the middle is left out; its tooltip has all of it."""


def as_html(cards: ClusterCards) -> str:
    """HTML without a style sheet, scripts or pictures, readable in light and dark themes, and without styles."""
    return str(
        _environment()
        .get_template("cluster.html.j2")
        .render(
            cards=cards,
            clock_time=_clock_time,
            event_text=_event_text,
            fitted=fitted_name,
            name_chars=NAME_CHARS,
            fills=palette.PILLS["any"],
            glyphs=GLYPHS,
            labelled_share=LABELLED_SHARE,
            last_events=LAST_EVENTS,
            run_label=run_label,
            marks=palette.MARKS,
            named_share=NAMED_SHARE,
            segment_text=palette.SEGMENT_TEXT,
            used_color=palette.PILLS["any"]["busy"].background,
        )
    )


def as_text(cards: ClusterCards, *, verbose: bool = False) -> str:
    """For terminals.

    Args:
        verbose: all reasons of each plan and all that is folded.
    """
    lines = [*_problem_lines(cards.problems, verbose=verbose)]
    for model in cards.models:
        lines += _model_lines(model, verbose=verbose)
    if not cards.models:
        lines.append("no coordinator is running")
    lines.append(cards.workers_summary or "no worker is known")
    shown = [worker for worker in cards.workers if verbose or not worker.fold]
    lines += _columns(_worker_cells(worker) for worker in shown)
    lines += [] if verbose else [f"  {text} (shown with -v)" for text in cards.folds.values()]
    lines += cards.invitations
    if cards.nodes:
        lines += [cards.nodes_summary, *_columns(map(_node_cells, cards.nodes))]
    lines += ["last events"] if cards.events else []
    for event in cards.events if verbose else cards.events[:LAST_EVENTS]:
        lines.append(f"  {_clock_time(event)}  {GLYPHS[event.icon]} {_event_text(event)}")
    if not verbose and len(cards.events) > LAST_EVENTS:
        lines.append(f"  {len(cards.events) - LAST_EVENTS} earlier (shown with -v)")
    return "\n".join(lines)


def run_label(command: str) -> str:
    """What stands before a command of a problem."""
    return "run" if command.startswith("%") else "run in a terminal there"


def _clock_time(event: EventLine) -> str:
    """When it was, and not how long ago: who reads a snapshot later does not know when it was made."""
    return time.strftime("%H:%M:%S", time.localtime(event.at))


def _event_text(event: EventLine) -> str:
    is_repeated = event.count > 1 and event.text == event.messages[0]
    return f"{event.text} ({event.count} times)" if is_repeated else event.text


def _problem_lines(problems: Iterable[Problem], *, verbose: bool) -> Iterator[str]:
    for problem in problems:
        yield f"{palette.MARKS[problem.role]} {problem.text}"
        if problem.command:
            yield f"  {run_label(problem.command)}: {problem.command}"
        if verbose:
            yield from (f"  {detail}" for detail in problem.details)


def _model_lines(model: ModelCard, *, verbose: bool) -> Iterator[str]:
    yield f"{model.title}  {palette.MARKS[model.pill.role]} {model.pill.text}"
    yield f"  {' · '.join(model.figures)}"
    if model.progress is not None:
        yield f"  {_bar(model.progress)}"
    if model.note:
        yield f"  {model.note}"
    for line in reason_lines(model.why, verbose=verbose):
        yield f"  {line}"
    yield from _columns(
        (
            _bar(segment.share),
            segment.layers,
            segment.name,
            f"{segment.units} units",
            f"{segment.weights} weights",
            f"{segment.kv} KV cache",
            segment.time,
        )
        for segment in model.segments
    )
    facts = [f"{name}: {value}" for name, value in model.facts if verbose or name != "file"]
    yield from (f"  {fact}" for fact in facts) if verbose else [f"  {' · '.join(facts)}"]


def _worker_cells(worker: WorkerRow) -> tuple[str, ...]:
    state = f"{palette.MARKS[worker.pill.role]} {worker.pill.text}"
    holder = f"held by {worker.held_by}" if worker.held_by else ""
    if worker.detail:
        return worker.name, state, worker.detail
    return worker.name, state, worker.memory, worker.round_trip, holder


def _node_cells(node: NodeRow) -> tuple[str, ...]:
    state = f"{palette.MARKS[node.pill.role]} {node.pill.text}"
    loaded = ", ".join(node.loaded) or ("nothing loaded" if node.figures else "")
    return node.name, state, loaded, " · ".join(node.figures), node.round_trip


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines whose cells stand below each other; the last cell of a row may be of any length."""
    known = list(rows)
    count = max(map(len, known), default=0)
    widths = [max((len(row[at]) for row in known if at < len(row) - 1), default=0) for at in range(count)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in known
    ]


def _bar(share: float) -> str:
    filled = max(1, round(share * BAR_CHARS))
    return "█" * filled + "·" * (BAR_CHARS - filled)


@lru_cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
