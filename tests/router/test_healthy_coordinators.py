"""A coordinator that is well is never ended, however slow its readers, the latency log or other kernels are."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import aclosing, closing, contextmanager

import pytest

from sollol_nb.llama_cpp.coordinators import pace
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, eventually, run, unused_ports

pytestmark = pytest.mark.engine

FLOOR_S = 1.5  # a busy machine may keep the engine waiting for some tenths of a second
LONGER_S = 2 * FLOOR_S
FEW = {"temperature": 0, "max_tokens": 4}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinators are given up after this silence, on slow machines too."""
    monkeypatch.setattr(pace, "MIN_FLOOR_S", FLOOR_S)
    monkeypatch.setattr(pace, "MAX_FLOOR_S", FLOOR_S)


@contextmanager
def new_router(**settings: object) -> Iterator[HybridRouter]:
    port = unused_ports(1)
    usual = {"auto_setup_rpc": True, "auto_discover_rpc": False, "num_rpc_backends": 1, "rpc_port": port}
    with HybridRouter(**{**usual, **settings}) as router:
        yield router


def pid_of(router: HybridRouter) -> int:
    assert router.coordinator is not None
    return router.coordinator.pid


@pytest.mark.parametrize("number", [1, -1], ids=["the second chunk", "the last chunk"])
def test_a_reader_may_take_its_time(engine: Engine, impatient: None, number: int) -> None:
    with new_router() as router:
        chunks = [chunk["done"] for chunk in router.stream("demo:sharded", QUESTION, **FEW)]
        before = pid_of(router)

        async def read() -> None:
            async with aclosing(router.stream_async("demo:sharded", QUESTION, **FEW)) as stream:
                position = 0
                async for _ in stream:
                    if position == number % len(chunks):
                        await asyncio.sleep(LONGER_S)
                    position += 1

        run(read())  # on the I/O loop, where a slow reader delays the stream itself
        assert router.route_request("demo:sharded", QUESTION, **FEW).routing["failovers"] == []
        assert pid_of(router) == before


def test_slot_and_time_limit_do_not_wait_for_the_reader_of_the_last_chunk(router: HybridRouter) -> None:
    async def read() -> None:
        async with aclosing(router.stream_async("demo:sharded", QUESTION, timeout=60, **FEW)) as stream:
            async for chunk in stream:
                if chunk["done"]:
                    assert router.coordinator is not None
                    assert router.coordinator.is_idle

    run(read())


def test_no_answer_waits_for_a_latency_log_that_is_locked(engine: Engine, impatient: None) -> None:
    with new_router() as router:
        router.route_request("demo:sharded", QUESTION, **FEW)
        before, rows = pid_of(router), len(router.latency.frame())
        with closing(sqlite3.connect(router.latency.path, timeout=60)) as other:
            other.execute("BEGIN EXCLUSIVE")
            answer = router.route_request("demo:sharded", QUESTION, **FEW)
            seen = other.execute("SELECT count(*) FROM requests").fetchone()[0]
            other.rollback()
        assert answer.text
        assert seen == rows, "the answer was there before its row"
        assert len(router.latency.frame()) == rows + 1, "readers wait for the row"
        assert pid_of(router) == before


def test_slots_that_another_kernel_keeps_busy_are_waited_for(
    engine: Engine, impatient: None, endless: str
) -> None:
    settings = {"slots": 1, "context_tokens": 8192}
    with new_router(**settings) as first, new_router(**settings) as second:
        for router in (first, second):
            router.route_request(endless, QUESTION, backend="sharded", **FEW)
        assert pid_of(first) == pid_of(second), "they share a coordinator"
        finished: list[dict[str, object]] = []
        begun = threading.Event()

        def ask_much() -> None:
            for chunk in first.stream(endless, QUESTION, backend="sharded", temperature=0, max_tokens=500):
                begun.set()
                if chunk["done"]:
                    finished.append(chunk["_routing"])

        asking = threading.Thread(target=ask_much)
        asking.start()
        assert begun.wait(60)
        answer = second.route_request(endless, QUESTION, backend="sharded", **FEW)
        asking.join(60)
        assert answer.routing["failovers"] == []
        assert eventually(lambda: finished, "the other kernel has its answer")[0]["failovers"] == []
        assert pid_of(first) == pid_of(second)
