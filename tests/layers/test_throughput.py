"""`throughput` spreads long prompts over workers where that pays, as predicted, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from random import Random

import pytest

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import CPU, LayerPlan, own_endpoint
from sollol_nb.layers.planner import memory_shortage, plan_layers, unchecked_plan
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.throughput import GENERATED_TOKENS, Throughput, predict_throughput
from sollol_nb.layers.token_time import WorkerSpeeds
from tests.support.layer_plans import GB, TWELVE, model


def cluster(*round_trips_ms: float, free_gb: float = 40, own_cpu: bool = False) -> list[WorkerCapacity]:
    free = int(free_gb * GB)
    found = [WorkerCapacity(f"w{n}:1", free, free, ms) for n, ms in enumerate(round_trips_ms)]
    return [*found, WorkerCapacity(own_endpoint(CPU), free, free, device=CPU)] if own_cpu else found


def speeds_of(workers: list[WorkerCapacity], ms_per_gb: float = 2.0, prompts: float = 20.0) -> WorkerSpeeds:
    """All alike; prompts are so many times as fast for each token."""
    endpoints = [worker.endpoint for worker in workers]
    return WorkerSpeeds(
        dict.fromkeys(endpoints, ms_per_gb / GB),
        None,
        0.0,
        dict.fromkeys(endpoints, 0.0),
        prompt_ms_per_byte=dict.fromkeys(endpoints, ms_per_gb / prompts / GB),
    )


def planned(facts: ModelFacts, workers: list[WorkerCapacity], speeds: WorkerSpeeds, **options: int) -> LayerPlan:
    return plan_layers(facts, workers, strategy="throughput", speeds=speeds, context_tokens=256, **options)


def predicted(
    plan: LayerPlan, facts: ModelFacts, workers: list[WorkerCapacity], speeds: WorkerSpeeds
) -> Throughput:
    found = predict_throughput(plan, workers, facts, speeds)
    assert found is not None
    return found


def workload_ms(plan: LayerPlan, facts: ModelFacts, workers: list[WorkerCapacity], speeds: WorkerSpeeds) -> float:
    """Four prompts of 2048 tokens, and what is generated for them."""
    found = predicted(plan, facts, workers, speeds)
    return 4 * 2048 / found.prompt_tokens_per_s * 1000 + GENERATED_TOKENS * 4 / found.tokens_per_s * 1000


def test_a_large_model_uses_several_workers_for_long_prompts_and_one_for_the_shortest_token() -> None:
    workers = cluster(0.5, 0.5)
    speeds = speeds_of(workers)
    both, alone = planned(TWELVE, workers, speeds), planned(TWELVE, workers[:1], speeds)

    assert sorted(both.unit_counts) == [6, 7]
    assert both.strategy == "throughput"
    assert len(plan_layers(TWELVE, workers, strategy="latency_aware", speeds=speeds).shards) == 1
    faster = predicted(both, TWELVE, workers, speeds), predicted(alone, TWELVE, workers, speeds)
    assert [found.is_pipelined for found in faster] == [True, False]
    assert 1.4 < faster[0].prompt_tokens_per_s / faster[1].prompt_tokens_per_s < 2
    assert both.reasons[0].startswith("4 requests with prompts of 2048 tokens: ")
    assert both.reasons[-1].startswith("the next best, over w")


def test_a_small_model_stays_on_one_worker_where_round_trips_outweigh_its_work() -> None:
    small = model([GB // 400] * 12, GB // 400)
    workers = cluster(5, 5, 5, 5)
    plan = planned(small, workers, speeds_of(workers))
    assert len(plan.shards) == 1
    assert plan.reasons[1].startswith("left out, since such requests would take longer with them: w")


def test_the_reasons_name_only_the_workers_that_are_left_out() -> None:
    workers = [*cluster(0.5, 0.5), WorkerCapacity("far:1", 40 * GB, 40 * GB, 500.0)]
    plan = planned(TWELVE, workers, speeds_of(workers))
    assert len(plan.shards) == 2
    assert plan.reasons[1] == "left out, since such requests would take longer with them: far:1"
    one = planned(TWELVE, workers, speeds_of(workers), wanted=1)
    assert (len(one.workers), one.reasons[1]) == (1, "1 worker as set by num_workers")


def test_as_many_workers_as_wanted_take_part_although_some_share_a_memory() -> None:
    shared = [replace(worker, memory_domain="here") for worker in cluster(0.5, 0.5)]
    workers = [*shared, WorkerCapacity("other:1", 40 * GB, 40 * GB, 0.5)]
    gpu = WorkerCapacity(own_endpoint("CUDA0"), 40 * GB, 40 * GB, device="CUDA0")
    assert len(planned(TWELVE, workers, speeds_of(workers), wanted=3).workers) == 3
    assert len(planned(TWELVE, [*workers, gpu], speeds_of([*workers, gpu]), wanted=2).workers) == 2


def test_a_worker_of_unknown_speed_takes_part_where_the_memory_requires_it() -> None:
    workers = [*cluster(0.5, free_gb=8), WorkerCapacity("new:1", 40 * GB, 40 * GB, 0.5)]
    plan = planned(TWELVE, workers, speeds_of(workers[:1]))
    assert set(plan.endpoints) == {"w0:1", "new:1"}
    assert plan.reasons[0].startswith("new:1 takes part although it is not calibrated yet: the memory ")
    plenty = [*cluster(0.5, free_gb=40), workers[1]]
    both = planned(TWELVE, plenty, speeds_of(plenty[:1]), wanted=2)
    assert both.reasons[0].startswith(
        "new:1 takes part although it is not calibrated yet: 2 workers must take part "
    )


def test_layers_on_the_own_cpu_end_the_overlap_so_it_gets_none_where_workers_suffice() -> None:
    workers = cluster(0.5, 0.5, own_cpu=True)
    speeds = speeds_of(workers)
    plan = planned(TWELVE, workers, speeds)
    assert (plan.own, len(plan.workers)) == ((), 2)
    with_own = unchecked_plan(TWELVE, workers, (4, 4, 5), context_tokens=256)
    assert not predicted(with_own, TWELVE, workers, speeds).is_pipelined


def test_of_an_expert_model_a_batch_reads_the_experts_of_all_its_requests() -> None:
    workers = cluster(0.5)
    speeds = speeds_of(workers, prompts=1e9)
    experts = replace(TWELVE, layer_read_bytes=(GB // 8,) * 12)
    plan = planned(experts, workers, speeds)
    one = predict_throughput(plan, workers, experts, speeds, requests=1)
    four = predict_throughput(plan, workers, experts, speeds, requests=4)
    assert one is not None
    assert four is not None
    assert four.tokens_per_s / one.tokens_per_s == pytest.approx(4 * (0.5 + 2 * 2.5) / (0.5 + 2 * 7), rel=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_the_chosen_layout_is_within_a_tenth_of_the_best_of_all(seed: int) -> None:
    random = Random(seed)
    facts = model([GB // random.choice([1, 30])] * 7, GB // random.choice([1, 30]))
    whole = sum(facts.layer_bytes) + facts.output_bytes + 100_000_000
    workers = [
        WorkerCapacity(f"w{n}:1", free := int(random.uniform(0.7, 3) * whole), free, random.uniform(0.1, 5))
        for n in range(random.randint(2, 4))
    ]
    speeds = speeds_of(workers)
    prompts = {endpoint: ms * random.uniform(0.5, 4) for endpoint, ms in speeds.prompt_ms_per_byte.items()}
    speeds = replace(speeds, prompt_ms_per_byte=prompts)
    layouts = (
        unchecked_plan(
            facts,
            order,
            [end - first for first, end in zip((0, *ends), (*ends, 8), strict=True)],
            context_tokens=256,
        )
        for count in range(1, len(workers) + 1)
        for order in permutations(workers, count)
        for ends in combinations(range(1, 8), count - 1)
    )
    fitting = [plan for plan in layouts if memory_shortage(plan, workers) is None]
    best = min(workload_ms(plan, facts, workers, speeds) for plan in fitting)
    assert workload_ms(planned(facts, workers, speeds), facts, workers, speeds) <= 1.1 * best
