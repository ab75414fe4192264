"""The time per token, predicted from measurements on other layouts of the same model, else from calibrations.

The cost of a token is additive, since the workers work one after the other:

    token_ms = own part + sum over workers of (bytes read * ms per byte of this worker + blocks * ms per block
                                               + output layer + round trip + hop + wire)

A dense model reads all weights of a worker for each token, a mixture of experts only those of the experts that
a token uses: `ModelFacts.read_bytes`. The round trip is that of the network, from the worker's probe; the hop is
what the engine itself spends for each worker (serialising a graph, waking threads), and shows only once layouts
with different numbers of workers were measured. The wire is what its values take on the way, above all the logits
of the output layer; the own part is what the coordinator spends for each token. A device of the coordinator's own
machine counts like a worker without round trip and wire; a hop it has only where one was calibrated (a GPU).

Calibrations (`llama_cpp/workers/calibrations.py`) give all of these before the first token. Once tokens of the
model were measured, these decide how fast the workers are together, and calibrations only how fast each is
relative to the others, as far as no layout has shown that, and nobody has seen how long the coordinator waits for
each (`llama_cpp/processes/traffic.py`). An unknown time is None, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan

ALIKE_WEIGHT = 0.05
"""How strongly workers are assumed to be alike. Measured times vary by some percent, which must not count as a
property of a worker; with this weight a worker that is three times slower is still found from two layouts."""

HOP_WEIGHT = 0.01
"""Of explanations that fit equally well, the one with the smaller hop is chosen."""

KNOWN_HOP_WEIGHT = 1.0
"""The same where hops were calibrated: a longer hop is then an unlikely explanation."""

VALUE_BYTES = 4  # of a value between workers: f32


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """The work of one worker, or of one own device, for each token.

    Attributes:
        endpoint: the worker.
        read_bytes: weights that it reads.
        round_trip_ms: network round trip; None if it was never probed.
        wire_bytes: values that are sent to it and back.
        block_count: its blocks.
        is_own: whether it is a device of the coordinator's machine.
        has_output: whether it has the output layer.
    """

    endpoint: str
    read_bytes: int
    round_trip_ms: float | None
    wire_bytes: int = 0
    block_count: int = 0
    is_own: bool = False
    has_output: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured time per token on one layout.

    Attributes:
        parts: the work of each worker.
        token_ms: of one answer that ran alone.
        part_ms: how long the coordinator waited for each of the workers, in that time (0 for own devices); empty
            if unknown.
    """

    parts: tuple[WorkerPart, ...]
    token_ms: float
    part_ms: tuple[float, ...] = ()

    @property
    def own_ms(self) -> float | None:
        """In which the coordinator waited for no worker; None if unknown."""
        return max(0.0, self.token_ms - sum(self.part_ms)) if self.part_ms else None


@dataclass(frozen=True, slots=True)
class TokenTime:
    """A predicted time per token.

    Attributes:
        part_ms: of each worker in order; empty if unknown.
        unknown: why it is unknown, or "".
        own_ms: the coordinator's own part.
        way_ms: of `part_ms`, what each spends on the way: round trip, hop and wire; the rest are its weights.
    """

    part_ms: tuple[float, ...]
    unknown: str = ""
    own_ms: float = 0.0
    way_ms: tuple[float, ...] = ()

    @property
    def token_ms(self) -> float | None:
        """Milliseconds per token of one answer that runs alone; None if unknown."""
        return sum(self.part_ms) + self.own_ms if self.part_ms else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of one answer that runs alone; None if unknown."""
        return 1000 / self.token_ms if self.token_ms else None

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each worker in the time per token, summing to 1 with the own part; empty if unknown."""
        return tuple(part_ms / self.token_ms for part_ms in self.part_ms) if self.token_ms else ()


