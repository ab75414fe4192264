"""The placement: where the engine says it put the layers, read back from its log, beside the plan.

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

_DEVICE = re.compile(r"using device (\S+) \((\S+:\d+)\)")
_LAYER = re.compile(r"layer\s+(\d+) assigned to device ([^\s,]+)")
_BUFFER = re.compile(r"(\w+)(?:\[(\S+)\])?\s+(model|KV) buffer size\s*=\s*([\d.]+) MiB")


@dataclass(frozen=True, slots=True)
class DevicePlacement:
    """What one worker (or local device) got.

    Attributes:
        place: the worker's endpoint, or the engine's name of a local device such as `CPU`.
        units: indices of its units: blocks 0 to n-1, and n for the output layer.
        model_bytes: weights, as the engine says (it rounds to 0.01 MiB).
        kv_bytes: the KV cache, likewise.
    """

    place: str
    units: tuple[int, ...]
    model_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """All that the engine placed, in its order of devices. Empty when the log did not tell."""

    devices: tuple[DevicePlacement, ...]

    def of(self, place: str) -> DevicePlacement | None:
        """What this endpoint or local device got, or None."""
        return next((device for device in self.devices if device.place == place), None)

    def differences(self, plan: LayerPlan) -> list[str]:
        """Where the engine placed other units than planned, one line each."""
        if not any(device.units for device in self.devices):
            return ["the engine's log does not tell where it placed the layers"]
        lines = []
        for shard in plan.shards:
            placed = self.of(shard.endpoint)
            count = len(placed.units) if placed else 0
            first = placed.units[0] if placed and placed.units else None
            if count != shard.unit_count or first != shard.first_layer:
                got = f"{count} from unit {first}" if count else "none"
                lines.append(
                    f"{shard.endpoint}: planned {shard.unit_count} units from unit {shard.first_layer}, "
                    f"the engine placed {got}"
                )
        planned = set(plan.endpoints)
        lines += [
            f"{device.place}: planned nothing, the engine placed {len(device.units)} units"
            for device in self.devices
            if device.units and device.place not in planned
        ]
        return lines


def read_placement(log: str) -> Placement:
    """The placement as told by an engine's log up to the point where it is ready."""
    endpoint_of = dict(_DEVICE.findall(log))
    units: dict[str, list[int]] = {}
    for unit, device in _LAYER.findall(log):
        units.setdefault(endpoint_of.get(device, device), []).append(int(unit))
    sizes: dict[tuple[str, str], float] = {}
    for device, endpoint, kind, mebibytes in _BUFFER.findall(log):
        place = endpoint or endpoint_of.get(device, device.removesuffix("_Mapped"))
        sizes[place, kind] = sizes.get((place, kind), 0.0) + float(mebibytes)
    places = list(dict.fromkeys([*endpoint_of.values(), *units, *(place for place, _ in sizes)]))
    return Placement(
        tuple(
            DevicePlacement(
                place,
                tuple(units.get(place, ())),
                round(sizes.get((place, "model"), 0.0) * 2**20),
                round(sizes.get((place, "KV"), 0.0) * 2**20),
            )
            for place in places
        )
    )


def split_over_devices(plan: LayerPlan, device_free_bytes: Mapping[str, Sequence[int]]) -> str:
    """The plan as llama.cpp's `--tensor-split`: whole units per device.

    A worker with several devices appears to llama.cpp as that many devices in a row; its units are shared
    among them in proportion to their free memory (largest remainders first).

    Raises:
        WorkersUnavailableError: the workers have more devices than llama.cpp takes.
    """
    counts: list[int] = []
    for shard in plan.shards:
        free = list(device_free_bytes.get(shard.endpoint, ())) or [1]
        if not any(free):
            free = [1] * len(free)
        exact = [shard.unit_count * one / sum(free) for one in free]
        shares = [int(one) for one in exact]
        by_remainder = sorted(range(len(free)), key=lambda device: shares[device] - exact[device])
        for device in by_remainder[: shard.unit_count - sum(shares)]:
            shares[device] += 1
        counts += shares
    if len(counts) > MAX_WORKERS:
        raise WorkersUnavailableError(
            f"the chosen workers have {len(counts)} devices, and llama.cpp takes at most {MAX_WORKERS}; "
            "choose fewer workers with num_rpc_backends"
        )
    return ",".join(map(str, counts))
