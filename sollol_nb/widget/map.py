"""The cluster map: an anywidget that draws a cluster's plain state in the browser (`assets/cluster_map.js`).

The JavaScript travels in the widget's own state: nothing is fetched, nothing is built. The front end gets the
whole state when a model of it opens, and merge patches as custom messages from then on. So the state is no
ordinary trait: it is made when it is asked for (by a page that opens, or by whoever saves widgets), and is never
sent by itself. Saving a notebook keeps what the front end has, patches included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from sollol_nb.text import palette

ASSETS = Path(__file__).parent / "assets"
SOURCE = ASSETS / "cluster_map.js"
STYLE = (
    f".sollol-cluster {{ --sollol-bad: {palette.BAD}; --sollol-used: {palette.SKY_BLUE};"
    f" --sollol-segment-text: {palette.SEGMENT_TEXT}; }}\n"
    + (ASSETS / "cluster_map.css").read_text(encoding="utf-8")
)
"""The style sheet, after the palette's colours as the variables that it uses."""

OnView = Callable[[str, bool], None]
"""Told that a view (by its id) is shown, again and again while it is, or that it has gone."""


def _current(_: object, widget: ClusterMap) -> dict[str, Any]:
    return widget.current()


class ClusterMap(anywidget.AnyWidget):
    """The map of one cluster, shown in as many places as one likes.

    Args:
        current: gives the plain state (see `cluster_data`).
        on_view: told which views there are.
    """

    _esm = SOURCE
    _css = STYLE
    state = traitlets.Any(0).tag(sync=True, to_json=_current)

    def __init__(self, current: Callable[[], dict[str, Any]], on_view: OnView) -> None:
        self.current = current
        super().__init__()
        self.on_msg(lambda _, content, __: _told(content, on_view))

    def change(self, patch: Mapping[str, Any]) -> None:
        """Send a merge patch to all views; from any thread."""
        self.send({"patch": patch})


def _told(content: Any, on_view: OnView) -> None:
    if isinstance(content, Mapping) and isinstance(content.get("view"), str):
        on_view(content["view"], bool(content.get("shown")))
