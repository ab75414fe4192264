"""Layers stay on the workers that have them cached, and the plan fits and is as fast all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sollol_nb.errors import ModelDoesNotFitError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.cached import EXACT_WORKERS, SLOWER, keep_cached
from sollol_nb.layers.plan import CPU, LayerPlan, own_endpoint
from sollol_nb.layers.planner import memory_shortage, plan_layers, unchecked_plan
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds, predict, worker_parts
from sollol_nb.llama_cpp.workers.choice import best_plan
from tests.support.layer_plans import GB, model, workers

QUICKLY = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def cacheable(layer_bytes: Sequence[int], output_bytes: int) -> ModelFacts:
    """A model of which workers can cache all but a small part of each unit."""
    sizes = (*layer_bytes, output_bytes)
    return replace(model(layer_bytes, output_bytes), cacheable_bytes=tuple(size - size // 100 for size in sizes))


ELEVEN = cacheable([GB] * 11, GB)


def calibrated(ms_per_gb: Mapping[str, float]) -> WorkerSpeeds:
    return WorkerSpeeds(
        {name: ms / GB for name, ms in ms_per_gb.items()}, None, 0.0, dict.fromkeys(ms_per_gb, 0.0)
    )


def near(*capacities: WorkerCapacity) -> list[WorkerCapacity]:
    return [replace(capacity, round_trip_ms=1.0) for capacity in capacities]


def sent_bytes(facts: ModelFacts, plan: LayerPlan, cached: Mapping[str, Sequence[int]]) -> int:
    return sum(
        facts.cacheable_bytes[unit]
        for shard in plan.workers
        for unit in shard.units
        if unit not in cached.get(shard.endpoint, ())
    )


THIRDS = {"w0:1": range(0, 4), "w1:1": range(4, 8), "w2:1": range(8, 12)}


@pytest.mark.parametrize("lost", THIRDS)
@pytest.mark.parametrize("strategy", ["memory_aware", "latency_aware"])
def test_a_death_costs_only_the_layers_of_the_dead_worker(lost: str, strategy: str) -> None:
    all_three = near(*workers(20 * GB, 20 * GB, 20 * GB))
    left = [worker for worker in all_three if worker.endpoint != lost]
    speeds = calibrated(dict.fromkeys(THIRDS, 2.0))
    plan = best_plan(ELEVEN, left, strategy=strategy, context_tokens=256, speeds=speeds, cached=THIRDS, wanted=2)
    assert len(plan.workers) == 2
    assert sent_bytes(ELEVEN, plan, THIRDS) == 4 * ELEVEN.cacheable_bytes[0]
    if (strategy, lost) == ("memory_aware", "w0:1"):  # equal parts would send more
        assert plan.reasons[-1] == (
            "w1:1, w2:1 keep what they have cached: 7.4 GiB of 11.1 GiB need not be sent, instead of 5.5 GiB"
        )


def test_the_worker_that_comes_back_gets_its_layers_again() -> None:
    found = best_plan(
        ELEVEN, workers(20 * GB, 20 * GB, 20 * GB)[::-1], strategy="auto", context_tokens=256, cached=THIRDS
    )
    assert found.endpoints == ("w0:1", "w1:1", "w2:1")
    assert sent_bytes(ELEVEN, found, THIRDS) == 0


def test_workers_with_cached_layers_are_chosen_before_others() -> None:
    cached = {"w3:1": range(4), "w4:1": range(4, 8), "w5:1": range(8, 12)}
    found = best_plan(ELEVEN, workers(*[20 * GB] * 6), strategy="auto", context_tokens=256, cached=cached)
    assert found.endpoints == ("w3:1", "w4:1", "w5:1")


def test_equal_counts_stay_equal() -> None:
    cached = {"w0:1": range(10, 12), "w1:1": range(10)}
    found = keep_cached(
        plan_layers(ELEVEN, workers(20 * GB, 20 * GB), strategy="even", context_tokens=256),
        ELEVEN,
        workers(20 * GB, 20 * GB),
        cached,
    )
    assert found.endpoints == ("w1:1", "w0:1")
    assert found.unit_counts == (6, 6)


def test_a_slow_worker_gets_no_more_layers_for_what_it_has_cached() -> None:
    both = near(*workers(20 * GB, 7 * GB))
    speeds = calibrated({"w0:1": 1.0, "w1:1": 50.0})
    plan = plan_layers(ELEVEN, both, strategy="latency_aware", context_tokens=256, speeds=speeds, wanted=2)
    found = keep_cached(plan, ELEVEN, both, {"w1:1": range(6)}, speeds)
    assert dict(zip(found.endpoints, found.unit_counts, strict=True)) == {"w0:1": 11, "w1:1": 1}
    assert found.endpoints[0] == "w1:1"  # the order costs nothing


def test_nothing_changes_where_nothing_can_be_cached_or_all_have_all() -> None:
    three = workers(20 * GB, 10 * GB, 20 * GB)
    small = replace(ELEVEN, cacheable_bytes=())
    for facts, cached in ((small, THIRDS), (ELEVEN, {}), (ELEVEN, dict.fromkeys(THIRDS, range(12)))):
        plan = plan_layers(facts, three, strategy="memory_aware", context_tokens=256)
        assert keep_cached(plan, facts, three, cached) is plan


def test_the_devices_of_this_machine_keep_their_layers() -> None:
    own = WorkerCapacity(own_endpoint(CPU), 6 * GB, 6 * GB, device=CPU)
    all_devices = [own, *workers(4 * GB, 5 * GB)]
    plan = plan_layers(ELEVEN, all_devices, strategy="memory_aware", context_tokens=256)
    assert plan.own
    first = plan.own[0].unit_count
    cached = {"w0:1": range(first + 4, 12), "w1:1": range(first, first + 4)}
    found = keep_cached(plan, ELEVEN, all_devices, cached)
    assert found.own == plan.own
    assert found.endpoints == ("w1:1", "w0:1")
    assert memory_shortage(found, all_devices) is None


@QUICKLY
@given(data=st.data())
def test_a_plan_that_keeps_layers_fits_is_as_fast_and_no_other_sends_less(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    blocks = data.draw(st.integers(count, 8))
    size = st.integers(1, 3).map(lambda number: number * GB)
    facts = cacheable(data.draw(st.lists(size, min_size=blocks, max_size=blocks)), data.draw(size))
    free = near(*workers(*data.draw(st.lists(st.integers(6, 40), min_size=count, max_size=count))))
    free = [
        replace(worker, free_bytes=worker.free_bytes * GB, total_bytes=worker.free_bytes * GB) for worker in free
    ]
    units = st.sets(st.integers(0, blocks))
    cached = {worker.endpoint: sorted(data.draw(units)) for worker in free}
    speeds = None
    strategy = "memory_aware"
    if data.draw(st.booleans()):
        speeds = calibrated({worker.endpoint: data.draw(st.sampled_from([1.0, 1.0, 4.0])) for worker in free})
        strategy = "latency_aware"
    try:
        plan = plan_layers(facts, free, strategy=strategy, context_tokens=256, speeds=speeds, wanted=count)
    except ModelDoesNotFitError:
        return
    found = keep_cached(plan, facts, free, cached, speeds)
    assert memory_shortage(found, free) is None
    assert sorted(found.endpoints) == sorted(plan.endpoints)
    assert sum(found.unit_counts) == blocks + 1
    assert sent_bytes(facts, found, cached) <= sent_bytes(facts, plan, cached)
    round_trips = {worker.endpoint: worker.round_trip_ms for worker in free}

    def token_ms(of: LayerPlan) -> float:
        return predict(speeds, worker_parts(of, round_trips, facts)).token_ms or 0.0

    assert token_ms(found) <= token_ms(plan) * (1 + SLOWER) + 1e-9
    if speeds is None:  # where time does not count, no order and no counts send less
        tight = [replace(worker, free_bytes=round(worker.free_bytes * 0.95)) for worker in free]
        for order in permutations(tight):
            for borders in combinations(range(1, blocks + 1), count - 1):
                ends = (0, *borders, blocks + 1)
                counts = [end - first for first, end in pairwise(ends)]
                other = unchecked_plan(facts, order, counts, context_tokens=256)
                if memory_shortage(other, tight) is None:
                    assert sent_bytes(facts, found, cached) <= sent_bytes(facts, other, cached)


def test_many_workers_keep_their_layers_too() -> None:
    count = 12
    assert count > EXACT_WORKERS
    facts = cacheable([GB] * 47, GB)
    cached = {f"w{(number * 5) % count}:1": range(4 * number, 4 * number + 4) for number in range(count)}
    free = workers(*[20 * GB] * count)
    found = best_plan(facts, free, strategy="memory_aware", context_tokens=256, cached=cached, wanted=count)
    assert sent_bytes(facts, found, cached) == 0
    lost = [worker for worker in free if worker.endpoint != "w3:1"]
    found = best_plan(facts, lost, strategy="memory_aware", context_tokens=256, cached=cached, wanted=count)
    assert sent_bytes(facts, found, cached) == 4 * facts.cacheable_bytes[0]
