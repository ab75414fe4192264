"""Which worker takes how many layers: a pure function of model facts, workers and strategy.

llama.cpp places n + 1 units, in order: the model's n blocks and the output layer (the input embedding stays with
the coordinator). Each worker gets a contiguous run of units, so a placement is a list of counts.

`--tensor-split` reproduces whole counts exactly. llama.cpp (llama-model.cpp, load_tensors) puts unit i of N on the
first device whose cumulative share exceeds i / N. Its float32 arithmetic cannot shift a border: at a border both
sides are the same quotient of the same two whole numbers, and elsewhere they are at least 1 / N apart.

A strategy decides how many units each worker gets (`strategies.py`); this module checks the memory and builds the
plan, the same for all strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sollol_nb.errors import ConfigError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts, kept_context_tokens
from sollol_nb.layers.strategies import (
    DEFAULT_STRATEGY,
    STRATEGIES,
    ModelLoad,
    WorkerCapacity,
    memory_aware,
    memory_domains,
    unplaceable_units,
)
from sollol_nb.runtime.amounts import is_whole_number
from sollol_nb.text.nearest import nearest
from sollol_nb.text.tables import counted, format_bytes

DEFAULT_CONTEXT_TOKENS = 4096
"""Context that a plan or an estimate of memory assumes where none is given."""

MAX_WORKERS = 15
"""llama.cpp schedules 16 backends (GGML_SCHED_MAX_BACKENDS), one of which is the coordinator's CPU."""

BATCH_TOKENS = 512  # llama-server's default --ubatch-size
GIVEN = "as given"
"""The strategy of a plan whose counts were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The units of one worker, without a gap.

    Attributes:
        endpoint: the worker.
        first_layer: its first block (the number of blocks, if it has the output layer only).
        layer_count: its blocks; 0 if it has the output layer only.
        has_output: whether it has the output layer.
        weight_bytes, kv_bytes, reserve_bytes: predicted memory for weights, KV cache and compute buffers.
        free_bytes: memory the worker reported as free.
        name: how people call the worker; "" if by its endpoint.
    """

    endpoint: str
    first_layer: int
    layer_count: int
    has_output: bool
    weight_bytes: int
    kv_bytes: int
    reserve_bytes: int
    free_bytes: int
    name: str = ""

    @property
    def worker(self) -> str:
        """The worker as people call it."""
        return self.name or self.endpoint

    @property
    def unit_count(self) -> int:
        return self.layer_count + self.has_output

    @property
    def last_layer(self) -> int:
        """Its last block; `first_layer - 1` if it has none."""
        return self.first_layer + self.layer_count - 1

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def layers(self) -> str:
        """`0-5`, `7`, `10-11 + output`, `output`."""
        if not self.layer_count:
            return "output"
        blocks = f"{self.first_layer}-{self.last_layer}" if self.layer_count > 1 else f"{self.first_layer}"
        return f"{blocks} + output" if self.has_output else blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Which worker takes which layers; workers without any are not in it.

    Attributes:
        strategy: a name in `STRATEGIES`, or `GIVEN`.
        layer_count: the model's blocks.
        context_tokens: of the coordinator, all its slots together.
        shards: in the order of their layers.
        predicted_token_ms: time per token, if it could be predicted when the plan was made (see `token_time.py`).
    """

    strategy: str
    layer_count: int
    context_tokens: int
    shards: tuple[Shard, ...]
    predicted_token_ms: float | None = None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Workers in the order of their layers, the order `--rpc` needs."""
        return tuple(shard.endpoint for shard in self.shards)

    @property
    def unit_counts(self) -> tuple[int, ...]:
        """Units of each worker; they sum to `layer_count + 1`."""
        return tuple(shard.unit_count for shard in self.shards)

    @property
    def tensor_split(self) -> str:
        """The value for `--tensor-split`: `6,4,3`."""
        return ",".join(map(str, self.unit_counts))

    @property
    def gpu_layers(self) -> int:
        """The value for `--gpu-layers` that places every unit on the workers."""
        return self.layer_count + 1

    @property
    def needed_bytes(self) -> int:
        return sum(shard.needed_bytes for shard in self.shards)

    def describe(self) -> str:
        """One line: `12 layers over 2 workers (even): a:50052 0-5 (1.2 GiB of 4.0 GiB), ...`."""
        workers = counted(len(self.shards), "worker")
        shards = ", ".join(
            f"{shard.worker} {shard.layers} "
            f"({format_bytes(shard.needed_bytes)} of {format_bytes(shard.free_bytes)})"
            for shard in self.shards
        )
        return f"{counted(self.layer_count, 'layer')} over {workers} ({self.strategy}): {shards}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        """The plan from the data of `as_dict`. Raises KeyError or TypeError for other data."""
        names = {field.name for field in fields(Shard)}
        return cls(
            strategy=data["strategy"],
            layer_count=data["layer_count"],
            context_tokens=data["context_tokens"],
            shards=tuple(Shard(**{key: shard[key] for key in shard if key in names}) for shard in data["shards"]),
            predicted_token_ms=data.get("predicted_token_ms"),  # entries of older versions lack it
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        shards = [
            asdict(shard) | {"layers": shard.layers, "needed_bytes": shard.needed_bytes} for shard in self.shards
        ]
        return {
            "strategy": self.strategy,
            "layer_count": self.layer_count,
            "context_tokens": self.context_tokens,
            "tensor_split": self.tensor_split,
            "needed_bytes": self.needed_bytes,
            "predicted_token_ms": self.predicted_token_ms,
            "shards": shards,
        }


def plan_layers(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    *,
    strategy: str = DEFAULT_STRATEGY,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> LayerPlan:
    """Spread a model's layers over workers.

    The order of the workers is kept, except that workers of one memory domain follow the first of them. Of more
    than `MAX_WORKERS` workers those with the most memory are used.

    Args:
        facts: the model.
        workers: the workers that may be used.
        strategy: a name in `STRATEGIES`.
        context_tokens: context of the coordinator, all its slots together.

    Raises:
        ConfigError: an unknown strategy, a context that is not positive, an endpoint named twice.
        WorkersUnavailableError: no workers.
        ModelDoesNotFitError: the model does not fit the workers' memory with this strategy.
    """
    check_strategy(strategy)
    _check_request(workers, context_tokens)
    load = model_load(facts, context_tokens)
    usable = _usable(workers)
    counts = STRATEGIES[strategy](load, usable)
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
        workers: the workers, in the order of their layers.
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
    if sum(map(bool, counts)) > MAX_WORKERS:
        raise ConfigError(f"{given} uses more than {MAX_WORKERS} workers, which llama.cpp cannot schedule")
    shards = _shards(model_load(facts, context_tokens), workers, counts)
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
