"""Displays of a notebook that are updated in place, also by other threads and later cells; a progress bar.

An Output of ipywidgets (`with out:`, `interact`, a button's callback) takes displays, but none of their updates
(ipywidgets issue 1844), in JupyterLab as in nbclient. There a display is an Output inside the outer one, whose
content is set from here. A frontend without widgets shows what is inside an Output in the cell, and it gets the
same content as updates of the display.
"""

from __future__ import annotations

import contextlib
import html
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tqdm.std import tqdm

from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.text.palette import SKY_BLUE

TERMINAL_CHARS = 78

_BAR_HTML = (
    '<div style="font-size:90%">{text}</div>'
    '<div style="height:.5em;background:#8884;border-radius:3px">'
    '<div style="height:100%;width:{percent}%;background:{color};border-radius:3px"></div></div>'
)

if TYPE_CHECKING:
    _Bar = tqdm[Any]
else:  # generic for type checkers only
    _Bar = tqdm


def is_kernel(shell: Any) -> bool:
    """Whether output goes to a notebook (a kernel) rather than to a terminal."""
    return hasattr(shell, "kernel")


def make_display(
    bundle: dict[str, Any], metadata: dict[str, Any] | None = None
) -> Callable[[dict[str, Any]], None]:
    """Show a mime bundle, as an output with this metadata; returns the function that replaces it."""
    from IPython.display import display

    if is_captured():
        return _make_inner_output(bundle)
    handle: Any = display(bundle, raw=True, metadata=metadata, display_id=True)
    return lambda new: handle.update(new, raw=True, metadata=metadata)


def is_captured() -> bool:
    """Whether an Output of ipywidgets takes what is displayed now."""
    from IPython.core.getipython import get_ipython

    widgets: Any = sys.modules.get("ipywidgets")
    shell: Any = get_ipython()
    if widgets is None or not is_kernel(shell):
        return False
    request = str(shell.parent_header.get("header", {}).get("msg_id") or "")
    known = list(widgets.widgets.widget._instances.values())
    return any(isinstance(each, widgets.Output) and each.msg_id == request != "" for each in known)


def _make_inner_output(bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    import ipywidgets
    from IPython.display import display

    output = ipywidgets.Output()

    def show(new: dict[str, Any]) -> None:
        outputs = ({"output_type": "display_data", "data": new, "metadata": {}},)
        if outputs == output.outputs:
            output.send_state("outputs")  # nbclient may have missed it, see `answers/background.py`
        output.outputs = outputs

    show(bundle)
    shown_instead = output._repr_mimebundle_()
    del shown_instead["text/plain"]
    handle: Any = display({**bundle, **shown_instead}, raw=True, display_id=True)

    def replace(new: dict[str, Any]) -> None:
        show(new)
        handle.update({**new, **shown_instead}, raw=True)

    return replace


@contextlib.contextmanager
def link_progress(events: EventBus) -> Iterator[None]:
    """In this context, show what the links to other machines do, a line for each that is not connected yet."""
    from IPython.core.getipython import get_ipython

    lines: dict[str, str] = {}
    update: Callable[[dict[str, Any]], None] | None = None
    if is_kernel(get_ipython()):
        update = make_display({"text/plain": ""})

    def show() -> None:
        text = "\n".join(f"{line} …" for line in lines.values())
        if update is not None:
            update({"text/plain": text})
        elif sys.stderr.isatty():  # one line that is replaced
            print(f"\r\x1b[K{' '.join(text.splitlines())[:TERMINAL_CHARS]}", end="", file=sys.stderr, flush=True)

    def note(event: Event) -> None:
        if event.kind is EventKind.LINK_CONNECTING:
            lines[event.subject] = event.message
        elif event.kind.source != "link" or lines.pop(event.subject, None) is None:
            return
        show()

    unsubscribe = events.subscribe(note)
    try:
        yield
    finally:
        unsubscribe()
        lines.clear()
        show()


def hide_once(shell: Any, value: object) -> None:
    """Do not show this value as the result of the running cell or callback: it is on the screen already. `_` and
    `Out` get it."""
    printers = shell.display_formatter.ipython_display_formatter
    hiding = printers.type_printers.get(type(value))
    if isinstance(hiding, _Hiding):  # not the first of this cell
        hiding.values.append(value)
        return
    hiding = _Hiding([value])
    previous = printers.for_type(type(value), hiding)

    def restore() -> None:
        shell.events.unregister("post_execute", restore)
        if printers.type_printers.get(type(value)) is hiding:
            printers.pop(type(value))
            if previous is not None:
                printers.for_type(type(value), previous)

    shell.events.register("post_execute", restore)


class _Hiding:
    """A printer of IPython that shows nothing for some values, and leaves all others to the other printers."""

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def __call__(self, shown: object) -> None:
        if not any(value is shown for value in self.values):
            raise NotImplementedError


class TextBar(_Bar):
    """A progress bar as HTML as wide as its cell, and as text: every frontend shows one of them, and a saved
    notebook keeps the last state.

    tqdm's own bar for notebooks is a widget, of which GitHub shows the first state only. A closed bar with
    `leave=False` becomes empty.
    """

    def __init__(self, **settings: Any) -> None:
        self._update: Callable[[dict[str, Any]], None] | None = None
        super().__init__(**settings, file=io.StringIO(), ascii=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar as it is now."""
        text = self._as_text() if msg is None else msg
        bundle = {"text/plain": text, "text/html": self._as_html() if text else ""}
        if self._update is None:
            self._update = make_display(bundle)
        else:
            self._update(bundle)

    def _as_text(self) -> str:
        return self._formatted("{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, ")

    def _as_html(self) -> str:
        text = self._formatted("{desc}: {percentage:.0f} % · {n_fmt} of {total_fmt} [{elapsed}<{remaining}, ")
        percent = 100 * min(self.n / self.total, 1) if self.total else 0
        return _BAR_HTML.format(text=html.escape(text), percent=f"{percent:.1f}", color=SKY_BLUE)

    def _formatted(self, begin: str) -> str:
        """The state as one line, whose length is not limited: a long description must not squeeze the bar."""
        bar_format = begin + "{rate_fmt}{postfix}]" if self.total else None
        return tqdm.format_meter(**{**self.format_dict, "ncols": None, "bar_format": bar_format})

    def close(self) -> None:
        """Show its last state, or nothing."""
        if self.disable:
            return
        super().close()
        self.display(None if self.leave else "")
