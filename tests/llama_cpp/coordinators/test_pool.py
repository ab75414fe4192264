"""Coordinators over their life: one per model, warm across requests, lost without harm, ended to make room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb import hybrid_router
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import (
    AnswerInterruptedError,
    ConfigError,
    ModelDoesNotFitError,
    ModelFileError,
    SollolError,
    WorkersUnavailableError,
)
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.process import ExitReport
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.llama_cpp.workers.probe import test_rpc_backend
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import (
    QUESTION,
    MeteredWire,
    OtherProtocolWorker,
    all_end,
    engine_on,
    engines_of,
    eventually,
    is_alive,
    run,
    says,
    script,
    serving,
    unused_port,
    unused_ports,
)
from tests.support.gguf_files import cut, write_llama

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def breakable(engine: Engine) -> Iterator[HybridRouter]:
    """A router over three workers that only it uses, whose engines these tests kill; it starts missing ones."""
    # With a context too small for the other tests and more slots than theirs, it shares no coordinator with them.
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, context_tokens=1024, slots=6
    ) as mine:
        yield mine


LONG_QUESTION = "Tell me everything about sharding."
TWO_TOKENS: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
"""Greedy: from random weights, sampling may draw bytes that are not text, which llama-server fails to send."""


@pytest.fixture(scope="module")
def sharding(engine: Engine) -> Iterator[HybridRouter]:
    """A router that shards every model over three workers that only it uses, and starts no others."""
    with HybridRouter(auto_discover_rpc=False, distributed_threshold_params=1e-6, timeout=600, slots=5) as mine:
        mine.start_workers(3)
        yield mine


@pytest.fixture
def halting(engine: Engine, alone: None, patient: None) -> Iterator[Halting]:
    """A router whose next answer can be halted, over two workers that only it uses; it starts no others."""
    started = run(start_workers(engine, unused_ports(2), LocalOptions(2, threads=1, keep_alive_s=60.0), set()))
    ports = [parse_endpoint(endpoint)[1] for endpoint in started]
    wire = MeteredWire(ports[0])
    run(wire.__aenter__())
    endpoints = [wire.endpoint, f"127.0.0.1:{ports[1]}"]
    try:
        with HybridRouter(
            rpc_backends=endpoints,
            auto_discover_rpc=False,
            distributed_threshold_params=1e-6,
            layer_strategy="even",
            speculation="off",
        ) as mine:
            yield Halting(mine, wire, [process.pid for process in started.values()])
    finally:
        run(wire.__aexit__())
        for process in started.values():
            run(process.stop())


class Halting:
    """A router, and the wire to one of its workers.

    Attributes:
        workers: their processes.
    """

    def __init__(self, router: HybridRouter, wire: MeteredWire, pids: Sequence[int]) -> None:
        self.router = router
        self.workers = [psutil.Process(pid) for pid in pids]
        self._wire = wire

    def whole_then_halted(self, model: str, question: str, **options: Any) -> Completion:
        """The answer; until `go_on`, the next one gets no further than half of it, however quick the engine is."""
        self.go_on()
        self.router.preload(model)
        before = self._wire.passed_bytes
        whole = self.router.route_request(model, question, temperature=0, **options)
        run(self._wire.let_through_only((self._wire.passed_bytes - before) // 2))
        return whole

    def go_on(self) -> None:
        run(self._wire.let_through(2**40))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("models") / "small.gguf"))


def coordinator_of(router: HybridRouter) -> Coordinator:
    assert router.coordinator is not None
    return router.coordinator


def worker_states(router: HybridRouter) -> list[str]:
    return sorted(worker.state for worker in router.check_workers())


def kinds(router: HybridRouter) -> list[str]:
    return [event.kind for event in router.events.recent()]


@contextmanager
def messages_of(router: HybridRouter, kind: str) -> Iterator[list[str]]:
    """The messages of the events of a kind that are published meanwhile, however many were before."""
    seen: list[str] = []
    unsubscribe = router.events.subscribe(lambda event: seen.append(event.message) if event.kind == kind else None)
    try:
        yield seen
    finally:
        unsubscribe()


def new_engines(before: list[psutil.Process]) -> list[psutil.Process]:
    """The running engines of this process that are not among these; those of other tests may end at any moment."""
    return [engine for engine in engines_of(psutil.Process()) if engine not in before and is_alive(engine)]


def error_of(ask: Callable[[], Any], kind: type[SollolError]) -> str:
    """The line of the error that the request ends in."""
    with pytest.raises(kind) as caught:
        ask()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one for each model, kept warm ------------------------------------------------------------


def test_a_second_request_finds_the_model_loaded(router: HybridRouter) -> None:
    router.stop_coordinator("demo:sharded")
    first = router.route_request("demo:sharded", QUESTION, max_tokens=3)
    pid = coordinator_of(router).pid
    second = router.route_request("demo:sharded", QUESTION, max_tokens=3)

    assert first.routing["load_ms"] > 0
    assert second.routing["load_ms"] is None
    assert coordinator_of(router).pid == pid
    assert first.routing["coordinator_url"] == second.routing["coordinator_url"]


def test_requests_at_the_same_time_from_an_event_loop_start_one_coordinator(router: HybridRouter) -> None:
    router.stop_coordinator("demo:sharded")

    async def ask_all() -> list[Any]:
        ask = router._async.route_request
        return await asyncio.gather(*(ask("demo:sharded", QUESTION, max_tokens=3) for _ in range(4)))

    # A start is tried again where another process takes its port.
    with messages_of(router, "coordinator.ready") as ready:
        answers = asyncio.run(ask_all())

    assert len(ready) == 1, "the others wait for it"
    assert all(answer.routing["load_ms"] > 0 for answer in answers), "all waited for its start"
    assert len({answer.routing["coordinator_url"] for answer in answers}) == 1


def test_requests_at_the_same_time_from_threads_start_one_coordinator(router: HybridRouter) -> None:
    router.stop_coordinator("demo:sharded")
    together = threading.Barrier(4)

    def ask(_: int) -> str:
        together.wait()
        return router.route_request("demo:sharded", QUESTION, max_tokens=3, temperature=0).text

    with messages_of(router, "coordinator.ready") as ready, ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(ask, range(4)))) == 1
    assert len(ready) == 1, "the others wait for it"


WHOLE_ROUTER = """
from sollol_nb.sync_wrapper import HybridRouter
import sys
settings = {"num_rpc_backends": 2, "context_tokens": 1024, "layer_strategy": sys.argv[1]}
with HybridRouter(auto_setup_rpc=True, auto_discover_rpc=False, **settings) as router:
    answer = router.route_request("demo:sharded", "What is a worker?", temperature=0, max_tokens=40)
    print("pid", router.coordinator.pid, flush=True)
    print("url", answer.routing["coordinator_url"], flush=True)
    print("workers", *router.coordinator.rpc_backends, flush=True)
    devices = router.coordinator.placement.devices
    print("units", *(len(device.units) for device in devices if device.units), flush=True)
    print("text", answer.text.encode().hex(), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_with_other_settings_have_separate_workers_and_ports(
    router: HybridRouter, tmp_path: Path
) -> None:
    state = {"SOLLOL_STATE_DIR": str(tmp_path)}
    with script(WHOLE_ROUTER, "even", **state) as first, script(WHOLE_ROUTER, "memory_aware", **state) as second:
        pids = {says(process, "pid") for process in (first, second)}
        urls = {says(process, "url") for process in (first, second)}
        workers = [endpoint for process in (first, second) for endpoint in says(process, "workers").split()]
        units = [says(process, "units").split() for process in (first, second)]
        texts = [bytes.fromhex(says(process, "text")).decode() for process in (first, second)]
        processes = [engine for process in (first, second) for engine in engines_of(psutil.Process(process.pid))]
        first.communicate("\n")
        second.communicate("\n")

    assert len(pids) == len(urls) == 2
    assert len(set(workers)) == len(workers) == 4
    assert [sum(map(int, each)) for each in units] == [13, 13]
    assert len(processes) == 6
    ours = router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=40)
    assert texts == [ours.text] * 2
    all_end(processes)