@dataclass(frozen=True, slots=True)
class WorkerSpeeds:
    """How fast workers run one model.

    Attributes:
        ms_per_byte: of each known worker.
        usual_ms_per_byte: of the others; None if nothing is known about these.
        hop_ms: spent for each worker besides the network round trip.
        hops_ms: what each calibrated worker takes in addition to `hop_ms`.
        bytes_per_s: of the way to each worker, where it was calibrated.
        own_ms: spent by the coordinator.
        block_ms: what each calibrated worker takes for each block, whatever its size.
        prompt_ms_per_byte: of each calibrated worker, for each token of a prompt.
        output_ms: what each calibrated worker takes for the output layer in addition to its bytes; below 0 where
            that is of a type that is read faster than those of the blocks.

    Devices of the coordinator's machine are keyed by `plan.own_endpoint`.
    """

    ms_per_byte: Mapping[str, float]
    usual_ms_per_byte: float | None
    hop_ms: float
    hops_ms: Mapping[str, float] = field(default_factory=dict)
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    own_ms: float = 0.0
    block_ms: Mapping[str, float] = field(default_factory=dict)
    prompt_ms_per_byte: Mapping[str, float] = field(default_factory=dict)
    output_ms: Mapping[str, float] = field(default_factory=dict)

    def is_known(self, endpoint: str) -> bool:
        """Whether this worker was calibrated or measured, so that it does not count as a usual one."""
        return endpoint in self.ms_per_byte

    def is_calibrated(self, endpoint: str) -> bool:
        """Whether this worker was calibrated."""
        return endpoint in self.hops_ms

    def weights_ms(self, part: WorkerPart) -> float | None:
        """What a worker's weights and blocks take for a token; None if nothing is known about it."""
        ms_per_byte = self.ms_per_byte.get(part.endpoint, self.usual_ms_per_byte)
        if ms_per_byte is None:
            return None
        output_ms = self.output_ms.get(part.endpoint, 0.0) if part.has_output else 0.0
        return part.read_bytes * ms_per_byte + part.block_count * self.block_ms.get(part.endpoint, 0.0) + output_ms

    def hop_and_wire_ms(self, part: WorkerPart) -> float:
        """What a worker takes besides its weights and the round trip."""
        wire_ms = part.wire_bytes * 1000 / self.bytes_per_s.get(part.endpoint, float("inf"))
        return wire_ms + (0.0 if part.is_own else self.hop_ms) + self.hops_ms.get(part.endpoint, 0.0)

    def work_ms(self, part: WorkerPart) -> float | None:
        """What a worker does for a token takes, without the round trip; None if nothing is known about it."""
        weights_ms = self.weights_ms(part)
        return None if weights_ms is None else weights_ms + self.hop_and_wire_ms(part)

    def predict(self, parts: Sequence[WorkerPart]) -> TokenTime:
        """The time per token over these workers."""
        part_ms, way_ms = [], []
        for part in parts:
            if part.round_trip_ms is None:
                return TokenTime((), f"the round trip to {part.endpoint} was not measured yet")
            weights_ms = self.weights_ms(part)
            if weights_ms is None:
                return TokenTime(
                    (), f"no token of this model was measured yet, and {part.endpoint} was not calibrated"
                )
            way_ms.append(self.hop_and_wire_ms(part) + part.round_trip_ms)
            part_ms.append(weights_ms + way_ms[-1])
        return TokenTime(tuple(part_ms), own_ms=self.own_ms, way_ms=tuple(way_ms))


def predict(speeds: WorkerSpeeds | None, parts: Sequence[WorkerPart]) -> TokenTime:
    """The time per token over these workers; unknown until a token was measured, or the workers calibrated."""
    if speeds is None:
        return TokenTime((), "no token of this model was measured yet")
    return speeds.predict(parts)


def worker_parts(
    plan: LayerPlan, round_trips_ms: Mapping[str, float | None], facts: ModelFacts | None = None
) -> tuple[WorkerPart, ...]:
    """The work of each of a plan's workers and own devices for a token, in its order.

    Args:
        facts: of the model; without them, all weights count as read, and no values count on the wire.
    """
    hidden_bytes, logits_bytes = value_bytes(facts) if facts else (0, 0)
    read_bytes = facts.read_bytes if facts else ()
    return tuple(
        WorkerPart(
            shard.endpoint,
            sum(read_bytes[unit] for unit in shard.units) if facts else shard.weight_bytes,
            0.0 if shard.is_own else round_trips_ms.get(shard.endpoint),
            0 if shard.is_own else hidden_bytes + (logits_bytes if shard.has_output else hidden_bytes),
            shard.layer_count,
            shard.is_own,
            shard.has_output,
        )
        for shard in plan.shards
    )


def value_bytes(facts: ModelFacts) -> tuple[int, int]:
    """Bytes on the wire for each token: of what goes from block to block, and of the logits."""
    return VALUE_BYTES * facts.embedding_length, VALUE_BYTES * facts.vocabulary_size


