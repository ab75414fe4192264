"""Plots of the cluster and of the latency log.

Each function takes the data and an `Axes` (without one it creates a figure of the default size), draws, and
returns the `Axes`. The data come from `router.cluster()` and `router.latency.frame()`. No setting of matplotlib is
changed, so styles such as `plt.style.context("dark_background")` work as usual. Pass axes of a figure with
`layout="constrained"`, since legends are placed below the axes.

| function | shows |
|---|---|
| `layer_map(router.cluster())` | which worker has which layers of each model, planned and actual |
| `ttft_ecdf(frame)`, `total_ecdf(frame)` | time to the first and to the last token, by backend |
| `tokens_per_s_by_layout(frame)` | generation speed by layout |
| `timeline(frame, events=router.events.recent())` | requests of each coordinator and node over time, with faults |
| `predicted_vs_measured(frame)` | time per token as the layer plan predicted it and as the engine measured it |
| `queue_wait_by_priority(frame)` | how long requests of each priority waited |

- `cluster.py`: the layer map.
- `distributions.py`: times and speeds, by backend, layout and priority.
- `timeline.py`: requests and faults over time.
- `prediction.py`: predicted and measured time per token.
- `style.py`: what all plots share.
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
