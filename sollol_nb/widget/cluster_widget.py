"""The cluster widget: the live map of a router's cluster, with controls below it.

The map is drawn by an anywidget (`map.ClusterMap`); without anywidget the same state is shown as static HTML in an
ipywidgets.HTML; where there are no widgets at all (a terminal) as text. Front ends seldom save the state of
widgets, so a second output beside the widget holds the state as static HTML: hidden by the map's style sheet while
there is a map, seen in a saved notebook that is opened later or elsewhere, and made anew after logged events.

There is one widget for each router, however often it is shown, so all that show it are in step. Views tell that
they are there; when the last has gone the widget ends its subscription and all looking, and takes them up again
when it is shown again. `close()` ends it for good and leaves the last state in its place as static HTML.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from sollol_nb.router.router import Router
from sollol_nb.runtime.io_loop import run_blocking, submit
from sollol_nb.widget.actions import ClusterActions
from sollol_nb.widget.controls import ModelControls, WorkerControls
from sollol_nb.widget.what_if_panel import WhatIfPanel

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

    from sollol_nb.widget.map import ClusterMap

VIEW_LEASE_S = 150.0
"""A view that has not told for so long has gone with its page. Pages in the background tell once a minute."""
HTML_EVERY_S = 1.0
SNAPSHOT_EVERY_S = 5.0
SNAPSHOTS_KEPT = 4
"""So many of the outputs that show it are kept up to date in the notebook's file: the last ones."""
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_widgets: weakref.WeakKeyDictionary[Router, ClusterWidget] = weakref.WeakKeyDictionary()


def cluster_widget(router: Router) -> ClusterWidget:
    """The widget of a router's cluster; the same one each time, until it is closed."""
    widget = _widgets.get(router)
    if widget is None or widget.is_closed:
        widget = _widgets[router] = ClusterWidget(router)
    return widget


