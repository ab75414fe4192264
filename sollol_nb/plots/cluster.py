"""The layer map: which worker has which layers of each model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.plots.style import MAX_NAME_CHARS, axes_or_new, legend_below, rows_from_top, set_title, without_data
from sollol_nb.text import palette
from sollol_nb.text.short_names import fitted_name
from sollol_nb.text.tables import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANNED_HEIGHT, ACTUAL_HEIGHT, GAP = 0.46, 0.2, 0.05
CHARS_ACROSS = 64  # how many characters fit into segments over the whole width
MAX_DETAILED = 6  # with more segments, the legend has no space for their weights


def layer_map(status: ClusterStatus | CoordinatorStatus | Coordinator, ax: Axes | None = None) -> Axes:
    """Each coordinator's layers as a bar of units (the blocks, then the output layer), a segment for each worker.

    The wide bar is the plan; the narrow one below it is the actual placement, as the engine reports it.

    Args:
        status: `router.cluster()`, one of its `coordinators`, or a running coordinator.
        ax: where to draw; by default a new figure.
    """
    ax = axes_or_new(ax)
    title = "Layers of each model by worker"
    if isinstance(status, ClusterStatus):
        coordinators = status.coordinators
    else:
        coordinators = (status if isinstance(status, CoordinatorStatus) else CoordinatorStatus.of(status),)
    sharded = [coordinator for coordinator in coordinators if coordinator.segments]
    if not sharded:
        return without_data(ax, title, "no model is sharded")
    most_units = max(sum(segment.units for segment in coordinator.segments) for coordinator in sharded)
    for row, coordinator in enumerate(sharded):
        _draw_coordinator(ax, row, coordinator.segments, CHARS_ACROSS / most_units)
    ax.set_yticks(range(len(sharded)), [fitted_name(coordinator.model, MAX_NAME_CHARS) for coordinator in sharded])
    rows_from_top(ax, len(sharded))
    ax.set_xlim(0, most_units)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("units (blocks, then the output layer)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    segments = [segment for coordinator in sharded for segment in coordinator.segments]
    weights = [f", {format_bytes(segment.weight_bytes)}" for segment in segments]
    if len(segments) > MAX_DETAILED:
        weights = [""] * len(segments)
    legend_below(
        ax,
        [Patch(facecolor=segment.color) for segment in segments],
        [f"{segment.worker}: {segment.layers}{more}" for segment, more in zip(segments, weights, strict=True)],
    )
    has_actual = any(segment.actual_units is not None for segment in segments)
    set_title(ax, title, "wide bars: planned, narrow bars: actual" if has_actual else "as planned")
    return ax


def _draw_coordinator(ax: Axes, row: int, segments: tuple[LayerSegment, ...], chars_per_unit: float) -> None:
    """The planned bar of one coordinator, and the actual one below it."""
    planned_from = actual_from = 0
    has_actual = any(segment.actual_units is not None for segment in segments)
    y = row - (ACTUAL_HEIGHT + GAP) / 2 if has_actual else float(row)
    y_actual = y + PLANNED_HEIGHT / 2 + GAP + ACTUAL_HEIGHT / 2
    background = ax.get_facecolor()
    for segment in segments:
        style: dict[str, Any] = {"color": segment.color, "edgecolor": background, "linewidth": 1.0}
        ax.barh(y, segment.units, PLANNED_HEIGHT, planned_from, **style)
        if len(segment.layers) <= segment.units * chars_per_unit:
            middle = planned_from + segment.units / 2
            ax.text(
                middle, y, segment.layers, ha="center", va="center", color=palette.SEGMENT_TEXT, fontsize="small"
            )
        planned_from += segment.units
        if segment.actual_units is not None:
            ax.barh(y_actual, segment.actual_units, ACTUAL_HEIGHT, actual_from, **style)
            actual_from += segment.actual_units
