"""`asyncio.run(...)` in a cell, where the kernel's own loop already runs.

That is what nest_asyncio is for. Its maintained fork is used: with ipykernel 7 the original loses the next cell
when cells are queued. It cannot be undone by itself, so what it replaces is noted before and put back after.
The I/O loop is started first, so that its thread runs the standard library's own loop. `SOLLOL_NEST_ASYNCIO=0`
switches this off; nothing in the package needs it.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import asyncio.futures
import asyncio.tasks
from types import ModuleType
from typing import Any

from sollol_nb.runtime.io_loop import io_loop

_MISSING = object()
_before: list[tuple[ModuleType | type, dict[str, Any]]] = []


def allow() -> None:
    """Let `asyncio.run` and `run_until_complete` work inside a running loop. Twice is fine."""
    import nest_asyncio2

    if _before:
        return
    io_loop()
    places: list[ModuleType | type] = [asyncio, asyncio.events, asyncio.futures, asyncio.tasks, *_loop_classes()]
    _before.extend((place, dict(vars(place))) for place in places)
    nest_asyncio2.apply()


def forbid() -> None:
    """Put everything back as it was before `allow`."""
    while _before:
        place, then = _before.pop()
        for name in set(vars(place)) | set(then):
            value = then.get(name, _MISSING)
            if value is _MISSING:
                delattr(place, name)
            elif vars(place).get(name, _MISSING) is not value:
                setattr(place, name, value)


def _loop_classes() -> list[type]:
    """The classes of this thread's loop that can be patched (those written in Python)."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        loop.close()
    return [one for one in type(loop).__mro__ if one is not object and one.__module__.startswith("asyncio")]
