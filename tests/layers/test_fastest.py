"""`latency_aware` chooses the workers and layers with the shortest predicted token: against all other layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sollol_nb.errors import ModelDoesNotFitError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers import fastest
from sollol_nb.layers.costs import DeviceCost, Runs
from sollol_nb.layers.fastest import KEEP, TIE
from sollol_nb.layers.plan import CPU, MAX_WORKERS, LayerPlan, own_endpoint
from sollol_nb.layers.planner import memory_shortage, plan_layers, unchecked_plan
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds, predict, worker_parts
from tests.support.layer_plans import GB, TWELVE, model

QUICKLY = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WITHOUT_MARGIN = 0.95
"""Of free memory; the strategy keeps the rest free as long as it can."""


def worker(
    name: str, free_gb: float, round_trip_ms: float | None = 1.0, domain: str | None = None
) -> WorkerCapacity:
    return WorkerCapacity(f"{name}:1", int(free_gb * GB), int(free_gb * GB), round_trip_ms, domain, name)


def own(device: str, free_gb: float) -> WorkerCapacity:
    free = int(free_gb * GB)
    return WorkerCapacity(own_endpoint(device), free, free, device=device)


def speeds_of(ms_per_gb: Mapping[str, float], **others: object) -> WorkerSpeeds:
    """Calibrated speeds, by name or own device."""
    endpoints = {
        name: own_endpoint(name) if name.isupper() or name[:4] == "CUDA" else f"{name}:1" for name in ms_per_gb
    }
    return WorkerSpeeds(
        {endpoints[name]: ms / GB for name, ms in ms_per_gb.items()},
        None,
        0.0,
        dict.fromkeys(endpoints.values(), 0.0),
        **others,  # type: ignore[arg-type]
    )


def planned(
    workers: Sequence[WorkerCapacity],
    speeds: WorkerSpeeds,
    facts: ModelFacts = TWELVE,
    *,
    wanted: int | None = None,
    current: LayerPlan | None = None,
    needs_worker: bool = False,
    strategy: str = "latency_aware",
) -> LayerPlan:
    return plan_layers(
        facts,
        workers,
        strategy=strategy,
        speeds=speeds,
        wanted=wanted,
        current=current,
        context_tokens=256,
        needs_worker=needs_worker,
    )


def token_ms(facts: ModelFacts, plan: LayerPlan, workers: Sequence[WorkerCapacity], speeds: WorkerSpeeds) -> float:
    """The prediction for a plan, by the formula of `token_time.py`."""
    round_trips_ms = {capacity.endpoint: capacity.round_trip_ms for capacity in workers}
    found = predict(speeds, worker_parts(plan, round_trips_ms, facts)).token_ms
    assert found is not None
    return found


# --- every layout there is --------------------------------------------------------------------


def orders(
    workers: Sequence[WorkerCapacity], wanted: int | None, least: int
) -> Iterator[tuple[WorkerCapacity, ...]]:
    """Every set of devices in every order that llama.cpp has."""
    for count in range(1, len(workers) + 1):
        for order in permutations(workers, count):
            ranks = [0 if capacity.device == CPU else 1 if not capacity.is_own else 2 for capacity in order]
            if ranks == sorted(ranks) and wanted in (None, ranks.count(1)) and ranks.count(1) >= least:
                yield order


def best_of_all(
    facts: ModelFacts,
    workers: Sequence[WorkerCapacity],
    speeds: WorkerSpeeds,
    wanted: int | None = None,
    least: int = 0,
) -> float | None:
    """The shortest token of all layouts that fit, with so many workers at least."""
    best = None
    units = facts.layer_count + 1
    for order in orders(workers, wanted, least):
        for borders in combinations(range(1, units), len(order) - 1):
            counts = [end - first for first, end in zip((0, *borders), (*borders, units), strict=True)]
            plan = unchecked_plan(facts, order, counts, context_tokens=256)
            if memory_shortage(plan, order) is None:
                ms = token_ms(facts, plan, workers, speeds)
                best = ms if best is None else min(best, ms)
    return best


@st.composite
def clusters(
    draw: st.DrawFn, *, workers: tuple[int, int] = (1, 4), blocks: tuple[int, int] = (2, 7)
) -> tuple[ModelFacts, list[WorkerCapacity], WorkerSpeeds]:
    """A model, workers, perhaps own devices, and their speeds."""
    count = draw(st.integers(*blocks))
    sizes = [draw(st.floats(0.5, 3.0)) for _ in range(count)]
    layer_bytes = [int(size * GB) for size in sizes]
    facts = model(layer_bytes, int(draw(st.floats(0.2, 3.0)) * GB), kv_per_token=draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        facts = replace(facts, layer_read_bytes=tuple(held // draw(st.integers(1, 8)) for held in layer_bytes))
    facts = replace(facts, vocabulary_size=draw(st.sampled_from([1000, 150_000])))
    names = "abcdefghijklmnopqrstuvwxyz"[: draw(st.integers(*workers))]
    whole = sum(layer_bytes) / GB
    capacities = [worker(name, draw(st.floats(0.3, 1.2)) * whole, draw(st.floats(0.02, 20))) for name in names]
    if draw(st.booleans()):
        capacities.append(own(CPU, draw(st.floats(0.3, 1.2)) * whole))
    if draw(st.booleans()):
        capacities.append(own("CUDA0", draw(st.floats(0.2, 0.8)) * whole))
    endpoints = [capacity.endpoint for capacity in capacities]
    known = WorkerSpeeds(
        {endpoint: draw(st.floats(0.5, 10)) / GB for endpoint in endpoints},
        None,
        0.0,
        {endpoint: draw(st.floats(0, 2)) for endpoint in endpoints},
        {endpoint: draw(st.floats(1e7, 1e9)) for endpoint in endpoints if draw(st.booleans())},
        draw(st.floats(0, 1)),
        {endpoint: draw(st.floats(0, 0.5)) for endpoint in endpoints},
    )
    return facts, capacities, known


@QUICKLY
@given(clusters(), st.one_of(st.none(), st.integers(1, 3)), st.booleans())
def test_of_all_layouts_of_few_workers_the_fastest_is_found(
    cluster: tuple[ModelFacts, list[WorkerCapacity], WorkerSpeeds], wanted: int | None, needs_worker: bool
) -> None:
    facts, workers, speeds = cluster
    with_margin = [replace(found, free_bytes=round(found.free_bytes * WITHOUT_MARGIN)) for found in workers]
    wanted = wanted and min(wanted, sum(not found.is_own for found in workers))
    limits = (speeds, wanted, int(needs_worker))
    best = best_of_all(facts, with_margin, *limits) or best_of_all(facts, workers, *limits)
    if best is None:
        with pytest.raises(ModelDoesNotFitError):
            planned(workers, speeds, facts, wanted=wanted, needs_worker=needs_worker)
        return
    plan = planned(workers, speeds, facts, wanted=wanted, needs_worker=needs_worker)
    assert plan.predicted_token_ms == pytest.approx(token_ms(facts, plan, workers, speeds))
    assert best - 1e-9 <= (plan.predicted_token_ms or 0.0) <= best * (1 + TIE) + 1e-9
    assert memory_shortage(plan, workers) is None


def drawn(seed: int) -> tuple[ModelFacts, list[WorkerCapacity], WorkerSpeeds, int | None]:
    """A cluster of up to eight workers and own devices, whose memory mostly is too small for one to hold all."""
    random = Random(seed)
    count = random.randint(16, 24)
    larger = random.choice([1.0, 1.15, 1.4])  # as in real files: some weights take more bits in some blocks
    sizes = [larger if block < count // 8 or block % 3 == 0 else 1.0 for block in range(count)]
    facts = model([int(size * GB) for size in sizes], int(random.uniform(0.3, 3) * GB))
    facts = replace(facts, vocabulary_size=random.choice([1000, 150_000]))
    names = "abcdefghi"[: random.randint(8, 9)]
    workers = [worker(name, random.uniform(0.1, 0.7) * count, random.uniform(0.02, 20)) for name in names]
    workers += [
        own(device, random.uniform(0.1, 0.7) * count) for device in (CPU, "CUDA0") if random.random() < 0.4
    ]
    endpoints = [found.endpoint for found in workers]
    speeds = WorkerSpeeds(
        {endpoint: random.uniform(0.5, 6) / GB * random.choice([1, 1, 4]) for endpoint in endpoints},
        None,
        0.0,
        {endpoint: random.uniform(0, 2) for endpoint in endpoints},
        {endpoint: random.uniform(1e7, 1e9) for endpoint in endpoints},
        0.3,
        {endpoint: random.uniform(0, 0.3) for endpoint in endpoints},
    )
    return facts, workers, speeds, random.choice([None, None, 3, 5])


@pytest.mark.parametrize("seed", range(15))
def test_of_the_layouts_of_more_workers_one_within_a_percent_of_the_fastest_is_found(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, workers, speeds, wanted = drawn(seed)
    plan = planned(workers, speeds, facts, wanted=wanted)
    monkeypatch.setattr(fastest, "FEW_MEMORIES", len(workers))  # every set in every order, which takes longer
    monkeypatch.setattr(fastest, "EXACT_WORK", 10**9)
    best = planned(workers, speeds, facts, wanted=wanted)

    assert memory_shortage(plan, workers) is None
    assert (plan.predicted_token_ms or 0.0) <= (best.predicted_token_ms or 0.0) * 1.01


@pytest.mark.parametrize(("larger", "passes_each"), [(1.0, 5), (1.2, 12)])
def test_many_workers_are_searched_without_trying_them_one_by_one(
    larger: float, passes_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 workers and 126 layers: about as many passes over a worker's borders as there are workers."""
    random = Random(0)
    workers = [worker(f"w{n}", random.uniform(4, 24), random.uniform(0.1, 8)) for n in range(64)]
    speeds = speeds_of({found.name: random.uniform(1, 10) for found in workers})
    passes = 0
    run_ms = Runs.ms

    def counted(runs: Runs, cost: DeviceCost) -> object:
        nonlocal passes
        passes += 1
        return run_ms(runs, cost)

    monkeypatch.setattr(Runs, "ms", counted)
    sizes = [int(GB * (larger if block % 3 == 0 else 1.0)) for block in range(126)]
    plan = planned(workers, speeds, model(sizes, GB))
    assert sum(plan.unit_counts) == 127
    assert len(plan.shards) <= MAX_WORKERS
    assert passes <= 64 * passes_each


