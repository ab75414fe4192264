"""What a script of this folder has counted, and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Show = Callable[[str], None]
"""Prints a line at once."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A count that was taken, and whether it is what it must be.

    Attributes:
        what: what was counted.
        counted: the count, as text.
        wanted: what it must be, as text.
        is_met: whether it is.
    """

    what: str
    counted: str
    wanted: str
    is_met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.is_met else 'MISSED'} {self.what}: {self.counted} (goal: {self.wanted})"


def at_most(
    what: str, values: Sequence[float], limit: float, form: Callable[[float], str] = "{:,.0f}".format
) -> Goal:
    """All values must be at most the limit; without any value, the goal is missed.

    Args:
        form: a value as text.
    """
    if not values:
        return Goal(what, "nothing was counted", f"<= {form(limit)}", False)
    middle = sorted(values)[len(values) // 2]
    within = sum(value <= limit for value in values)
    counted = f"median {form(middle)}, most {form(max(values))}, {within} of {len(values)} within"
    return Goal(what, counted, f"<= {form(limit)}", within == len(values))


def all_of(what: str, outcomes: Sequence[bool]) -> Goal:
    """All outcomes must be true; without any, the goal is missed."""
    return Goal(what, f"{sum(outcomes)} of {len(outcomes)}", "all", bool(outcomes) and all(outcomes))


def percent(share: float) -> str:
    """A share as text: `0.15` is `15.0 %`."""
    return f"{share * 100:.1f} %"
