"""Strategies: how many units (blocks, then the output layer) each worker gets.

`STRATEGIES` has the names of all. Those in `SPLITS` spread the model over all given workers: each is one pure
function from a `ModelLoad` and workers to unit counts, and `plan_layers` checks whether its counts fit the
workers' memory. The others choose among the workers by predicted times (`fastest.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What the planner knows about a worker.

    Attributes:
        endpoint: `host:port`.
        free_bytes: memory the worker reports as free.
        total_bytes: all memory that the worker reports.
        round_trip_ms: network round trip, paid once per worker and token; None where it was not measured.
        memory_domain: workers of the same domain share one memory, such as CPU workers on one host.
        name: how people call it; "" if by its endpoint.
        device: "" for a worker; `plan.CPU`, or llama.cpp's name of a GPU such as `CUDA0`, for a device of the
            coordinator's own machine, whose endpoint is `plan.own_endpoint(device)`.
        device_count: as how many devices llama.cpp sees it.
    """

    endpoint: str
    free_bytes: int
    total_bytes: int
    round_trip_ms: float | None = None
    memory_domain: str | None = None
    name: str = ""
    device: str = ""
    device_count: int = 1

    @property
    def is_own(self) -> bool:
        """Whether it is a device of the coordinator's own machine."""
        return bool(self.device)

    @property
    def worker(self) -> str:
        """The worker or device as people call it."""
        return self.name or self.endpoint


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """Memory that a model needs on its workers.

    Attributes:
        weight_bytes: of each unit: the blocks, then the output layer.
        kv_bytes: KV cache of each unit for the whole context; 0 for the output layer.
        reserve_bytes: compute buffers of each worker that has units.
        output_reserve_bytes: compute buffers that the output layer adds to its worker.
    """

    weight_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    reserve_bytes: int
    output_reserve_bytes: int

    @property
    def unit_count(self) -> int:
        return len(self.weight_bytes)


Strategy = Callable[[ModelLoad, Sequence[WorkerCapacity]], list[int] | None]
"""From a load and workers (those of one memory domain next to each other) to the units of each worker, in their
order.

The counts sum to `load.unit_count`; None means that no split fits. `plan_layers` refuses counts that do not fit.
"""


def even(load: ModelLoad, workers: Sequence[WorkerCapacity]) -> list[int]:
    """The same number of units for each worker, the remainder to the first ones."""
    share, remainder = divmod(load.unit_count, len(workers))
    return [share + (position < remainder) for position in range(len(workers))]


def memory_aware(load: ModelLoad, workers: Sequence[WorkerCapacity]) -> list[int] | None:
    """Units in proportion to the free memory, by bytes; None only if no split in this order fits.

    A worker's budget is its free memory without its compute buffers. First the fullest worker is made as empty as
    possible (the smallest ratio of bytes to budget that all can keep), then, within that ratio, the bytes are
    spread as proportionally as possible (least squares).
    """
    row = _UnitRow.of(load)
    domains = memory_domains(workers)
    # Where a memory is too small for the buffers of all workers that share it, one of them is enough.
    for buffers_for_all in (True, False):
        budgets = _budgets(load, domains, buffers_for_all)
        if row.fill(budgets) == row.count:
            borders = _proportional_borders(row, budgets, _smallest_ratio(row, budgets))
            return _within_domains(row, domains, load.reserve_bytes, borders)
    return None


SPLITS: dict[str, Strategy] = {"memory_aware": memory_aware, "even": even}
"""Strategies that spread a model over all given workers."""
AUTO, LATENCY_AWARE, THROUGHPUT = "auto", "latency_aware", "throughput"
STRATEGIES: dict[str, str] = {
    AUTO: "latency_aware as soon as a worker is calibrated, else memory_aware",
    LATENCY_AWARE: "the workers, and the layers of each, with the shortest predicted time per token",
    THROUGHPUT: "those with the most predicted tokens per second for many requests and long prompts",
    "memory_aware": "over all workers, by free memory",
    "even": "over all workers, by count",
}
"""All strategies, and what each does."""
DEFAULT_STRATEGY = AUTO


def unplaceable_units(load: ModelLoad, workers: Sequence[WorkerCapacity]) -> tuple[int, int]:
    """Units, and their bytes, that do not fit even if the workers are filled completely."""
    row = _UnitRow.of(load)
    placed = row.fill(_budgets(load, memory_domains(workers), False))
    missing_reserve = load.output_reserve_bytes if placed < row.count else 0
    return row.count - placed, row.bytes_of(placed, row.count) + missing_reserve


# --- workers that share a memory --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryDomain:
    """Workers that share one memory."""

    endpoints: tuple[str, ...]
    free_bytes: int


