"""A coordinator that is well is never ended, however slow its readers, the latency log or other kernels are."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import ENDLESS_CONTEXT_TOKENS, HANG_GUARD_S, QUESTION, eventually, run, unused_ports

pytestmark = pytest.mark.engine

LONGER_S = 3.0
FEW = {"temperature": 0, "max_tokens": 4}


@contextmanager
def impatient(router: HybridRouter, floor_s: float) -> Iterator[None]:
    """Meanwhile, the coordinator is given up after this silence, on slow machines too. Not while its engine alone
    decides how long that lasts: a busy machine may keep it waiting."""
    assert router.coordinator is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router.coordinator.pace, "_floor_s", floor_s)
        yield


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
def test_a_reader_may_take_its_time(engine: Engine, number: int) -> None:
    with new_router() as router:
        chunks = [chunk["done"] for chunk in router.stream("demo:sharded", QUESTION, **FEW)]
        before = pid_of(router)

        async def read() -> None:
            async with aclosing(router.stream_async("demo:sharded", QUESTION, **FEW)) as stream:
                position = 0
                async for _ in stream:
                    if position == number % len(chunks):
                        with impatient(router, LONGER_S / 4):
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


def test_no_answer_waits_for_a_latency_log_that_is_locked(engine: Engine) -> None:
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
    engine: Engine, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"slots": 1, "context_tokens": ENDLESS_CONTEXT_TOKENS}
    with new_router(**settings) as first, new_router(**settings) as second:
        for router in (first, second):
            router.route_request(endless, QUESTION, backend="sharded", **FEW)
        before = pid_of(first)
        assert pid_of(second) == before, "they share a coordinator"
        assert second.coordinator is not None
        waiting = second.coordinator.pace
        silences, on_moved = [0.0], waiting.on_moved  # each until a slot was seen to move
        monkeypatch.setattr(waiting, "on_moved", lambda: (silences.append(waiting._silence_s), on_moved()))
        with (
            ThreadPoolExecutor(1) as threads,
            closing(first.stream(endless, QUESTION, backend="sharded", temperature=0)) as holder,
        ):
            next(holder)
            with impatient(second, 2 * LONGER_S):  # its slots are looked at after half of that
                asked = threads.submit(second.route_request, endless, QUESTION, backend="sharded", **FEW)
                eventually(
                    lambda: asked.done() or sum(silences) + waiting._silence_s > 2 * LONGER_S,
                    "it was silent for longer",
                )
            assert not asked.done()
            assert next(holder)["done"] is False
            holder.close()
            assert asked.result(HANG_GUARD_S).routing["failovers"] == []
        assert pid_of(first) == pid_of(second) == before
