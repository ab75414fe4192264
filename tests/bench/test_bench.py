"""Benchmarks on real engines: turns, workers, what fails, what an interrupt keeps, and what is left behind."""

from __future__ import annotations

import _thread
import asyncio
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import psutil
import pytest

from sollol_nb import hybrid_router
from sollol_nb.bench.bench import bench
from sollol_nb.bench.result import BenchResult
from sollol_nb.errors import ConfigError, ModelNotFoundError, RequestTimeoutError, WorkersUnavailableError
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.events import Event
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import engine_on, engines_of, eventually, is_alive, run, unused_port, unused_ports

pytestmark = pytest.mark.engine

MODEL = "demo:sharded"
QUICK: dict[str, Any] = {"prompts": ["Hello!", "What is a worker?"], "repeat": 2, "max_tokens": 6}


@pytest.fixture(scope="module")
def three_workers(engine: Engine) -> Iterator[HybridRouter]:
    """A blocking router that knows three workers, and starts no more."""
    # With a larger context than the coordinators of other tests, which it would share.
    with HybridRouter(auto_discover_rpc=False, rpc_port=unused_ports(3), context_tokens=2560) as router:
        router.start_workers(3)
        yield router


@pytest.fixture
def idle(three_workers: HybridRouter) -> HybridRouter:
    """The same, without any coordinator."""
    three_workers.stop_coordinator()
    return three_workers


def turns(result: BenchResult) -> list[str]:
    """Cases in the order in which they were measured."""
    return [case for case, _ in groupby(row.case for row in sorted(result.rows, key=lambda row: row.start_s))]


def coordinators() -> list[psutil.Process]:
    return engines_of(psutil.Process(), "llama-server")


def test_cases_take_turns_side_by_side_where_workers_suffice(idle: HybridRouter) -> None:
    before = coordinators()
    result = idle.bench(MODEL, layouts=[1, 2], **QUICK)
    assert result.complete
    assert turns(result) == ["1 worker", "2 workers"] * 2
    frame = result.frame
    assert list(frame.groupby("case")["layers"].unique().map(list)) == [["13"], ["6/7"]]
    first, second = (set(" ".join(rows["workers"]).split()) for _, rows in frame.groupby("case"))
    assert (len(first), len(second), first & second) == (1, 2, set())
    assert any("had its own workers" in note for note in result.notes)
    for metric in ("ttft_ms", "total_ms", "prompt_tokens_per_s", "tokens_per_s", "router_overhead_ms"):
        assert (frame[metric] > 0).all(), metric
    assert frame["load_ms"].isna().all(), "loads are not measured"
    # Some of those before, which other tests have left, may have ended meanwhile.
    assert set(coordinators()) <= set(before), "what was started for it is ended"


def test_coordinators_take_turns_on_the_same_workers_where_these_are_few(idle: HybridRouter) -> None:
    result = idle.bench(MODEL, layouts=[2, 3], **QUICK)
    assert turns(result) == ["2 workers", "3 workers"] * 2
    frame = result.frame
    assert frame["load_ms"].isna().all(), "each turn begins with a load, before the measurement"
    two, three = (set(" ".join(rows["workers"]).split()) for _, rows in frame.groupby("case"))
    assert two < three
    assert any("took turns on the same workers" in note for note in result.notes)
    assert len(result.rows) == 2 * 2 * 2
    assert [worker.state for worker in idle.check_workers()] == ["free"] * 3


def test_turns_can_be_requested_and_refused(idle: HybridRouter) -> None:
    result = idle.bench(MODEL, layouts=[1, 2], reload=True, **QUICK)
    assert any("took turns on the same workers" in note for note in result.notes)
    with pytest.raises(ConfigError, match=r"loading all layouts at once needs 5 workers \(available: 3\)"):
        idle.bench(MODEL, layouts=[2, 3], reload=False, **QUICK)


