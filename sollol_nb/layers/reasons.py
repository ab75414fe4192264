"""Why a layout was chosen, in sentences: who was left out, and what the next best would have given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sollol_nb.layers.plan import THIS_MACHINE
from sollol_nb.layers.search import WORKER, Device, Layout
from sollol_nb.layers.strategies import ModelLoad, WorkerCapacity
from sollol_nb.text.tables import counted, format_bytes

EXPLAINED = 4
"""Devices that were left out are explained one by one up to this number."""
ALONE_IS_FASTEST = f"all layers are on {THIS_MACHINE}, which alone is fastest"
CALIBRATE = "`%sollol_cluster calibrate`"


class Alternatives(Protocol):
    """What a search found besides its choice.

    Attributes:
        devices: that it could choose among.
        own_ms: the coordinator's part of each token.
    """

    devices: Sequence[Device]
    own_ms: float

    def with_device(self, device: Device) -> Layout | None:
        """The best layout in which a device takes part that was left out; None if there is none."""

    def next_best(self, chosen: Layout) -> Layout | None:
        """The best layout over other devices than those chosen; None if there is none."""

    def alone(self) -> Layout | None:
        """The best layout over own devices alone; None if these do not hold the model."""


def explain(
    chosen: Layout,
    found: Alternatives,
    workers: Sequence[WorkerCapacity],
    load: ModelLoad,
    *,
    unknown: Sequence[int] = (),
    wanted: int | None = None,
    needs_worker: bool = False,
) -> tuple[str, ...]:
    """Why this layout was chosen, a sentence each.

    Args:
        unknown: positions of chosen workers of unknown speed.
        wanted: so many workers were to be used.
        needs_worker: at least one worker was to be used.
    """
    devices = {device.position: device for device in found.devices}
    used = set(chosen.positions)
    names = [worker.worker for worker in workers]
    sentences = []
    alone = found.alone() if needs_worker else None
    if alone is not None and alone.ms < chosen.ms:
        sentences.append(
            f"a worker takes part since sharding was requested: {THIS_MACHINE} alone would take "
            f"{_ms(alone.ms + found.own_ms)} per token instead of {_ms(chosen.ms + found.own_ms, unit='')}"
        )
    if all(device.rank != WORKER for device in chosen.devices):
        sentences.append(ALONE_IS_FASTEST)
    if unknown:
        sentences.append(why_unknown([names[position] for position in unknown], wanted))
    without = [names[position] for position in range(len(workers)) if position not in devices]
    if without:
        are = "is" if len(without) == 1 else "are"
        sentences.append(f"{listed(without)} {are} left out: not calibrated yet ({CALIBRATE} measures speeds)")
    left_out = [device for position, device in devices.items() if position not in used]
    left_out.sort(key=lambda device: device.cost.ms_per_byte)
    if wanted is not None and left_out:
        sentences.append(f"{counted(wanted, 'worker')} as set by num_workers")
    else:
        sentences += [
            f"{names[device.position]} is left out: {_why(device, chosen, found, names, load)}"
            for device in left_out[:EXPLAINED]
        ]
        more = len(left_out) - EXPLAINED
        if more > 0:
            sentences.append(f"{counted(more, 'other')} would not make it faster either")
    other = found.next_best(chosen)
    if other is not None:
        over = f"over {listed([names[position] for position in other.positions])}"
        if len(other.counts) <= EXPLAINED:
            over = f"{'/'.join(map(str, other.counts))} {over}"
        sentences.append(f"the next best, {over}, would take {_ms(other.ms + found.own_ms)}")
    return tuple(sentences)


def why_unknown(names: Sequence[str], wanted: int | None = None) -> str:
    """Why workers of unknown speed take part.

    Args:
        wanted: so many workers were to be used.
    """
    take, are = ("takes", "it is") if len(names) == 1 else ("take", "they are")
    needed = "the memory of the others does not suffice"
    if wanted is not None:
        needed = f"{counted(wanted, 'worker')} must take part"
    return f"{listed(names)} {take} part although {are} not calibrated yet: {needed} ({CALIBRATE} measures speeds)"


def _why(device: Device, chosen: Layout, found: Alternatives, names: Sequence[str], load: ModelLoad) -> str:
    smallest = min(map(sum, zip(load.weight_bytes, load.kv_bytes, strict=True))) + load.reserve_bytes
    if device.cost.free_bytes < smallest:
        return f"its memory holds no layer ({format_bytes(device.cost.free_bytes)} free)"
    sharing = next((other for other in chosen.devices if other.memory == device.memory), None)
    if sharing is not None:
        return f"it shares the memory of {names[sharing.position]}"
    layout = found.with_device(device)
    if layout is None:
        return "its memory, or the number of devices that llama.cpp supports, does not allow for it"
    now_ms, with_ms = chosen.ms + found.own_ms, layout.ms + found.own_ms
    if _ms(now_ms) == _ms(with_ms):
        return f"with it a token would not take less than {_ms(now_ms)}"
    with_it = f"with it a token would take {_ms(with_ms)} instead of {_ms(now_ms, unit='')}"
    return f"{with_it} ({_cause(device, chosen, with_ms - now_ms, names)})"


def _cause(device: Device, chosen: Layout, more_ms: float, names: Sequence[str]) -> str:
    """What most of the additional time is: the way to a device, or its speed."""
    best = min(chosen.devices, key=lambda other: other.cost.ms_per_byte)
    ratio = device.cost.ms_per_byte / best.cost.ms_per_byte if best.cost.ms_per_byte else 1.0
    if device.cost.fixed_ms >= more_ms / 2 or ratio < 1.1:
        return f"{_ms(device.cost.fixed_ms)} on the way to it"
    return f"its layers take {ratio:.2g} times as long as those of {names[best.position]}"


def _ms(ms: float, unit: str = " ms") -> str:
    return f"{ms:.3g}{unit}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, `a, b, c, d and 6 more`."""
    shown = [*names[:EXPLAINED], *([f"{len(names) - EXPLAINED} more"] if len(names) > EXPLAINED else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
