"""Errors of this package as one line in a cell, without a traceback.

IPython asks an exception for `_render_traceback_`. It is given to the tree's base class while the extension is
loaded, so that the rooms below know nothing of IPython.
"""

from __future__ import annotations

from typing import Any

from sollol_nb.errors import SollolError

_HOOK = "_render_traceback_"


def shorten() -> None:
    """Show errors of this package as one line."""
    setattr(SollolError, _HOOK, _one_line)


def restore() -> None:
    """Show whole tracebacks again."""
    if _HOOK in vars(SollolError):
        delattr(SollolError, _HOOK)


def _one_line(error: SollolError, *_: Any) -> list[str]:
    return [f"\x1b[31m{type(error).__name__}\x1b[0m: {error}"]
