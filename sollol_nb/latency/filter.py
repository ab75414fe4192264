"""Which rows of the latency log to read: names, a span of time, the newest N."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import PurePath

from sollol_nb.errors import ConfigError
from sollol_nb.latency.schema import STATUSES
from sollol_nb.runtime.amounts import is_whole_number, parse_duration
from sollol_nb.text.nearest import nearest

MAX_ROWS = 2**63 - 1  # of SQLite's integers
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_UNIT_NAMES = {
    "s": ("s", "sec", "secs", "second", "seconds"),
    "min": ("m", "min", "mins", "minute", "minutes"),
    "h": ("h", "hour", "hours"),
    "d": ("d", "day", "days"),
    "w": ("w", "week", "weeks"),
}
_SECONDS_PER_UNIT = {name: _UNIT_S[unit] for unit, names in _UNIT_NAMES.items() for name in names}

Moment = datetime | timedelta | str
"""A time (naive ones are local), a span before now, or either as text: `2026-03-01`, `1h`, `2 days`."""


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows to read. None does not limit them.

    Attributes:
        equal: columns and the text that each must have.
        since_s: only rows started at or after this, in seconds since the epoch.
        until_s: only rows started before this.
        last: only the newest N of these.
    """

    equal: tuple[tuple[str, str], ...] = ()
    since_s: float | None = None
    until_s: float | None = None
    last: int | None = None

    @classmethod
    def of(
        cls,
        now_s: float,
        *,
        model: str | None = None,
        backend: str | None = None,
        status: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        last: int | None = None,
    ) -> RowFilter:
        """The filter for arguments as a person gives them; spans are counted back from `now_s`.

        Raises:
            ConfigError: an argument cannot be used.
        """
        if last is not None and not (is_whole_number(last) and 0 < last <= MAX_ROWS):
            raise ConfigError(f"last={last!r} must be a whole number above 0, such as last=20")
        if status is not None and status not in STATUSES:
            near = nearest(status, STATUSES)
            hint = f"did you mean {near!r}?" if near else f"known statuses: {', '.join(STATUSES)}"
            raise ConfigError(f"status={status!r} is unknown; {hint}")
        for name, text in (("model", model), ("backend", backend)):
            if text is not None and not isinstance(text, str | PurePath):
                raise ConfigError(f"{name}={text!r} is not a name; write {name}='...'")
        names = {"model": model, "backend": backend, "status": status}
        return cls(
            equal=tuple((name, str(text)) for name, text in names.items() if text is not None),
            since_s=None if since is None else seconds_of(since, now_s),
            until_s=None if until is None else seconds_of(until, now_s),
            last=last,
        )


def seconds_of(moment: Moment, now_s: float) -> float:
    """A moment in seconds since the epoch; spans are counted back from `now_s`.

    Raises:
        ConfigError: it is neither a time nor a span.
    """
    if isinstance(moment, datetime):
        return moment.timestamp()
    if isinstance(moment, timedelta):
        return now_s - moment.total_seconds()
    if isinstance(moment, str):
        span_s = parse_duration(moment.strip().lower(), _SECONDS_PER_UNIT)
        if span_s is not None:
            return now_s - span_s
        try:
            return datetime.fromisoformat(moment.strip()).timestamp()
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"cannot read {moment!r} as a time; use '1h', '2 days', '2026-03-01 12:00', or a datetime")
