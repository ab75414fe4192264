"""A layer plan places every unit once, in order, within memory, exactly as the engine will."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sollol_nb.errors import ConfigError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.layers.plan import MAX_WORKERS, LayerPlan
from sollol_nb.layers.planner import model_load, plan_from_counts, plan_layers
from sollol_nb.layers.strategies import SPLITS, STRATEGIES, ModelLoad, WorkerCapacity, even, memory_aware
from sollol_nb.text.tables import format_bytes
from tests.support.layer_plans import GB, TWELVE, model, workers

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20


# --- what strategies decide -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "free", "counts"),
    [
        ("even", (60, 40, 30), (5, 4, 4)),
        ("even", (60,), (13,)),
        ("even", (9,) * 5, (3, 3, 3, 2, 2)),
        ("even", (9,) * 13, (1,) * 13),
        ("even", (9,) * 15, (1,) * 13),
        ("memory_aware", (60, 40, 30), (6, 4, 3)),
        ("memory_aware", (30, 40, 60), (3, 4, 6)),
        ("memory_aware", (60,), (13,)),
        ("memory_aware", (20, 20), (7, 6)),
        ("memory_aware", (100, 2), (13,)),
        ("memory_aware", (2, 100), (13,)),
        ("memory_aware", (9,) * 15, (1,) * 13),
        ("memory_aware", (5.1, 0, 9.1), (5, 8)),
    ],
)
def test_strategies_count_units(strategy: str, free: tuple[float, ...], counts: tuple[int, ...]) -> None:
    plan = plan_layers(TWELVE, workers(*(int(gigabytes * GB) for gigabytes in free)), strategy=strategy)
    assert plan.unit_counts == counts


def test_memory_aware_weighs_bytes_not_layers() -> None:
    uneven = model([4 * GB, 4 * GB, 1 * GB, 1 * GB, 1 * GB, 1 * GB], 4 * GB)
    assert plan_layers(uneven, workers(20 * GB, 20 * GB)).unit_counts == (2, 5)
    assert plan_layers(uneven, workers(20 * GB, 20 * GB), strategy="even").unit_counts == (4, 3)


def test_the_context_counts_as_bytes_too() -> None:
    facts = model([GB] * 4, GB, kv_per_token=2**18)
    short, long = (plan_layers(facts, workers(9 * GB, 9 * GB), context_tokens=n) for n in (1024, 8192))
    assert short.shards[0].kv_bytes == short.shards[0].layer_count * 2**18 * 1024
    assert long.needed_bytes > short.needed_bytes + 4 * 2**18 * 7000


def test_a_worker_without_units_is_not_in_the_plan() -> None:
    plan = plan_layers(TWELVE, workers(60 * GB, MIB, 60 * GB))
    assert plan.endpoints == ("w0:1", "w2:1")
    assert sum(plan.unit_counts) == 13


def test_a_strategy_is_a_function_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_worker_only(load: ModelLoad, usable: Sequence[WorkerCapacity]) -> list[int]:
        return [0] * (len(usable) - 1) + [load.unit_count]

    monkeypatch.setitem(SPLITS, "last_worker_only", last_worker_only)
    monkeypatch.setitem(STRATEGIES, "last_worker_only", "for this test")
    plan = plan_layers(TWELVE, workers(60 * GB, 60 * GB), strategy="last_worker_only")
    assert (plan.endpoints, plan.unit_counts) == (("w1:1",), (13,))
    with pytest.raises(ModelDoesNotFitError, match="'memory_aware' would fit"):
        plan_layers(TWELVE, workers(60 * GB, GB), strategy="last_worker_only")


# --- workers that share a memory --------------------------------------------------------------


def test_workers_of_one_memory_share_it_and_each_get_layers() -> None:
    shared = plan_layers(TWELVE, workers(14 * GB, 14 * GB, 14 * GB, domains="aaa"))
    assert shared.unit_counts == (5, 4, 4)
    with pytest.raises(ModelDoesNotFitError):
        plan_layers(TWELVE, workers(12 * GB, 12 * GB, 12 * GB, domains="aaa"))
    assert plan_layers(TWELVE, workers(12 * GB, 12 * GB, 12 * GB)).unit_counts == (5, 4, 4)


def test_workers_of_one_memory_follow_each_other() -> None:
    plan = plan_layers(TWELVE, workers(*[20 * GB] * 4, domains="abab"))
    assert plan.endpoints == ("w0:1", "w2:1", "w1:1", "w3:1")
    assert sum(plan.unit_counts[:2]) in (6, 7)


def test_a_memory_too_small_for_the_buffers_of_all_its_workers_uses_fewer() -> None:
    load = model_load(TWELVE, 4096)
    needed = 13 * GB + load.output_reserve_bytes
    for used in (1, 2, 3):
        free = needed + used * load.reserve_bytes
        assert len(plan_layers(TWELVE, workers(free, free, free, domains="aaa")).shards) == used


def test_even_overfilling_a_shared_memory_names_all_its_workers() -> None:
    with pytest.raises(ModelDoesNotFitError, match=r"w0:1 \(layers 0-4\) and w1:1 \(layers 5-8\)"):
        plan_layers(TWELVE, workers(8 * GB, 8 * GB, 8 * GB, domains="aa."), strategy="even")


# --- when it does not fit ---------------------------------------------------------------------


def test_even_names_the_first_worker_that_overflows_and_the_strategy_that_would_fit() -> None:
    with pytest.raises(ModelDoesNotFitError) as failure:
        plan_layers(TWELVE, workers(20 * GB, 2 * GB, 20 * GB), strategy="even")
    needed = 4 * GB + model_load(TWELVE, 4096).reserve_bytes
    assert str(failure.value) == (
        f"strategy 'even' needs {format_bytes(needed)} on w1:1 (layers 5-8), "
        f"but only {format_bytes(2 * GB)} are free: short by {format_bytes(needed - 2 * GB)}; "
        "strategy 'memory_aware' would fit"
    )


def test_even_asks_for_workers_where_no_strategy_would_fit() -> None:
    with pytest.raises(ModelDoesNotFitError, match="add workers or use a smaller context"):
        plan_layers(TWELVE, workers(4 * GB, 2 * GB), strategy="even")


def test_memory_aware_reports_what_is_needed_free_and_short() -> None:
    with pytest.raises(ModelDoesNotFitError) as failure:
        plan_layers(TWELVE, workers(6 * GB, 4 * GB))
    load = model_load(TWELVE, 4096)
    needed = 13 * GB + 2 * load.reserve_bytes + load.output_reserve_bytes
    message = str(failure.value)
    assert f"needs {format_bytes(needed)} and 2 workers have {format_bytes(10 * GB)} free" in message
    assert "5 of 13 layers do not fit" in message
    assert f"short by {format_bytes(5 * GB + load.output_reserve_bytes)}" in message
    assert f"w1:1 has the least, {format_bytes(4 * GB)};" in message
    assert "add workers" in message


def test_memory_in_pieces_too_small_for_a_layer_is_short_by_the_remaining_layers() -> None:
    blocks = model([3 * GB] * 4, 3 * GB)
    with pytest.raises(ModelDoesNotFitError, match=r"3 of 5 layers do not fit, short by 8\.4 GiB"):
        plan_layers(blocks, workers(*[5 * GB] * 2, *[2 * GB] * 5))


@pytest.mark.parametrize("free", [0, -5, 1000])
def test_workers_without_memory_hold_nothing(free: int) -> None:
    for strategy in STRATEGIES:
        with pytest.raises(ModelDoesNotFitError):
            plan_layers(TWELVE, workers(free, free), strategy=strategy)


# --- requests that make no plan ---------------------------------------------------------------


def test_no_workers_make_no_plan() -> None:
    with pytest.raises(WorkersUnavailableError, match="no worker"):
        plan_layers(TWELVE, [])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("evn", "did you mean 'even'"),
        ("memory-aware", "did you mean 'memory_aware'"),
        ("zzz", "known strategies: auto, even, latency_aware, memory_aware, throughput"),
    ],
)
def test_an_unknown_strategy_is_answered_with_the_known_ones(strategy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layers(TWELVE, workers(60 * GB), strategy=strategy)


@pytest.mark.parametrize("context_tokens", [0, -1])
def test_a_context_is_positive(context_tokens: int) -> None:
    with pytest.raises(ConfigError, match="context"):
        plan_layers(TWELVE, workers(60 * GB), context_tokens=context_tokens)


def test_a_worker_is_named_once() -> None:
    with pytest.raises(ConfigError, match="w0:1 is named twice"):
        plan_layers(TWELVE, workers(60 * GB) * 2)


# --- the plan itself --------------------------------------------------------------------------


@pytest.fixture
def plan() -> LayerPlan:
    return plan_layers(model([GB] * 12, GB, kv_per_token=1024), workers(60 * GB, 40 * GB, 30 * GB))


def test_a_plan_says_what_the_engine_needs(plan: LayerPlan) -> None:
    assert plan.tensor_split == "6,4,3"
    assert plan.endpoints == ("w0:1", "w1:1", "w2:1")
    assert plan.gpu_layers == 13
    assert [shard.layers for shard in plan.shards] == ["0-5", "6-9", "10-11 + output"]
    assert [shard.last_layer for shard in plan.shards] == [5, 9, 11]


def test_a_plan_predicts_memory_by_kind(plan: LayerPlan) -> None:
    load = model_load(model([GB] * 12, GB, kv_per_token=1024), 4096)
    last = plan.shards[2]
    assert (last.weight_bytes, last.kv_bytes) == (3 * GB, 2 * 1024 * 4096)
    assert last.reserve_bytes == load.reserve_bytes + load.output_reserve_bytes
    assert last.needed_bytes == last.weight_bytes + last.kv_bytes + last.reserve_bytes
    assert plan.needed_bytes == sum(shard.needed_bytes for shard in plan.shards)


def test_a_shard_with_the_output_layer_only_says_so() -> None:
    plan = plan_layers(model([GB], GB), workers(2 * GB, 2 * GB))
    output = plan.shards[1]
    assert (output.layers, output.layer_count, output.unit_count, output.has_output) == ("output", 0, 1, True)
    assert plan.shards[0].layers == "0"


def test_a_plan_is_described_in_one_line_and_as_plain_data(plan: LayerPlan) -> None:
    assert plan.describe().startswith(
        "12 layers over 3 workers (memory_aware): w0:1 0-5 (5.6 GiB of 55.9 GiB), w1:1 6-9"
    )
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["tensor_split"] == "6,4,3"
    assert data["needed_bytes"] == plan.needed_bytes
    assert [shard["layers"] for shard in data["shards"]] == ["0-5", "6-9", "10-11 + output"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 7, MAX_WORKERS, MAX_WORKERS + 1, 64])
def test_every_unit_is_placed_once_and_in_order(strategy: str, count: int) -> None:
    facts = model([GB] * 80, GB)
    plan = plan_layers(facts, workers(*[90 * GB] * count), strategy=strategy)
    assert len(plan.shards) == min(count, MAX_WORKERS)
    assert [shard.first_layer for shard in plan.shards] == np.cumsum([0, *plan.unit_counts])[:-1].tolist()
    assert sum(plan.unit_counts) == 81
    assert [shard.has_output for shard in plan.shards] == [False] * (len(plan.shards) - 1) + [True]
    assert sum(shard.weight_bytes for shard in plan.shards) == 81 * GB


def test_of_more_workers_than_the_engine_can_schedule_the_largest_are_used_in_order() -> None:
    free = [20 * GB if n % 2 else 90 * GB for n in range(2 * MAX_WORKERS)]
    plan = plan_layers(model([GB] * 80, GB), workers(*free))
    assert plan.endpoints == tuple(f"w{n}:1" for n in range(0, 2 * MAX_WORKERS, 2))


# --- memory_aware against every split there is ------------------------------------------------


def every_split(unit_count: int, worker_count: int) -> list[list[int]]:
    borders = combinations_with_replacement(range(unit_count + 1), worker_count - 1)
    return [np.diff([0, *inner, unit_count]).tolist() for inner in borders]


def fullest(load: ModelLoad, capacities: Sequence[WorkerCapacity], counts: Sequence[int]) -> float | None:
    """The highest ratio of bytes to budget under these counts; None if they do not fit."""
    ratios, first = [0.0], 0
    for worker, count in zip(capacities, counts, strict=True):
        end = first + count
        byte_count = sum(load.weight_bytes[first:end]) + sum(load.kv_bytes[first:end])
        budget = worker.free_bytes - load.reserve_bytes
        extra = load.output_reserve_bytes if count and end == load.unit_count else 0
        if count and byte_count + extra > budget:
            return None
        if count:
            ratios.append(byte_count / budget)
        first = end
    return max(ratios)


def test_memory_aware_finds_a_split_whenever_there_is_one_and_the_emptiest_of_all() -> None:
    chance = random.Random(11)
    outcomes = set()
    for _ in range(300):
        units = chance.randint(2, 7)
        load = ModelLoad(
            weight_bytes=tuple(chance.randint(1, 60) for _ in range(units)),
            kv_bytes=(*(chance.randint(0, 9) for _ in range(units - 1)), 0),
            reserve_bytes=chance.choice((0, 5, 20)),
            output_reserve_bytes=chance.choice((0, 10)),
        )
        capacities = workers(*(chance.randint(0, 150) for _ in range(chance.randint(1, 4))))
        ratios = [fullest(load, capacities, counts) for counts in every_split(units, len(capacities))]
        best = min((ratio for ratio in ratios if ratio is not None), default=None)
        counts = memory_aware(load, capacities)
        outcomes.add(counts is None)
        if best is None:
            assert counts is None
        else:
            assert counts is not None
            assert sum(counts) == units
            assert fullest(load, capacities, counts) == pytest.approx(best, abs=1e-5)
    assert outcomes == {True, False}


def test_memory_aware_with_shared_memory_fits_whenever_one_worker_per_memory_would() -> None:
    chance = random.Random(12)
    outcomes = set()
    for _ in range(300):
        units = chance.randint(2, 7)
        load = ModelLoad(tuple(chance.randint(1, 60) for _ in range(units)), (0,) * units, 20, 10)
        memories = [chance.randint(0, 300) for _ in range(chance.randint(1, 3))]
        groups = [chance.randint(1, 3) for _ in memories]
        free = [memory for memory, size in zip(memories, groups, strict=True) for _ in range(size)]
        names = "".join(letter * size for letter, size in zip("abc", groups, strict=False))
        shared = memory_aware(load, workers(*free, domains=names))
        alone = memory_aware(load, workers(*memories))
        outcomes.add(shared is None)
        assert (shared is None) == (alone is None)
        if shared is not None:
            assert len(shared) == len(free)
            assert sum(shared) == units
            first = 0
            for position, memory in enumerate(memories):
                own = shared[sum(groups[:position]) : sum(groups[: position + 1])]
                end = first + sum(own)
                buffers = 20 * sum(count > 0 for count in own) + 10 * (first < end == units)
                assert sum(load.weight_bytes[first:end]) + buffers <= memory or first == end
                first = end
    assert outcomes == {True, False}


# --- the engine's arithmetic ------------------------------------------------------------------


def engine_placement(counts: Sequence[int]) -> tuple[int, ...]:
    """llama.cpp's load_tensors with --tensor-split, step by step in its float32."""
    total = np.float32(0)
    splits = []
    for count in counts:
        total = np.float32(total + np.float32(count))
        splits.append(total)
    shares = np.array([split / total for split in splits], dtype=np.float32)
    units = sum(counts)
    return tuple(
        int(np.searchsorted(shares, np.float32(unit) / np.float32(units), side="right")) for unit in range(units)
    )