# --- what is chosen, and why ------------------------------------------------------------------


def test_a_far_worker_is_left_out_although_it_is_as_fast_and_the_reason_has_the_figures() -> None:
    workers = [worker("near", 9, 0.2), worker("also-near", 9, 0.2), worker("far", 9, 4.0)]
    plan = planned(workers, speeds_of({"near": 1, "also-near": 1, "far": 1}))
    assert set(plan.endpoints) == {"near:1", "also-near:1"}
    assert plan.reasons[0] == (
        "far is left out: with it a token would take 17.2 ms instead of 13.4 (4 ms on the way to it)"
    )
    assert plan.reasons[1].startswith("the next best, ")


def test_a_slow_worker_gets_what_the_memory_of_the_fast_ones_does_not_hold() -> None:
    plan = planned([worker("slow", 20), worker("fast", 8)], speeds_of({"slow": 4, "fast": 1}))
    assert dict(zip(plan.endpoints, plan.unit_counts, strict=True)) == {"slow:1": 6, "fast:1": 7}
    plan = planned([worker("slow", 20), worker("fast", 20)], speeds_of({"slow": 4, "fast": 1}))
    assert (plan.endpoints, plan.unit_counts) == (("fast:1",), (13,))
    assert "its layers take 4 times as long as those of fast" in plan.reasons[0]