def test_a_second_process_adopts_the_coordinator_of_the_first_and_the_last_one_ends_it(
    engine: Engine, tmp_path: Path
) -> None:
    state = {"SOLLOL_STATE_DIR": str(tmp_path)}
    with script(WHOLE_ROUTER, "even", **state) as first:
        pid, url, workers, units, text = (says(first, name) for name in ("pid", "url", "workers", "units", "text"))
        with script(WHOLE_ROUTER, "even", **state) as second:
            shown = [says(second, name) for name in ("pid", "url", "workers", "units", "text")]
            processes = engines_of(psutil.Process(first.pid))
            assert engines_of(psutil.Process(second.pid)) == [], "it started none"
            first.communicate("\n")
            assert len(processes) == 3
            assert all(map(is_alive, processes)), "the second process uses them"
            second.communicate("\n")
    assert shown == [pid, url, workers, units, text]
    all_end(processes)


def test_without_discovery_the_default_number_of_workers_is_set_up(engine: Engine) -> None:
    # With more slots than the coordinators of other tests, which it would share.
    with HybridRouter(auto_setup_rpc=True, auto_discover_rpc=False, slots=7) as mine:
        answer = mine.route_request("demo:sharded", QUESTION, max_tokens=1)
        assert len(answer.routing["plan"]["shards"]) == 3


