"""Plots of a benchmark: for each case the median (a bar), its 95 % interval (a band), and a dot for each round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sollol_nb.bench.result import METRICS
from sollol_nb.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sollol_nb.bench.result import BenchResult

PANELS = ("ttft_ms", "prompt_tokens_per_s", "tokens_per_s")
THROUGHPUT = "throughput_tokens_per_s"
# Of Okabe and Ito's colour-blind-safe palette; the grey reads on light and dark grounds.
_COLOR, _ROUND_COLOR = "#0072b2", "#7a7a7a"
_ROW_INCHES = 0.42


def draw_metric(result: BenchResult, metric: str, ax: Axes | None = None) -> Axes:
    """Draw one metric on axes, by default those of a new figure.

    Raises:
        ConfigError: there is no such metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"there is no metric {metric!r}; known are {', '.join(METRICS)}")
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6.4, _height(result)), layout="constrained")
    rounds = result.rounds()
    here = rounds[rounds["metric"] == metric]
    summary = result.summary().xs(metric, level="metric")
    for position, case in enumerate(result.cases):
        values = here.loc[here["case"] == case, "value"]
        ax.plot(values, [position] * len(values), ".", color=_ROUND_COLOR, markersize=6, zorder=2)
    positions = range(len(result.cases))
    ax.hlines(positions, summary["lower"], summary["upper"], color=_COLOR, linewidth=7, alpha=0.35, zorder=1)
    ax.plot(summary["median"], positions, "|", color=_COLOR, markersize=16, markeredgewidth=3, zorder=3)
    ax.set_yticks(positions, result.cases)
    ax.set_ylim(len(result.cases) - 0.5, -0.5)  # the first case on top
    ax.set_xlim(left=0)
    about = METRICS[metric]
    ax.set_xlabel(f"{about.title} ({'higher' if about.higher_is_better else 'lower'} is better)")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def overview(result: BenchResult) -> Figure:
    """A figure with the metrics side by side: first token, reading, writing, and where several ask, throughput.

    It is not known to pyplot, so it is shown only by who asks for it.
    """
    from matplotlib.figure import Figure

    several = any(row.concurrency > 1 for row in result.rows)
    panels = (*PANELS, THROUGHPUT) if several else PANELS
    figure = Figure(figsize=(3.6 * len(panels) + 1.2, _height(result)), layout="constrained")
    for position, metric in enumerate(panels):
        ax = draw_metric(result, metric, figure.add_subplot(1, len(panels), position + 1))
        if position:
            ax.set_yticklabels([])
    return figure


def _height(result: BenchResult) -> float:
    return 1.1 + _ROW_INCHES * max(2, len(result.cases))
