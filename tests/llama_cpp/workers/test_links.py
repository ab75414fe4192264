"""Links as routers use them: shared, lost, found again, stopped. The links are real ones, to IPv6 addresses."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import as_table, end_engines, engine_log, running_engines, stop_engines
from sollol_nb.llama_cpp.workers.link_states import unique_names
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, eventually, eventually_async, run, says, script, suspended
from tests.support.far_workers import FarWorker, far_workers

pytestmark = pytest.mark.engine

ABOUT_MACHINES = (
    EventKind.LINK_READY,
    EventKind.LINK_LOST,
    EventKind.LINK_STOPPED,
    EventKind.WORKER_LOST,
    EventKind.WORKER_RETURNED,
)
LONG: dict[str, Any] = {
    "backend": "llama.cpp-distributed",
    "temperature": 0,
    "max_tokens": 400,
    "recovery": "exact",
}
"""An answer that has not ended when its first words are read."""
OTHER_KERNEL = """
import sys
from sollol_nb.sync_wrapper import HybridRouter
router = HybridRouter(rpc_backends=[sys.argv[1]])
for command in sys.stdin:
    if command == "look\\n":
        (worker,) = router.check_workers()
    else:
        (worker,) = router.add_workers([sys.argv[1]])
    print("seen", worker.state, worker.detail, flush=True)
