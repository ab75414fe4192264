"""What loading the extension changes in the kernel, and unloading restores: short errors, `asyncio.run` in cells.

IPython asks an exception for `_render_traceback_`. While the extension is loaded, the package's base exceptions
have that method, so that no other module needs to know of IPython.

`asyncio.run(...)` in a cell, where the kernel's own loop runs already, needs nest_asyncio. Its maintained fork is
used: with ipykernel 7 the original loses the next cell when cells are queued. It cannot undo its patches, so this
module saves what they replace, and restores it. `SOLLOL_NEST_ASYNCIO=0` switches this off; nothing in the package
needs it.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import asyncio.futures
import asyncio.tasks
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sollol_nb.errors import BatchInterrupted, SollolError
from sollol_nb.runtime.io_loop import io_loop

_HOOK = "_render_traceback_"
_ERROR_BASES: tuple[type[BaseException], ...] = (SollolError, BatchInterrupted)
_MISSING = object()
_before_nesting: list[tuple[ModuleType | type, dict[str, Any]]] = []


def shorten_errors(is_wanted: Callable[[], bool]) -> None:
    """Show the package's errors as one line without a traceback, whenever `is_wanted()`."""

    def render(error: BaseException, *_: Any) -> list[str]:
        if not is_wanted():
            return "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
        return [f"\x1b[31m{type(error).__name__}\x1b[0m: {text}"]

    for base in _ERROR_BASES:
        setattr(base, _HOOK, render)


def restore_errors() -> None:
    """Show whole tracebacks again."""
    for base in _ERROR_BASES:
        if _HOOK in vars(base):
            delattr(base, _HOOK)


def allow_nested_loops() -> None:
    """Let `asyncio.run` and `run_until_complete` work inside a running loop. Twice is fine."""
    import nest_asyncio2

    if _before_nesting:
        return
    io_loop()  # its thread must run the standard library's own loop, so it starts before the patch
    patched: list[ModuleType | type] = [asyncio, asyncio.events, asyncio.futures, asyncio.tasks, *_loop_classes()]
    _before_nesting.extend((owner, dict(vars(owner))) for owner in patched)
    nest_asyncio2.apply()


def forbid_nested_loops() -> None:
    """Restore everything as it was before `allow_nested_loops`."""
    while _before_nesting:
        owner, before = _before_nesting.pop()
        for name in set(vars(owner)) | set(before):
            value = before.get(name, _MISSING)
            if value is _MISSING:
                delattr(owner, name)
            elif vars(owner).get(name, _MISSING) is not value:
                setattr(owner, name, value)


def _loop_classes() -> list[type]:
    """The classes of this thread's loop that can be patched (those written in Python)."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        loop.close()
    classes = type(loop).__mro__
    return [class_ for class_ in classes if class_ is not object and class_.__module__.startswith("asyncio")]