def calibrate(measurements: Sequence[Measurement], known: WorkerSpeeds | None = None) -> WorkerSpeeds | None:
    """Speeds that explain measurements of one model; without a usable measurement, those that are known.

    Least squares of relative errors, with two preferences (`ALIKE_WEIGHT`, `HOP_WEIGHT`) where measurements leave
    a choice: one measurement makes all workers equally fast with no hop, or equally much faster or slower than
    they are known to be, and each further layout separates them as far as needed. Where the waits for each worker
    were measured, these decide at once. A speed below zero is set to zero, and the others are fitted again.

    Args:
        known: from calibrations, for this model.
    """
    import numpy as np

    usable = [
        measured for measured in measurements if measured.token_ms > 0 and _wire_ms(measured.parts) is not None
    ]
    if not usable:
        return known
    endpoints = list(dict.fromkeys(part.endpoint for measured in usable for part in measured.parts))
    typical_bytes = sum(part.read_bytes for measured in usable for part in measured.parts) / len(usable)
    typical_ms = sum(measured.token_ms for measured in usable) / len(usable)
    expected = _expected(known, endpoints, typical_ms / typical_bytes)
    own_ms = [
        max(0.0, measured.own_ms - sum(expected.work_ms(part) or 0.0 for part in measured.parts if part.is_own))
        for measured in usable
        if measured.own_ms is not None
    ]
    # Unknowns: the time of each worker relative to what is expected, that of usual ones, and the hop, which is in
    # units of a typical token.
    usual, hop, count = len(endpoints), len(endpoints) + 1, len(endpoints) + 2
    rows, targets = [], []
    for measured in usable:
        for part, part_ms in zip(measured.parts, measured.part_ms, strict=False):
            if part.is_own:  # nobody waits for it
                continue
            row = [0.0] * count
            row[endpoints.index(part.endpoint)] = (expected.work_ms(part) or 0.0) / measured.token_ms
            row[hop] = typical_ms / measured.token_ms
            rows.append(row)
            targets.append(max(0.0, part_ms - (part.round_trip_ms or 0.0)) / measured.token_ms)
        if measured.part_ms:  # the sum has nothing to add
            continue
        row = [0.0] * count
        for part in measured.parts:
            row[endpoints.index(part.endpoint)] += (expected.work_ms(part) or 0.0) / measured.token_ms
        row[usual] = expected.own_ms / measured.token_ms
        row[hop] = sum(not part.is_own for part in measured.parts) * typical_ms / measured.token_ms
        rows.append(row)
        targets.append(max(0.0, 1 - (_wire_ms(measured.parts) or 0.0) / measured.token_ms))
    seen = {part.endpoint for measured in usable if measured.part_ms for part in measured.parts if not part.is_own}
    for position, endpoint in enumerate(endpoints):
        if endpoint in seen:
            continue
        row = [0.0] * count
        row[position], row[usual] = ALIKE_WEIGHT, -ALIKE_WEIGHT
        rows.append(row)
        targets.append(0.0)
    if seen:
        rows.append([ALIKE_WEIGHT * (position == usual) for position in range(count)])
        targets.append(ALIKE_WEIGHT)
    rows.append([0.0] * (count - 1) + [KNOWN_HOP_WEIGHT if known and known.hops_ms else HOP_WEIGHT])
    targets.append(0.0)
    matrix, vector = np.array(rows), np.array(targets)
    free = list(range(count))
    while True:
        found = np.linalg.lstsq(matrix[:, free], vector, rcond=None)[0]
        lowest = int(np.argmin(found))
        if found[lowest] >= 0:
            break
        del free[lowest]  # one after the other: without it, others may be above zero
    values = dict(zip(free, map(float, found), strict=True))
    usual_factor = values.get(usual, 0.0)
    factors = {endpoint: values.get(position, 0.0) for position, endpoint in enumerate(endpoints)}
    if own_ms:  # then one slow worker does not make others slower that were not measured
        usual_factor = median(factors.values())
    return WorkerSpeeds(
        {endpoint: ms * factors.get(endpoint, usual_factor) for endpoint, ms in expected.ms_per_byte.items()},
        (expected.usual_ms_per_byte or 0.0) * usual_factor,
        values.get(hop, 0.0) * typical_ms,
        {endpoint: ms * factors.get(endpoint, usual_factor) for endpoint, ms in expected.hops_ms.items()},
        {
            endpoint: rate / factors.get(endpoint, usual_factor)
            for endpoint, rate in expected.bytes_per_s.items()
            if factors.get(endpoint, usual_factor)
        },
        median(own_ms) if own_ms else expected.own_ms * usual_factor,
        {endpoint: ms * factors.get(endpoint, usual_factor) for endpoint, ms in expected.block_ms.items()},
        {
            endpoint: ms * factors.get(endpoint, usual_factor)
            for endpoint, ms in expected.prompt_ms_per_byte.items()
        },
        {endpoint: ms * factors.get(endpoint, usual_factor) for endpoint, ms in expected.output_ms.items()},
    )


def _expected(known: WorkerSpeeds | None, endpoints: Sequence[str], typical_ms_per_byte: float) -> WorkerSpeeds:
    """What is known about workers, and for the others of these endpoints the usual speed of those."""
    speeds = dict(known.ms_per_byte) if known else {}
    usual = median(speeds.values()) if speeds else typical_ms_per_byte
    speeds = {**dict.fromkeys(endpoints, usual), **speeds}
    if known is None:
        return WorkerSpeeds(speeds, usual, 0.0)
    return replace(known, ms_per_byte=speeds, usual_ms_per_byte=usual)


def _wire_ms(parts: Sequence[WorkerPart]) -> float | None:
    """All round trips of a token; None if one is unknown."""
    known = [part.round_trip_ms for part in parts if part.round_trip_ms is not None]
    return sum(known) if parts and len(known) == len(parts) else None