def test_own_devices_take_part_in_the_places_that_llama_cpp_gives_them() -> None:
    workers = [own("CUDA0", 5), worker("gpu1", 6, 0.3), own(CPU, 30)]
    plan = planned(workers, speeds_of({"CUDA0": 0.5, "gpu1": 0.6, CPU: 9}))
    assert [shard.endpoint for shard in plan.shards] == [own_endpoint(CPU), "gpu1:1", own_endpoint("CUDA0")]
    assert plan.unit_counts == (4, 5, 4)
    assert (plan.endpoints, plan.gpu_layers, plan.tensor_split) == (("gpu1:1",), 9, "5,4")
    assert plan.describe().startswith(
        "12 layers over 1 worker and this machine (latency_aware): this machine 0-3 ("
    )
    assert LayerPlan.from_dict(plan.as_dict()) == plan

    alone = planned([worker("far", 30, 20.0), own(CPU, 30)], speeds_of({"far": 1, CPU: 2}))
    assert (alone.endpoints, alone.gpu_layers, alone.tensor_split, alone.unit_counts) == ((), 0, "", (13,))
    assert alone.describe().startswith("12 layers on this machine (latency_aware): this machine 0-11 + output (")


@pytest.mark.parametrize(
    ("far_gb", "count", "fits"),
    [
        (30, 1, True),
        (30, 20, True),
        (0.1, 1, False),
    ],
)
@pytest.mark.parametrize("strategy", ["latency_aware", "throughput"])
def test_where_sharding_is_requested_a_worker_takes_part_though_this_machine_alone_is_faster(
    strategy: str, far_gb: float, count: int, fits: bool
) -> None:
    workers = [worker(f"far{number}", far_gb, 20.0 + number) for number in range(count)] + [own(CPU, 30)]
    speeds = speeds_of({f"far{number}": 200 for number in range(count)} | {CPU: 2})
    alone = planned(workers, speeds, strategy=strategy)
    assert not alone.workers
    assert alone.reasons[0] == "all layers are on this machine, which alone is fastest"
    if not fits:
        with pytest.raises(ModelDoesNotFitError):
            planned(workers, speeds, strategy=strategy, needs_worker=True)
        return
    for current in (None, alone):
        plan = planned(workers, speeds, strategy=strategy, needs_worker=True, current=current)
        assert [shard.endpoint for shard in plan.workers] == ["far0:1"]
        if strategy == "latency_aware":
            assert plan.reasons[0] == (
                "a worker takes part since sharding was requested: this machine alone would take 26 ms per token "
                "instead of 244"
            )


