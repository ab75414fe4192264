"""The strategy `latency_aware`: the workers, their order and units with the shortest predicted time per token.

The search (`search.py`) is exact for up to `FEW_MEMORIES` memories (six with 126 layers). For more it is nearly
always within a percent; where blocks differ and little memory is left over, it may be some percent off. Of workers
that share a memory one takes part: moving the units of a second one to the faster of them saves a round trip. Of
layouts that are nearly as fast, the one with fewer devices is taken, and one that runs already is kept.

Workers whose speed is not known take part only where the memory of the others does not suffice; they then count as
half as fast as the slowest of those, and as far away as the farthest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.costs import DeviceCost, Runs, device_cost, free_by_endpoint, is_known
from sollol_nb.layers.plan import CPU, MAX_WORKERS, LayerPlan
from sollol_nb.layers.reasons import Alternatives, explain
from sollol_nb.layers.search import OWN_CPU, OWN_GPU, WORKER, Device, EveryOrder, Layout, in_order, likely_sets
from sollol_nb.layers.strategies import ModelLoad, WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds

MARGIN = 0.05
"""Of free memory, which is left free as long as the model fits: another program may need it a moment later."""
FEW_MEMORIES, EXACT_WORK = 8, 5 * 10**6
"""All sets and orders of so many memories are tried, while that compares so many borders at most."""
POOL = 6
"""Devices that are tried in all orders where blocks differ."""
SWAPS, SWAP_WORK = 48, 10**6
"""Exchanges of one device that are tried where blocks differ, and borders that are compared for them at most."""
SMALL_SET = 4
SETS_TRIED = 4
ORDERS_OVER_ALL = 2
"""For the best of these sets, other devices may join when the borders are placed."""
TIE = 0.002
"""Of layouts that differ by less than this share, the one with fewer devices is taken."""
UNKNOWN = 2.0
"""How much slower than the slowest known a worker of unknown speed counts."""
KEEP = 0.02
"""A running layout is kept if it takes at most this share longer than the best."""

CostOf = Callable[[WorkerCapacity, int], DeviceCost | None]
"""What units cost on a worker with so many free bytes; None if that is not known."""


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
    current: LayerPlan | None = None,
    needs_worker: bool = False,
) -> Choice | None:
    """The choice with the shortest predicted time per token; None if the model does not fit.

    Args:
        wanted: use exactly so many workers, or as many as can have a block; own devices come in addition.
        current: a layout that runs.
        needs_worker: whether at least one worker takes part.
    """
    found = best_layout(
        facts,
        load,
        workers,
        lambda worker, free_bytes: device_cost(worker, speeds, facts, free_bytes),
        own_ms=speeds.own_ms,
        wanted=wanted,
        needs_worker=needs_worker,
    )
    if found is None:
        return None
    search, _ = found
    assert search.best is not None
    best = _kept(search, current, workers) or search.best
    unknown = [position for position in best.positions if not is_known(workers[position], speeds)]
    reasons = explain(best, search, workers, load, unknown=unknown, wanted=wanted, needs_worker=needs_worker)
    return Choice(best.positions, best.counts, reasons)


def best_layout(
    facts: ModelFacts,
    load: ModelLoad,
    workers: Sequence[WorkerCapacity],
    cost_of: CostOf,
    *,
    own_ms: float,
    wanted: int | None,
    needs_worker: bool = False,
) -> tuple[Search, float] | None:
    """The search that found a layout, and the margin of memory with which it did; None if the model does not fit.

    Args:
        cost_of: what units cost on a worker with so many free bytes; None if that is not known.
        own_ms: that the coordinator takes in addition, whatever the layout.
        wanted, needs_worker: as in `fastest`.
    """
    runs = Runs(facts, load)
    if wanted is not None:
        smallest = min(map(sum, zip(load.weight_bytes, load.kv_bytes, strict=True))) + load.reserve_bytes
        able = sum(not worker.is_own and worker.free_bytes >= smallest for worker in workers)
        wanted = max(1, min(wanted, able, MAX_WORKERS, load.unit_count))
    for with_unknown in (False, True):
        for margin in (MARGIN, 0.0):
            devices = _devices(workers, cost_of, margin, with_unknown=with_unknown)
            search = Search(runs, devices, wanted, own_ms, needs_worker=needs_worker)
            if search.best is None and needs_worker and wanted is None and search.is_inexact:
                search = Search(runs, devices, 1, own_ms, needs_worker=True)
            if search.best is not None:
                return search, margin
    return None


def _devices(
    workers: Sequence[WorkerCapacity],
    cost_of: CostOf,
    margin: float,
    *,
    with_unknown: bool,
) -> list[Device]:
    """The devices whose costs are known; with the unknown, also those."""
    free = free_by_endpoint(workers, margin)
    costs = [cost_of(worker, free[worker.endpoint]) for worker in workers]
    known = [cost for cost in costs if cost is not None]
    devices, gpus = [], 0
    for position, (worker, cost) in enumerate(zip(workers, costs, strict=True)):
        if cost is None and (not with_unknown or worker.is_own or not known):
            continue
        cost = cost or DeviceCost(
            UNKNOWN * max(other.ms_per_byte for other in known),
            max(other.block_ms for other in known),
            max(other.fixed_ms for other in known),
            max(other.output_ms for other in known),
            free[worker.endpoint],
        )
        rank = WORKER
        if worker.device == CPU:
            rank = OWN_CPU
        elif worker.is_own:
            rank, gpus = OWN_GPU + gpus, gpus + 1
        memory = worker.endpoint if worker.memory_domain is None else f"domain {worker.memory_domain}"
        devices.append(Device(position, cost, rank, memory, worker.device_count))
    return devices


class Search(Alternatives):
    """The best layout, and what others would give.

    Attributes:
        wanted: exactly so many workers; None if that does not matter.
        best: the layout with the shortest token; None if nothing fits.
    """

    def __init__(
        self,
        runs: Runs,
        devices: Sequence[Device],
        wanted: int | None,
        own_ms: float,
        *,
        needs_worker: bool = False,
    ) -> None:
        self.runs = runs
        self.own_ms = own_ms
        self.devices = devices
        self.wanted = wanted
        self._needs_worker = needs_worker
        self._every: EveryOrder | None = None
        self._groups: list[list[Device]] = []
        self._others: list[Layout] = []
        memories = len({device.memory for device in devices} if wanted is None else devices)
        if not devices:
            self.best: Layout | None = None
        elif memories <= FEW_MEMORIES and 2**memories * memories / 2 * runs.unit_count**2 <= EXACT_WORK:
            self.best = self._among_few(devices) or self._among_few(_with_equal_parts(devices))
        else:
            self.best = self._among_many(devices) or self._among_many(_with_equal_parts(devices))

    def with_device(self, device: Device) -> Layout | None:
        assert self.best is not None
        if self._every is not None:
            (number,) = (number for number, group in enumerate(self._groups) if device in group)
            sets = [members for members in self._every.ms if number in members]
            members = min(sets, key=self._every.ms.__getitem__, default=None)
            return None if members is None else self._every.layout(members)
        joined = _in_engine_order([*self.best.devices[:-1], device, self.best.devices[-1]])
        found = in_order(self.runs, joined, must={device.position})
        return found if found is not None and self.is_possible(found) else None

    def next_best(self, chosen: Layout) -> Layout | None:
        if self._every is not None:
            best = {device.position for device in chosen.devices}
            for members in sorted(self._every.ms, key=self._every.ms.__getitem__):
                found = self._every.layout(members)
                if set(found.positions) != best and self.is_possible(found):
                    return found
            return None
        others = [*self._others]
        if self.wanted is None and len(chosen.devices) > 1:
            least = min(range(len(chosen.counts)), key=chosen.counts.__getitem__)
            without = in_order(self.runs, [*chosen.devices[:least], *chosen.devices[least + 1 :]])
            others += [without] if without is not None and self.is_possible(without) else []
        different = [other for other in others if set(other.positions) != set(chosen.positions)]
        return min(different, key=lambda layout: layout.ms, default=None)

    def one_of_each_memory(self) -> list[Device]:
        """The devices, but of those that share a memory the fastest."""
        return _one_of_each_memory(self.runs, self.devices)

    def is_possible(self, layout: Layout) -> bool:
        """Whether it has as many workers as wanted, not too many devices, and those in one memory fit it."""
        return self._can_be(layout.devices) and _fit_together(self.runs, layout)

    @property
    def is_inexact(self) -> bool:
        """Whether only likely sets of devices were tried."""
        return bool(self.devices) and self._every is None

    def alone(self) -> Layout | None:
        """The best layout over own devices alone; None if these do not hold the model."""
        own = [device for device in self.devices if device.rank != WORKER]
        return Search(self.runs, own, None, self.own_ms).best

    def _can_be(self, devices: Sequence[Device]) -> bool:
        if self._needs_worker and all(device.rank != WORKER for device in devices):
            return False
        if self.wanted is not None and sum(device.rank == WORKER for device in devices) != self.wanted:
            return False
        return sum(device.weight for device in devices) <= MAX_WORKERS

    def _among_few(self, devices: Sequence[Device]) -> Layout | None:
        groups: dict[str, list[Device]] = {}
        for device in devices:
            key = device.memory if self.wanted is None else str(device.position)
            groups.setdefault(f"{key} {device.rank}" if device.rank != WORKER else key, []).append(device)
        self._groups = list(groups.values())
        self._every = EveryOrder(self.runs, self._groups, self._can_be)
        ms = self._every.ms
        for members in sorted(ms, key=ms.__getitem__):
            limit = (ms[members] + self.own_ms) * (1 + TIE)
            nearly = [other for other in ms if ms[members] <= ms[other] <= limit - self.own_ms]
            for other in sorted(nearly, key=lambda found: (len(found), ms[found])):
                layout = self._every.layout(other)
                if self.is_possible(layout):
                    return layout
        return None

    def _among_many(self, devices: Sequence[Device]) -> Layout | None:
        if self.wanted is None:
            devices = _one_of_each_memory(self.runs, devices)
        found: list[Layout] = []
        tried: list[Sequence[Device]] = []
        for candidates in _with_output_where_it_can_be(devices):
            sizes = [self.runs.mean_block_bytes]
            if not self.runs.are_alike:  # where memory is tight, more devices may be needed than for mean blocks
                sizes.append(self.runs.largest_block_bytes)
            for size in sizes:
                sets = likely_sets(self.runs, candidates, size, wanted=self.wanted, kept=SETS_TRIED)
                tried += [members for members, _ in sets]
                for number, (members, holder) in enumerate(sets):
                    found += self._placed(
                        devices, members, holder, over_all=number < ORDERS_OVER_ALL // len(sizes)
                    )
        by_memory = sorted(devices, key=lambda device: (device.rank == WORKER, -device.cost.free_bytes))
        own = sum(device.rank != WORKER for device in devices)
        by_memory = by_memory[: own + self.wanted if self.wanted else MAX_WORKERS]
        tried.append(by_memory)
        if not found:
            found += self._placed(devices, by_memory, by_memory[-1], over_all=True)
        found = list(filter(self.is_possible, found))
        if not self.runs.are_alike:
            found = sorted(found, key=lambda layout: layout.ms)
            reordered = self._reordered(found, [*(layout.devices for layout in found), *tried])
            found += filter(self.is_possible, reordered)
        self._others = found
        return min(found, key=lambda layout: layout.ms, default=None)

    def _reordered(self, layouts: Sequence[Layout], sets: Sequence[Sequence[Device]]) -> list[Layout]:
        """Layouts in other orders: where blocks differ, it matters which ones a device gets.

        Args:
            layouts: so far, the best first.
            sets: of devices, the most likely first; as many as are few are tried in all orders.
        """
        pool: list[Device] = []
        for devices in sets:
            more = [device for device in devices if device not in pool]
            pool += more if len(pool) + len(more) <= POOL else []
        pools = [
            pool,
            *(devices for devices in sets if len(devices) <= SMALL_SET and not set(devices) <= set(pool)),
        ]
        found: list[Layout] = []
        for some in filter(None, pools[: 2 * SETS_TRIED]):
            every = EveryOrder(self.runs, [[device] for device in some], self._can_be)
            found += [every.layout(members) for members in sorted(every.ms, key=every.ms.__getitem__)[:SETS_TRIED]]
        if not layouts:
            return found
        best = self._swapped(layouts[0], [device for devices in sets for device in devices])
        for place in range(len(best.devices) - 1 if len(best.devices) > FEW_MEMORIES else 0):
            order = list(best.devices)
            if place + 1 >= len(order):  # a better one has fewer
                break
            order[place], order[place + 1] = order[place + 1], order[place]
            must = {device.position for device in order} if self.wanted is not None else set()
            swapped = in_order(self.runs, _in_engine_order(order), must)
            if swapped is not None and swapped.ms < best.ms:
                best = swapped
        return [*found, best]

    def _placed(
        self, devices: Sequence[Device], members: Sequence[Device], holder: Device, *, over_all: bool
    ) -> list[Layout]:
        """Layouts with the devices of a set, of which one is to have the output layer."""
        must = {device.position for device in members} if self.wanted is not None else set()
        rows = [members, devices] if over_all and self.wanted is None else [members]
        found = []
        for row in rows:
            order = sorted(row, key=lambda device: (device is holder, device.cost.ms_per_byte))
            layout = in_order(self.runs, _in_engine_order(order), must)
            if layout is not None:
                found.append(layout)
        return found

    def _swapped(self, best: Layout, others: Sequence[Device]) -> Layout:
        """The best layout, after putting others in its devices' places, or between them, as far as tries last."""
        tries = min(SWAPS, SWAP_WORK // (len(best.devices) * self.runs.unit_count**2))
        for other in dict.fromkeys(others):
            for place in range(len(best.devices) + 1):
                if other in best.devices:
                    break
                before, after = best.devices[:place], best.devices[place:]
                orders = [[*before, other, *after[1:]], [*before, other, *after]]
                for order in orders if self.wanted is None else orders[:1]:
                    ranks = [device.rank for device in order]
                    if ranks != sorted(ranks) or not self._can_be(order):
                        continue
                    tries -= 1
                    if tries < 0:
                        return best
                    must = {device.position for device in order} if self.wanted is not None else set()
                    found = in_order(self.runs, order, must)
                    if found is not None and found.ms < best.ms and self.is_possible(found):
                        best = found
                        break
        return best


def _in_engine_order(devices: Sequence[Device]) -> list[Device]:
    return sorted(devices, key=lambda device: device.rank)


def _with_output_where_it_can_be(devices: Sequence[Device]) -> list[list[Device]]:
    """The devices without own GPUs; and all, where an own GPU takes the output layer, since it comes last."""
    gpus = [device for device in devices if device.rank >= OWN_GPU]
    alone = [[device] for device in devices if device.rank == OWN_CPU]
    without = [device for device in devices if device.rank < OWN_GPU]
    return [without, list(devices), *alone] if gpus else [without, *alone]


def _one_of_each_memory(runs: Runs, devices: Sequence[Device]) -> list[Device]:
    """Of devices that share a memory, the one that is fastest with as many blocks as fit."""
    best: dict[str, tuple[float, Device]] = {}
    for device in devices:
        key = device.memory if device.rank == WORKER else f"{device.memory} {device.rank}"
        blocks = max(1.0, (device.cost.free_bytes - runs.reserve_bytes) / max(1.0, runs.mean_block_bytes))
        block_ms = device.cost.ms_per_byte * runs.mean_block_read + device.cost.block_ms
        ms = device.cost.fixed_ms + block_ms * min(blocks, runs.unit_count)
        if key not in best or ms < best[key][0]:
            best[key] = ms, device
    return [device for _, device in best.values()]


def _with_equal_parts(devices: Sequence[Device]) -> list[Device]:
    """The devices, each with an equal part of a memory that it shares."""
    sharing: dict[str, int] = {}
    for device in devices:
        sharing[device.memory] = sharing.get(device.memory, 0) + 1
    return [
        replace(device, cost=replace(device.cost, free_bytes=device.cost.free_bytes // sharing[device.memory]))
        for device in devices
    ]


def _fit_together(runs: Runs, layout: Layout) -> bool:
    """Whether devices that share a memory fit it together."""
    needed: dict[str, float] = {}
    first = 0
    for device, count in zip(layout.devices, layout.counts, strict=True):
        needed[device.memory] = needed.get(device.memory, 0.0) + runs.needed_bytes(first, first + count)
        first += count
    return all(needed[device.memory] <= device.cost.free_bytes for device in layout.devices)


def _kept(search: Search, current: LayerPlan | None, workers: Sequence[WorkerCapacity]) -> Layout | None:
    """The running layout, if it still fits and is nearly as fast as the best."""
    if current is None or search.best is None:
        return None
    by_endpoint = {workers[device.position].endpoint: device for device in search.devices}
    if any(shard.endpoint not in by_endpoint for shard in current.shards):
        return None
    devices = tuple(by_endpoint[shard.endpoint] for shard in current.shards)
    ms, first = 0.0, 0
    for device, count in zip(devices, current.unit_counts, strict=True):
        if not 0 < count <= search.runs.unit_count - first:
            return None
        ms += float(search.runs.ms(device.cost)[first, first + count])
        first += count
    layout = Layout(devices, current.unit_counts, ms)
    fits = first == search.runs.unit_count and search.is_possible(layout)
    best_ms = search.best.ms + search.own_ms
    return layout if fits and ms + search.own_ms <= best_ms * (1 + KEEP) else None
