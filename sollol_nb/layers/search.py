"""The search for the layout with the shortest token: which devices, in which order, with how many units each.

For a fixed order of devices, dynamic programming over the borders finds the best layout, exactly, with any of the
devices left empty (`in_order`). For few devices, the same over all sets of devices tries all orders
(`EveryOrder`), exactly. For many, only the set is searched, as if all blocks were alike (`likely_sets`), and the
borders follow by `in_order`.

With blocks that are alike, the time is a fixed cost for each device that is used, and so much for each block. Then
there is a best layout in which, sorted by the time for a block, all used devices are full but the last: blocks
could move from a slower one otherwise. The device with the output layer may be slower and have nothing else. So
one pass over the sorted devices suffices, over the number of blocks that are placed and of devices that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sollol_nb.layers.costs import DeviceCost, Runs
from sollol_nb.layers.plan import MAX_WORKERS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sollol_nb.layers.costs import Floats

    Ints = npt.NDArray[np.int64]

OWN_CPU, WORKER, OWN_GPU = 0, 1, 2
"""Ranks: the order of devices in llama.cpp; the second own GPU has `OWN_GPU + 1`, and so on."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that may take part.

    Attributes:
        position: its place among the given workers.
        cost: what units cost on it.
        rank: `OWN_CPU`, `WORKER`, or from `OWN_GPU` on.
        memory: equal for devices that share a memory.
        device_count: as how many devices llama.cpp sees it.
    """

    position: int
    cost: DeviceCost
    rank: int
    memory: str
    device_count: int = 1

    @property
    def weight(self) -> int:
        """What it takes of `MAX_WORKERS`."""
        return 0 if self.rank == OWN_CPU else self.device_count


@dataclass(frozen=True, slots=True)
class Layout:
    """Devices in the order of their layers, the units of each, and the time per token."""

    devices: tuple[Device, ...]
    counts: tuple[int, ...]
    ms: float

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(device.position for device in self.devices)


def in_order(
    runs: Runs,
    devices: Sequence[Device],
    must: Collection[int] = (),
    *,
    ms_of: Callable[[DeviceCost], Floats] | None = None,
) -> Layout | None:
    """The best layout over devices in this order, of which any may stay empty but those at the positions `must`;
    None if nothing fits.

    Args:
        ms_of: milliseconds of each run, as `Runs.ms`, which is the default.
    """
    import numpy as np

    ms = np.full(runs.unit_count + 1, np.inf)  # by the units placed so far
    ms[0] = 0.0
    every = np.arange(len(ms))
    firsts = []
    for device in devices:
        sums = ms[:, None] + (ms_of or runs.ms)(device.cost)
        first = sums.argmin(axis=0)
        found = sums[first, every]
        is_used = np.full(len(ms), True) if device.position in must else found < ms
        firsts.append(np.where(is_used, first, -1))
        ms = np.where(is_used, found, ms)
    if not np.isfinite(ms[-1]):
        return None
    end, used = runs.unit_count, []
    for device, first in zip(reversed(devices), reversed(firsts), strict=True):
        if first[end] >= 0:
            used.append((device, int(end - first[end])))
            end = int(first[end])
    return Layout(
        tuple(device for device, _ in reversed(used)), tuple(count for _, count in reversed(used)), float(ms[-1])
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """How a set of devices best holds the units before each end: the first unit of its last device, and which
    device of which group that is."""

    first: Ints
    device: Ints
    group: Ints


class EveryOrder:
    """The best layout of every set of a few devices, over all their orders.

    Args:
        groups: of which each gives at most one device to a set.
        can_be: whether a set may be used, by the first devices of its groups.
    """

    def __init__(
        self, runs: Runs, groups: Sequence[Sequence[Device]], can_be: Callable[[Sequence[Device]], bool]
    ) -> None:
        import numpy as np

        self._runs = runs
        self._groups = groups
        every = np.arange(runs.unit_count + 1)
        start = np.full(runs.unit_count + 1, np.inf)
        start[0] = 0.0
        self._ms: list[Floats] = [start]
        self._steps: dict[int, _Step] = {}
        for members in range(1, 2 ** len(groups)):
            ranks = [groups[group][0].rank for group in _bits(members)]
            best = np.full(runs.unit_count + 1, np.inf)
            first_of, device_of, group_of = (np.full(len(best), -1) for _ in range(3))
            for group in _bits(members):
                if groups[group][0].rank < max(ranks):
                    continue  # it cannot be the last
                before = self._ms[members & ~(1 << group)]
                for number, device in enumerate(groups[group]):
                    sums = before[:, None] + runs.ms(device.cost)
                    first = sums.argmin(axis=0)
                    found = sums[first, every]
                    better = found < best
                    best[better] = found[better]
                    first_of[better], device_of[better], group_of[better] = first[better], number, group
            self._ms.append(best)
            self._steps[members] = _Step(first_of, device_of, group_of)
        self.ms = {
            frozenset(_bits(members)): float(ms[-1])
            for members, ms in enumerate(self._ms)
            if members and np.isfinite(ms[-1]) and can_be([groups[group][0] for group in _bits(members)])
        }
        """Milliseconds per token of each set of groups that fits."""

    def layout(self, members: Collection[int]) -> Layout:
        """The best layout of a set."""
        rest, end = sum(1 << group for group in members), self._runs.unit_count
        ms = float(self._ms[rest][end])
        devices, counts = [], []
        while rest:
            step = self._steps[rest]
            group, first = int(step.group[end]), int(step.first[end])
            devices.append(self._groups[group][int(step.device[end])])
            counts.append(end - first)
            end = first
            rest &= ~(1 << group)
        return Layout(tuple(devices[::-1]), tuple(counts[::-1]), ms)


def _bits(members: int) -> Iterator[int]:
    return (bit for bit in range(members.bit_length()) if members >> bit & 1)


@dataclass(frozen=True)
class AlikeBlocks:
    """What a device costs if all blocks are like their mean.

    Attributes:
        block_ms: for each block.
        blocks: how many fit.
        output_ms: for the device with the output layer, without blocks; infinite if it cannot have it.
        output_blocks: how many fit beside the output layer; below zero if not even that fits.
    """

    device: Device
    block_ms: float
    blocks: int
    output_ms: float
    output_blocks: int

    @cached_property
    def fixed_ms(self) -> float:
        return self.device.cost.fixed_ms


def alike_blocks(runs: Runs, device: Device, block_bytes: float) -> AlikeBlocks:
    """A device's costs for mean blocks, and its capacity for blocks of this size."""
    cost, blocks = device.cost, runs.unit_count - 1
    space = cost.free_bytes - runs.reserve_bytes
    beside = space - runs.output_bytes
    fits = beside >= 0 and device.rank != OWN_CPU
    return AlikeBlocks(
        device,
        cost.ms_per_byte * runs.mean_block_read + cost.block_ms,
        max(0, min(blocks, int(space // block_bytes) if block_bytes else blocks)),
        cost.fixed_ms + cost.output_ms + cost.ms_per_byte * runs.output_read if fits else float("inf"),
        min(blocks, int(beside // block_bytes) if block_bytes else blocks) if fits else -1,
    )


def likely_sets(
    runs: Runs, devices: Sequence[Device], block_bytes: float, *, wanted: int | None, kept: int
) -> list[tuple[list[Device], Device]]:
    """The best sets of devices as if all blocks were alike, with the device of the output layer of each.

    Args:
        block_bytes: that a block needs.
        wanted: so many workers exactly.
        kept: how many sets to return at most, the best first.
    """
    import numpy as np

    blocks = runs.unit_count - 1
    rows = sorted((alike_blocks(runs, device, block_bytes) for device in devices), key=lambda row: row.block_ms)
    limit = MAX_WORKERS if wanted is None else wanted
    weights = [(row.device.weight if wanted is None else int(row.device.rank == WORKER)) for row in rows]
    # By whether the output layer is placed, what of the limit is used, and how many blocks are placed, all on
    # devices that are full.
    ms = np.full((2, limit + 1, blocks + 1), np.inf)
    ms[0, 0, 0] = 0.0
    steps, found = [], []
    for index, row in enumerate(rows):
        weight = weights[index]
        tails = list(_tails(rows, weights, index + 1, wanted, limit))
        for has_output, (capacity, fixed_ms) in enumerate(
            ((row.blocks, row.fixed_ms), (row.output_blocks, row.output_ms))
        ):
            for tail_ms, tail_weight, tail_blocks, tail_output, tail in tails:
                if has_output and tail_output:
                    continue
                left = blocks - tail_blocks
                lowest = max(0, left - capacity)
                highest = left - (0 if has_output else 1)
                top = limit - weight - tail_weight
                if capacity < 0 or highest < lowest or top < 0:
                    continue
                before = ms[1 - has_output - tail_output, : top + 1, lowest : highest + 1]
                placed = np.arange(lowest, highest + 1)
                total = before + (fixed_ms + tail_ms + row.block_ms * (left - placed))
                if wanted is not None:
                    total = total[top : top + 1]
                at = int(total.argmin())
                used, number = divmod(at, total.shape[1])
                value = float(total.flat[at])
                if np.isfinite(value):
                    used = used if wanted is None else top
                    found.append(
                        (value, index, has_output, 1 - has_output - tail_output, used, lowest + number, tail)
                    )
        after = ms.copy()
        step = np.zeros(ms.shape, dtype=np.int8)
        for is_output, (capacity, fixed_ms) in enumerate(
            ((row.blocks, row.fixed_ms), (row.output_blocks, row.output_ms))
        ):
            if capacity < (not is_output) or capacity > blocks or weight > limit:
                continue
            source = ms[: 2 - is_output, : limit + 1 - weight, : blocks + 1 - capacity]
            target = after[is_output:, weight:, capacity:]
            value_ms = source + (fixed_ms + row.block_ms * capacity)
            better = value_ms < target
            target[better] = value_ms[better]
            step[is_output:, weight:, capacity:][better] = 1 + is_output
        steps.append(step)
        ms = after
    best = []
    seen: set[frozenset[int]] = set()
    for _, index, has_output, output, used, placed, tail in sorted(found, key=lambda entry: entry[0]):
        members = [rows[index].device, *(rows[other].device for other, _ in tail)]
        holder = rows[index].device if has_output else next((rows[i].device for i, out in tail if out), None)
        for row, weight, step in zip(
            reversed(rows[:index]), reversed(weights[:index]), reversed(steps[:index]), strict=True
        ):
            kind = int(step[output, used, placed])
            if kind:
                members.append(row.device)
                used -= weight
                placed -= row.output_blocks if kind == 2 else row.blocks
                if kind == 2:
                    output, holder = 0, row.device
        assert holder is not None
        key = frozenset(device.position for device in members)
        if key not in seen:
            seen.add(key)
            best.append((members, holder))
        if len(best) == kept:
            break
    return best


def _tails(
    rows: Sequence[AlikeBlocks], weights: Sequence[int], start: int, wanted: int | None, limit: int
) -> Iterator[tuple[float, int, int, int, list[tuple[int, bool]]]]:
    """What may follow the last device that is filled: nothing; one device with the output layer alone; where so
    many workers are wanted, others with a block each. Milliseconds, weight, blocks, whether with the output layer,
    and the rows with whether each has that."""
    yield 0.0, 0, 0, 0, []
    rest = range(start, len(rows))
    holder = min(rest, key=lambda index: rows[index].output_ms, default=None)
    if holder is not None and rows[holder].output_blocks >= 0:
        yield rows[holder].output_ms, weights[holder], 0, 1, [(holder, True)]
    if wanted is None:
        return
    others = sorted(
        (index for index in rest if rows[index].blocks and weights[index]),
        key=lambda index: rows[index].fixed_ms + rows[index].block_ms,
    )
    for with_output in (False, True):
        if with_output and (holder is None or rows[holder].output_blocks < 0):
            continue
        total_ms, weight, tail = 0.0, 0, []
        if with_output and holder is not None:
            total_ms, weight, tail = rows[holder].output_ms, weights[holder], [(holder, True)]
        for count, index in enumerate((index for index in others if not with_output or index != holder), start=1):
            total_ms += rows[index].fixed_ms + rows[index].block_ms
            weight += weights[index]
            tail = [*tail, (index, False)]
            if weight > limit:
                break
            yield total_ms, weight, count, int(with_output), tail
