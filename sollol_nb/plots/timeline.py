"""The timeline: the requests of each coordinator and node over time, with faults."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.patches import Patch

from sollol_nb.plots.style import (
    axes_or_new,
    checked_frame,
    faint_grid,
    legend_below,
    rows_from_top,
    set_title,
    text_color,
    without_data,
)
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text import palette
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MAX_REQUESTS = 2000
FAULT_KINDS = (
    EventKind.WORKER_LOST,
    EventKind.COORDINATOR_LOST,
    EventKind.COORDINATOR_FAILED,
    EventKind.NODE_ABSENT,
    EventKind.NODE_COOLING,
    EventKind.ACTION_FAILED,
)
PALE = 0.4
LANE_HEIGHT = 0.8
DAY_S = 86400.0


def timeline(frame: pd.DataFrame, events: Iterable[Event] | None = None, ax: Axes | None = None) -> Axes:
    """A bar for each request, from its start to its end, in the rows of the coordinator or node that finished it.

    Requests that were served at the same time are drawn in separate lanes. A bar is pale until the first token
    (while the request waits, the model loads and the prompt is processed). A cross marks a failover, after which
    the request continued elsewhere; a dotted line marks a fault that the cluster reported.

    Args:
        frame: the latency log (`started_at`, `place`, `ttft_ms`, `total_ms`, `status`, `failover_details`); the
            newest 2000 requests are drawn.
        events: `router.events.recent()`; faults among them are marked.
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "started_at", "place", "ttft_ms", "total_ms", "status", "failover_details")
    ax, title = axes_or_new(ax), "Requests by server"
    if frame.empty:
        return without_data(ax, title)
    shown = frame.tail(MAX_REQUESTS).sort_values("started_at", kind="stable")
    began_utc = shown["started_at"].dt.tz_convert("UTC").dt.tz_localize(None)
    began = _days(began_utc.to_numpy().astype("datetime64[ms]").astype("int64") / 1000)
    ended = began + shown["total_ms"].to_numpy(dtype=float) / 1000 / DAY_S
    first = began + shown["ttft_ms"].to_numpy(dtype=float) / 1000 / DAY_S
    first = np.where(np.isnan(first), ended, np.minimum(first, ended))
    rows = _rows(ax, [str(place) for place in shown["place"]], began, ended)
    statuses = [status if status in palette.REQUEST_STATUSES else "cancelled" for status in shown["status"]]
    _draw_bars(ax, began, first, rows, [to_rgba(palette.REQUEST_STATUSES[status], PALE) for status in statuses])
    _draw_bars(ax, first, ended, rows, [to_rgba(palette.REQUEST_STATUSES[status]) for status in statuses])
    margin = 0.03 * float(ended.max() - began.min()) or 1 / DAY_S
    ax.set_xlim(float(began.min()) - margin, float(ended.max()) + margin)

    present = [status for status in palette.REQUEST_STATUSES if status in statuses]
    handles: list[Artist] = [Patch(facecolor=palette.REQUEST_STATUSES[status]) for status in present]
    handles.append(Patch(facecolor=to_rgba(palette.REQUEST_STATUSES[present[0]], PALE)))
    labels = [*present, "before the first token"]
    for handle, label in (
        (_mark_failovers(ax, shown["failover_details"], rows), "failover"),
        (_mark_events(ax, events or ()), "fault in the cluster"),
    ):
        if handle is not None:
            handles.append(handle)
            labels.append(label)
    locator = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    ax.set_xlabel("time (UTC)")
    faint_grid(ax, "x")
    ax.spines["left"].set_visible(False)
    legend_below(ax, handles, labels)
    of_all = f", the newest of {len(frame):,}" if len(frame) > len(shown) else ""
    set_title(ax, title, counted(len(shown), "request") + of_all)
    return ax


def _rows(ax: Axes, servers: Sequence[str], began: Any, ended: Any) -> Any:
    """The height of each request: servers from top to bottom, with a lane for each request at the same time."""
    lanes = np.zeros(len(servers))
    heights, names = [], list(dict.fromkeys(sorted(servers, key=lambda server: (server == "", server))))
    top = 0.0
    for number, server in enumerate(names):
        positions = [position for position, name in enumerate(servers) if name == server]
        lane_of, count = _lanes([(began[position], ended[position]) for position in positions])
        for position, lane in zip(positions, lane_of, strict=True):
            lanes[position] = top + lane
        heights.append(top + (count - 1) / 2)
        top += count + 0.5
        if number < len(names) - 1:
            ax.axhline(top - 0.75, color=text_color(ax), alpha=0.2, linewidth=0.8)
    ax.set_yticks(heights, [server.partition("://")[2] or server or "no server\nreached" for server in names])
    rows_from_top(ax, top - 0.5)
    return lanes


def _lanes(spans: Sequence[tuple[float, float]]) -> tuple[list[int], int]:
    """The lowest free lane for each span, in the order of their starts, and the number of lanes."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    lanes, count = [], 0
    for began, ended in spans:
        while busy and busy[0][0] <= began:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else count
        count = max(count, lane + 1)
        heapq.heappush(busy, (ended, lane))
        lanes.append(lane)
    return lanes, count


def _draw_bars(ax: Axes, left: Any, right: Any, rows: Any, colors: Sequence[Any]) -> None:
    low, high = rows - LANE_HEIGHT / 2, rows + LANE_HEIGHT / 2
    corners = np.stack(
        [np.column_stack([x, y]) for x, y in ((left, low), (left, high), (right, high), (right, low))], axis=1
    )
    # The edge keeps bars visible that are narrower than a pixel.
    ax.add_collection(PolyCollection(list(corners), facecolors=colors, edgecolors=colors, linewidths=0.6))


def _mark_failovers(ax: Axes, details: Iterable[str], rows: Any) -> Artist | None:
    """A cross on a request's bar for each of its failovers; None without any."""
    crosses = [
        (failover["when"], row)
        for text, row in zip(details, rows, strict=True)
        if text
        for failover in json.loads(text)
    ]
    if not crosses:
        return None
    when_s, heights = zip(*crosses, strict=True)
    return ax.plot(
        _days(np.array(when_s)),
        heights,
        linestyle="none",
        marker="X",
        markersize=9,
        color=palette.BAD,
        markeredgecolor=ax.get_facecolor(),
        zorder=4,
    )[0]


def _mark_events(ax: Axes, events: Iterable[Event]) -> Artist | None:
    """A dotted line for each fault in the time shown; None without any."""
    left, right = ax.get_xlim()
    line = None
    for event in events:
        when = float(_days(np.array(event.at)))
        if event.kind in FAULT_KINDS and left <= when <= right:
            line = ax.axvline(when, color=palette.BAD, linestyle=":", linewidth=1.4, zorder=3)
    return line


def _days(seconds: Any) -> Any:
    """Seconds since the epoch as matplotlib counts time."""
    return date2num((seconds * 1000).astype("int64").astype("datetime64[ms]"))  # type: ignore[no-untyped-call]
