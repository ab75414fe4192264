"""Which worker takes how many layers: a pure function of model facts, workers, speeds and strategy.

`plan_layers` chooses; `plan_from_counts` takes counts as given. Devices of the coordinator's own machine are
`WorkerCapacity`s with a `device` among the workers. Both check the memory and build the plan, the same for all
strategies: those in `strategies.SPLITS` spread the model over all given workers (own devices help only where the
workers' memory does not suffice), `latency_aware` (`fastest.py`) and `throughput` (`throughput.py`) choose workers
by predicted times, which need `speeds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sollol_nb.errors import ConfigError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts, kept_context_tokens
from sollol_nb.layers.fastest import fastest
from sollol_nb.layers.plan import CPU, GIVEN, MAX_WORKERS, LayerPlan, Shard
from sollol_nb.layers.strategies import (
    AUTO,
    DEFAULT_STRATEGY,
    LATENCY_AWARE,
    SPLITS,
    STRATEGIES,
    THROUGHPUT,
    ModelLoad,
    WorkerCapacity,
    memory_aware,
    memory_domains,
    unplaceable_units,
)
from sollol_nb.layers.throughput import BATCH_TOKENS, DEFAULT_REQUESTS, soonest_through
from sollol_nb.layers.token_time import WorkerSpeeds, predict, worker_parts
from sollol_nb.runtime.amounts import is_whole_number
from sollol_nb.text.nearest import nearest
from sollol_nb.text.tables import counted, format_bytes

DEFAULT_CONTEXT_TOKENS = 4096
"""Context that a plan or an estimate of memory assumes where none is given."""

NAMED_WORKERS = 3  # in a reason


def plan_layers(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    *,
    strategy: str = DEFAULT_STRATEGY,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    speeds: WorkerSpeeds | None = None,
    wanted: int | None = None,
    current: LayerPlan | None = None,
    requests: int = DEFAULT_REQUESTS,
    needs_worker: bool = False,
) -> LayerPlan:
    """Spread a model's layers over workers.

    Strategies in `SPLITS` keep the order of the workers, except that workers of one memory domain follow the first
    of them; of more than `MAX_WORKERS` workers those with the most memory are used.

    Args:
        facts: the model.
        workers: the workers, and devices of the coordinator's machine, that may be used.
        strategy: a name in `STRATEGIES`.
        context_tokens: context of the coordinator, all its slots together.
        speeds: of these workers, from calibrations and measurements, with `worker_parts` of their plan; their
            round trips are those of `workers`. Without them, no time is predicted.
        wanted: use exactly so many workers (own devices not counted); only where speeds decide.
        current: a layout that is running; kept where no other is clearly faster.
        requests: at the same time, for `throughput`.
        needs_worker: whether at least one worker takes part, even if own devices alone would be faster.

    Raises:
        ConfigError: an unknown strategy, a context that is not positive, an endpoint named twice.
        WorkersUnavailableError: no workers.
        ModelDoesNotFitError: the model does not fit the workers' memory with this strategy.
    """
    check_strategy(strategy)
    _check_request(workers, context_tokens)
    load = model_load(facts, context_tokens)
    chosen = resolve_strategy(strategy, workers, speeds)
    if chosen in SPLITS:
        plan = _split(facts, workers, chosen, load, context_tokens)
        if strategy not in SPLITS:
            plan = replace(plan, reasons=(*plan.reasons, _why_by_memory(workers, speeds)))
        return _with_prediction(plan, facts, workers, speeds)
    assert speeds is not None
    if chosen == THROUGHPUT:
        found = soonest_through(
            facts, load, workers, speeds, wanted=wanted, requests=requests, needs_worker=needs_worker
        )
    else:
        found = fastest(facts, load, workers, speeds, wanted=wanted, current=current, needs_worker=needs_worker)
    if found is None:
        if wanted is not None and memory_aware(load, in_engine_order(_usable(workers))) is not None:
            raise ModelDoesNotFitError(
                f"the model does not fit {counted(wanted, 'worker')}; use more, or a smaller context"
            )
        raise ModelDoesNotFitError(_shortage_of_all(load, workers))
    plan = LayerPlan(
        strategy=chosen,
        layer_count=facts.layer_count,
        context_tokens=context_tokens,
        shards=_shards(load, [workers[position] for position in found.positions], found.counts),
        reasons=found.reasons,
    )
    return _with_prediction(plan, facts, workers, speeds)


def resolve_strategy(strategy: str, workers: Sequence[WorkerCapacity], speeds: WorkerSpeeds | None) -> str:
    """The strategy that plans: for `auto` `latency_aware` as soon as a worker is calibrated; `memory_aware`
    instead of those that need speeds where none is known."""
    if strategy in SPLITS:
        return strategy
    decisive = _decisive(workers)
    if speeds is None or not any(speeds.is_known(worker.endpoint) for worker in decisive):
        return "memory_aware"
    if strategy == AUTO:
        is_any_calibrated = any(speeds.is_calibrated(worker.endpoint) for worker in decisive)
        return LATENCY_AWARE if is_any_calibrated else "memory_aware"
    return strategy


def _decisive(workers: Sequence[WorkerCapacity]) -> Sequence[WorkerCapacity]:
    """Those whose speeds must be known: workers, or own devices where there is no worker."""
    return [worker for worker in workers if not worker.is_own] or workers


def _why_by_memory(workers: Sequence[WorkerCapacity], speeds: WorkerSpeeds | None) -> str:
    unknown = [
        worker.worker
        for worker in _decisive(workers)
        if speeds is None or not speeds.is_calibrated(worker.endpoint)
    ]
    names = ", ".join(unknown[:NAMED_WORKERS]) + (" ..." if len(unknown) > NAMED_WORKERS else "")
    return f"spread by free memory: {names} not calibrated yet (`%sollol_cluster calibrate` measures speeds)"


def _split(
    facts: ModelFacts, workers: Sequence[WorkerCapacity], strategy: str, load: ModelLoad, context_tokens: int
) -> LayerPlan:
    """The plan of a strategy in `SPLITS`; over own devices too only if the workers' memory does not suffice."""
    without_own = [worker for worker in workers if not worker.is_own]
    if without_own and len(without_own) < len(workers):
        try:
            return _split(facts, without_own, strategy, load, context_tokens)
        except ModelDoesNotFitError:
            pass
    usable = in_engine_order(_usable(workers))
    counts = SPLITS[strategy](load, usable)
    if counts is None:
        raise ModelDoesNotFitError(_shortage_of_all(load, usable))
    plan = LayerPlan(
        strategy=strategy,
        layer_count=facts.layer_count,
        context_tokens=context_tokens,
        shards=_shards(load, usable, counts),
    )
    shortage = memory_shortage(plan, usable)
    if shortage is not None:
        fits = strategy != "memory_aware" and memory_aware(load, usable) is not None
        advice = "strategy 'memory_aware' would fit" if fits else "add workers or use a smaller context"
        raise ModelDoesNotFitError(f"{shortage}; {advice}")
    return plan


