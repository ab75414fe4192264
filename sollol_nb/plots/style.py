"""What all plots share: axes, titles, legends beside the data, scales, colours.

Lines, ticks and texts take their colours from the axes, so that they are readable on light and dark backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from sollol_nb.errors import ConfigError
from sollol_nb.text import palette

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MAX_NAME_CHARS = 24  # of a model; longer names would leave too little space for the data
LOG_FROM_RATIO = 20.0
LEGEND_BELOW_PT = 44.0  # space for tick labels and the axis label
_LEGEND_CHARS = 88  # characters that fit side by side below axes of the default size


def axes_or_new(ax: Axes | None) -> Axes:
    """These axes, or those of a new figure of the default size."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def checked_frame(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame, if it has these columns.

    Raises:
        ConfigError: it is not a frame, or lacks a column.
    """
    if not hasattr(frame, "columns"):
        raise ConfigError(f"a plot takes a DataFrame, not {type(frame).__name__}; pass router.latency.frame()")
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ConfigError(
            f"the frame has no column {missing[0]!r}; pass router.latency.frame() with all its columns"
        )
    return frame


def set_title(ax: Axes, title: str, detail: str = "") -> None:
    """Set a title at the left, and a smaller line below it."""
    ax.set_title(title, loc="left", pad=24 if detail else None)
    if detail:
        ax.annotate(
            detail,
            (0, 1),
            (0, 7),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize="small",
            color=text_color(ax),
            alpha=0.75,
        )


def without_data(ax: Axes, title: str, message: str = "no requests yet") -> Axes:
    """Axes with a message instead of data."""
    set_title(ax, title)
    ax.set_axis_off()
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color=text_color(ax), alpha=0.75)
    return ax


def text_color(ax: Axes) -> Any:
    """The colour of the axes' labels."""
    return ax.xaxis.label.get_color()


def faint_grid(ax: Axes, axis: Literal["x", "y", "both"]) -> None:
    """A faint grid, and no frame at the top and at the right."""
    ax.grid(axis=axis, color=text_color(ax), alpha=0.15, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend below the axis label, where it covers no data."""
    longest = max(map(len, labels)) + 6
    figure = ax.figure
    below = ax.transAxes + ScaledTranslation(0, -LEGEND_BELOW_PT / 72, figure.dpi_scale_trans)
    ax.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        ncols=max(1, min(len(labels), _LEGEND_CHARS // longest)),
        frameon=False,
        fontsize="small",
        borderaxespad=0,
        borderpad=0,
    )


def color_of(names: Iterable[str], fixed: dict[str, str] | None = None) -> dict[str, str]:
    """A colour for each name: its fixed one, or the next free one."""
    fixed = fixed or {}
    free = [color for color in palette.SERIES if color not in fixed.values()] or list(palette.SERIES)
    others = [name for name in names if name not in fixed]
    return {**fixed, **{name: free[position % len(free)] for position, name in enumerate(others)}}


def scale(ax: Axes, which: str, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """A linear axis from 0, or a logarithmic one where positive values differ by more than a factor of 20."""
    axis: Axis = getattr(ax, f"{which}axis")
    positive = values[values > 0]
    low, high = (float(np.min(positive)), float(np.max(positive))) if len(positive) else (1.0, 1.0)
    set_limits = getattr(ax, f"set_{which}lim")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if high / low <= LOG_FROM_RATIO:
        set_limits(0, high * 1.06)
        return
    getattr(ax, f"set_{which}scale")("log")
    steps = (1.0, 2.0, 5.0) if high / low < 2000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
    set_limits(low / 1.2, high * 1.2)


def rows_from_top(ax: Axes, count: float) -> None:
    """A y axis for rows 0 to `count - 1`, the first on top; a single row is placed in the middle."""
    margin = 0.6 + max(0.0, 2.0 - count) / 2
    ax.set_ylim(count - 1 + margin, -margin)
    ax.tick_params(axis="y", length=0)
