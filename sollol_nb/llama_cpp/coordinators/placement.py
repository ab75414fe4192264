"""The placement: where the engine put the layers according to its log, compared with the plan.

Source: the lines that llama.cpp prints while loading at debug verbosity (`llama-model.cpp`, `load_tensors`),
such as `using device RPC0 (127.0.0.1:50052)`, `layer   3 assigned to device RPC0`, and
`RPC0[127.0.0.1:50052] model buffer size = 1.54 MiB`. Devices are matched by endpoint, since their numbering has
varied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.layers.plan import MAX_WORKERS, LayerPlan
from sollol_nb.text.tables import counted

_DEVICE = re.compile(r"using device (\S+) \((\S+:\d+)\)")
_LAYER = re.compile(r"layer\s+(\d+) assigned to device ([^\s,]+)")
_BUFFER = re.compile(r"(\w+)(?:\[(\S+)\])?\s+(model|KV) buffer size\s*=\s*([\d.]+) MiB")


@dataclass(frozen=True, slots=True)
class DevicePlacement:
    """What the engine placed on one worker, or on a device of the coordinator's machine.

    Attributes:
        name: the worker's endpoint, or the engine's name of a local device such as `CPU`.
        units: indices of its units: blocks 0 to n-1, and n for the output layer.
        model_bytes: weights, as the engine reports them (rounded to 0.01 MiB).
        kv_bytes: the KV cache, likewise.
    """

    name: str
    units: tuple[int, ...]
    model_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """All that the engine placed, in its order of devices. Empty if the log does not say."""

    devices: tuple[DevicePlacement, ...]

    def of(self, name: str) -> DevicePlacement | None:
        """What this endpoint or local device has; None if nothing is known of it."""
        return next((device for device in self.devices if device.name == name), None)

    def differences(self, plan: LayerPlan) -> list[str]:
        """Where the engine placed other units than planned, one line for each worker or device."""
        if not any(device.units for device in self.devices):
            return ["the engine's log does not say where it placed the layers"]
        lines = []
        for shard in plan.shards:
            placed = self.of(shard.placed_on)
            count = len(placed.units) if placed else 0
            first = placed.units[0] if placed and placed.units else None
            if count != shard.unit_count or first != shard.first_layer:
                actual = f"{count} from unit {first}" if count else "none"
                planned_units = f"{counted(shard.unit_count, 'unit')} from unit {shard.first_layer}"
                lines.append(f"{shard.worker}: planned {planned_units}, but the engine placed {actual}")
        planned = {shard.placed_on for shard in plan.shards}
        lines += [
            f"{device.name}: planned no units, but the engine placed {len(device.units)}"
            for device in self.devices
            if device.units and device.name not in planned
        ]
        return lines


def read_placement(log: str) -> Placement:
    """The placement according to an engine's log, up to the line where it is ready."""
    endpoint_of = dict(_DEVICE.findall(log))
    units: dict[str, list[int]] = {}
    for unit, device in _LAYER.findall(log):
        units.setdefault(endpoint_of.get(device, device), []).append(int(unit))
    sizes: dict[tuple[str, str], float] = {}
    for device, endpoint, kind, mebibytes in _BUFFER.findall(log):
        name = endpoint or endpoint_of.get(device, device.removesuffix("_Mapped").removesuffix("_REPACK"))
        sizes[name, kind] = sizes.get((name, kind), 0.0) + float(mebibytes)
    names = list(dict.fromkeys([*endpoint_of.values(), *units, *(name for name, _ in sizes)]))
    return Placement(
        tuple(
            DevicePlacement(
                name,
                tuple(units.get(name, ())),
                round(sizes.get((name, "model"), 0.0) * 2**20),
                round(sizes.get((name, "KV"), 0.0) * 2**20),
            )
            for name in names
        )
    )


def split_over_devices(plan: LayerPlan, device_free_bytes: Mapping[str, Sequence[int]]) -> str:
    """The plan as llama.cpp's `--tensor-split`: whole units per device.

    A worker with several devices appears to llama.cpp as that many devices in a row; its units are shared
    among them in proportion to their free memory (largest remainders first). The units of the own CPU are not
    among them.

    Raises:
        WorkersUnavailableError: the workers have more devices than llama.cpp supports.
    """
    counts: list[int] = []
    for shard in plan.offloaded:
        free = list(device_free_bytes.get(shard.endpoint, ())) or [1]
        if not any(free):
            free = [1] * len(free)
        exact = [shard.unit_count * free_bytes / sum(free) for free_bytes in free]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(free)), key=lambda device: shares[device] - exact[device])
        for device in by_remainder[: shard.unit_count - sum(shares)]:
            shares[device] += 1
        counts += shares
    if len(counts) > MAX_WORKERS:
        raise WorkersUnavailableError(
            f"the workers and GPUs have {len(counts)} devices, but llama.cpp supports at most {MAX_WORKERS}; "
            "choose fewer workers with num_rpc_backends"
        )
    return ",".join(map(str, counts))
