"""The cluster widget: the live map of a router's cluster, with controls below it.

The map is drawn by an anywidget (`map.ClusterMap`). Without anywidget the same state is shown as static HTML in an
ipywidgets.HTML, and without any widgets (in a terminal) as text. Front ends seldom save the state of widgets, so a
second output beside the widget holds the state as static HTML. The map's style sheet hides it while the map is
shown; a saved notebook that is opened later or elsewhere shows it. It is renewed after logged events.

Each router has one widget, however often it is shown, so all its views show the same. Views report regularly that
they are shown. When the last one closes, the widget ends its subscription and all probing, and resumes both when
it is shown again. `close()` ends it for good and leaves the last state in its place as static HTML.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets

from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.router.router import Router
from sollol_nb.runtime.io_loop import run_blocking, submit
from sollol_nb.widget.actions import ClusterActions
from sollol_nb.widget.controls import ModelControls, WorkerControls
from sollol_nb.widget.fixes import Fixes
from sollol_nb.widget.suggestion import Suggestion
from sollol_nb.widget.what_if_panel import WhatIfPanel

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

    from sollol_nb.widget.map import ClusterMap

VIEW_LEASE_S = 150.0
"""A view that reported nothing for so long is gone with its page. Pages in the background report once a minute."""
HTML_EVERY_S = 1.0
SNAPSHOT_EVERY_S = 5.0
SNAPSHOTS_KEPT = 4
"""How many of the outputs that show it are kept up to date in the notebook's file: the last ones."""
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_widgets: weakref.WeakKeyDictionary[Router, ClusterWidget] = weakref.WeakKeyDictionary()


def cluster_widget(router: Router) -> ClusterWidget:
    """The widget of an async router's cluster; the same one each time, until it is closed."""
    widget = _widgets.get(router)
    if widget is None or widget.is_closed:
        widget = _widgets[router] = ClusterWidget(router)
    return widget