def planned_placement(counts: Sequence[int]) -> tuple[int, ...]:
    """Device (index into `--rpc`) of each unit, as planned."""
    return tuple(device for device, count in enumerate(counts) for _ in range(count))


def test_whole_counts_are_placed_exactly_for_every_border_of_up_to_512_layers() -> None:
    for units in range(2, 514):
        borders = np.arange(1, units, dtype=np.float32) / np.float32(units)
        assert np.all(np.diff(borders) > 0)  # distinct in float32, so no unit slips over a border
    for units in (2, 3, 13, 33, 61, 81, 127, 129, 513):
        for border in range(1, units):
            counts = (border, units - border)
            assert engine_placement(counts) == planned_placement(counts)


def test_whole_counts_are_placed_exactly_for_many_workers() -> None:
    chance = random.Random(13)
    for _ in range(400):
        units = chance.randint(1, 129)
        borders = sorted(chance.sample(range(1, units), min(units, chance.randint(1, 64)) - 1))
        counts = np.diff([0, *borders, units]).tolist()
        assert engine_placement(counts) == planned_placement(counts)


def test_even_counts_differ_by_one_at_most() -> None:
    for units in range(2, 130):
        load = ModelLoad((1,) * units, (0,) * units, 0, 0)
        for worker_count in (1, 2, 3, 7, 15):
            counts = even(load, workers(*[1] * worker_count))
            assert sum(counts) == units
            assert max(counts) - min(counts) <= 1
            assert counts == sorted(counts, reverse=True)


