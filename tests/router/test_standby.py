"""The warm standby, on real engines: it takes over at once, is replaced, and gives way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.llama_cpp.coordinators import standby as standby_module
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import ExitReport
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import running_engines, stop_engines
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import Event
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import HANG_GUARD_S, eventually, posix_only, read_and_do, write_endless
from tests.support.mid_answer import read_and_kill, wired_workers
from tests.support.moved_answers import read_and_move

pytestmark = [pytest.mark.engine, posix_only]

MODEL, QUESTION = "demo:sharded", "Tell me everything about sharding."
STRIKE_AT = 4  # early in the answer, which is long
Make = Callable[..., HybridRouter]


@pytest.fixture
def make(alone: None) -> Iterator[Make]:
    """Makes routers that keep standbys, over this test's own workers."""
    with ExitStack() as routers:

        def router(*, workers: int = 0, **settings: object) -> HybridRouter:
            usual = {
                "auto_discover_rpc": None,
                "num_rpc_backends": 2,
                "rpc_port": 52300,
                "coordinator_port": 18300,
            }
            made = routers.enter_context(HybridRouter(**{**usual, "standby": True, **settings}))
            if workers:
                made.start_workers(workers)
            return made

        yield router
    run_blocking(stop_engines(also_used=True))


@pytest.fixture
def wired(engine: Engine) -> Iterator[dict[str, psutil.Process]]:
    """Four workers that no router owns, by their endpoints; while an answer is read late, they wait."""
    with wired_workers(engine, 4) as workers:
        yield workers


def ask(
    router: HybridRouter, strike: Callable[[], object] = lambda: None, **options: object
) -> tuple[str, dict[str, Any]]:
    """The answer to `QUESTION`, with a strike in the middle of it. Returns text and last chunk."""
    stream = router.stream_async(MODEL, QUESTION, temperature=0, **options)
    return whole(read_and_do(stream, STRIKE_AT, lambda _: strike()))


def ask_and_kill(router: HybridRouter, coordinator: Entry, **options: object) -> tuple[str, dict[str, Any]]:
    """The same, whose coordinator is killed in the middle of it."""
    stream = router.stream_async(MODEL, QUESTION, temperature=0, **options)
    return whole(read_and_kill(stream, STRIKE_AT, lambda: kill(coordinator.pid)))


