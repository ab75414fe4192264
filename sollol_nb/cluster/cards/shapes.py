"""The parts of a view of a cluster: plain data, frozen, and as JSON by `as_data`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from sollol_nb.text.palette import Role

Icon = Literal["added", "removed", "lost", "ready", "loading", "changed", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Pill:
    """A state in a word or two. Its colours and its mark are `palette.PILLS` and `palette.MARKS` of its role."""

    text: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One worker's part of the layers of a model, in the layer bar and in the table below it.

    Attributes:
        key: the worker's endpoint.
        layers: `0-4`, or `10-11 + output`.
        worker: its name, shortened: the label inside the bar.
        name: its whole name.
        tooltip: planned and actual layers, weights and KV cache, one fact per line.
        share: of the bar's width, 0 to 1.
        color: one of `palette.SEGMENTS`; text on it is `palette.SEGMENT_TEXT`.
        units: `6 of 6 units`; units are the model's blocks and its output layer.
        weights, kv: `2.3 MiB`, with the planned size where that differs.
        time: `1.96 ms (47 %)` of each token; "" if unknown.
        time_share: the same as a part of a token, 0 to 1; None if unknown.
        actual_share: of the bar's width, by the actual units, where they are not those that were planned.
    """

    key: str
    layers: str
    worker: str
    name: str
    tooltip: str
    share: float
    color: str
    units: str
    weights: str
    kv: str
    time: str = ""
    time_share: float | None = None
    actual_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model that is loaded, or is being loaded.

    Attributes:
        key: the coordinator's URL; of a model that is being loaded its name.
        title: its short name.
        tooltip: the path of its file; "" if not known.
        pill: `ready`, `answering`, `loading`, `standby`.
        progress: share of a load that is done, 0 to 1; None if it is not loading, or if that is not known.
        figures: one line of figures with units, the most important first, to be joined with ` · `.
        note: what is special about it: `a tiny demo model, not a general one`.
        segments: the layer bar; empty where the model is not sharded.
        facts: name and value of what few people need, for a part that is folded.
        why: why its layers are planned like this; empty if they are not planned. Commands are in backticks.
        is_own: whether this router started or adopted it, so that its controls work.
    """

    key: str
    title: str
    pill: Pill
    tooltip: str = ""
    progress: float | None = None
    figures: tuple[str, ...] = ()
    note: str = ""
    segments: tuple[Segment, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    why: tuple[str, ...] = ()
    is_own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One worker in one line.

    Attributes:
        key: its endpoint.
        name: how people call it, without its domain.
        tooltip: its endpoint where it has another name, what is wrong with it (as in `ClusterCards.problems`), its
            protocol, and its speed if measured.
        pill: its state.
        used: share of its memory that is used, 0 to 1; None if unknown.
        memory: `22.4 of 23.5 GiB free`; "" if unknown.
        round_trip: `0.15 ms`; "" if unknown.
        held_by: short name of the model that holds it, `demo (standby)` of a standby; "" if none does.
        detail: how far it is, or why it is not used; "" where the pill or a problem says all. Commands are in
            backticks.
        fold: "", or the key of `ClusterCards.folds` under which it is folded.
    """

    key: str
    name: str
    tooltip: str
    pill: Pill
    used: float | None = None
    memory: str = ""
    round_trip: str = ""
    held_by: str = ""
    detail: str = ""
    fold: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """One Ollama node in one line.

    Attributes:
        key: its URL.
        name: its URL without `http://`.
        pill: its state.
        loaded: short names of the models in its memory.
        tooltip: the whole names of those, or what is wrong.
        figures: one line of figures with units, to be joined with ` · `.
        round_trip: `0.9 ms`; "" if unknown.
    """

    key: str
    name: str
    pill: Pill
    loaded: tuple[str, ...] = ()
    tooltip: str = ""
    figures: tuple[str, ...] = ()
    round_trip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What a button does: an action of `%sollol_cluster` with its arguments.

    Attributes:
        name: `start`, `remove` or `replan`.
        arguments: as on the magic's line: a number, endpoints, models.
        label: the button's text.
    """

    name: Literal["start", "remove", "replan"]
    arguments: tuple[str, ...]
    label: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What needs attention, and what to do.

    Attributes:
        text: one line.
        command: what to type; "" if there is nothing to do. It begins with `%` if it belongs into a cell; any
            other is a command for a terminal of the machine concerned.
        action: what a button can do here; None if nothing.
        role: `bad`; `busy` for a hint, such as a better layout; `idle` for what to do first.
        key: equal as long as it is the same problem.
        details: more lines, to be folded: each worker of ten.
    """

    text: str
    command: str = ""
    action: Action | None = None
    role: Role = "bad"
    key: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLine:
    """Events of one kind that came one after the other, as one line.

    Attributes:
        key: the number of the first of them.
        kind: an `EventKind`.
        icon: what it is, for a symbol: `ICONS` of `events.py`.
        role: its colour.
        text: what happened, to whom.
        at: `time.time()` of the last one.
        count: how many events.
        messages: all of their messages where there are several, the newest first.
    """

    key: str
    kind: str
    icon: Icon
    role: Role
    text: str
    at: float
    count: int = 1
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCards:
    """A whole cluster, in the order in which a view shows it.

    Attributes:
        summary: one line about requests; "" where there were none.
        problems: what needs attention, the worst first.
        models: loading, running, standbys.
        workers: in the order in which they became known.
        workers_summary: `12 workers: 2 held, 10 down`.
        folds: a line for each group of workers that is folded, by `WorkerRow.fold`.
        nodes: Ollama nodes.
        nodes_summary: as for workers.
        invitations: lines about open invitations.
        events: the newest first.
    """

    summary: str = ""
    problems: tuple[Problem, ...] = ()
    models: tuple[ModelCard, ...] = ()
    workers: tuple[WorkerRow, ...] = ()
    workers_summary: str = ""
    folds: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[NodeRow, ...] = ()
    nodes_summary: str = ""
    invitations: tuple[str, ...] = ()
    events: tuple[EventLine, ...] = ()


KEYED = ("problems", "models", "workers", "nodes", "events")
"""Parts of `ClusterCards` that are dicts by key in `as_data`, so that a change of one is a small patch."""


def as_data(value: Any) -> Any:
    """Cards, or a part of them, as JSON has it.

    Empty values are left out, and relative times, which change all the time. Of a whole cluster, the parts named
    in `KEYED` are dicts by key, with the position as `n`.
    """
    if is_dataclass(value) and not isinstance(value, type):
        data = {part.name: as_data(getattr(value, part.name)) for part in fields(value)}
        if isinstance(value, ClusterCards):
            data |= {
                name: {part.pop("key"): part | {"n": n} for n, part in enumerate(data[name])} for name in KEYED
            }
            return data
        return {name: item for name, item in data.items() if item not in (None, "", [], {}) or name == "key"}
    if isinstance(value, Mapping):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_data(item) for item in value]
    return value