def test_a_wider_model_and_a_longer_context_reserve_more() -> None:
    base = model_load(TWELVE, 4096)
    assert model_load(TWELVE, 8192).reserve_bytes > base.reserve_bytes
    assert model_load(replace(TWELVE, embedding_length=4096), 4096).reserve_bytes > base.reserve_bytes
    assert model_load(replace(TWELVE, vocabulary_size=128_000), 4096).output_reserve_bytes == 512 * 4 * 128_000


# --- given counts -----------------------------------------------------------------------------


def test_given_counts_are_planned_exactly_and_in_the_order_given() -> None:
    plan = plan_from_counts(TWELVE, workers(20 * GB, 20 * GB, 20 * GB), (2, 0, 11))
    assert (plan.strategy, plan.endpoints, plan.unit_counts) == ("as given", ("w0:1", "w2:1"), (2, 11))
    assert plan.describe().startswith("12 layers over 2 workers (as given): w0:1 0-1")


def test_given_counts_are_checked_against_each_memory() -> None:
    with pytest.raises(ModelDoesNotFitError, match=r"given layout needs .* on w1:1 \(layers 2-11 \+ output\)"):
        plan_from_counts(TWELVE, workers(20 * GB, 5 * GB), (2, 11))
    with pytest.raises(ModelDoesNotFitError, match="move layers to a worker with more memory"):
        plan_from_counts(TWELVE, workers(12 * GB, 12 * GB, domains="aa"), (6, 7))


