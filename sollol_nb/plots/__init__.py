"""Plots of the cluster and of the latency log.

Each function takes what it shows and an `Axes` (without one it makes a figure of the default size), draws, and
returns the `Axes`. It draws only: data come from `router.cluster()` and `router.latency.frame()`, and nothing of
matplotlib's settings is changed, so that styles (`plt.style.context("dark_background")`) work as always. Give axes
of a figure with `layout="constrained"`: legends stand below them.

| function | shows |
|---|---|
| `layer_map(router.cluster())` | which worker has which layers of each model, planned and actual |
| `ttft_ecdf(frame)`, `total_ecdf(frame)` | time to first token, and to the last, by backend |
| `tokens_per_s_by_layout(frame)` | generation speed by layout |
| `timeline(frame, events=router.events.recent())` | when each place served what, and where faults came |
| `predicted_vs_measured(frame)` | the layer plan's time per token, and the engine's |
| `queue_wait_by_priority(frame)` | how long requests of each priority waited |
"""

from __future__ import annotations

from sollol_nb.plots.cluster import layer_map
from sollol_nb.plots.distributions import queue_wait_by_priority, tokens_per_s_by_layout, total_ecdf, ttft_ecdf
from sollol_nb.plots.prediction import predicted_vs_measured
from sollol_nb.plots.timeline import timeline

__all__ = [
    "layer_map",
    "predicted_vs_measured",
    "queue_wait_by_priority",
    "timeline",
    "tokens_per_s_by_layout",
    "total_ecdf",
    "ttft_ecdf",
]
