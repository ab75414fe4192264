"""Events as lines: those of one kind that come one after the other are one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from sollol_nb.cluster.cards.shapes import EventLine, Icon
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text.palette import Role

NAMED = 3
"""So many subjects of a group are named."""
GROUPED_WITHIN_S = 60.0
"""Events that are further apart are not one group."""

ICONS: Mapping[EventKind, tuple[Icon, Role]] = {
    **dict.fromkeys(
        (EventKind.WORKER_ADDED, EventKind.WORKER_DISCOVERED, EventKind.WORKER_STARTED, EventKind.WORKER_ADOPTED),
        ("added", "ok"),
    ),
    **dict.fromkeys(
        (
            EventKind.WORKER_RETURNED,
            EventKind.LINK_READY,
            EventKind.COORDINATOR_READY,
            EventKind.COORDINATOR_ADOPTED,
            EventKind.STANDBY_READY,
            EventKind.NODE_READY,
            EventKind.GATEWAY_RETURNED,
        ),
        ("ready", "ok"),
    ),
    **dict.fromkeys(
        (
            EventKind.WORKER_REMOVED,
            EventKind.WORKER_STOPPED,
            EventKind.LINK_STOPPED,
            EventKind.COORDINATOR_STOPPED,
            EventKind.COORDINATOR_MADE_ROOM,
            EventKind.STANDBY_ENDED,
        ),
        ("removed", "idle"),
    ),
    **dict.fromkeys(
        (
            EventKind.WORKER_LOST,
            EventKind.LINK_LOST,
            EventKind.COORDINATOR_LOST,
            EventKind.COORDINATOR_FAILED,
            EventKind.NODE_ABSENT,
            EventKind.NODE_COOLING,
            EventKind.GATEWAY_LOST,
            EventKind.ACTION_FAILED,
        ),
        ("lost", "bad"),
    ),
    **dict.fromkeys((EventKind.COORDINATOR_STARTING, EventKind.STANDBY_STARTING), ("loading", "busy")),
    **dict.fromkeys((EventKind.STANDBY_TAKEN, EventKind.ANSWER_CONTINUED), ("changed", "busy")),
    **dict.fromkeys(
        (
            EventKind.COORDINATOR_PLACED_OTHERWISE,
            EventKind.STANDBY_MISSING,
            EventKind.CONTEXT_REFUSED,
            EventKind.COORDINATOR_ADVICE,
        ),
        ("warning", "busy"),
    ),
}
"""The symbol and the colour of a kind; of others `info` and `idle`."""


def event_lines(events: Mapping[int, Event]) -> tuple[EventLine, ...]:
    """Numbered events, the oldest first, as lines, the newest first."""
    lines = []
    for _, group in groupby(_groups(events.items()), key=lambda item: item[0]):
        numbered = [item[1] for item in group]
        lines.append(_line(numbered[0][0], [event for _, event in numbered]))
    return tuple(reversed(lines))


def _groups(numbered: Iterable[tuple[int, Event]]) -> Iterable[tuple[int, tuple[int, Event]]]:
    """Each event with the number of the group to which it belongs."""
    group, before = 0, None
    for number, event in numbered:
        if before is None or not _belongs(event, before):
            group += 1
        before = event
        yield group, (number, event)


def _belongs(event: Event, before: Event) -> bool:
    return (
        event.kind == before.kind
        and event.at - before.at <= GROUPED_WITHIN_S
        and (_pattern(event) == _pattern(before))
    )


def _name(event: Event) -> str:
    """Its subject as its message names it; "" if that does not."""
    names = (str(event.data.get("name") or ""), event.subject)
    return next((name for name in names if name and name in event.message), "")


def _pattern(event: Event) -> tuple[str, str]:
    """Its message around its subject."""
    name = _name(event)
    if not name:
        return event.message, ""
    before, _, after = event.message.partition(name)
    return before, after.replace(name, "")


def _line(number: int, events: Sequence[Event]) -> EventLine:
    last = events[-1]
    icon, role = ICONS.get(last.kind, ("info", "idle"))
    return EventLine(
        key=str(number),
        kind=str(last.kind),
        icon=icon,
        role=role,
        text=_text(events),
        at=last.at,
        count=len(events),
        messages=tuple(event.message for event in reversed(events)) if len(events) > 1 else (),
    )


def _text(events: Sequence[Event]) -> str:
    """The message; of a group with all of its subjects: `started workers a, b and 8 more with 1 thread`."""
    last, names = events[-1], list(dict.fromkeys(map(_name, events)))
    if len(names) == 1:
        return last.message
    named = ", ".join(names[: NAMED if len(names) > NAMED + 1 else None])
    if len(names) > NAMED + 1:
        named += f" and {len(names) - NAMED} more"
    elif len(names) > 1:
        named = f"{', '.join(names[:-1])} and {names[-1]}"
    before, after = _pattern(last)
    if before.endswith("worker "):
        before = before.removesuffix("worker ") + "workers "
    if before in ("", "workers "):  # not in "the link to a and b was stopped"
        for one, many in ((" is ", " are "), (" was ", " were ")):
            if after.startswith(one):
                after = many + after.removeprefix(one)
    return f"{before}{named}{after}"
