"""The strategy `latency_aware`: the workers, their order and units with the shortest predicted time per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.costs import DeviceCost, Runs, device_cost, free_by_endpoint
from sollol_nb.layers.plan import CPU, MAX_WORKERS
from sollol_nb.layers.strategies import ModelLoad, WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds

MARGIN = 0.05
"""Of free memory, which is left free as long as the model fits: another program may need it a moment later."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Workers by their position among those given, in the order of their layers, with the units of each."""

    positions: tuple[int, ...]
    counts: tuple[int, ...]
    reasons: tuple[str, ...] = ()


def fastest(
    facts: ModelFacts,
    load: ModelLoad,
    workers: Sequence[WorkerCapacity],
    speeds: WorkerSpeeds,
    *,
    wanted: int | None = None,
) -> Choice | None:
    """The choice with the shortest predicted time per token; None if the model does not fit."""
    runs = Runs(facts, load)
    for margin in (MARGIN, 0.0):
        free = free_by_endpoint(workers, margin)
        found = {
            position: cost
            for position, worker in enumerate(workers)
            if (cost := device_cost(worker, speeds, facts, free[worker.endpoint])) is not None
        }
        domains = {
            workers[position].memory_domain or position: position
            for position in sorted(found, key=lambda position: -found[position].ms_per_byte)
        }
        found = {position: found[position] for position in domains.values()}
        slowest_last = sorted(found, key=lambda position: found[position].ms_per_byte)
        best: tuple[float, Choice] | None = None
        for order in (slowest_last, slowest_last[::-1]):
            ordered = sorted(
                order, key=lambda position: (workers[position].device != CPU, workers[position].is_own)
            )
            tried = _best_in_order(runs, [(position, found[position]) for position in ordered])
            if (
                tried is not None
                and len(tried[1].positions) <= MAX_WORKERS
                and (best is None or tried[0] < best[0])
            ):
                best = tried
        if best is not None:
            return best[1]
    return None


def _best_in_order(runs: Runs, devices: Sequence[tuple[int, DeviceCost]]) -> tuple[float, Choice] | None:
    """The fastest way to place all units on these devices in this order, of which any may stay empty."""
    import numpy as np

    cost = np.full(runs.unit_count + 1, np.inf)  # by units placed so far
    cost[0] = 0.0
    steps = []
    for _, device in devices:
        sums = cost[:, None] + runs.cost_ms(device)
        first = sums.argmin(axis=0)
        found = sums[first, np.arange(len(cost))]
        is_better = found < cost
        steps.append(np.where(is_better, first, -1))
        cost = np.where(is_better, found, cost)
    if not np.isfinite(cost[-1]):
        return None
    end, positions, counts = runs.unit_count, [], []
    for (position, _), step in zip(reversed(devices), reversed(steps), strict=True):
        if step[end] >= 0:
            positions.append(position)
            counts.append(int(end - step[end]))
            end = int(step[end])
    return float(cost[-1]), Choice(tuple(positions[::-1]), tuple(counts[::-1]))
