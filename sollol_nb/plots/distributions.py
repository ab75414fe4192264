"""Distributions of times and speeds: by backend, layout and priority."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sollol_nb.plots.style import (
    MAX_NAME_CHARS,
    axes_or_new,
    checked_frame,
    color_of,
    faint_grid,
    legend_below,
    rows_from_top,
    scale,
    set_title,
    text_color,
    without_data,
)
from sollol_nb.runtime.priority import Priority
from sollol_nb.text import palette
from sollol_nb.text.short_names import fitted_name
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Values = np.ndarray[Any, np.dtype[np.float64]]

MAX_STEPS = 2000  # of one ECDF line; more are not visible
MAX_POINTS = 300  # of one group, spread evenly over its values
MAX_GROUPS = 12
MANY_GROUPS = 6
BOX_LEGEND = "boxes: quartiles, whiskers: 5 to 95 %"
BOX_COLOR = palette.SKY_BLUE  # visible on white and on black
_GOLDEN = 0.618034


def ttft_ecdf(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The share of requests whose first token arrived within a time, by backend; of all requests that got one.

    Args:
        frame: the latency log (`backend`, `ttft_ms`).
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "backend", "ttft_ms")
    return _ecdf(frame, "ttft_ms", "Time to first token by backend", "time to first token (ms)", axes_or_new(ax))


def total_ecdf(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The share of answers that were complete within a time, by backend; of successful requests only.

    Args:
        frame: the latency log (`backend`, `total_ms`, `status`).
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "backend", "total_ms", "status")
    whole = frame[frame["status"] == "ok"]
    return _ecdf(whole, "total_ms", "Time to the complete answer by backend", "total time (ms)", axes_or_new(ax))


def tokens_per_s_by_layout(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Generation speed by layout (units per worker; the backend if the model is not sharded), and by model if
    there are several models. The layouts with most requests are shown.

    Args:
        frame: the latency log (`model`, `backend`, `layout`, `tokens_per_s`).
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "model", "backend", "layout", "tokens_per_s")
    ax, title = axes_or_new(ax), "Generation speed by layout"
    measured = frame[frame["tokens_per_s"].notna()]
    if measured.empty:
        return without_data(ax, title)
    has_several_models = measured["model"].nunique() > 1
    groups: list[tuple[str, Values]] = []
    for (model, layout, backend), speeds in measured.groupby(["model", "layout", "backend"])["tokens_per_s"]:
        # One number alone would not be understood as a layout.
        name = f"1 worker ({layout} units)" if str(layout).isdigit() else str(layout or backend)
        label = f"{fitted_name(model, MAX_NAME_CHARS)}, {name}" if has_several_models else name
        groups.append((label, speeds.to_numpy(dtype=float)))
    most = sorted(groups, key=lambda group: -len(group[1]))[:MAX_GROUPS]
    most.sort(key=lambda group: -float(np.median(group[1])))
    scale(ax, "x", np.concatenate([values for _, values in most]))
    _boxes(ax, most)
    ax.set_xlabel("tokens per second")
    set_title(
        ax,
        title,
        BOX_LEGEND if len(most) == len(groups) else f"the {len(most)} most used of {len(groups)} layouts",
    )
    return ax


def queue_wait_by_priority(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How long requests waited for a slot of their coordinator or node, by priority, the highest on top.

    Args:
        frame: the latency log (`priority`, `queue_ms`).
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "priority", "queue_ms")
    ax, title = axes_or_new(ax), "Queue wait by priority"
    waited = frame[frame["priority"].notna() & frame["queue_ms"].notna()]
    if waited.empty:
        return without_data(ax, title)
    levels = waited["priority"].astype(int)
    groups = [
        (_priority_name(level), waited.loc[levels == level, "queue_ms"].to_numpy(dtype=float))
        for level in sorted(set(levels), reverse=True)
    ]
    longest_ms = float(waited["queue_ms"].max())
    if longest_ms > 100:  # most do not wait at all, a few wait long
        ax.set_xscale("symlog", linthresh=1.0)
        ax.set_xticks([0, *(10.0**power for power in range(int(np.log10(longest_ms)) + 2))])
        ax.set_xlim(-0.15, longest_ms * 1.5)
    else:
        ax.set_xlim(-0.02 * max(longest_ms, 1.0), 1.06 * max(longest_ms, 1.0))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    _boxes(ax, groups)
    ax.set_xlabel("wait for a slot (ms)")
    set_title(ax, title, BOX_LEGEND)
    return ax


def _ecdf(frame: pd.DataFrame, column: str, title: str, label: str, ax: Axes) -> Axes:
    known = frame[frame[column].notna() & (frame["backend"] != "")]
    if known.empty:
        return without_data(ax, title)
    groups = {
        str(backend): np.sort(values.to_numpy(dtype=float))
        for backend, values in known[column].groupby(known["backend"])
    }
    colors = color_of(groups, palette.BACKENDS)
    scale(ax, "x", np.concatenate(list(groups.values())))
    lines, labels = [], []
    for backend, values in groups.items():
        shares = np.arange(1, len(values) + 1) / len(values)
        if len(values) > MAX_STEPS:
            kept = np.linspace(0, len(values) - 1, MAX_STEPS).round().astype(int)
            values, shares = values[kept], shares[kept]
        x, y = np.concatenate([values[:1], values]), np.concatenate([[0.0], shares])
        lines += ax.plot(x, y, drawstyle="steps-post", color=colors[backend], linewidth=1.8)
        count, median_ms = len(groups[backend]), float(np.median(groups[backend]))
        labels.append(f"{backend}: median {median_ms:,.{0 if median_ms >= 10 else 2}f} ms, n = {count:,}")
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 0.95])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("share of requests")
    ax.set_xlabel(label)
    faint_grid(ax, "both")
    legend_below(ax, lines, labels)
    set_title(ax, title, counted(len(known), "request"))
    return ax


def _boxes(ax: Axes, groups: Sequence[tuple[str, Values]]) -> None:
    """A horizontal box with its points for each label and values, the first on top; the x axis has been set
    before."""
    most_points = MAX_POINTS if len(groups) <= MANY_GROUPS else MAX_POINTS // 3
    for row, (_, values) in enumerate(groups):
        low, first, middle, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        shown = np.sort(values)
        if len(shown) > most_points:
            shown = shown[np.linspace(0, len(shown) - 1, most_points).round().astype(int)]
        # Multiples of the golden ratio spread evenly over the height, and always in the same way.
        heights = row + 0.44 * ((np.arange(len(shown)) * _GOLDEN) % 1.0 - 0.5)
        ax.scatter(shown, heights, s=9, color=BOX_COLOR, alpha=0.6, linewidths=0, zorder=2)
        if len(values) > 2:
            corner, width = (first, row - 0.3), third - first
            ax.add_patch(Rectangle(corner, width, 0.6, facecolor=BOX_COLOR, alpha=0.25, zorder=1))
            ax.add_patch(Rectangle(corner, width, 0.6, fill=False, edgecolor=BOX_COLOR, linewidth=1.2))
            for ends in ((low, first), (third, high)):
                ax.add_line(Line2D(ends, (row, row), color=BOX_COLOR, linewidth=1.2))
        ax.add_line(
            Line2D((middle, middle), (row - 0.3, row + 0.3), color=text_color(ax), linewidth=2.0, zorder=3)
        )
    names = [f"{name}  (n = {len(values):,})" for name, values in groups]
    ax.set_yticks(range(len(groups)), names, fontsize="medium" if len(groups) <= MANY_GROUPS else "small")
    rows_from_top(ax, len(groups))
    faint_grid(ax, "x")
    ax.spines["left"].set_visible(False)


def _priority_name(level: int) -> str:
    """`7 high`, or just the number if its level has no name."""
    return f"{level} {Priority(level).name.lower().replace('_', ' ')}" if level in set(Priority) else f"{level}"
