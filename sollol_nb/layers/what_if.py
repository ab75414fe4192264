"""What if: another layout of a running model, seen before it is applied.

Pure functions: a model's facts, workers and counts go in; memory on each worker, whether it fits, and the time of
a token come out. Counts are units (blocks, then the output layer) of each worker, in the order of their layers, as
in `plan.plan_from_counts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan, memory_shortage, unchecked_plan
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import TokenTime, WorkerPart, WorkerSpeeds, predict
from sollol_nb.text.tables import format_bytes


@dataclass(frozen=True, slots=True)
class WorkerForecast:
    """What a worker would hold.

    Attributes:
        endpoint: the worker.
        layers: in words, such as `0-5` or `10-11 + output`; "" for none.
        unit_count: blocks and output layer.
        needed_bytes: predicted memory: weights, KV cache and compute buffers.
        free_bytes: its memory without the running layout; workers of one machine's memory share it.
        token_ms: its predicted part of a token; None where that cannot be told.
    """

    endpoint: str
    layers: str
    unit_count: int
    needed_bytes: int
    free_bytes: int
    token_ms: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """A layout that is not applied yet.

    Attributes:
        plan: the layout; workers without units are not in it.
        workers: every worker asked about, in order.
        shortage: which memory it overfills, in words; "" where it fits.
        token: the predicted token.
    """

    plan: LayerPlan
    workers: tuple[WorkerForecast, ...]
    shortage: str
    token: TokenTime

    @property
    def fits(self) -> bool:
        """Whether every worker's memory holds what it is given."""
        return not self.shortage

    def describe(self) -> str:
        """One line: `6/4/3 over 3 workers: fits; 12.5 ms a token (80.0 tokens/s)`."""
        counts = "/".join(map(str, self.plan.unit_counts))
        workers = "1 worker" if len(self.plan.shards) == 1 else f"{len(self.plan.shards)} workers"
        fits = "fits" if self.fits else f"does not fit: {self.shortage}"
        return f"{counts} over {workers}: {fits}; {token_words(self.token)}"


def token_words(token: TokenTime) -> str:
    """`12.5 ms a token (80.0 tokens/s)`, or why that is not known."""
    if token.token_ms is None or token.tokens_per_s is None:
        return f"time of a token not known: {token.unknown}"
    return f"{token.token_ms:.3g} ms a token ({token.tokens_per_s:.3g} tokens/s)"


def forecast(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    counts: Sequence[int],
    *,
    context_tokens: int,
    speeds: WorkerSpeeds | None = None,
) -> Forecast:
    """What a layout would need and bring.

    Args:
        facts: the model.
        workers: with their memory as it is without the running layout (see `without_layout`).
        counts: units of each worker, in order.
        context_tokens: context of the coordinator, all its slots together.
        speeds: of these workers, from `token_time.calibrate`; None where nothing was measured.

    Raises:
        ConfigError: counts that are no placement of this model.
        WorkersUnavailableError: no workers.
    """
    plan = unchecked_plan(facts, workers, counts, context_tokens=context_tokens)
    by_endpoint = {worker.endpoint: worker for worker in workers}
    parts = [
        WorkerPart(shard.endpoint, shard.weight_bytes, by_endpoint[shard.endpoint].round_trip_ms)
        for shard in plan.shards
    ]
    token = predict(speeds, parts)
    part_ms = dict(zip(plan.endpoints, token.part_ms, strict=False))
    shards = {shard.endpoint: shard for shard in plan.shards}
    forecasts = []
    for worker in workers:
        shard = shards.get(worker.endpoint)
        forecasts.append(
            WorkerForecast(
                worker.endpoint,
                shard.layers if shard else "",
                shard.unit_count if shard else 0,
                shard.needed_bytes if shard else 0,
                worker.free_bytes,
                part_ms.get(worker.endpoint),
            )
        )
    return Forecast(plan, tuple(forecasts), memory_shortage(plan, workers) or "", token)


def without_layout(plan: LayerPlan, workers: Sequence[WorkerCapacity]) -> list[WorkerCapacity]:
    """The workers with the memory that they would have if this plan's coordinator ended.

    Its own workers had what they reported when it was planned; others on the same memory would have as much.
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


def moved(counts: Sequence[int], position: int, unit_count: int) -> list[int]:
    """The counts when one worker is set to so many units, and its neighbours make up for it.

    What it gains is taken from the nearest workers, the following one first; what it loses goes to the nearest
    that has units already (else to the nearest). The sum stays.
    """
    total = sum(counts)
    result = list(counts)
    others = sorted(
        (one for one in range(len(counts)) if one != position), key=lambda one: _distance(one, position)
    )
    if not others:
        return result
    change = max(0, min(unit_count, total)) - result[position]
    result[position] += change
    if change < 0:
        receiver = next((one for one in others if counts[one]), others[0])
        result[receiver] -= change
        return result
    for one in others:
        taken = min(change, result[one])
        result[one] -= taken
        change -= taken
    return result


def _distance(one: int, position: int) -> tuple[int, bool]:
    return abs(one - position), one < position


def memory_words(worker: WorkerForecast) -> str:
    """`1.2 GiB of 4.0 GiB`, or `nothing` for a worker without layers."""
    if not worker.unit_count:
        return "nothing"
    return f"{format_bytes(worker.needed_bytes)} of {format_bytes(worker.free_bytes)}"