def test_exact_counts_are_applied_as_written(idle: HybridRouter) -> None:
    result = idle.bench(MODEL, layouts=["5/4/4", "10/3"], **QUICK)
    layers = dict(zip(result.frame["case"], result.frame["layers"], strict=True))
    assert layers == {"layers 5/4/4": "5/4/4", "layers 10/3": "10/3"}
    assert turns(result) == ["layers 5/4/4", "layers 10/3"] * 2
    assert result.frame["load_ms"].isna().all()


def test_coordinators_take_turns_once_not_all_can_be_loaded(engine: Engine) -> None:
    with HybridRouter(auto_discover_rpc=False, rpc_port=unused_ports(3)) as router:
        endpoints = router.start_workers(3)
        third = engine_on(int(endpoints[2].rpartition(":")[2]))

        def kill_a_free_worker(event: Event) -> None:
            if event.kind == "request.finished" and is_alive(third):
                third.kill()

        router.events.subscribe(kill_a_free_worker)
        result = router.bench(MODEL, layouts=[1, 2], **QUICK)
    assert turns(result) == ["1 worker", "2 workers"] * 2
    assert set(result.frame["error"]) == {""}
    assert any("from then on they took turns" in note for note in result.notes)


def test_auto_is_the_router_itself_and_stays_loaded(idle: HybridRouter) -> None:
    idle.route_request(MODEL, "Hello!", max_tokens=1)
    (before,) = idle.coordinators
    result = idle.bench(MODEL, concurrency=[1, 2], **QUICK)
    assert idle.coordinators == [before]
    assert before.plan is not None
    assert set(result.frame["layers"]) == {"/".join(map(str, before.plan.unit_counts))}
    assert result.cases == ("1 client", "2 clients")
    logged = idle.latency.frame(model=MODEL, last=len(result.rows))
    assert set(logged["status"]) == {"ok"}, "requests of a benchmark are in the latency log"


def test_an_idle_coordinator_is_stopped_to_free_its_workers_and_loaded_again_after_the_benchmark(
    idle: HybridRouter,
) -> None:
    idle.route_request(MODEL, "Hello!", max_tokens=1)
    (before,) = idle.coordinators
    result = idle.bench(MODEL, layouts=3, **QUICK)
    note = f"stopped the idle coordinator of {MODEL} to free its workers; it is loaded again after the benchmark"
    assert note in result.notes
    assert not before.is_running()
    eventually(lambda: idle.coordinators, "it is loaded again")
    assert idle.route_request(MODEL, "Hello!", max_tokens=1).routing["load_ms"] is None