def memory_domains(workers: Sequence[WorkerCapacity]) -> list[MemoryDomain]:
    """Memories in the order of their first workers. Where reports differ, the smallest is used."""
    groups: dict[str, list[WorkerCapacity]] = {}
    for worker in workers:
        name = f"worker {worker.endpoint}" if worker.memory_domain is None else f"domain {worker.memory_domain}"
        groups.setdefault(name, []).append(worker)
    return [
        MemoryDomain(
            tuple(worker.endpoint for worker in group), max(0, min(worker.free_bytes for worker in group))
        )
        for group in groups.values()
    ]


def _budgets(load: ModelLoad, domains: Sequence[MemoryDomain], buffers_for_all: bool) -> list[int]:
    """Bytes for units in each memory; negative where not even the compute buffers fit."""
    return [
        domain.free_bytes - load.reserve_bytes * (len(domain.endpoints) if buffers_for_all else 1)
        for domain in domains
    ]


def _within_domains(
    row: _UnitRow, domains: Sequence[MemoryDomain], reserve_bytes: int, borders: Sequence[int]
) -> list[int]:
    """Units of each worker: those of a memory go to as many of its workers as there is space for buffers."""
    counts: list[int] = []
    for domain, (first, end) in zip(domains, pairwise(borders), strict=True):
        spare_bytes = domain.free_bytes - row.bytes_of(first, end) - row.reserve_of(first, end)
        used = min(len(domain.endpoints), end - first, max(1, spare_bytes // max(1, reserve_bytes)))
        if used:
            part = _UnitRow(row.cumulative[first : end + 1], 0)
            inner = _proportional_borders(part, [row.cumulative[-1]] * used, 1.0)
            counts += [after - before for before, after in pairwise(inner)]
        counts += [0] * (len(domain.endpoints) - used)
    return counts


# --- a row of units into a row of budgets -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _UnitRow:
    """Units in order: `cumulative[i]` bytes are before unit i. The last unit may need a reserve too."""

    cumulative: tuple[int, ...]
    last_reserve_bytes: int

    @classmethod
    def of(cls, load: ModelLoad) -> _UnitRow:
        units = map(sum, zip(load.weight_bytes, load.kv_bytes, strict=True))
        return cls(tuple(accumulate(units, initial=0)), load.output_reserve_bytes)

    @property
    def count(self) -> int:
        return len(self.cumulative) - 1

    def bytes_of(self, first: int, end: int) -> int:
        return self.cumulative[end] - self.cumulative[first]

    def reserve_of(self, first: int, end: int) -> int:
        return self.last_reserve_bytes if first < end == self.count else 0

    def fits(self, first: int, end: int, budget_bytes: int, ratio: float) -> bool:
        """Whether units `first` to `end - 1` fill at most this ratio of the budget, and fit it with their
        reserve."""
        byte_count = self.bytes_of(first, end)
        return byte_count <= budget_bytes * ratio and byte_count + self.reserve_of(first, end) <= budget_bytes

    def fill(self, budgets: Sequence[int], ratio: float = 1.0) -> int:
        """Units that fit when each budget, from the left, takes as many as possible."""
        placed = 0
        for budget_bytes in budgets:
            ends = range(placed + 1, self.count + 1)
            placed += bisect_left(ends, True, key=lambda end: not self.fits(placed, end, budget_bytes, ratio))
        return placed


def _smallest_ratio(row: _UnitRow, budgets: Sequence[int]) -> float:
    """The smallest ratio of bytes to budget, to 1e-6, at which all units fit; at 1 they do."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if row.fill(budgets, middle) == row.count:
            high = middle
        else:
            low = middle
    return high


def _proportional_borders(row: _UnitRow, budgets: Sequence[int], ratio: float) -> list[int]:
    """First unit of each budget (and the end): least sum of bytes² / budget with none above the ratio."""
    costs: dict[int, float] = {0: 0.0}  # units placed so far -> least cost
    choices: list[dict[int, int]] = []  # per budget: units placed with it -> units placed before it
    for budget_bytes in budgets:
        next_costs: dict[int, float] = {}
        choice: dict[int, int] = {}
        for first, cost in costs.items():
            for end in range(first, row.count + 1):
                if end > first and not row.fits(first, end, budget_bytes, ratio):
                    break
                cost_here = cost + row.bytes_of(first, end) ** 2 / max(1, budget_bytes)
                if end not in next_costs or cost_here <= next_costs[end]:
                    next_costs[end], choice[end] = cost_here, first
        costs = next_costs
        choices.append(choice)
    borders = [row.count]
    for choice in reversed(choices):
        borders.append(choice[borders[-1]])
    return borders[::-1]