def test_one_of_the_workers_that_share_a_memory_is_used_unless_more_are_wanted() -> None:
    workers = [worker(name, 30, domain="here") for name in "abc"]
    speeds = speeds_of(dict.fromkeys("abc", 1.0))
    plan = planned(workers, speeds)
    assert len(plan.shards) == 1
    assert "shares the memory of" in plan.reasons[0]
    three = planned(workers, speeds, wanted=3)
    assert len(three.shards) == 3
    tight = planned([replace(found, free_bytes=14 * GB) for found in workers], speeds, wanted=3)
    assert memory_shortage(tight, [replace(found, free_bytes=14 * GB) for found in workers]) is None


def test_a_worker_of_unknown_speed_is_used_only_where_the_memory_requires_it() -> None:
    workers, speeds = [worker("a", 20), worker("new", 20)], speeds_of({"a": 1})
    plan = planned(workers, speeds)
    assert (plan.strategy, plan.endpoints) == ("latency_aware", ("a:1",))
    assert plan.reasons[0].startswith("new is left out: not calibrated yet")
    tight = planned([worker("a", 8), worker("new", 20)], speeds)
    assert set(tight.endpoints) == {"a:1", "new:1"}
    assert tight.reasons[0].startswith("new takes part although it is not calibrated yet: ")
    assert tight.predicted_token_ms is None


def test_auto_goes_by_times_once_a_worker_is_calibrated() -> None:
    workers, known = [worker("a", 20), worker("b", 20)], speeds_of({"a": 1, "b": 1})
    assert plan_layers(TWELVE, workers).strategy == "memory_aware"
    wished = plan_layers(TWELVE, workers, strategy="latency_aware")
    assert (wished.strategy, wished.reasons[0][:39]) == ("memory_aware", "spread by free memory: a, b not calibra")
    partly = plan_layers(TWELVE, workers, speeds=speeds_of({"a": 1}))
    assert (partly.strategy, partly.endpoints) == ("latency_aware", ("a:1",))
    assert partly.reasons[0].startswith("b is left out: not calibrated yet")
    both = plan_layers(TWELVE, workers, speeds=speeds_of({"a": 1}), wanted=2)
    assert both.reasons[0].startswith("b takes part although it is not calibrated yet: 2 workers must take part")
    alone = plan_layers(TWELVE, [own(CPU, 20)])
    assert alone.reasons[0].startswith("spread by free memory: this machine not calibrated yet")
    measured = replace(known, hops_ms={})  # by answers, without a calibration
    assert plan_layers(TWELVE, workers, speeds=measured).strategy == "memory_aware"
    assert plan_layers(TWELVE, workers, speeds=known).strategy == "latency_aware"


def test_a_running_layout_is_kept_unless_another_is_clearly_faster() -> None:
    workers = [worker("a", 20), worker("b", 20)]
    current = planned(workers[:1], speeds_of({"a": 1}))
    slightly, clearly = (speeds_of({"a": 1, "b": 1 / factor}) for factor in (1 + KEEP / 2, 1 + 2 * KEEP))
    assert planned(workers, slightly).endpoints == ("b:1",)
    assert planned(workers, slightly, current=current).endpoints == ("a:1",)
    assert planned(workers, clearly, current=current).endpoints == ("b:1",)


def test_of_an_expert_model_the_bytes_that_a_token_reads_count_for_time_and_all_for_memory() -> None:
    experts = replace(TWELVE, layer_read_bytes=(GB // 8,) * 12)
    workers = [worker("a", 9, 3.0), worker("b", 20, 3.0)]
    speeds = speeds_of({"a": 1.0, "b": 1.5})
    assert len(planned(workers, speeds).shards) == 2
    plan = planned(workers, speeds, experts)
    assert plan.endpoints == ("b:1",), "a round trip costs more than a's speed saves"
    assert plan.predicted_token_ms == pytest.approx(3 + 1.5 * (12 / 8 + 1))
    assert plan.shards[0].weight_bytes == 13 * GB