def test_a_benchmark_waits_for_a_model_that_is_being_loaded(
    idle: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers can be freed only then; the benchmark before it may have just begun the load."""
    idle.route_request(MODEL, "Hello!", max_tokens=1)
    until_ready = Coordinator.until_ready

    async def slow(coordinator: Coordinator, timeout_s: float) -> None:
        await until_ready(coordinator, timeout_s)
        if len(coordinator.rpc_backends) == 3:  # not those of the benchmarks
            await asyncio.sleep(2)

    monkeypatch.setattr(Coordinator, "until_ready", slow)
    idle.bench(MODEL, layouts=2, **QUICK)
    result = idle.bench(MODEL, layouts=[1, 2], **QUICK)
    assert result.complete
    assert set(result.frame["error"]) == {""}
    eventually(lambda: idle.coordinators, "it is loaded again")


def test_a_small_model_is_sharded_where_a_layout_says_so(idle: HybridRouter) -> None:
    result = idle.bench("demo", layouts=["local", 2], strategies=["even", "memory_aware"], **QUICK)
    backends = dict(zip(result.frame["case"], result.frame["backend"], strict=True))
    assert backends == {
        "local": "llama.cpp-local",
        "2 workers, even": "llama.cpp-distributed",
        "2 workers, memory_aware": "llama.cpp-distributed",
    }
    tokens = result.frame.groupby(["round", "prompt"])["completion_tokens"].nunique()
    assert (tokens == 1).all(), "all layouts are asked the same, and write the same"


def test_clients_send_requests_at_the_same_time(idle: HybridRouter) -> None:
    result = idle.bench(MODEL, layouts=1, concurrency=3, **QUICK)
    assert len(result.rows) == 2 * 3 * 2
    first = [row for row in result.rows if row.round == 0]
    begins = {client: min(row.start_s for row in first if row.client == client) for client in range(3)}
    ends = {
        client: max(row.start_s + (row.total_ms or 0) / 1e3 for row in first if row.client == client)
        for client in range(3)
    }
    assert max(begins.values()) < min(ends.values())
    assert result.summary().loc[(MODEL, "throughput_tokens_per_s"), "n"] == 2


def test_without_warmup_the_first_request_loads_and_does_not_count(idle: HybridRouter) -> None:
    result = idle.bench(MODEL, layouts=2, warmup=0, **QUICK)
    assert result.frame["load_ms"].notna().tolist() == [True, False, False, False]
    assert result.summary().loc[(MODEL, "throughput_tokens_per_s"), "n"] == 1


def test_what_cannot_be_loaded_is_left_out_and_the_rest_is_measured(idle: HybridRouter) -> None:
    known = idle.cluster().workers
    nobody = f"127.0.0.1:{unused_port()}"
    with HybridRouter(rpc_backends=[known[0].endpoint, nobody], auto_discover_rpc=False) as router:
        result = router.bench(MODEL, layouts=[1, 2], **QUICK)
    left_out = [row for row in result.rows if row.error]
    assert [row.case for row in left_out] == ["2 workers"]
    assert "needs 2 free workers (free now: 1)" in left_out[0].error
    assert len(result.rows) == 1 + 2 * 2
    assert any(note.startswith("2 workers: ") for note in result.notes)


@pytest.mark.parametrize(
    ("models", "settings", "error", "message"),
    [
        (MODEL, {"layouts": "5/4"}, ConfigError, r"places 9 units, but demo:sharded has 13"),
        (MODEL, {"layouts": 2, "strategies": "evne"}, ConfigError, "did you mean 'even'"),
        (MODEL, {"layouts": 4}, WorkersUnavailableError, "needs 4 workers but found only 3"),
        (MODEL, {"temprature": 0}, ConfigError, "did you mean temperature"),
        (MODEL, {"temprature": 0, "warmup": 0}, ConfigError, "did you mean temperature"),
        (MODEL, {"timeout": 1e-6}, RequestTimeoutError, "did not finish within"),
        ("nosuch", {}, ModelNotFoundError, "nosuch is not available"),
    ],
)
def test_what_cannot_be_measured_at_all_is_one_error(
    idle: HybridRouter, models: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = set(coordinators())
    with pytest.raises(error, match=message):
        idle.bench(models, **{**QUICK, **settings})
    eventually(
        lambda: {each.pid for each in {*coordinators()} - before} == {each.pid for each in idle.coordinators},
        "only what runs in the router is left",
    )


def test_an_interrupt_keeps_what_was_measured_and_ends_what_was_started(idle: HybridRouter) -> None:
    finished: list[Event] = []

    def interrupt_the_fifth(event: Event) -> None:
        finished.append(event)
        if [event.kind for event in finished].count("request.finished") == 5 and event.kind == "request.finished":
            _thread.interrupt_main()

    unsubscribe = idle.events.subscribe(interrupt_the_fifth)
    try:
        result = idle.bench(MODEL, layouts=2, **{**QUICK, "repeat": 500})
    finally:
        unsubscribe()
    assert not result.complete
    assert 0 < len(result.rows) < 1000
    assert "incomplete" in str(result)
    assert [worker.state for worker in idle.check_workers()] == ["free"] * 3
    assert idle.route_request(MODEL, "Hello!", max_tokens=2).text


def test_the_async_api_is_the_same(engine: Engine) -> None:
    async def measured() -> BenchResult:
        async with hybrid_router.HybridRouter(
            auto_discover_rpc=False, auto_setup_rpc=True, rpc_port=unused_ports(2)
        ) as router:
            return await bench(router, MODEL, layouts=[1, 2], **QUICK)

    result = run(measured())
    assert turns(result) == ["1 worker", "2 workers"] * 2
    assert len(set(" ".join(result.frame["workers"]).split())) == 2, "no more were started than the largest takes"
