"""Plots of a benchmark: for each case the median (a bar), its 95 % interval (a band), and a dot for each round.

The functions take the frames of `BenchResult.rounds` and `BenchResult.summary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sollol_nb.bench.rows import METRICS
from sollol_nb.errors import ConfigError
from sollol_nb.text import palette

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_INCHES = 0.42


def draw_metric(
    rounds: pd.DataFrame, summary: pd.DataFrame, cases: Sequence[str], metric: str, ax: Axes | None = None
) -> Axes:
    """Draw one metric on axes, by default those of a new figure.

    Args:
        rounds: columns `case`, `round`, `metric`, `value`.
        summary: one row per case and metric (the index); columns `median`, `lower`, `upper`.
        cases: in the order in which they are drawn, from the top.
        metric: a name in `METRICS`.

    Raises:
        ConfigError: there is no such metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; choose one of: {', '.join(METRICS)}")
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6.4, _height_inches(cases)), layout="constrained")
    values = rounds[rounds["metric"] == metric]
    estimates = summary.loc[[(case, metric) for case in cases]]
    for position, case in enumerate(cases):
        of_case = values.loc[values["case"] == case, "value"]
        ax.plot(of_case, [position] * len(of_case), ".", color=palette.GREY, markersize=6, zorder=2)
    positions = range(len(cases))
    ax.hlines(
        positions, estimates["lower"], estimates["upper"], color=palette.BLUE, linewidth=7, alpha=0.35, zorder=1
    )
    ax.plot(estimates["median"], positions, "|", color=palette.BLUE, markersize=16, markeredgewidth=3, zorder=3)
    ax.set_yticks(positions, cases)
    ax.set_ylim(len(cases) - 0.5, -0.5)  # the first case on top
    ax.set_xlim(left=0)
    title, better = METRICS[metric].title, "higher" if METRICS[metric].higher_is_better else "lower"
    ax.set_xlabel(f"{title} ({better} is better)")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def draw_overview(
    rounds: pd.DataFrame, summary: pd.DataFrame, cases: Sequence[str], metrics: Sequence[str]
) -> Figure:
    """A figure with these metrics side by side; arguments as for `draw_metric`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(metrics) + 1.2, _height_inches(cases)), layout="constrained")
    for position, metric in enumerate(metrics):
        ax = draw_metric(rounds, summary, cases, metric, figure.add_subplot(1, len(metrics), position + 1))
        if position:
            ax.set_yticklabels([])
    return figure


def _height_inches(cases: Sequence[str]) -> float:
    return 1.1 + _ROW_INCHES * max(2, len(cases))