def _with_prediction(
    plan: LayerPlan, facts: ModelFacts, workers: Sequence[WorkerCapacity], speeds: WorkerSpeeds | None
) -> LayerPlan:
    if speeds is None:
        return plan
    round_trips_ms = {worker.endpoint: worker.round_trip_ms for worker in workers}
    token = predict(speeds, worker_parts(plan, round_trips_ms, facts))
    return replace(plan, predicted_token_ms=token.token_ms)


def in_engine_order(workers: Sequence[WorkerCapacity]) -> list[WorkerCapacity]:
    """Workers as llama.cpp orders devices: the own CPU, workers, own GPUs."""
    return sorted(workers, key=lambda worker: (worker.device != CPU, worker.is_own))


def check_strategy(strategy: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: it is unknown; the message names the nearest known one.
    """
    if strategy not in STRATEGIES:
        near = nearest(strategy, STRATEGIES)
        hint = f"did you mean {near!r}? " if near else ""
        known = ", ".join(sorted(STRATEGIES))
        raise ConfigError(f"there is no strategy {strategy!r}; {hint}known strategies: {known}")


def plan_from_counts(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    counts: Sequence[int],
    *,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> LayerPlan:
    """The plan that gives each worker its count of units, in this order.

    Args:
        facts: the model.
        workers: the workers, in the order of their layers. Own devices may be among them; their place is always
            that of `in_engine_order`.
        counts: units (blocks, then the output layer) of each worker; 0 leaves the worker out. They sum to
            the model's blocks plus one.
        context_tokens: context of the coordinator, all its slots together.

    Raises:
        ConfigError: counts that do not place this model, a context that is not positive, an endpoint named twice.
        WorkersUnavailableError: no workers.
        ModelDoesNotFitError: a worker's share does not fit its memory.
    """
    plan = unchecked_plan(facts, workers, counts, context_tokens=context_tokens)
    shortage = memory_shortage(plan, workers)
    if shortage is not None:
        raise ModelDoesNotFitError(f"{shortage}; move layers to a worker with more memory")
    return plan


def unchecked_plan(
    facts: ModelFacts, workers: Sequence[WorkerCapacity], counts: Sequence[int], *, context_tokens: int
) -> LayerPlan:
    """As `plan_from_counts`, without the check of memory (see `memory_shortage`).

    Raises:
        ConfigError, WorkersUnavailableError: as in `plan_from_counts`.
    """
    _check_request(workers, context_tokens)
    unit_count = facts.layer_count + 1
    given = "/".join(map(str, counts))
    if len(counts) != len(workers):
        raise ConfigError(f"{given} has {len(counts)} counts for {len(workers)} workers; give one for each worker")
    if not all(is_whole_number(count) and count >= 0 for count in counts) or sum(counts) != unit_count:
        raise ConfigError(
            f"{given} does not place the model's {unit_count} units ({facts.layer_count} blocks and the output "
            f"layer); give whole numbers that sum to {unit_count}"
        )
    used = [worker for worker, count in zip(workers, counts, strict=True) if count and worker.device != CPU]
    if sum(worker.device_count for worker in used) > MAX_WORKERS:
        raise ConfigError(f"{given} uses more than {MAX_WORKERS} devices, which llama.cpp cannot schedule")
    count_of = {worker.endpoint: count for worker, count in zip(workers, counts, strict=True)}
    ordered = in_engine_order(workers)
    shards = _shards(model_load(facts, context_tokens), ordered, [count_of[worker.endpoint] for worker in ordered])
    return LayerPlan(strategy=GIVEN, layer_count=facts.layer_count, context_tokens=context_tokens, shards=shards)


def model_load(facts: ModelFacts, context_tokens: int) -> ModelLoad:
    """Memory that the model needs on its workers for this context.

    The reserve is an upper estimate of llama.cpp's compute buffers with flash attention (its default where the
    device can), fitted to the sizes that coordinators report for various widths, contexts and vocabularies: for
    each of 512 batched tokens the attention mask (8 bytes per token of context), 5 rows of the residual stream and
    3 of the feed-forward layer in f32, and 2 MiB. The output layer adds one row of logits for each of those
    tokens, which newer builds keep only for tokens that are sampled.
    """
    row_values = 5 * facts.embedding_length + 3 * facts.feed_forward_width
    return ModelLoad(
        weight_bytes=(*facts.layer_bytes, facts.output_bytes),
        kv_bytes=(*facts.kv_bytes(context_tokens), 0),
        reserve_bytes=BATCH_TOKENS * (8 * kept_context_tokens(context_tokens) + 4 * row_values) + 2 * 2**20,
        output_reserve_bytes=BATCH_TOKENS * 4 * facts.vocabulary_size,
    )


# --- from counts to plan ----------------------------------------------------------------------


def _check_request(workers: Sequence[WorkerCapacity], context_tokens: int) -> None:
    if context_tokens <= 0:
        raise ConfigError(
            f"a context of {context_tokens} tokens is not possible; give a positive number, such as 4096"
        )
    if not workers:
        raise WorkersUnavailableError("there is no worker to place layers on; start workers, or set RPC_BACKENDS")
    endpoints = [worker.endpoint for worker in workers]
    twice = next((endpoint for endpoint in endpoints if endpoints.count(endpoint) > 1), None)
    if twice is not None:
        raise ConfigError(f"worker {twice} is named twice; name each worker once")


def _usable(workers: Sequence[WorkerCapacity]) -> list[WorkerCapacity]:
    """At most `MAX_WORKERS` workers, those of one memory domain next to each other."""
    by_endpoint = {worker.endpoint: worker for worker in workers}
    shares = {
        endpoint: domain.free_bytes / len(domain.endpoints)
        for domain in memory_domains(workers)
        for endpoint in domain.endpoints
    }
    kept = sorted(shares, key=lambda endpoint: -shares[endpoint])[:MAX_WORKERS]
    return [by_endpoint[endpoint] for endpoint in shares if endpoint in kept]


def _shards(load: ModelLoad, workers: Sequence[WorkerCapacity], counts: Sequence[int]) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    first, output = 0, load.unit_count - 1
    for worker, count in zip(workers, counts, strict=True):
        if not count:
            continue
        end = first + count
        has_output = end > output
        shards.append(
            Shard(
                endpoint=worker.endpoint,
                first_layer=first,
                layer_count=count - has_output,
                has_output=has_output,
                weight_bytes=sum(load.weight_bytes[first:end]),
                kv_bytes=sum(load.kv_bytes[first:end]),
                reserve_bytes=load.reserve_bytes + load.output_reserve_bytes * has_output,
                free_bytes=worker.free_bytes,
                name=worker.name,
                device=worker.device,
            )
        )
        first = end
    return tuple(shards)


def memory_shortage(plan: LayerPlan, workers: Sequence[WorkerCapacity]) -> str | None:
    """Which memory the plan exceeds, and by how much; None if it fits."""
    subject = "the given layout" if plan.strategy == GIVEN else f"strategy {plan.strategy!r}"
    for domain in memory_domains(workers):
        shards = [shard for shard in plan.shards if shard.endpoint in domain.endpoints]
        needed = sum(shard.needed_bytes for shard in shards)
        if needed > domain.free_bytes:
            endpoints = " and ".join(f"{shard.worker} (layers {shard.layers})" for shard in shards)
            return (
                f"{subject} needs {format_bytes(needed)} on {endpoints}, but only "
                f"{format_bytes(domain.free_bytes)} are free: short by {format_bytes(needed - domain.free_bytes)}"
            )
    return None


def _shortage_of_all(load: ModelLoad, workers: Sequence[WorkerCapacity]) -> str:
    """Why no split fits."""
    domains = memory_domains(workers)
    needed_bytes = sum(load.weight_bytes) + sum(load.kv_bytes) + load.output_reserve_bytes
    needed_bytes += load.reserve_bytes * len(domains)
    free_bytes = sum(domain.free_bytes for domain in domains)
    left_count, left_bytes = unplaceable_units(load, workers)
    tightest = min(domains, key=lambda domain: domain.free_bytes)
    names = {worker.endpoint: worker.name or worker.endpoint for worker in workers}
    owners = "1 worker has" if len(workers) == 1 else f"{len(workers)} workers have"
    return (
        f"the model needs {format_bytes(needed_bytes)} and {owners} {format_bytes(free_bytes)} free: "
        f"{left_count} of {load.unit_count} layers do not fit, "
        f"short by {format_bytes(max(needed_bytes - free_bytes, left_bytes))}; "
        f"{names[tightest.endpoints[0]]} has the least, {format_bytes(tightest.free_bytes)}; "
        "add workers or use a smaller context"
    )
