"""Errors of this package as one line in a cell, without a traceback.

IPython asks an exception for `_render_traceback_`. It is given to the tree's base class, and to that of a stopped
batch, while the extension is loaded, so that the rooms below know nothing of IPython.
`%config Sollol.short_errors = False` shows all again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from sollol_nb.errors import BatchInterrupted, SollolError

_HOOK = "_render_traceback_"
_BASES: tuple[type[BaseException], ...] = (SollolError, BatchInterrupted)


def shorten(wanted: Callable[[], bool]) -> None:
    """Show errors of this package as one line, as long as that is wanted."""

    def render(error: BaseException, *_: Any) -> list[str]:
        if not wanted():
            return "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        words = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
        return [f"\x1b[31m{type(error).__name__}\x1b[0m: {words}"]

    for base in _BASES:
        setattr(base, _HOOK, render)


def restore() -> None:
    """Show whole tracebacks again."""
    for base in _BASES:
        if _HOOK in vars(base):
            delattr(base, _HOOK)
