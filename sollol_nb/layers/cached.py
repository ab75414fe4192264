"""The same workers in another order, or with other counts, so that layers stay where they are cached.

A worker keeps the tensors that it has received (over 10 MiB each) in a cache, and a load does not send them again.
So which worker gets which layers decides how much of a model is sent. The set of workers is never changed here,
and the time per token by at most `SLOWER`: what a plan says about speed stays true.

For one order of the workers, dynamic programming over the borders finds the counts with the fewest bytes to send,
as in `search.py`. All orders of few workers are tried; for more, workers are moved one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.costs import Runs, device_cost, free_by_endpoint
from sollol_nb.layers.plan import LayerPlan, Shard
from sollol_nb.layers.planner import memory_shortage, model_load, unchecked_plan
from sollol_nb.layers.strategies import LATENCY_AWARE, WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds, predict, worker_parts
from sollol_nb.text.tables import format_bytes

if TYPE_CHECKING:
    from sollol_nb.layers.costs import Floats

SLOWER = 0.01
"""Share of the predicted time per token that a plan may lose."""
MARGIN = 0.05
"""Of free memory, which other counts leave free."""
EXACT_WORKERS = 5
"""All orders of so many workers are tried."""
PASSES = 3
"""How often each of more workers is moved to every other place."""
MOVABLE = ("memory_aware", LATENCY_AWARE)
"""Strategies whose counts may change: the others promise equal counts, or counts for many requests at once."""
_TIME_WEIGHTS = (0.0, 0.1, 1.0, 10.0, 100.0)
"""How much time counts against bytes; the first that keeps within `SLOWER` is used."""
_FEW = 1e-4  # of what decides only between plans that are otherwise equal

Cached = Mapping[str, Collection[int]]
"""The units of a model that each worker has cached, by its endpoint."""


def keep_cached(
    plan: LayerPlan,
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    cached: Cached,
    speeds: WorkerSpeeds | None = None,
) -> LayerPlan:
    """The plan with its workers in the order, and with the counts, for which the fewest bytes have to be sent.

    Own devices keep their units: weights are not sent to them.

    Args:
        plan: by a strategy.
        facts: of the model.
        workers: those that the plan was made of, own devices included.
        cached: what they have of this model.
        speeds: of these workers, if known.

    Returns:
        The plan as it was, if nothing is gained.
    """
    search = _Search(plan, facts, workers, cached, speeds)
    before = search.kept_bytes(plan)
    if not search.gains or before >= search.most_bytes:
        return plan
    found = search.best()
    if found is None or search.kept_bytes(found) <= before:
        return plan
    keepers = [shard.worker for shard in found.workers if search.kept_by(shard)]
    total = sum(facts.cacheable_bytes[unit] for shard in found.workers for unit in shard.units)
    has = f"{keepers[0]} keeps what it has" if len(keepers) == 1 else f"{', '.join(keepers)} keep what they have"
    reason = (
        f"{has} cached: {format_bytes(search.kept_bytes(found))} of {format_bytes(total)} need not be sent, "
        f"instead of {format_bytes(before)}"
    )
    return replace(found, reasons=(*plan.reasons, reason))


@dataclass(frozen=True, slots=True)
class _Gain:
    """A worker of the plan, and the bytes of each run of units `[first, end]` that need not be sent to it."""

    shard: Shard
    kept: Floats


class _Search:
    """Other orders and counts of one plan's workers."""

    def __init__(
        self,
        plan: LayerPlan,
        facts: ModelFacts,
        workers: Sequence[WorkerCapacity],
        cached: Cached,
        speeds: WorkerSpeeds | None,
    ) -> None:
        self._plan = plan
        self._facts = facts
        self._workers = workers
        self._cached = {endpoint: frozenset(units) for endpoint, units in cached.items()}
        self._speeds = speeds
        self._round_trips_ms = {worker.endpoint: worker.round_trip_ms for worker in workers}
        placed = [unit for shard in plan.workers for unit in shard.units]
        self._first, self._end = (placed[0], placed[-1] + 1) if placed else (0, 0)
        of_unit = facts.cacheable_bytes
        held = [self._cached.get(shard.endpoint, frozenset()) for shard in plan.workers]
        self.most_bytes = (
            sum(of_unit[unit] for unit in placed if any(unit in units for units in held)) if of_unit else 0
        )
        self.gains = self._gains() if self.most_bytes else []

    def _gains(self) -> list[_Gain]:
        import numpy as np

        gains = []
        for shard in self._plan.workers:
            units = self._cached.get(shard.endpoint, frozenset())
            kept = [size if unit in units else 0 for unit, size in enumerate(self._facts.cacheable_bytes)]
            sums = np.cumsum([0, *kept]).astype(float)
            gains.append(_Gain(shard, sums[None, :] - sums[:, None]))
        return gains

    def kept_by(self, shard: Shard) -> int:
        """Bytes of a worker's share that it has cached."""
        units = self._cached.get(shard.endpoint, frozenset())
        sizes = self._facts.cacheable_bytes
        return sum(sizes[unit] for unit in shard.units if unit in units) if sizes else 0

    def kept_bytes(self, plan: LayerPlan) -> int:
        """Bytes that need not be sent."""
        return sum(map(self.kept_by, plan.workers))

    def best(self) -> LayerPlan | None:
        """The plan with the fewest bytes to send, of those as fast; the least changed one of equals."""
        if len(self.gains) <= EXACT_WORKERS:
            return self._best_of(map(list, permutations(self.gains)))
        by_cached = sorted(self.gains, key=self._middle)
        found = self._best_of([self.gains, by_cached])
        for _ in range(PASSES):
            order = self.gains
            if found is not None:
                places = {shard.endpoint: place for place, shard in enumerate(found.workers)}
                order = sorted(self.gains, key=lambda gain: places[gain.shard.endpoint])
            better = self._best_of(list(_moved(order)))
            if better is None or (found is not None and self.kept_bytes(better) <= self.kept_bytes(found)):
                break
            found = better
        return found

    def _middle(self, gain: _Gain) -> float:
        """Where a worker's cached units are; that of a worker without any, where it is now."""
        units = [unit for unit in self._cached.get(gain.shard.endpoint, ()) if self._first <= unit < self._end]
        units = units or list(gain.shard.units)
        return sum(units) / len(units)

    def _best_of(self, orders: Iterator[list[_Gain]] | Sequence[list[_Gain]]) -> LayerPlan | None:
        found: tuple[tuple[int, int], LayerPlan] | None = None
        for order in orders:
            for counts in self._counts(order):
                plan = self._valid(order, counts)
                if plan is not None:
                    value = (-self.kept_bytes(plan), self._moved_units(plan))
                    if found is None or value < found[0]:
                        found = value, plan
                    break
        return found[1] if found else None

    def _moved_units(self, plan: LayerPlan) -> int:
        before = {unit: shard.endpoint for shard in self._plan.shards for unit in shard.units}
        return sum(before[unit] != shard.endpoint for shard in plan.shards for unit in shard.units)

    # --- counts -----------------------------------------------------------------------------------

    def _counts(self, order: Sequence[_Gain]) -> Iterator[list[int]]:
        """Units of each worker in this order, the fewest bytes to send first, then faster ones."""
        if self._plan.strategy in MOVABLE and (costs := self._costs) is not None:
            for weight in _TIME_WEIGHTS:
                counts = self._by_borders(order, weight, costs)
                if counts is not None:
                    yield counts
        yield [gain.shard.unit_count for gain in order]

    @cached_property
    def _costs(self) -> dict[str, tuple[Floats, Floats]] | None:
        """By worker, of each run: the share of the plan's time, and how far it is from the planned bytes; infinite
        where it does not fit. None where nobody knows how fast one is although the plan goes by speed."""
        import numpy as np

        load = model_load(self._facts, self._plan.context_tokens)
        runs = Runs(self._facts, load)
        free = free_by_endpoint(self._workers, MARGIN)
        all_free = free_by_endpoint(self._workers, 0.0)
        by_endpoint = {worker.endpoint: worker for worker in self._workers}
        total_ms = self._token_ms(self._plan)
        sums = np.cumsum([0, *load.weight_bytes]).astype(float)
        found = {}
        for gain in self.gains:
            shard = gain.shard
            limit = max(free[shard.endpoint], min(all_free[shard.endpoint], shard.needed_bytes))
            worker = by_endpoint[shard.endpoint]
            cost = device_cost(worker, self._speeds, self._facts, limit) if self._speeds else None
            if cost is None and self._plan.strategy == LATENCY_AWARE:
                return None
            moved = np.abs(sums[None, :] - sums[:, None] - shard.weight_bytes) / sums[-1]
            moved[runs.needs_more_than(limit)] = np.inf
            ms = runs.ms(cost) / total_ms if cost is not None and total_ms else np.zeros_like(moved)
            found[shard.endpoint] = (ms, moved**2)
        return found

    def _by_borders(
        self, order: Sequence[_Gain], weight: float, costs: Mapping[str, tuple[Floats, Floats]]
    ) -> list[int] | None:
        """The counts with the least bytes to send, and time as far as it counts; None if nothing fits."""
        import numpy as np

        size = self._facts.layer_count + 2
        best, every = np.full(size, np.inf), np.arange(size)
        best[self._first] = 0.0
        firsts = []
        for gain in order:
            ms, moved = costs[gain.shard.endpoint]
            sums = best[:, None] - gain.kept / self.most_bytes + (weight + _FEW) * ms + _FEW * moved
            first = sums.argmin(axis=0)
            best = sums[first, every]
            firsts.append(first)
        end, counts = self._end, []
        if not np.isfinite(best[end]):
            return None
        for first in reversed(firsts):
            counts.append(int(end - first[end]))
            end = int(first[end])
        return counts[::-1]

    def _valid(self, order: Sequence[_Gain], counts: Sequence[int]) -> LayerPlan | None:
        """The plan with these workers and counts, if it fits and is as fast."""
        by_endpoint = {worker.endpoint: worker for worker in self._workers}
        count_of = {shard.endpoint: shard.unit_count for shard in self._plan.own}
        count_of |= {gain.shard.endpoint: count for gain, count in zip(order, counts, strict=True)}
        used = [by_endpoint[endpoint] for endpoint in count_of]
        found = unchecked_plan(
            self._facts, used, list(count_of.values()), context_tokens=self._plan.context_tokens
        )
        if memory_shortage(found, self._workers) is not None:
            return None
        before, now = self._token_ms(self._plan), self._token_ms(found)
        if before is not None and (now is None or now > before * (1 + SLOWER)):
            return None
        return replace(found, strategy=self._plan.strategy, predicted_token_ms=now, reasons=self._plan.reasons)

    def _token_ms(self, plan: LayerPlan) -> float | None:
        return predict(self._speeds, worker_parts(plan, self._round_trips_ms, self._facts)).token_ms


def _moved(order: Sequence[_Gain]) -> Iterator[list[_Gain]]:
    """Each of them at every other place."""
    for place, gain in enumerate(order):
        others = [*order[:place], *order[place + 1 :]]
        for new in range(len(order)):
            if new != place:
                yield [*others[:new], gain, *others[new:]]
