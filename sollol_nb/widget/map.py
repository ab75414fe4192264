"""The cluster map: an anywidget that draws a cluster's plain state in the browser (`assets/cluster_map.js`).

The JavaScript is part of the widget's own state: nothing is downloaded or compiled. The front end gets the whole
state when it opens a model of the widget, and merge patches as custom messages from then on. So `state` is not an
ordinary trait: it is computed on request (by a page that opens, or by whoever saves widgets), and Python never
sends it by itself. A saved notebook keeps what the front end has, patches included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import traitlets

from sollol_nb.widget.drawing import SOURCE, STYLE

OnView = Callable[[str, bool], None]
"""Called with the id of a view: with True when it opens and regularly while it is shown, else False."""
OnButton = Callable[[str, str], None]
"""Called when a button of a problem was pressed, with `fix` or `compare` and the key of the problem."""


def _current(_: object, widget: ClusterMap) -> dict[str, Any]:
    return widget.current()


class ClusterMap(anywidget.AnyWidget):
    """The map of one cluster; it can be shown in several places at the same time.

    Args:
        current: returns the plain state (see `cluster_data`).
        on_view: called for each view that opens, stays or closes.
        on_button: called for each button of a problem that is pressed.

    Attributes:
        can_fix: whether problems have buttons; the status page's have none.
    """

    _esm = SOURCE
    _css = STYLE
    state = traitlets.Any(0).tag(sync=True, to_json=_current)
    can_fix = traitlets.Bool(True).tag(sync=True)

    def __init__(self, current: Callable[[], dict[str, Any]], on_view: OnView, on_button: OnButton) -> None:
        self.current = current
        super().__init__()
        self.on_msg(lambda _, content, __: _handle(content, on_view, on_button))

    def send_patch(self, patch: Mapping[str, Any]) -> None:
        """Send a merge patch to all views; from any thread."""
        self.send({"patch": patch})


def _handle(content: Any, on_view: OnView, on_button: OnButton) -> None:
    if not isinstance(content, Mapping):
        return
    if isinstance(content.get("view"), str):
        on_view(content["view"], bool(content.get("shown")))
    for button in ("fix", "compare"):
        if isinstance(content.get(button), str):
            on_button(button, content[button])
