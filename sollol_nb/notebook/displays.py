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
    hiding = printers.type_printers.get(type(value))
    if isinstance(hiding, _Hiding):  # not the first of this cell
        hiding.values.append(value)
        return
    hiding = _Hiding([value])
    before = printers.for_type(type(value), hiding)

    def restore(_: object) -> None:
        shell.events.unregister("post_run_cell", restore)
        if printers.type_printers.get(type(value)) is hiding:
            printers.pop(type(value))
            if before is not None:
                printers.for_type(type(value), before)

    shell.events.register("post_run_cell", restore)


class _Hiding:
    """A printer of IPython that shows some values by nothing, and leaves others to the other ways to show them."""

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def __call__(self, shown: object) -> None:
        if not any(one is shown for one in self.values):
            raise NotImplementedError
