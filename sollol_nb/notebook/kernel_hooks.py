"""What loading the extension changes in the kernel, and unloading restores: short errors, `asyncio.run` in cells.

IPython asks an exception for `_render_traceback_`. While the extension is loaded, the package's base exceptions
have that method, so that no other module needs to know of IPython.

`asyncio.run(...)` in a cell, where the kernel's own loop runs already, needs nest_asyncio. Its maintained fork is
used: with ipykernel 7 the original loses the next cell when cells are queued. It cannot undo its patches, so this
module saves what they replace, and restores it, unless the user has applied nest_asyncio, too.
`SOLLOL_NEST_ASYNCIO=0` switches this off; nothing in the package needs it.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import asyncio.futures
import asyncio.tasks
import re
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sollol_nb.errors import BatchInterrupted, PullInterrupted, SollolError
from sollol_nb.runtime.io_loop import io_loop

_HOOK = "_render_traceback_"
_ERROR_BASES: tuple[type[BaseException], ...] = (SollolError, BatchInterrupted, PullInterrupted)
_MISSING = object()
_CODE_IN_ERROR = re.compile(r"`([^`\x1b]+)`")
_CODE_STYLE = "\x1b[38;2;28;28;28;48;2;236;236;236m\\1\x1b[0m"
"""Dark on light in every theme: an error's background is the front end's."""
_MARKS = ("_nest_patched", "_nest_asyncio2")
"""What nest_asyncio and nest_asyncio2 set in the module `asyncio` when they patch it."""
_before_nesting: list[tuple[ModuleType | type, dict[str, Any]]] = []


def shorten_errors(is_wanted: Callable[[], bool], *, with_style: bool = False) -> None:
    """Show the package's errors as one line without a traceback, whenever `is_wanted()`.

    Args:
        with_style: show what stands between backticks as code. A notebook's front end knows the colours of
            terminals; a terminal shows the backticks.
    """

    def render(error: BaseException, *_: Any) -> list[str]:
        if not is_wanted():
            return "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
        if not with_style:
            return [f"\x1b[31m{type(error).__name__}\x1b[0m: {text}"]
        # Not in red as well: an error's background is red already, in dark themes a dark one.
        return [f"\x1b[1m{type(error).__name__}\x1b[0m: {_CODE_IN_ERROR.sub(_CODE_STYLE, text)}"]

    for base in _ERROR_BASES:
        setattr(base, _HOOK, render)


def restore_errors() -> None:
    """Show whole tracebacks again."""
    for base in _ERROR_BASES:
        if _HOOK in vars(base):
            delattr(base, _HOOK)


def allow_nested_loops() -> str:
    """Let `asyncio.run` and `run_until_complete` work inside a running loop. Twice is fine.

    Returns:
        Why they do not, where the loop cannot be nested (uvloop), as one line; else "". Nothing is changed then.
    """
    import nest_asyncio2

    if _before_nesting or hasattr(asyncio, "_nest_patched"):  # by the user, who may also undo it
        return ""
    loop_class, is_running = _loop_class()
    if not issubclass(loop_class, asyncio.BaseEventLoop):
        name = f"{loop_class.__module__}.{loop_class.__qualname__}"
        hint = f"asyncio.run(...) does not work in cells here, since {name} cannot be nested; use await instead"
        return hint if is_running else ""  # in a terminal no loop runs while a cell does
    io_loop()  # its thread must run the standard library's own loop, so it starts before the patch
    _before_nesting.extend((owner, dict(vars(owner))) for owner in _patched(loop_class))
    try:
        nest_asyncio2.apply()
        is_done = True
    except ValueError:  # the loop that is set, though none of it runs, is of another class
        is_done = False
    # Without these marks, a user's own nest_asyncio does its work again, and shows that it was applied.
    for mark in _MARKS:
        vars(asyncio).pop(mark, None)
    if not is_done:
        forbid_nested_loops()
    return ""


def forbid_nested_loops() -> None:
    """Restore everything as it was before `allow_nested_loops`, unless the user has nested loops since then."""
    if _MARKS[0] in vars(asyncio):
        _before_nesting.clear()
    while _before_nesting:
        owner, before = _before_nesting.pop()
        for name in set(vars(owner)) | set(before):
            value = before.get(name, _MISSING)
            if value is _MISSING:
                delattr(owner, name)
            elif vars(owner).get(name, _MISSING) is not value:
                setattr(owner, name, value)


def _loop_class() -> tuple[type, bool]:
    """The class of this thread's loops, and whether one runs."""
    try:
        return type(asyncio.get_running_loop()), True
    except RuntimeError:
        loop = asyncio.new_event_loop()
        loop.close()
        return type(loop), False


def _patched(loop_class: type) -> list[ModuleType | type]:
    """What nest_asyncio2 changes: modules, the loop's classes written in Python, the policy's class."""
    classes = [class_ for class_ in loop_class.__mro__ if class_.__module__.startswith("asyncio")]
    policies = [] if sys.version_info >= (3, 14) else [type(asyncio.get_event_loop_policy())]
    return [asyncio, asyncio.events, asyncio.futures, asyncio.tasks, *classes, *policies]
