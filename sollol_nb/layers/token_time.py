"""The time per token, predicted from measurements on other layouts of the same model.

The cost of a token is additive, since the workers work one after the other:

    token_ms = sum over workers of (bytes read * ms per byte of this worker + round trip + hop)

A dense model reads all weights of a worker for each token, so `read_bytes` are the weights placed there; a mixture
of experts reads a part of them, the same part in every block, which the measured `ms per byte` includes. The round
trip is that of the network, from the worker's probe; the hop is what the engine itself spends for each worker
(serialising a graph, waking threads), and shows only once layouts with different numbers of workers were measured.

An unknown time is None, with the reason. Nothing is carried over from one model to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sollol_nb.layers.plan import LayerPlan

ALIKE_WEIGHT = 0.05
"""How strongly workers are assumed to be alike. Measured times vary by some percent, which must not count as a
property of a worker; with this weight a worker that is three times slower is still found from two layouts."""

HOP_WEIGHT = 0.01
"""Of explanations that fit equally well, the one with the smaller hop is chosen."""


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """The work of one worker for each token.

    Attributes:
        endpoint: the worker.
        read_bytes: weights that it reads.
        round_trip_ms: network round trip; None if it was never probed.
    """

    endpoint: str
    read_bytes: int
    round_trip_ms: float | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured time per token on one layout."""

    parts: tuple[WorkerPart, ...]
    token_ms: float


@dataclass(frozen=True, slots=True)
class TokenTime:
    """A predicted time per token.

    Attributes:
        part_ms: of each worker in order; empty if unknown.
        unknown: why it is unknown, or "".
    """

    part_ms: tuple[float, ...]
    unknown: str = ""

    @property
    def token_ms(self) -> float | None:
        """Milliseconds per token of one answer that runs alone; None if unknown."""
        return sum(self.part_ms) if self.part_ms else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of one answer that runs alone; None if unknown."""
        return 1000 / self.token_ms if self.token_ms else None

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each worker in the time per token, summing to 1; empty if unknown."""
        return tuple(part_ms / self.token_ms for part_ms in self.part_ms) if self.token_ms else ()


@dataclass(frozen=True, slots=True)
class WorkerSpeeds:
    """How fast workers run one model.

    Attributes:
        ms_per_byte: of each measured worker.
        usual_ms_per_byte: of the others.
        hop_ms: spent for each worker besides the network round trip.
    """

    ms_per_byte: Mapping[str, float]
    usual_ms_per_byte: float
    hop_ms: float

    def predict(self, parts: Sequence[WorkerPart]) -> TokenTime:
        """The time per token over these workers."""
        part_ms = []
        for part in parts:
            if part.round_trip_ms is None:
                return TokenTime((), f"the round trip to {part.endpoint} was not measured yet")
            speed = self.ms_per_byte.get(part.endpoint, self.usual_ms_per_byte)
            part_ms.append(part.read_bytes * speed + part.round_trip_ms + self.hop_ms)
        return TokenTime(tuple(part_ms))


def predict(speeds: WorkerSpeeds | None, parts: Sequence[WorkerPart]) -> TokenTime:
    """The time per token over these workers; unknown until a token was measured."""
    if speeds is None:
        return TokenTime((), "no token of this model was measured yet")
    return speeds.predict(parts)


def worker_parts(plan: LayerPlan, round_trips_ms: Mapping[str, float | None]) -> tuple[WorkerPart, ...]:
    """The work of each of a plan's workers for a token, in its order."""
    return tuple(
        WorkerPart(shard.endpoint, shard.weight_bytes, round_trips_ms.get(shard.endpoint)) for shard in plan.shards
    )


def calibrate(measurements: Sequence[Measurement]) -> WorkerSpeeds | None:
    """Speeds that explain measurements of one model; None if none is usable.

    Least squares of relative errors, with two preferences (`ALIKE_WEIGHT`, `HOP_WEIGHT`) where measurements leave
    a choice: one measurement makes all workers equally fast with no hop, and each further layout separates them as
    far as needed. A speed below zero is set to zero, and the others are fitted again.
    """
    import numpy as np

    usable = [
        measured for measured in measurements if measured.token_ms > 0 and _wire_ms(measured.parts) is not None
    ]
    if not usable:
        return None
    endpoints = list(dict.fromkeys(part.endpoint for measured in usable for part in measured.parts))
    typical_bytes = sum(part.read_bytes for measured in usable for part in measured.parts) / len(usable)
    typical_ms = sum(measured.token_ms for measured in usable) / len(usable)
    # Unknowns in units of a typical token: the speed of each worker, the usual speed, the hop.
    usual, hop, count = len(endpoints), len(endpoints) + 1, len(endpoints) + 2
    rows, targets = [], []
    for measured in usable:
        row = [0.0] * count
        for part in measured.parts:
            row[endpoints.index(part.endpoint)] += part.read_bytes / typical_bytes * typical_ms / measured.token_ms
        row[hop] = len(measured.parts) * typical_ms / measured.token_ms
        rows.append(row)
        targets.append(max(0.0, 1 - (_wire_ms(measured.parts) or 0.0) / measured.token_ms))
    for position in range(len(endpoints)):
        row = [0.0] * count
        row[position], row[usual] = ALIKE_WEIGHT, -ALIKE_WEIGHT
        rows.append(row)
        targets.append(0.0)
    rows.append([0.0] * (count - 1) + [HOP_WEIGHT])
    targets.append(0.0)
    matrix, vector = np.array(rows), np.array(targets)
    free = list(range(count))
    while True:
        found = np.linalg.lstsq(matrix[:, free], vector, rcond=None)[0]
        kept = [unknown for unknown, value in zip(free, found, strict=True) if value >= 0]
        if len(kept) == len(free):
            break
        free = kept
    values = dict(zip(free, map(float, found), strict=True))
    scale = typical_ms / typical_bytes
    return WorkerSpeeds(
        {endpoint: values.get(position, 0.0) * scale for position, endpoint in enumerate(endpoints)},
        values.get(usual, 0.0) * scale,
        values.get(hop, 0.0) * typical_ms,
    )


def _wire_ms(parts: Sequence[WorkerPart]) -> float | None:
    """All round trips of a token; None if one is unknown."""
    known = [part.round_trip_ms for part in parts if part.round_trip_ms is not None]
    return sum(known) if parts and len(known) == len(parts) else None
