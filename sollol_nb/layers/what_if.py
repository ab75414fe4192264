"""What if: a forecast for another layout of a running model, before it is applied.

Pure functions: from a model's facts, workers and counts to the memory on each worker, whether it fits, and the
time per token. Counts are units (blocks, then the output layer) of each worker, in the order of their layers, as
in `plan_from_counts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import memory_shortage, unchecked_plan
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import TokenTime, WorkerSpeeds, predict, worker_parts
from sollol_nb.text.tables import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerForecast:
    """What a worker would hold.

    Attributes:
        endpoint: the worker.
        layers: as text, such as `0-5` or `10-11 + output`; "" for none.
        unit_count: blocks and output layer.
        needed_bytes: predicted memory: weights, KV cache and compute buffers.
        free_bytes: its free memory without the running layout; workers in one memory share it.
        token_ms: its predicted part of the time per token; None if unknown.
        name: how people call it; "" if by its endpoint.
    """

    endpoint: str
    layers: str
    unit_count: int
    needed_bytes: int
    free_bytes: int
    token_ms: float | None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast for a layout.

    Attributes:
        plan: the layout; workers without units are not in it.
        workers: every given worker, in order.
        shortage: which memory it exceeds, and by how much; "" if it fits.
        token: the predicted time per token.
    """

    plan: LayerPlan
    workers: tuple[WorkerForecast, ...]
    shortage: str
    token: TokenTime

    @property
    def fits(self) -> bool:
        """Whether every worker's share fits its memory."""
        return not self.shortage

    def describe(self) -> str:
        """One line: `6/4/3 over 3 workers: fits; 12.5 ms per token (80.0 tokens/s)`."""
        counts = "/".join(map(str, self.plan.unit_counts))
        fits = "fits" if self.fits else f"does not fit: {self.shortage}"
        return f"{counts} {self.plan.describe_devices()}: {fits}; {describe_token_time(self.token)}"


def describe_token_time(token: TokenTime) -> str:
    """`12.5 ms per token (80.0 tokens/s)`, or why it is unknown."""
    if token.token_ms is None or token.tokens_per_s is None:
        return f"time per token unknown: {token.unknown}"
    return f"{token.token_ms:.3g} ms per token ({token.tokens_per_s:.3g} tokens/s)"


def forecast(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    counts: Sequence[int],
    *,
    context_tokens: int,
    speeds: WorkerSpeeds | None = None,
) -> Forecast:
    """The memory and the time per token of a layout.

    Args:
        facts: the model.
        workers: with their memory as it is without the running layout (see `without_layout`).
        counts: units of each worker, in order.
        context_tokens: context of the coordinator, all its slots together.
        speeds: of these workers, from `token_time.calibrate`; None if nothing is known.

    Raises:
        ConfigError: counts that do not place this model.
        WorkersUnavailableError: no workers.
    """
    plan = unchecked_plan(facts, workers, counts, context_tokens=context_tokens)
    round_trips_ms = {worker.endpoint: worker.round_trip_ms for worker in workers}
    token = predict(speeds, worker_parts(plan, round_trips_ms, facts))
    part_ms = dict(zip((shard.endpoint for shard in plan.shards), token.part_ms, strict=False))
    shards = {shard.endpoint: shard for shard in plan.shards}
    forecasts = []
    for worker in workers:
        shard = shards.get(worker.endpoint)
        forecasts.append(
            WorkerForecast(
                endpoint=worker.endpoint,
                layers=shard.layers if shard else "",
                unit_count=shard.unit_count if shard else 0,
                needed_bytes=shard.needed_bytes if shard else 0,
                free_bytes=worker.free_bytes,
                token_ms=part_ms.get(worker.endpoint),
                name=worker.name,
            )
        )
    return Forecast(plan, tuple(forecasts), memory_shortage(plan, workers) or "", token)


def without_layout(plan: LayerPlan, workers: Sequence[WorkerCapacity]) -> list[WorkerCapacity]:
    """The workers with the free memory that they would have if this plan's coordinator ended.

    Its own workers had the memory that they reported when it was planned; others in the same memory would have as
    much.
    """
    reported = {shard.endpoint: shard.free_bytes for shard in plan.shards}
    domain_bytes: dict[str, int] = {}
    for worker in workers:
        if worker.memory_domain is not None and worker.endpoint in reported:
            before = domain_bytes.get(worker.memory_domain, 0)
            domain_bytes[worker.memory_domain] = max(before, reported[worker.endpoint])
    freed = []
    for worker in workers:
        known = [worker.free_bytes, reported.get(worker.endpoint, 0)]
        if worker.memory_domain is not None:
            known.append(domain_bytes.get(worker.memory_domain, 0))
        freed.append(replace(worker, free_bytes=max(known)))
    return freed


def rebalance(counts: Sequence[int], position: int, unit_count: int) -> list[int]:
    """The counts with `unit_count` units for one worker; its neighbours compensate, so that the sum stays.

    Units that it gains come from the nearest workers, the following one first; units that it loses go to the
    nearest that has units already (else to the nearest).
    """
    total = sum(counts)
    result = list(counts)
    neighbours = sorted(
        (index for index in range(len(counts)) if index != position),
        key=lambda index: (abs(index - position), index < position),
    )
    if not neighbours:
        return result
    change = max(0, min(unit_count, total)) - result[position]
    result[position] += change
    if change < 0:
        receiver = next((index for index in neighbours if counts[index]), neighbours[0])
        result[receiver] -= change
        return result
    for index in neighbours:
        taken = min(change, result[index])
        result[index] -= taken
        change -= taken
    return result


def describe_memory(worker: WorkerForecast) -> str:
    """`1.2 GiB of 4.0 GiB`, or `nothing` for a worker without layers."""
    if not worker.unit_count:
        return "nothing"
    return f"{format_bytes(worker.needed_bytes)} of {format_bytes(worker.free_bytes)}"