# --- lost -------------------------------------------------------------------------------------


def test_a_connection_that_was_overlooked_once_is_not_a_lost_worker(
    breakable: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    coordinator, checks = coordinator_of(breakable), []

    def overlooked_once() -> list[str]:
        checks.append(Coordinator.broken_links(coordinator))
        return coordinator.rpc_backends if len(checks) == 1 else checks[-1]

    monkeypatch.setattr(coordinator, "broken_links", overlooked_once)
    eventually(lambda: len(checks) > 2, "it is checked again and again")
    assert coordinator.is_running()
    assert coordinator_of(breakable) is coordinator


@pytest.mark.usefixtures("patient_probes")
def test_a_coordinator_killed_while_idle_is_noticed_and_the_next_request_starts_another(
    breakable: HybridRouter,
) -> None:
    breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    lost = coordinator_of(breakable)
    psutil.Process(lost.pid).kill()

    eventually(lambda: breakable.coordinator is None, "the loss is noticed")
    assert breakable.coordinator_model is None
    eventually(lambda: worker_states(breakable) == ["free"] * 3, "its workers are free")
    assert "demo:sharded ended: signal 9" in [event.message for event in breakable.events.recent()]
    assert breakable.get_stats()["coordinator_uptime_seconds"] == 0

    answer = breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    assert answer.routing["load_ms"] > 0
    assert coordinator_of(breakable).pid != lost.pid
    assert worker_states(breakable) == ["held"] * 3


@pytest.mark.usefixtures("patient_probes")
def test_an_answer_continues_when_its_coordinator_is_killed(halting: Halting) -> None:
    router, whole = halting.router, halting.whole_then_halted("demo:sharded", LONG_QUESTION)
    killed = psutil.Process(coordinator_of(router).pid)

    chunks = []
    for position, chunk in enumerate(router.stream("demo:sharded", LONG_QUESTION, temperature=0)):
        chunks.append(chunk)
        if position == 3:
            killed.kill()
            halting.go_on()

    answer = Completion.from_chunks(chunks)
    assert (answer.text, answer["eval_count"], answer["done_reason"]) == (whole.text, whole["eval_count"], "stop")
    (failover,) = answer.routing["failovers"]
    assert failover["what"].startswith("the coordinator of demo:sharded ended (signal 9); log: ")
    assert failover["continued"]
    assert 3 <= failover["tokens_before"] < whole["eval_count"]
    assert failover["cost_ms"] > 0
    assert failover["lost_workers"] == []
    row = router.latency.frame(model="demo:sharded", last=1).iloc[0]
    assert (row.status, row.failovers, row.completion_tokens) == ("ok", 1, whole["eval_count"])


@pytest.mark.usefixtures("patient_probes")
def test_a_worker_killed_while_idle_is_noticed_and_replaced(breakable: HybridRouter) -> None:
    breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    before = coordinator_of(breakable)
    lost = before.rpc_backends[1]
    engine_on(int(lost.rpartition(":")[2])).kill()

    eventually(lambda: not before.is_running(), "the coordinator that has lost it is ended")
    events = [event.message for event in breakable.events.recent()]
    assert f"demo:sharded lost its connection to {lost}" in events

    again = breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    assert again.routing["load_ms"] > 0
    assert again.routing["failovers"] == []
    assert len(coordinator_of(breakable).rpc_backends) == 3
    assert worker_states(breakable).count("held") == 3


@pytest.mark.usefixtures("patient_probes")
def test_a_request_waits_for_the_end_of_a_coordinator_that_holds_workers(
    breakable: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    before = coordinator_of(breakable)
    stop = before.stop

    async def stop_late(**options: Any) -> ExitReport:
        await asyncio.sleep(1)
        return await stop(**options)

    monkeypatch.setattr(before, "stop", stop_late)
    engine_on(int(before.rpc_backends[1].rpartition(":")[2])).kill()
    eventually(lambda: breakable.coordinator is None, "it is being ended")

    answer = breakable.route_request("demo:sharded", QUESTION, max_tokens=3)
    assert answer.routing["failovers"] == [], "it was not adopted"
    assert len(coordinator_of(breakable).rpc_backends) == 3


def test_without_a_worker_left_the_answer_is_kept_and_resumed_later(halting: Halting) -> None:
    router, whole = halting.router, halting.whole_then_halted("demo:sharded", LONG_QUESTION)
    workers = coordinator_of(router).rpc_backends
    asked = router.stream("demo:sharded", LONG_QUESTION, temperature=0)
    chunks = [next(asked) for _ in range(5)]
    for process in halting.workers:
        process.kill()
    halting.go_on()

    with pytest.raises(AnswerInterruptedError) as caught:
        chunks += asked

    text = Completion.from_chunks(chunks).text
    assert text
    assert whole.text.startswith(text)
    assert caught.value.partial.text == text
    assert "no other coordinator could take over" in str(caught.value)
    assert "router.resume(error)" in str(caught.value)
    assert "\n" not in str(caught.value)
    row = router.latency.frame(model="demo:sharded", last=1).iloc[0]
    assert (row.status, row.partial_text) == ("error", text)

    for endpoint in workers:
        router.remove_worker(endpoint)
    router.start_workers(2)
    resumed = router.resume(caught.value)
    assert (resumed.text, resumed["eval_count"], resumed["done_reason"]) == (
        whole.text,
        whole["eval_count"],
        "stop",
    )
    with pytest.raises(ConfigError, match="takes an AnswerInterruptedError"):
        router.resume(ValueError())  # type: ignore[arg-type]


# --- making room ------------------------------------------------------------------------------


def test_an_idle_coordinator_makes_room_for_another_model(
    sharding: HybridRouter, endless: str, small: str
) -> None:
    sharding.stop_coordinator()
    sharding.route_request(endless, QUESTION, **TWO_TOKENS)
    before = coordinator_of(sharding)

    with messages_of(sharding, "coordinator.made_room") as messages:
        sharding.route_request(small, QUESTION, **TWO_TOKENS)

    assert not before.is_running()
    assert [coordinator.model for coordinator in sharding.coordinators] == ["small"]
    assert messages == ["stopped endless (idle) to make room for small"]


def test_a_busy_coordinator_is_not_stopped_to_make_room(halting: Halting, endless: str, small: str) -> None:
    router = halting.router
    halting.whole_then_halted(endless, QUESTION, max_tokens=100)
    chunks = router.stream(endless, QUESTION, temperature=0)
    next(chunks)
    busy = coordinator_of(router)

    message = error_of(lambda: router.route_request(small, QUESTION, **TWO_TOKENS), WorkersUnavailableError)

    assert message.startswith("small needs RPC workers, but none of 2 is free: ")
    assert message.count(": held by the coordinator of endless,") == 2
    assert busy.is_running()
    halting.go_on()
    assert next(chunks)["done"] is False, "its answer continues"
    chunks.close()
    assert router.route_request(small, QUESTION, **TWO_TOKENS)["eval_count"] == 2
    assert not busy.is_running()


def test_stopping_releases_the_workers_and_stopping_twice_is_fine(sharding: HybridRouter, small: str) -> None:
    sharding.route_request(small, QUESTION, **TWO_TOKENS)
    pid = coordinator_of(sharding).pid
    assert sharding.stop_coordinator("no such model") == []
    assert sharding.stop_coordinator(small) == ["small"]
    assert sharding.stop_coordinator(small) == []
    assert not psutil.pid_exists(pid)
    eventually(lambda: worker_states(sharding) == ["free"] * 3, "the workers notice that it has ended")


def test_a_stop_that_is_cancelled_releases_the_workers_all_the_same(sharding: HybridRouter, small: str) -> None:
    sharding.route_request(small, QUESTION, **TWO_TOKENS)
    pid = coordinator_of(sharding).pid

    async def cancelled() -> None:
        stopping = asyncio.create_task(sharding._async.stop_coordinator(small))
        await asyncio.sleep(0)  # it has begun
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping

    run(cancelled())
    eventually(lambda: not psutil.pid_exists(pid), "the engine has ended")
    eventually(lambda: worker_states(sharding) == ["free"] * 3, "the workers are free")


# --- what cannot start ------------------------------------------------------------------------


@pytest.mark.usefixtures("patient_probes")
def test_a_model_that_does_not_fit_is_refused_before_any_engine_starts(
    sharding: HybridRouter, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding.stop_coordinator()
    eventually(lambda: worker_states(sharding) == ["free"] * 3, "the workers notice that it has ended")
    tiny = property(lambda self: WorkerCapacity(self.endpoint, free_bytes=100_000, total_bytes=100_000))
    monkeypatch.setattr(WorkerStatus, "capacity", tiny)

    with messages_of(sharding, "coordinator.starting") as starts:
        message = error_of(lambda: sharding.route_request(small, QUESTION), ModelDoesNotFitError)

    assert "layers do not fit" in message
    assert starts == []
    assert worker_states(sharding) == ["free"] * 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cut.gguf"),
        ("missing", "missing.gguf does not exist; give the path of a GGUF file"),
        ("text", "text.gguf"),
    ],
)
def test_a_damaged_model_file_is_reported_before_any_engine_starts(
    engine: Engine, tmp_path: Path, damage: str, message: str
) -> None:
    path = tmp_path / f"{damage}.gguf"
    if damage == "cut":
        cut(write_llama(path), missing_bytes=5000)
    elif damage == "text":
        path.write_text("This is not a model.\n" * 100)
    before = engines_of(psutil.Process())
    with HybridRouter(gguf_path=path, auto_setup_rpc=True, auto_discover_rpc=False) as mine:
        assert message in error_of(lambda: mine.route_request("llama3.1:70b", QUESTION), ModelFileError)
        assert kinds(mine) == ["request.started", "request.finished"]
    assert new_engines(before) == []


def test_a_worker_of_another_protocol_is_not_used_and_is_named(engine: Engine) -> None:
    with serving(OtherProtocolWorker) as newer, HybridRouter(auto_discover_rpc=False) as mine:
        mine.add_worker(f"127.0.0.1:{newer}")
        message = error_of(lambda: mine.route_request("demo:sharded", QUESTION), WorkersUnavailableError)
        assert (
            f"127.0.0.1:{newer} speaks RPC protocol 8.0.0 of a newer llama.cpp, but llama.cpp {engine.version} "
            "here speaks 7.0; run `sollol-nb install` there, or use one llama.cpp build everywhere"
        ) in message

        (usable,) = mine.start_workers(1)
        answer = mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert [shard["endpoint"] for shard in answer.routing["plan"]["shards"]] == [usable]


def test_without_workers_the_error_says_how_to_get_some(engine: Engine) -> None:
    with HybridRouter(auto_discover_rpc=False) as mine:
        message = error_of(lambda: mine.route_request("demo:sharded", QUESTION), WorkersUnavailableError)
    assert message.startswith("demo:sharded needs RPC workers, but none is known; start workers here with")
    with HybridRouter(auto_discover_rpc=False, rpc_backends=[f"127.0.0.1:{unused_port()}"]) as mine:
        message = error_of(lambda: mine.route_request("demo:sharded", QUESTION), WorkersUnavailableError)
    assert "none of 1 is free: nothing listens on 127.0.0.1:" in message


def test_a_worker_that_hangs_at_the_start_costs_the_coordinator_timeout_and_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker falls silent between the probe of it and the start."""
    with HybridRouter(auto_discover_rpc=False, coordinator_timeout=1.0) as mine:
        (endpoint,) = mine.start_workers(1)
        worker = engine_on(int(endpoint.rpartition(":")[2]))
        before = engines_of(psutil.Process())

        def hangs(event: Any) -> None:
            if event.kind == "coordinator.starting":
                worker.suspend()

        stop_hanging = mine.events.subscribe(hangs)
        message = error_of(lambda: mine.route_request("demo:sharded", QUESTION), WorkersUnavailableError)
        stop_hanging()

        assert "was not ready within 1 s; pass a larger coordinator_timeout" in message
        assert f"none of 1 is free: {endpoint}" in message
        assert kinds(mine)[-2:] == ["coordinator.failed", "request.finished"]
        assert new_engines(before) == []
        row = mine.latency.frame(model="demo:sharded", last=1).iloc[0]
        assert row.status == "error"
        worker.resume()
        eventually(lambda: worker_states(mine) == ["free"], "the worker is free again")


def test_a_request_cancelled_while_its_coordinator_starts_leaves_no_engine_and_free_workers(
    engine: Engine,
) -> None:
    async def cancelled(mine: hybrid_router.HybridRouter) -> None:
        starting = asyncio.Event()
        loop = asyncio.get_running_loop()

        def note(event: Any) -> None:
            if event.kind == "coordinator.starting":
                loop.call_soon_threadsafe(starting.set)

        mine.events.subscribe(note)
        asking = asyncio.create_task(mine.route_request("demo:sharded", QUESTION))
        await starting.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with HybridRouter(auto_discover_rpc=False) as mine:
        mine.start_workers(2)
        before = engines_of(psutil.Process())
        asyncio.run(cancelled(mine._async))
        assert mine.coordinators == []
        all_end(new_engines(before))
        eventually(lambda: worker_states(mine) == ["free"] * 2, "the workers are free")
        assert mine.latency.frame(model="demo:sharded", last=1).status[0] == "cancelled"


# --- a second router in the same process ------------------------------------------------------


@pytest.fixture
def running(engine: Engine, alone: None) -> Iterator[HybridRouter]:
    """A router that runs the demo model over the only three workers, which nobody else uses."""
    with HybridRouter(context_tokens=1024) as mine:
        mine.start_workers(3)
        mine.route_request("demo:sharded", QUESTION, **TWO_TOKENS)
        yield mine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"num_rpc_backends": 3}, ""),
        ({"num_rpc_backends": 2}, "so the running coordinator is used: it has 3 workers instead of 2"),
        ({"layer_strategy": "even"}, "it has layer strategy memory_aware instead of even"),
        ({"layer_strategy": "memory_aware"}, ""),  # what auto, the default, has chosen
        ({"slots": 9, "num_rpc_backends": 6}, "it has 4 slots instead of 9, 3 workers instead of 6"),
        ({"context_tokens": 512}, ""),
    ],
)  # fmt: skip
def test_a_running_coordinator_is_used_and_the_route_says_where_it_is_not_as_asked(
    running: HybridRouter, settings: dict[str, Any], said: str
) -> None:
    with HybridRouter(**{"context_tokens": 1024, **settings}) as second:
        answer = second.route_request("demo:sharded", QUESTION, **TWO_TOKENS)
        assert answer.routing["coordinator_url"] == coordinator_of(running).base_url
        assert answer.routing["reason"].endswith(said)
        assert ("instead of" in answer.routing["reason"]) == bool(said)
    assert coordinator_of(running).is_running()


def test_a_coordinator_with_too_small_a_context_is_not_used_and_makes_room(running: HybridRouter) -> None:
    before = coordinator_of(running)
    with HybridRouter(context_tokens=1536) as second:
        second.route_request("demo:sharded", QUESTION, **TWO_TOKENS)
        assert coordinator_of(second).settings.context_tokens == 1536
        eventually(lambda: not before.is_running(), "the other router notices its end")
        messages = [event.message for event in second.events.recent() if event.kind == "coordinator.made_room"]
        assert messages == ["stopped demo:sharded, which is idle in another router, to make room for demo:sharded"]


def test_a_worker_that_an_own_coordinator_holds_is_available(running: HybridRouter) -> None:
    host, _, port = coordinator_of(running).rpc_backends[0].rpartition(":")
    assert test_rpc_backend(host, int(port))
    assert not test_rpc_backend("127.0.0.1", unused_port())
