"""Displays of a notebook that are updated in place, also from other threads and later cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def is_kernel(shell: Any) -> bool:
    """Whether output goes to a notebook (a kernel) rather than to a terminal."""
    return hasattr(shell, "kernel")


def make_display(bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Show a mime bundle; gives the function that replaces it."""
    from IPython.display import display

    handle: Any = display(bundle, raw=True, display_id=True)
    return lambda new: handle.update(new, raw=True)


def hide_once(shell: Any, value: object) -> None:
    """Do not show this value as the running cell's own: it is on the screen already. `_` and `Out` get it."""
    printers = shell.display_formatter.ipython_display_formatter

    def nothing(shown: object) -> None:
        if shown is not value:
            raise NotImplementedError  # IPython goes on with the other ways to show it

    before = printers.for_type(type(value), nothing)

    def restore(_: object) -> None:
        shell.events.unregister("post_run_cell", restore)
        if before is not None:
            printers.for_type(type(value), before)
        elif printers.type_printers.get(type(value)) is nothing:
            printers.pop(type(value))

    shell.events.register("post_run_cell", restore)