def whole(chunks: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Text and last chunk of an answer."""
    return "".join(chunk["message"]["content"] for chunk in chunks), chunks[-1]


def known_entry(url: str) -> Entry | None:
    return next((entry for entry in registry.entries(registry.COORDINATOR) if entry.about["url"] == url), None)


def entry_of(url: str) -> Entry:
    found = known_entry(url)
    assert found is not None
    return found


def standby_of(router: HybridRouter) -> CoordinatorStatus | None:
    return next((each for each in router.status().coordinators if each.standby == "ready"), None)


def ready_standby(router: HybridRouter) -> Entry:
    """The registry entry of the standby, once there is one that is ready."""

    def known() -> Entry | None:  # it may be ended after it was seen
        found = standby_of(router)
        return None if found is None else known_entry(found.url)

    found = eventually(known, "there is a standby")
    assert found is not None
    return found


def main_of(router: HybridRouter) -> Entry:
    assert router.coordinator is not None
    return entry_of(router.coordinator.base_url)


def main_id(router: HybridRouter) -> str | None:
    """The id of its coordinator's entry; None while there is none, as between two coordinators."""
    coordinator = router.coordinator
    found = None if coordinator is None else known_entry(coordinator.base_url)
    return None if found is None else found.id


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_worker(endpoint: str) -> None:
    (worker,) = [entry for entry in registry.entries(registry.WORKER) if entry.name == endpoint]
    kill(worker.pid)


def other_connections(router: HybridRouter) -> int:
    """How many this process has to the coordinator, except that of the router's table."""
    assert router.coordinator is not None
    return int(run_blocking(router.coordinator._process.status())["clients"])


def kinds(router: HybridRouter) -> list[str]:
    return [str(event.kind) for event in router.events.recent()]


def messages(router: HybridRouter, kind: str) -> list[str]:
    return [event.message for event in router.events.recent() if event.kind == kind]


@pytest.mark.parametrize("victim", ["worker", "coordinator"])
@pytest.mark.usefixtures("patient_probes")
def test_a_death_costs_a_switch_and_a_new_standby_is_started_from_what_is_left(
    wired: dict[str, psutil.Process], make: Make, victim: str
) -> None:
    router = make(rpc_backends=[*wired])
    undisturbed, _ = ask(router)
    before, standby = main_of(router), ready_standby(router)
    assert not set(before.workers) & set(standby.workers)
    assert standby.standby_of == before.id

    def strike() -> None:
        if victim == "worker":
            wired[before.workers[0]].kill()
        else:
            kill(before.pid)

    text, last = ask(router, strike)

    assert text == undisturbed
    (failover,) = last["_routing"]["failovers"]
    assert failover["lost_workers"] == (before.workers[:1] if victim == "worker" else [])
    assert main_of(router).id == standby.id
    assert not registry.find(standby.id).standby_of, "it is the coordinator now"
    assert kinds(router).count("coordinator.starting") == 1
    assert kinds(router).count("standby.taken") == 1
    following = ready_standby(router)
    assert following.standby_of == standby.id
    assert set(following.workers) <= set(before.workers)
    assert ask(router)[0] == undisturbed


def test_a_silent_worker_costs_a_switch(wired: dict[str, psutil.Process], make: Make) -> None:
    router = make(rpc_backends=[*wired])
    undisturbed, _ = ask(router)
    before = main_of(router)
    ready_standby(router)
    worker = wired[before.workers[0]]

    text, last = ask(router, worker.suspend, recovery="exact")

    worker.kill()
    assert text == undisturbed
    assert len(last["_routing"]["failovers"]) == 1
    assert kinds(router).count("standby.taken") == 1


def test_a_worker_that_dies_while_nobody_asks_costs_a_switch(make: Make) -> None:
    router = make(workers=4)
    undisturbed, _ = ask(router)
    standby = ready_standby(router)
    kill_worker(main_of(router).workers[0])
    eventually(lambda: "standby.taken" in kinds(router), "it takes over")
    assert main_of(router).id == standby.id
    assert ask(router)[0] == undisturbed


def test_it_also_takes_over_for_a_request_that_comes_while_the_other_one_is_being_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = make(workers=4)
    undisturbed, _ = ask(router)
    standby, before = ready_standby(router), router.coordinator
    assert before is not None
    stop, asked = before.stop, asyncio.Event()

    async def stop_late(**options: Any) -> ExitReport:
        await asyncio.wait_for(asked.wait(), HANG_GUARD_S)
        await asyncio.sleep(1)
        return await stop(**options)

    monkeypatch.setattr(before, "stop", stop_late)
    kill_worker(before.rpc_backends[0])
    eventually(lambda: router.coordinator is None, "it is being ended")
    router.events.subscribe(lambda event: asked.set() if event.kind == "request.started" else None)

    assert ask(router)[0] == undisturbed
    assert main_of(router).id == standby.id
    assert kinds(router).count("standby.taken") == 1
    assert other_connections(router) == 0, "nor was it adopted"


def test_what_has_taken_over_is_no_standby_before_lost_workers_are_looked_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another start ends it, which lacks the same worker."""
    router = make(workers=4)
    ask(router)
    standby, seen, find_lost = ready_standby(router), [], Workers.find_lost

    async def look(workers: Workers, endpoints: list[str]) -> frozenset[str]:
        seen.append(registry.find(standby.id).standby_of)
        return await find_lost(workers, endpoints)

    monkeypatch.setattr(Workers, "find_lost", look)
    kill(main_of(router).pid)
    eventually(lambda: seen, "lost workers are looked for")
    assert seen[0] == ""


@pytest.mark.parametrize("by_speed", [False, True])
def test_a_start_adopts_the_standby_of_what_was_ended_unless_it_is_for_a_faster_layout(
    make: Make, by_speed: bool
) -> None:
    router = make(workers=4)
    undisturbed, _ = ask(router)
    standby, pool = ready_standby(router), router._async._engines._coordinators
    main = router.coordinator
    assert main is not None

    async def start_again() -> None:
        route = pool.route_of(main)
        async with next(iter(pool._starting.values())):
            await pool._running.end(main)
            await pool._start(route, frozenset(), by_speed=by_speed)

    run_blocking(start_again())

    following = ready_standby(router)
    assert (main_of(router).id == standby.id) != by_speed
    assert (following.id == standby.id) == by_speed
    eventually(lambda: ready_standby(router).standby_of == main_id(router), "it belongs to what runs now")
    assert main_of(router).standby_of == ""
    assert other_connections(router) == 0
    assert ask(router)[0] == undisturbed


def test_a_standby_that_dies_is_replaced(make: Make) -> None:
    router = make(workers=4)
    ask(router)
    standby = ready_standby(router)
    kill_worker(standby.workers[0])
    eventually(lambda: "standby.ended" in kinds(router), "its end is noticed")
    following = ready_standby(router)
    assert following.id != standby.id
    assert following.workers == standby.workers[1:]
    assert kinds(router).count("standby.missing") == 0


def test_a_standby_ends_where_another_model_needs_its_workers(make: Make, tmp_path: Path) -> None:
    router = make(workers=4)
    ask(router)
    main, standby = main_of(router), ready_standby(router)
    other = write_endless(tmp_path)

    router.route_request(str(other), "Hello", max_tokens=4, backend="sharded")

    assert registry.find(standby.id) is None
    assert registry.find(main.id) is not None, "the other coordinator stays"
    assert set(router.coordinator.rpc_backends) == set(standby.workers)
    (ended,) = messages(router, "standby.ended")
    assert f"making room for {other.stem}" in ended
    assert kinds(router).count("standby.starting") == 1
    assert kinds(router).count("coordinator.made_room") == 0


def test_without_spare_workers_it_is_said_once_and_tried_when_one_comes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby_module, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(standby_module, "SELDOM_S", 0.05)
    router = make(workers=2)
    probes: list[Event] = []
    ask(router)
    eventually(lambda: messages(router, "standby.missing"), "it is said")
    router.events.subscribe(lambda event: probes.append(event) if event.kind == "probe.done" else None)
    ask(router)
    (said,) = messages(router, "standby.missing")
    assert "none of 2 is free" in said
    assert said.split(": ", 1)[1] in str(router.status()).partition("\nlast events\n")[0]
    assert "no standby of demo:sharded is possible" in router.standby_of(MODEL)
    assert kinds(router).count("standby.starting") == 0

    router.start_workers(2)
    ready_standby(router)
    assert kinds(router).count("standby.missing") == 1
    assert "is ready" in router.standby_of(MODEL)


def test_a_model_that_starts_again_without_drafts_gets_a_standby_without_them(make: Make) -> None:
    """A deterministic answer needs that, also on the standby."""
    router = make(workers=4, speculation="ngram")
    undisturbed, _ = ask(router)
    assert ready_standby(router).about["speculation"]["kind"] == "ngram"
    ask(router, deterministic=True)
    eventually(lambda: ready_standby(router).about["speculation"]["kind"] == "off", "another one is ready")
    text, last = ask_and_kill(router, main_of(router), deterministic=True)
    assert text == undisturbed
    assert last["_routing"]["failovers"][0]["recovery"] == "exact"
    assert kinds(router).count("standby.taken") == 1


def test_an_answer_goes_on_with_the_new_layout_of_its_model_and_not_on_the_standby(make: Make) -> None:
    router = make(workers=4)
    undisturbed, _ = ask(router)
    before, standby = main_of(router), ready_standby(router)
    first, second = before.workers

    text, last = whole(read_and_move(router, MODEL, QUESTION, STRIKE_AT, {first: 1, second: 12}))

    assert text == undisturbed
    assert last["_routing"]["layout"] == "1/12"
    assert "standby.taken" not in kinds(router)
    following = ready_standby(router)
    assert (following.id, following.standby_of) == (standby.id, main_of(router).id)
    assert len(registry.entries(registry.COORDINATOR)) == 2


def test_the_next_kernel_adopts_both(make: Make) -> None:
    first = make(workers=4)
    ask(first)
    main, standby = main_of(first), ready_standby(first)
    first.close(keep=True)

    second = make()
    ask(second)
    assert main_of(second).id == main.id
    assert ready_standby(second).id == standby.id
    assert kinds(second).count("standby.starting") == 0
    kill(main.pid)
    ask(second)
    assert main_of(second).id == standby.id


def test_two_kernels_have_one_standby_and_both_go_on_with_it(make: Make) -> None:
    """Also the one that keeps no standbys."""
    keeps, shares = make(workers=4), make(standby=False)
    undisturbed, _ = ask(keeps)
    main, standby = main_of(keeps), ready_standby(keeps)
    assert ask(shares)[0] == undisturbed
    assert main_of(shares).id == main.id, "it does not take the standby"

    text, _ = ask_and_kill(shares, main)

    assert text == undisturbed
    eventually(lambda: main_id(keeps) == main_id(shares) == standby.id, "both use it")


def test_the_setting_off_ends_it_and_its_cost_is_said_before(make: Make) -> None:
    router = make(workers=4, standby=False)
    ask(router)
    assert standby_of(router) is None
    assert router.standby_of(MODEL, even_if_off=False) == ""
    foreseen = router.standby_of(MODEL)
    (cost,) = router.use_standbys(True)
    assert cost.startswith("a standby of demo:sharded would take ")
    assert cost == foreseen
    assert cost == router.standby_of(MODEL) or "is ready" in router.standby_of(MODEL)
    assert "a standby of demo:sharded " in router.standby_of(MODEL, even_if_off=False)
    standby = ready_standby(router)
    assert all(endpoint in cost for endpoint in standby.workers)
    (started,) = messages(router, "standby.starting")
    assert cost.split("would take ")[1] in started

    assert router.use_standbys(False) == []
    assert registry.find(standby.id) is None
    assert not psutil.pid_exists(standby.pid)


def test_it_ends_with_its_coordinator_and_is_shown_until_then(make: Make) -> None:
    router = make(workers=4)
    ask(router)
    standby = ready_standby(router)
    main = next(each for each in router.status().coordinators if not each.standby)
    assert "a standby is ready" in main.note
    shown = standby_of(router)
    assert shown is not None
    assert (shown.running, shown.slots, shown.note.split("; ")[-1]) == (0, 0, "standby, ready")
    (engine,) = [engine for engine in run_blocking(running_engines()) if engine.id == standby.id]
    assert engine.state == "standby, ready"
    data = run_blocking(router.state.current())
    assert data["coordinators"][standby.about["url"]]["standby"] == "ready"
    router.stop_coordinator(MODEL)
    assert [entry.id for entry in registry.entries(registry.COORDINATOR)] == []


def test_it_lives_as_long_as_its_coordinator(make: Make) -> None:
    router = make(workers=4, keep_alive=3)
    ask(router, keep_alive=600)  # a standby is not ready within 3 s on a busy machine
    standby, began = ready_standby(router), time.monotonic()
    while time.monotonic() - began < 2 * 3:  # longer than its own keep_alive
        ask(router, keep_alive=3)
    assert registry.find(standby.id) is not None
    eventually(lambda: not registry.entries(registry.COORDINATOR), "both end")
    assert kinds(router).count("standby.taken") == 0
