"""Numbers and durations as callers give them: is it a number, and how many seconds is `1h30m`?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeGuard

SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
"""The units of a duration as Go and Ollama write it."""

_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)[\s,]*")


_LONGEST_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """A value as an error message shows it: on one line, and not much longer."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a caller's class can raise anything
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_SHOWN_CHARS else f"{text[: _LONGEST_SHOWN_CHARS - 1]}…"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float; True and False are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether it is an int; True and False are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> TypeGuard[int | float]:
    """Whether it is a number above 0; infinity is."""
    return is_number(value) and value > 0


def parse_duration(text: str, seconds_per_unit: Mapping[str, float] = SECONDS_PER_UNIT) -> float | None:
    """Seconds of amounts with units (`10m`, `1h30m`, `2 h, 5 m`); None if the text is anything else.

    Args:
        text: lower case.
        seconds_per_unit: the units that may occur.
    """
    amounts = _AMOUNT.findall(text)
    if not amounts or _AMOUNT.sub("", text) or any(unit not in seconds_per_unit for _, unit in amounts):
        return None
    return sum(float(number) * seconds_per_unit[unit] for number, unit in amounts)