"""


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without any engine."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def two(engine: Engine) -> Iterator[list[FarWorker]]:
    with far_workers(engine, 2) as workers:
        yield workers


@pytest.fixture
def far(two: list[FarWorker]) -> FarWorker:
    return two[0]


def only(router: HybridRouter) -> WorkerStatus:
    (worker,) = router.check_workers()
    return worker


def the_link() -> Entry:
    (entry,) = registry.entries(registry.LINK)
    return entry


def the_engine(router: HybridRouter) -> psutil.Process:
    """Of the coordinator that answers."""
    assert router.coordinator is not None
    return psutil.Process(router.coordinator.pid)


def leases(entry: Entry) -> int | None:
    (engine,) = [engine for engine in run(running_engines()) if engine.id == entry.id]
    return engine.leases


def about_machines(router: HybridRouter) -> list[EventKind]:
    return [event.kind for event in router.events.recent() if event.kind in ABOUT_MACHINES]


def test_a_router_that_only_looks_at_a_link_neither_holds_nor_ends_it(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as looking:
        assert (only(looking).state, registry.entries(registry.LINK)) == ("unknown", []), "looking starts none"
        assert only(looking).detail == "not connected; the next request connects to it"
    with HybridRouter(rpc_backends=[far.target]) as using:
        (worker,) = using.add_workers([far.target])
        assert (worker.state, worker.name, worker.target) == ("free", far.target, far.target)
        using.close(keep=True)
    link = the_link()
    with HybridRouter(rpc_backends=[far.target]) as looking:
        assert only(looking).state == "free", "it lives for its keep_alive"
        assert leases(link) == 0
    assert the_link() == link
    with HybridRouter(rpc_backends=[far.target]) as using:
        using.add_worker(far.target)
        assert (the_link().id, leases(link)) == (link.id, 1), "it is shared"
    assert registry.entries(registry.LINK) == []


def test_a_router_of_the_same_process_keeps_the_link_that_both_use(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        mine.add_worker(far.target)
        sibling = mine.sibling()
        assert sibling.worker_targets == [far.target]
        sibling.add_worker(far.target)
        assert leases(the_link()) == 2
        sibling.close()
        assert leases(the_link()) == 1
        assert only(mine).state == "free"


def test_two_kernels_share_a_link_and_both_see_why_it_ended(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine, script(OTHER_KERNEL, far.target) as kernel:
        assert kernel.stdin is not None

        def seen(command: str) -> str:
            print(command, file=kernel.stdin, flush=True)
            return says(kernel, "seen ")

        mine.add_worker(far.target)
        assert seen("look") == "free free"
        assert leases(the_link()) == 1
        assert seen("add") == "free free"
        assert leases(the_link()) == 2
        os.kill(the_link().pid, signal.SIGKILL)
        eventually(lambda: not registry.entries(registry.LINK), "it has ended")
        eventually(lambda: only(mine).state == "lost", "the loss is noticed")
        assert about_machines(mine) == [EventKind.LINK_READY, EventKind.LINK_LOST, EventKind.WORKER_LOST]
        why = only(mine).detail
        assert why.startswith(f"the link to {far.target} ended (")
        assert seen("look") == f"lost {why}"
        with HybridRouter(rpc_backends=[far.target]) as third:
            assert (only(third).state, only(third).detail) == ("down", why), "the reason outlives the link"
        assert seen("add") == "free free", "it is tried again on request"
        assert len(registry.entries(registry.LINK)) == 1
        eventually(lambda: only(mine).state == "free", "it is shared again")
        assert about_machines(mine)[3:] == [EventKind.LINK_READY]


def test_a_lost_worker_is_reported_once_and_comes_back_at_its_endpoint(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        mine.add_worker(far.target)
        endpoint = only(mine).endpoint
        far.cut()
        try:
            eventually(lambda: only(mine).state == "lost", "the loss is noticed")
            lost = only(mine)
            assert (lost.endpoint, lost.name) == (endpoint, far.target)
            assert "nothing listens on" in lost.detail
            assert sorted(about_machines(mine)[1:]) == [EventKind.LINK_LOST, EventKind.WORKER_LOST]
            messages = [event.message for event in mine.events.recent() if event.kind in ABOUT_MACHINES[1:]]
            assert not any(endpoint in message for message in messages), "people know it by its name"
        finally:
            far.connect()
        eventually(lambda: only(mine).state == "free", "it is back")
        assert only(mine).endpoint == endpoint
        only(mine)
        assert sorted(about_machines(mine)[3:]) == [EventKind.LINK_READY, EventKind.WORKER_RETURNED]


def test_a_link_that_somebody_has_stopped_is_started_again_only_by_a_request(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        mine.add_worker(far.target)
        (stopped,) = run(stop_engines([far.target]))
        assert (stopped.kind, stopped.name) == ("link", far.target)
        eventually(lambda: only(mine).state == "unknown", "the end is noticed")
        mine.cluster()
        assert registry.entries(registry.LINK) == []
        assert about_machines(mine) == [EventKind.LINK_READY, EventKind.LINK_STOPPED]
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"]
        assert only(mine).state == "held"

        (coordinator, link) = mine.stop_workers([far.target])
        assert (coordinator.kind, link.kind, link.users) == ("coordinator", "link", ())
        assert only(mine).state == "unknown"
        mine.remove_worker(far.target)
        assert mine.check_workers() == []


def test_an_entry_that_was_read_just_before_the_end_of_its_link_does_not_bring_it_back(
    far: FarWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        mine.add_worker(far.target)
        before = registry.entries()
        process = mine._async._engines._workers.links._links[far.target].process
        assert process is not None
        run(stop_engines([far.target]))
        run(process.wait())
        with monkeypatch.context() as patch:
            patch.setattr(registry, "entries", lambda kind=None: before)
            assert only(mine).state == "unknown"
        assert about_machines(mine) == [EventKind.LINK_READY, EventKind.LINK_STOPPED]


def test_a_target_that_is_removed_while_its_link_is_adopted_is_not_held(
    far: FarWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HybridRouter(rpc_backends=[far.target]) as first, HybridRouter(rpc_backends=[far.target]) as second:
        first.add_worker(far.target)
        adopt = EngineProcess.adopt

        async def adopt_late(entry: Entry) -> EngineProcess | None:
            process = await adopt(entry)
            await second._async.remove_worker(far.target)
            return process

        with monkeypatch.context() as patch:
            patch.setattr(EngineProcess, "adopt", adopt_late)
            assert second.add_workers([far.target]) == []
        assert second.check_workers() == []
        assert leases(the_link()) == 1


def test_a_model_on_this_machine_starts_while_another_machine_is_being_connected(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "ssh"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setenv("SOLLOL_SSH", str(silent))
    with HybridRouter(rpc_backends=["ssh://gpu1"], auto_discover_rpc=False) as mine:

        async def ask() -> None:
            connecting = asyncio.Event()
            mine.events.subscribe(
                lambda event: connecting.set() if event.kind is EventKind.LINK_CONNECTING else None
            )
            sharded = asyncio.create_task(mine._async.route_request("demo:sharded", QUESTION, max_tokens=2))
            await connecting.wait()
            local = await mine._async.route_request("demo", QUESTION, backend="local", max_tokens=2)
            assert local["done"]
            assert not sharded.done()
            sharded.cancel()
            await asyncio.gather(sharded, return_exceptions=True)

        run(ask())


def test_a_link_in_use_is_listed_and_its_log_can_be_read(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        coordinator, link = run(running_engines())
        assert coordinator.worker_names == (far.target,)
        assert (link.name, link.state, link.workers) == (far.target, "in use", coordinator.workers)
        table = as_table([coordinator, link])
        assert f"on {far.target}" in table
        assert f"ready: {far.target} is reached through {link.workers[0]}" in table
        assert "ready: " in engine_log(far.target)
        mine.close(keep=True)
    assert run(running_engines())[1].leases == 1, "its coordinator holds it"
    run(end_engines(force=True))


def test_an_answer_continues_without_the_machine_that_was_cut(two: list[FarWorker], endless: str) -> None:
    targets = [far.target for far in two]
    with HybridRouter(rpc_backends=targets) as mine:
        undisturbed = mine.route_request(endless, QUESTION, **LONG)
        assert len(undisturbed["_routing"]["plan"]["shards"]) == 2

        async def ask() -> tuple[str, Any]:
            text, last = "", None
            stream = mine._async.stream(endless, QUESTION, **LONG)
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    text += chunk["message"]["content"]
                    if text and two[1].is_connected:
                        with suspended(the_engine(mine)):
                            await asyncio.to_thread(two[1].cut)
                    last = chunk
            return text, last

        try:
            text, last = run(ask())
            assert text == undisturbed["message"]["content"]
            (failover,) = last["_routing"]["failovers"]
            assert failover["lost_workers"] == [targets[1]]
            assert [shard["name"] for shard in last["_routing"]["plan"]["shards"]] == targets[:1]
            eventually(
                lambda: (
                    {worker.name: worker.state for worker in mine.check_workers()}
                    == {targets[0]: "held", targets[1]: "lost"}
                ),
                "its link has noticed, too",
            )
        finally:
            two[1].connect()
        eventually(lambda: {w.state for w in mine.check_workers()} == {"held", "free"}, "it is back")
        mine.stop_coordinator()
        again = mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert len(again["_routing"]["plan"]["shards"]) == 2


def test_an_answer_waits_for_its_only_machine_to_come_back(far: FarWorker, endless: str) -> None:
    with HybridRouter(rpc_backends=[far.target]) as mine:
        undisturbed = mine.route_request(endless, QUESTION, **LONG)
        noticed, lost = asyncio.Event(), mine._async._engines._coordinators._lost

        def note(event: Event) -> None:
            if event.kind is EventKind.WORKER_LOST:
                noticed.set()

        mine.events.subscribe(note)

        async def connect_again() -> None:
            await noticed.wait()
            await eventually_async(
                lambda: any(lost.values()), "the router has looked for lost workers and found it"
            )
            await asyncio.to_thread(far.connect)

        async def ask() -> tuple[str, Any]:
            text, last, returning = "", None, asyncio.create_task(connect_again())
            stream = mine._async.stream(endless, QUESTION, **LONG)
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    text += chunk["message"]["content"]
                    if text and not noticed.is_set() and far.is_connected:
                        with suspended(the_engine(mine)):
                            await asyncio.to_thread(far.cut)
                    last = chunk
            await returning
            return text, last

        text, last = run(ask())
        assert text == undisturbed["message"]["content"]
        assert last["_routing"]["failovers"][-1]["lost_workers"] == [far.target]


def test_a_model_that_needs_workers_names_the_machines_that_are_missing(far: FarWorker) -> None:
    with HybridRouter(rpc_backends=["ssh://nowhere.invalid"], auto_discover_rpc=False) as mine:
        with pytest.raises(WorkersUnavailableError, match=r"nowhere\.invalid") as failure:
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert "\n" not in str(failure.value)
        mine.add_worker(far.target)
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"], "the others are used"


def test_adding_those_who_join_while_nobody_has_is_one_line() -> None:
    with (
        HybridRouter(auto_discover_rpc=False) as mine,
        pytest.raises(WorkersUnavailableError, match="invitations leads to no worker yet; "),
    ):
        mine.add_worker("invitations")


def test_names_are_unlike_each_other() -> None:
    names = {"l:1": "gpu1", "l:2": "gpu1", "l:3": "gpu2", "l:4": "cpu", "l:5": "cpu"}
    targets = {"l:1": "ssh://gpu1", "l:2": "ssh://me@gpu1:2222", "l:3": "ssh://gpu2", "l:4": "hub", "l:5": "hub"}
    assert unique_names(names, targets) == {
        "l:1": "gpu1 (gpu1)",
        "l:2": "gpu1 (me@gpu1:2222)",
        "l:3": "gpu2",
        "l:4": "cpu (hub) (l:4)",
        "l:5": "cpu (hub) (l:5)",
    }
