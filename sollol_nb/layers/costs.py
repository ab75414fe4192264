"""What units cost on each device, as arrays: time per token as in `token_time.py`, memory as in `planner.py`.

Units are numbered as in a plan: blocks 0 to n - 1, then the output layer. A run of units is `[first, end)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.strategies import ModelLoad, WorkerCapacity, memory_domains
from sollol_nb.layers.token_time import WorkerPart, WorkerSpeeds, value_bytes

ALIKE = 0.01
"""Blocks whose bytes differ by at most this share count as alike."""

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """What a token costs on a worker or own device.

    Attributes:
        ms_per_byte: of weights read.
        block_ms: of each block besides.
        fixed_ms: once it has any unit: round trip, hop, and values of blocks on the wire.
        output_ms: in addition with the output layer: logits on the wire instead, and the type of its weights.
        free_bytes: memory that may be used.
    """

    ms_per_byte: float
    block_ms: float
    fixed_ms: float
    output_ms: float
    free_bytes: int


def device_cost(
    worker: WorkerCapacity, speeds: WorkerSpeeds, facts: ModelFacts, free_bytes: int
) -> DeviceCost | None:
    """What a token costs on a worker, by the same formula as `WorkerSpeeds.predict`; None if that is not known."""
    round_trip_ms = 0.0 if worker.is_own else worker.round_trip_ms
    ms_per_byte = speeds.ms_per_byte.get(worker.endpoint)
    if round_trip_ms is None or ms_per_byte is None:
        return None
    hidden_bytes, logits_bytes = (0, 0) if worker.is_own else value_bytes(facts)

    def way_ms(wire_bytes: int) -> float:
        return round_trip_ms + speeds.hop_and_wire_ms(
            WorkerPart(worker.endpoint, 0, round_trip_ms, wire_bytes, is_own=worker.is_own)
        )

    fixed_ms = way_ms(2 * hidden_bytes)
    return DeviceCost(
        ms_per_byte,
        speeds.block_ms.get(worker.endpoint, 0.0),
        fixed_ms,
        way_ms(hidden_bytes + logits_bytes) - fixed_ms + speeds.output_ms.get(worker.endpoint, 0.0),
        free_bytes,
    )


def is_known(worker: WorkerCapacity, speeds: WorkerSpeeds) -> bool:
    """Whether it is known what a token costs on a worker."""
    return worker.endpoint in speeds.ms_per_byte and (worker.is_own or worker.round_trip_ms is not None)


def free_by_endpoint(workers: Sequence[WorkerCapacity], margin: float) -> dict[str, int]:
    """The memory of each worker without a margin, a share of it; of one that shares it, the whole memory."""
    return {
        endpoint: round(domain.free_bytes * (1 - margin))
        for domain in memory_domains(workers)
        for endpoint in domain.endpoints
    }


class Runs:
    """What each run of units costs and needs.

    Attributes:
        reserve_bytes: compute buffers of each device that has units.
        mean_block_read, mean_block_bytes: bytes that a token reads of a block, and that a block needs.
        largest_block_bytes: that the largest block needs.
        output_read, output_bytes: the same for the output layer, with its own compute buffers.
        are_alike: whether blocks differ by so little that it does not matter which ones a device gets.
    """

    def __init__(self, facts: ModelFacts, load: ModelLoad) -> None:
        import numpy as np

        self.unit_count = load.unit_count
        units = np.arange(load.unit_count + 1)
        read = np.cumsum([0, *facts.read_bytes]).astype(float)
        held = np.cumsum([0, *(w + kv for w, kv in zip(load.weight_bytes, load.kv_bytes, strict=True))])
        self.reserve_bytes = load.reserve_bytes
        self.mean_block_read = float(read[-2]) / facts.layer_count
        self.mean_block_bytes = float(held[-2]) / facts.layer_count
        self.largest_block_bytes = float(np.diff(held)[:-1].max())
        self.output_read = facts.read_bytes[-1]
        self.output_bytes = float(held[-1] - held[-2]) + load.output_reserve_bytes
        self.are_alike = all(
            max(sizes) - min(sizes) <= ALIKE * max(sizes)
            for sizes in (np.diff(read)[:-1].tolist(), np.diff(held)[:-1].tolist())
        )
        blocks = np.minimum(units, load.unit_count - 1)
        self._read = read[None, :] - read[:, None]
        self._blocks = (blocks[None, :] - blocks[:, None]).astype(float)
        self._needed_bytes = (held[None, :] - held[:, None]).astype(float) + load.reserve_bytes
        self._needed_bytes[:, -1] += load.output_reserve_bytes
        self._needed_bytes[units[None, :] <= units[:, None]] = np.inf  # an empty run is none
        self._known: dict[DeviceCost, Floats] = {}

    def needed_bytes(self, first: int, end: int) -> float:
        """What a run needs, with compute buffers."""
        return float(self._needed_bytes[first, end])

    def needs_more_than(self, limit_bytes: int) -> npt.NDArray[np.bool_]:
        """`[first, end]`: whether a run does not fit these bytes, or is empty."""
        found: npt.NDArray[np.bool_] = self._needed_bytes > limit_bytes
        return found

    def ms(self, device: DeviceCost) -> Floats:
        """`[first, end]`: milliseconds of a run on a device; infinite where it does not fit, or is empty."""
        if device not in self._known:
            found: Floats = device.ms_per_byte * self._read
            if device.block_ms:
                found += device.block_ms * self._blocks
            found += device.fixed_ms
            found[:, -1] += device.output_ms
            found[self._needed_bytes > device.free_bytes] = float("inf")
            self._known[device] = found
        return self._known[device]