class ClusterWidget:
    """A router's cluster, live and with controls. It does not keep the router alive.

    Attributes:
        map: the drawing; None without anywidget.
        suggestion: a better layout, where the router knows one; shown without a map.
        fixes: what the buttons of problems do.
        workers, models, what_if: the controls.
        progress: what the controls are doing, or how the last action ended.
        box: all of them, as one ipywidget.
        is_closed: whether it was closed for good.
    """

    def __init__(self, router: Router) -> None:
        self.is_closed = False
        self._state = router.state
        self._lock = threading.RLock()
        self._views: dict[str, float] = {}
        self._is_watching = False
        self._is_cell_running = False
        self._snapshots: deque[DisplayHandle] = deque(maxlen=SNAPSHOTS_KEPT)
        self._due: set[str] = set()
        self._actions, get_router = ClusterActions(router, self._refresh), weakref.ref(router)
        self.workers = WorkerControls(self._actions)
        self.models = ModelControls(self._actions, lambda: _strategy_of(get_router()))
        self.what_if = WhatIfPanel(get_router, self._actions)
        self.suggestion = Suggestion(self._actions, self._compare)
        self.fixes = Fixes(self._actions, lambda: self._state.data)
        self.progress = ipywidgets.HTML().add_class("sollol-progress")
        self.map = _create_map(self)
        self._html = ipywidgets.HTML(self._state.status()._repr_html_()) if self.map is None else None
        controls = ipywidgets.VBox([self.workers.box, self.models.box]).add_class("sollol-controls")
        self._panels = ipywidgets.Accordion(
            [controls, self.what_if.box], titles=("Controls", "What if"), selected_index=None
        ).add_class("sollol-panels")
        # The map shows a suggestion among the problems.
        shown = [self.map] if self.map is not None else [self._html, self.suggestion.box]
        self.box = ipywidgets.VBox([*shown, self.progress, self._panels]).add_class("sollol-widget")

    def __repr__(self) -> str:
        return f"<ClusterWidget: {'closed' if self.is_closed else f'{len(self._views)} views'}>"

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        bundle = self.bundle()
        has_snapshot = _WIDGET_VIEW in bundle and hasattr(get_ipython(), "kernel")
        if has_snapshot:
            bundle["text/plain"] = "Live view of the cluster. Where widgets are not available, its last state:"
        display(bundle, raw=True)
        if has_snapshot:
            self._snapshots.append(display(self._snapshot(), raw=True, display_id=True))

    def bundle(self) -> dict[str, Any]:
        """What is displayed, by MIME type: the widget, and its state as text where there are no widgets."""
        if self.is_closed:
            return self._state.status()._repr_mimebundle_()
        from IPython.core.getipython import get_ipython

        with self._lock:
            self._views["display"] = time.monotonic()  # until the first view reports
            self._is_cell_running = get_ipython() is not None  # the cell that shows it
        run_blocking(self._update_watching())
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {_WIDGET_VIEW: view, "text/plain": str(self._state.status())}

    def close(self) -> None:
        """Close it for good, and leave the last state where it is shown. Closing twice is fine."""
        if self.is_closed:
            return
        self.is_closed = True
        run_blocking(self._update_watching())
        for snapshot in self._snapshots:
            snapshot.update(self._snapshot(), raw=True)
        self._snapshots.clear()
        _close_all(self.suggestion.box)
        _close_all(self.box)

    def _snapshot(self) -> dict[str, str]:
        """The state as a saved notebook keeps it."""
        status = self._state.status()
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        html = f'<div class="sollol-snapshot">{status._repr_html_()}<p>as of {at}</p></div>'
        return {"text/html": html, "text/plain": f"{status}\nas of {at}"}

    # --- watching -------------------------------------------------------------------------------

    def on_view(self, view: str, is_shown: bool) -> None:
        """Called when a view reports that it is shown, or that it closes."""
        with self._lock:
            self._views.pop("display", None)
            if is_shown:
                self._views[view] = time.monotonic()
            else:
                self._views.pop(view, None)
            is_up_to_date = self._is_watching == bool(self._views)
        if not is_up_to_date and not self._state.is_closed:
            submit(self._update_watching())

    async def _update_watching(self) -> None:
        """Watch the cluster's state exactly while there are views."""
        is_wanted = bool(self._views) and not self.is_closed
        if is_wanted and not self._is_watching:
            self._is_watching = True
            self._follow_cells(not self._state.is_closed)
            await self._state.watch(self._on_patch)
            self._refresh()
        elif not is_wanted and self._is_watching:
            self._is_watching = False
            self._follow_cells(False)
            await self._state.unwatch(self._on_patch)

    def _on_patch(self, patch: Mapping[str, Any]) -> None:
        """On the I/O loop: apply a change to the map and the controls."""
        if self.map is not None:
            self.map.send_patch(patch)
        else:
            self._schedule("html", HTML_EVERY_S, self._update_html)
        if "events" in patch:
            self._schedule("snapshots", SNAPSHOT_EVERY_S, self._update_snapshots)
        if patch.keys() & {"workers", "coordinators", "starting", "events", "closed"}:
            self._refresh()
        if "closed" in patch:
            self._follow_cells(False)
        self._drop_lost_views()

    def _schedule(self, name: str, seconds: float, update: Callable[[], None]) -> None:
        """Run an update that is large after a while, once for all changes until then."""

        def run() -> None:
            self._due.discard(name)
            if not self.is_closed:
                update()

        if name not in self._due:
            self._due.add(name)
            asyncio.get_running_loop().call_later(seconds, run)

    def _update_html(self) -> None:
        if self._html is not None:
            unreachable = self._state.data.get("unreachable")
            line = f"<p>{escape(unreachable)}</p>" if unreachable else ""
            self._html.value = self._state.status()._repr_html_() + line

    def _update_snapshots(self) -> None:
        for snapshot in self._snapshots:
            snapshot.update(self._snapshot(), raw=True)

    def _refresh(self) -> None:
        if not self.is_closed:
            for panel in (self.suggestion, self.workers, self.models, self.what_if):
                panel.refresh(self._state.data)
            self.progress.value = escape(self._actions.progress)

    def _compare(self, model: str) -> None:
        """Show a suggested layout on the sliders."""
        self.what_if.show_suggestion(model)
        self._panels.selected_index = 1

    def _on_button(self, button: str, key: str) -> None:
        """Called when a button of a problem was pressed."""
        if button == "fix":
            self.fixes.run(key)
        else:
            self._compare(self.fixes.subject(key))

    def _drop_lost_views(self) -> None:
        if self.map is None or self._is_cell_running:  # views of ipywidgets.HTML do not report
            return
        oldest = time.monotonic() - VIEW_LEASE_S
        with self._lock:
            self._views = {view: reported_at for view, reported_at in self._views.items() if reported_at > oldest}
            if not self._views:
                submit(self._update_watching())

    # Many kernels read no messages of views while a cell runs; reports of that time arrive only after it.

    def _follow_cells(self, is_wanted: bool) -> None:
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is None:
            return
        for name, callback in (("pre_run_cell", self._on_cell_start), ("post_run_cell", self._on_cell_end)):
            if is_wanted:
                shell.events.register(name, callback)
            elif callback in shell.events.callbacks[name]:
                shell.events.unregister(name, callback)

    def _on_cell_start(self, _: object) -> None:
        self._is_cell_running = True

    def _on_cell_end(self, _: object) -> None:
        with self._lock:
            self._is_cell_running = False
            self._views = dict.fromkeys(self._views, time.monotonic())


def _strategy_of(router: Router | None) -> str | None:
    """The router's strategy; None where it is not known: the router is gone, or its gateway has not answered."""
    return router.layer_strategy if router is not None and router.layer_strategy in STRATEGIES else None


def _create_map(widget: ClusterWidget) -> ClusterMap | None:
    try:
        from sollol_nb.widget.map import ClusterMap
    except ImportError:  # anywidget is not installed
        return None
    return ClusterMap(lambda: widget._state.data, widget.on_view, widget._on_button)


def _close_all(widget: ipywidgets.Widget) -> None:
    """Close a widget and its children, with the models of their layouts and styles."""
    for child in getattr(widget, "children", ()):
        _close_all(child)
    for name in ("layout", "style"):
        part = getattr(widget, name, None)
        if part is not None:
            part.close()
    widget.close()