def test_given_counts_use_no_more_devices_than_the_engine_can_schedule() -> None:
    facts = model([GB] * 80, GB)
    with pytest.raises(ConfigError, match="more than 15 devices"):
        plan_from_counts(facts, workers(*[90 * GB] * 16), (66, *[1] * 15))
    assert len(plan_from_counts(facts, workers(*[90 * GB] * 16), (67, *[1] * 14, 0)).shards) == 15
    several = [replace(worker, device_count=8) for worker in workers(90 * GB, 90 * GB)]
    with pytest.raises(ConfigError, match="more than 15 devices"):
        plan_from_counts(facts, several, (40, 41))


@pytest.mark.parametrize("predicted_ms", [None, 12.5])
def test_a_plan_survives_as_plain_data(plan: LayerPlan, predicted_ms: float | None) -> None:
    measured = replace(plan, predicted_token_ms=predicted_ms)
    data = json.loads(json.dumps(measured.as_dict()))
    assert data["predicted_token_ms"] == predicted_ms
    assert LayerPlan.from_dict(data) == measured
    del data["predicted_token_ms"]
    assert LayerPlan.from_dict(data) == plan


def test_a_plan_and_its_errors_call_workers_by_their_names() -> None:
    named = [replace(worker, name=f"gpu{n}") for n, worker in enumerate(workers(60 * GB, 8 * GB))]
    plan = plan_layers(TWELVE, named)
    assert plan.describe().startswith("12 layers over 2 workers (memory_aware): gpu0 0-11 (")
    assert LayerPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    older = plan.as_dict()
    for shard in older["shards"]:
        del shard["name"]
    assert LayerPlan.from_dict(older).shards[0].worker == "w0:1", "an entry of an older version"
    with pytest.raises(ModelDoesNotFitError, match=r"on gpu1 \(layers 6-11 \+ output\)"):
        plan_from_counts(TWELVE, [named[0], replace(named[1], free_bytes=2 * GB)], (6, 7))
    with pytest.raises(ModelDoesNotFitError, match="gpu1 has the least"):
        plan_layers(TWELVE, [replace(worker, free_bytes=worker.free_bytes // 10) for worker in named])
