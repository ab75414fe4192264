"""The name that somebody meant to write: the nearest known one, or none, since a far guess misleads."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST_CHARS = 60
_NOTEBOOK_NAMES = frozenset({"In", "Out", "exit", "quit", "open", "get_ipython"})
"""Variables that IPython puts into every notebook: nobody misspells these in a prompt."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that differs from this one by very few typing errors; None if there is none.

    A typing error is a missing, surplus or wrong character, or two neighbours in the wrong order. Names of three
    to five characters may have one, longer ones two; in shorter ones nothing is certain. Case, and `-` for `_`, do
    not count.
    """
    written = _plain(str(name))
    allowed = 0 if len(written) < 3 else 1 if len(written) < 6 else 2
    candidates = (candidate for candidate in known if _may_be_near(written, candidate, allowed))
    near = min(((_distance(written, _plain(candidate)), candidate) for candidate in candidates), default=None)
    return near[1] if near is not None and near[0] <= allowed else None


def nearest_variable(name: str, known: Iterable[object]) -> str | None:
    """The nearest of a notebook's variables, without hidden ones and those that IPython adds; None if there is
    none."""
    names = (each for each in known if isinstance(each, str) and each[:1] != "_" and each not in _NOTEBOOK_NAMES)
    return nearest(name, names)


def _plain(name: str) -> str:
    return name.casefold().replace("_", "-").strip("-")


def _may_be_near(written: str, known: str, allowed: int) -> bool:
    return len(written) <= _LONGEST_CHARS and abs(len(_plain(known)) - len(written)) <= allowed


def _distance(written: str, known: str) -> int:
    """How many typing errors lead from one text to the other (optimal string alignment distance)."""
    before: list[int] = []
    row = list(range(len(known) + 1))
    for i, character in enumerate(written, start=1):
        two_before, before, row = before, row, [i]
        for j, wanted in enumerate(known, start=1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (character != wanted))
            if i > 1 and j > 1 and character == known[j - 2] and written[i - 2] == wanted:
                best = min(best, two_before[j - 2] + 1)
            row.append(best)
    return row[-1]