class ClusterWidget:
    """A router's cluster to look at and to steer; the router is not kept alive by it.

    Attributes:
        map: the drawing; None without anywidget.
        workers, models, what_if: the controls.
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
        actions, known = ClusterActions(router, self._refresh), weakref.ref(router)
        self.workers = WorkerControls(actions)
        self.models = ModelControls(actions, lambda: _strategy_of(known()))
        self.what_if = WhatIfPanel(known, actions)
        self.map = _make_map(self)
        self._html = ipywidgets.HTML(self._state.status()._repr_html_()) if self.map is None else None
        steering = ipywidgets.VBox([self.workers.box, self.models.box])
        panels = ipywidgets.Accordion(
            [steering, self.what_if.box], titles=("Steer", "What if"), selected_index=None
        )
        self.box = ipywidgets.VBox([self.map if self.map is not None else self._html, panels])

    def __repr__(self) -> str:
        return f"<ClusterWidget: {'closed' if self.is_closed else f'{len(self._views)} views'}>"

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        bundle = self.bundle()
        has_snapshot = _WIDGET_VIEW in bundle and hasattr(get_ipython(), "kernel")
        if has_snapshot:
            bundle["text/plain"] = "the cluster, live where widgets are shown; its last state:"
        display(bundle, raw=True)
        if has_snapshot:
            self._snapshots.append(display(self._snapshot(), raw=True, display_id=True))

    def bundle(self) -> dict[str, Any]:
        """What is displayed, by MIME type: the widget, and its state for where there are none."""
        if self.is_closed:
            return self._state.status()._repr_mimebundle_()
        from IPython.core.getipython import get_ipython

        with self._lock:
            self._views["display"] = time.monotonic()  # until the first view tells
            self._is_cell_running = get_ipython() is not None  # the one that shows it
        run_blocking(self._watch_or_not())
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {_WIDGET_VIEW: view, "text/plain": str(self._state.status())}

    def close(self) -> None:
        """End it, and leave the last state where it is shown. Closing twice is fine."""
        if self.is_closed:
            return
        self.is_closed = True
        run_blocking(self._watch_or_not())
        for snapshot in self._snapshots:
            snapshot.update(self._snapshot(), raw=True)
        self._snapshots.clear()
        _close_all(self.box)

    def _snapshot(self) -> dict[str, str]:
        """The state as it stays in a saved notebook."""
        status = self._state.status()
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        html = f'<div class="sollol-snapshot">{status._repr_html_()}<p>as of {at}</p></div>'
        return {"text/html": html, "text/plain": f"{status}\nas of {at}"}

    # --- watching -------------------------------------------------------------------------------

    def on_view(self, view: str, is_here: bool) -> None:
        """A view tells that it is there, or that it goes."""
        with self._lock:
            self._views.pop("display", None)
            if is_here:
                self._views[view] = time.monotonic()
            else:
                self._views.pop(view, None)
            is_settled = self._is_watching == bool(self._views)
        if not is_settled and not self._state.is_closed:
            submit(self._watch_or_not())

    async def _watch_or_not(self) -> None:
        """Watch while there are views, else do not."""
        wanted = bool(self._views) and not self.is_closed
        if wanted and not self._is_watching:
            self._is_watching = True
            self._follow_cells(not self._state.is_closed)
            await self._state.watch(self._on_patch)
            self._refresh()
        elif not wanted and self._is_watching:
            self._is_watching = False
            self._follow_cells(False)
            await self._state.unwatch(self._on_patch)

    def _on_patch(self, patch: Mapping[str, Any]) -> None:
        """On the I/O loop: pass a change on to the map and the controls."""
        if self.map is not None:
            self.map.change(patch)
        else:
            self._soon("html", HTML_EVERY_S, self._show_html)
        if "events" in patch:
            self._soon("snapshots", SNAPSHOT_EVERY_S, self._show_snapshots)
        if patch.keys() & {"workers", "coordinators", "starting", "events", "closed"}:
            self._refresh()
        if "closed" in patch:
            self._follow_cells(False)
        self._drop_gone_views()

    def _soon(self, what: str, seconds: float, show: Callable[[], None]) -> None:
        """Show what is large, after a while, for all changes until then."""

        def run() -> None:
            self._due.discard(what)
            if not self.is_closed:
                show()

        if what not in self._due:
            self._due.add(what)
            asyncio.get_running_loop().call_later(seconds, run)

    def _show_html(self) -> None:
        if self._html is not None:
            self._html.value = self._state.status()._repr_html_()

    def _show_snapshots(self) -> None:
        for snapshot in self._snapshots:
            snapshot.update(self._snapshot(), raw=True)

    def _refresh(self) -> None:
        if not self.is_closed:
            for part in (self.workers, self.models, self.what_if):
                part.refresh(self._state.data)

    def _drop_gone_views(self) -> None:
        if self.map is None or self._is_cell_running:  # views of ipywidgets.HTML do not tell
            return
        long_ago = time.monotonic() - VIEW_LEASE_S
        with self._lock:
            self._views = {view: told_at for view, told_at in self._views.items() if told_at > long_ago}
            if not self._views:
                submit(self._watch_or_not())

    # Many kernels read no message of a view while a cell runs, so what views tell then comes only after it.

    def _follow_cells(self, is_wanted: bool) -> None:
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is None:
            return
        for name, callback in (("pre_run_cell", self._cell_begins), ("post_run_cell", self._cell_ends)):
            if is_wanted:
                shell.events.register(name, callback)
            elif callback in shell.events.callbacks[name]:
                shell.events.unregister(name, callback)

    def _cell_begins(self, _: object) -> None:
        self._is_cell_running = True

    def _cell_ends(self, _: object) -> None:
        with self._lock:
            self._is_cell_running = False
            self._views = dict.fromkeys(self._views, time.monotonic())


def _strategy_of(router: Router | None) -> str | None:
    return router.layer_strategy if router is not None else None


def _make_map(widget: ClusterWidget) -> ClusterMap | None:
    try:
        from sollol_nb.widget.map import ClusterMap
    except ImportError:  # anywidget is not installed
        return None
    return ClusterMap(lambda: widget._state.data, widget.on_view)


def _close_all(widget: ipywidgets.Widget) -> None:
    """Close a widget with all in it, and the models of their layouts and styles."""
    for child in getattr(widget, "children", ()):
        _close_all(child)
    for name in ("layout", "style"):
        part = getattr(widget, name, None)
        if part is not None:
            part.close()
    widget.close()
