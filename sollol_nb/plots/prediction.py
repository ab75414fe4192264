"""The prediction of the layer plan compared with the measurements of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from sollol_nb.plots.style import (
    MAX_NAME_CHARS,
    axes_or_new,
    checked_frame,
    color_of,
    faint_grid,
    legend_below,
    scale,
    set_title,
    text_color,
    without_data,
)
from sollol_nb.text import palette
from sollol_nb.text.short_names import fitted_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MAX_POINTS = 2000  # of one model, the newest
MAX_MODELS = 6  # with a separate colour


def predicted_vs_measured(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Time per token as the layer plan predicted it (x) and as the engine measured it (y), coloured by model.

    On the dashed line both are equal; above it, the engine was slower than predicted. Each answer is compared with
    the prediction for the layout that it ran on. Left out are answers with drafts, as a prediction is for tokens
    that are computed one after the other, and those that continued on another layout.

    Args:
        frame: the latency log (`model`, `tokens_per_s`, `predicted_ms_per_token`, and
            `drafted_tokens` and `failovers` if it has them).
        ax: where to draw; by default a new figure.

    Raises:
        ConfigError: the frame lacks a column.
    """
    checked_frame(frame, "model", "tokens_per_s", "predicted_ms_per_token")
    ax, title = axes_or_new(ax), "Time per token: predicted and measured"
    known = frame[(frame["predicted_ms_per_token"] > 0) & (frame["tokens_per_s"] > 0)]
    for reason in ("drafted_tokens", "failovers"):
        if reason in known:
            known = known[known[reason].fillna(0) == 0]
    if known.empty:
        return without_data(ax, title, "no requests yet" if frame.empty else "no request with a prediction yet")
    predicted_ms = known["predicted_ms_per_token"].to_numpy(dtype=float)
    measured_ms = 1000.0 / known["tokens_per_s"].to_numpy(dtype=float)
    both = np.concatenate([predicted_ms, measured_ms])
    for axis in ("x", "y"):
        scale(ax, axis, both)
    diagonal = Line2D(ax.get_xlim(), ax.get_xlim(), color=text_color(ax), alpha=0.6, linewidth=1.2, linestyle="--")
    ax.add_line(diagonal)
    counts = known["model"].value_counts()
    names = sorted(map(str, counts.index[:MAX_MODELS]))
    colors = color_of(names)
    models = known["model"].astype(str).to_numpy()
    groups = {name: models == name for name in names}
    if len(counts) > MAX_MODELS:
        groups["other models"] = ~np.isin(models, names)
        colors["other models"] = palette.GREY
    handles = []
    for name, is_model in groups.items():
        newest = slice(-MAX_POINTS, None)
        handles.append(
            ax.scatter(
                predicted_ms[is_model][newest],
                measured_ms[is_model][newest],
                s=18,
                color=colors[name],
                alpha=0.75,
                linewidths=0,
                zorder=2,
            )
        )
    labels = [
        f"{fitted_name(name, MAX_NAME_CHARS)}, n = {int(is_model.sum()):,}" for name, is_model in groups.items()
    ]
    legend_below(ax, [*handles, diagonal], [*labels, "measured as predicted"])
    ax.set_xlabel("predicted (ms per token)")
    ax.set_ylabel("measured (ms per token)")
    faint_grid(ax, "both")
    error = float(np.median(np.abs(measured_ms / predicted_ms - 1)))
    set_title(ax, title, f"half of the requests were within {error:.0%} of the prediction")
    return ax
