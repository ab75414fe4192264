"""Answers over coordinators that are lost: cases that are rare with real engines, on stand-ins for them.

`coordinators/test_pool.py` has the failovers of real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sollol_nb import hybrid_router
from sollol_nb.errors import (
    AnswerInterruptedError,
    CoordinatorLostError,
    CoordinatorTimeoutError,
    RequestTimeoutError,
    SollolError,
    WorkersUnavailableError,
)
from sollol_nb.llama_cpp.answers.chat import ChatAnswer
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.coordinators.speculation import NO_SPECULATION
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.models.profiles import profile_of
from sollol_nb.models.routing import DISTRIBUTED, Route
from sollol_nb.router import active_request
from sollol_nb.router.failover import stream_answer
from sollol_nb.router.record import RequestRecord
from sollol_nb.runtime.gate import Gate
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import run

ROUTE = Route(model="demo", backend=DISTRIBUTED, reason="", profile=profile_of("demo"), model_path=DEMO_MODEL_PATH)
Chunk = dict[str, Any]


def piece(text: str, *, done: bool = False) -> Chunk:
    return {"model": "demo", "message": {"role": "assistant", "content": text}, "done": done}


class StandIn:
    """A coordinator that gives these chunks and then is lost; without `takes_requests` it is just ending."""

    base_url = "http://127.0.0.1:1"
    plan = None
    placement_differences: tuple[str, ...] = ()
    compromise: str = ""
    settings = SimpleNamespace(speculation=NO_SPECULATION)

    def __init__(self, *chunks: Chunk, takes_requests: bool = True) -> None:
        self._chunks = chunks
        self._takes_requests = takes_requests
        self.leases = 0

    def ask_lease(self) -> StandIn:
        self.leases += 1
        return self

    async def is_granted(self) -> bool:
        return self._takes_requests

    def free(self) -> None:
        self.leases -= 1

    def is_running(self) -> bool:
        return False

    def answer(self, _: object) -> ChatAnswer:
        return ChatAnswer("demo", [{"role": "user", "content": "Hi"}], {})

    async def stream(self, _: ChatAnswer, lease: StandIn) -> AsyncGenerator[Chunk, None]:
        for chunk in self._chunks:
            yield chunk
            if chunk["done"]:
                return
        raise CoordinatorLostError("it was killed")


class StandInPool:
    """Gives these coordinators one after the other; raises those that are errors."""

    def __init__(self, *coordinators: StandIn | SollolError) -> None:
        self._coordinators = iter(coordinators)
        self.only_gate = Gate(1)
        self.reported: list[StandIn] = []

    def gate(self, _: Route) -> Gate:
        return self.only_gate

    async def get(self, _: Route, speculation: str | None = None) -> tuple[StandIn, float | None]:
        coordinator = next(self._coordinators)
        if isinstance(coordinator, SollolError):
            raise coordinator
        return coordinator, None

    async def found_lost(self, _: Route) -> None:
        return None

    def lost_workers(self, _: Route) -> frozenset[str]:
        return frozenset({"w:1"})

    def report_continued(self, _route: Route, _answer: object, coordinator: StandIn) -> None:
        self.reported.append(coordinator)


async def answered(pool: StandInPool, *, timeout_s: float = 60, reads_for_s: float = 0) -> list[Chunk]:
    """All chunks. So much time passes at once, for the event loop, while each of them is read."""
    begin = cast(Any, StandIn().answer)
    chunks, loop, passed_s = [], asyncio.get_running_loop(), 0.0
    clock = loop.time
    loop.time = lambda: clock() + passed_s  # type: ignore[method-assign]
    stream = stream_answer(
        cast(CoordinatorPool, pool), ROUTE, RequestRecord("demo"), begin, priority=5, timeout_s=timeout_s
    )
    async with aclosing(stream):
        async for chunk in stream:
            chunks.append(chunk)
            passed_s += reads_for_s
            await asyncio.sleep(0.01)  # what is due by now comes first
    return chunks


def test_an_answer_continues_where_the_next_coordinator_ends_before_it_is_used() -> None:
    ending, last = StandIn(takes_requests=False), StandIn(piece("lo"), piece("", done=True))
    pool = StandInPool(StandIn(piece("Hel")), ending, last)
    chunks = asyncio.run(answered(pool))
    assert "".join(chunk["message"]["content"] for chunk in chunks) == "Hello"
    assert pool.reported == [ending, last]
    assert (last.leases, pool.only_gate.running) == (0, 0)


def test_a_running_answer_is_kept_where_the_next_coordinator_ends_and_no_other_starts() -> None:
    gone = WorkersUnavailableError("no worker is left")
    pool = StandInPool(StandIn(piece("Hel")), StandIn(takes_requests=False), gone)
    with pytest.raises(
        AnswerInterruptedError, match=r"it was killed; no other coordinator could take over: no worker"
    ) as caught:
        asyncio.run(answered(pool))
    assert caught.value.state is not None
    assert pool.only_gate.running == 0


@pytest.mark.parametrize("error", [WorkersUnavailableError("no worker"), CoordinatorTimeoutError("not ready")])
def test_a_request_that_waited_fails_with_the_reason_why_no_coordinator_starts(error: SollolError) -> None:
    pool = StandInPool(StandIn(takes_requests=False), error)
    with pytest.raises(type(error)) as caught:
        asyncio.run(answered(pool))
    assert caught.value is error
    assert pool.reported == []


def test_an_answer_done_in_time_does_not_time_out_however_slow_its_reader_is() -> None:
    pool = StandInPool(StandIn(piece("Hello", done=True)))
    assert len(asyncio.run(answered(pool, reads_for_s=1000.0))) == 1


def test_an_answer_not_done_in_time_is_cancelled() -> None:
    class Silent(StandIn):
        async def stream(self, _: ChatAnswer, lease: StandIn) -> AsyncGenerator[Chunk, None]:
            await asyncio.Event().wait()
            yield piece("never")

    pool = StandInPool(Silent())
    with pytest.raises(RequestTimeoutError, match=r"did not finish within 0\.05 s"):
        asyncio.run(answered(pool, timeout_s=0.05))
    assert pool.only_gate.running == 0


# --- seen from the router -----------------------------------------------------------------------


def test_an_answer_that_is_interrupted_again_is_resumed_for_the_same_schema_and_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def interrupted(*_: Any, **__: Any) -> AsyncGenerator[Chunk, None]:
        yield piece("Hel")
        error = AnswerInterruptedError("lost")
        error.state = StandIn().answer(None).state()
        raise error

    monkeypatch.setattr(active_request, "stream_answer", interrupted)
    with HybridRouter(auto_discover_rpc=False) as router:
        with pytest.raises(AnswerInterruptedError) as first:
            router.route_request("demo", "Hi", schema=list[str], backend="sharded", priority=7)
        with pytest.raises(AnswerInterruptedError) as second:
            router.resume(first.value, priority=8)
        rows = router.latency.frame(model="demo", last=2)
    assert (first.value.schema, first.value.backend) == (list[str], DISTRIBUTED)
    assert (second.value.schema, second.value.backend) == (list[str], DISTRIBUTED)
    assert list(rows.priority) == [7, 8]


def test_a_stream_has_routing_each_time_that_its_server_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def moving(_pool: object, _route: object, record: RequestRecord, *_: Any, **__: Any) -> Any:
        record.server_url = "http://a"
        yield piece("H")
        yield piece("e")
        record.server_url = "http://b"
        yield piece("l")
        yield piece("lo")
        yield piece("", done=True)

    async def urls(router: hybrid_router.HybridRouter) -> list[str | None]:
        stream = router.stream("demo", "Hi", backend="local")
        return [chunk.get("_routing", {}).get("coordinator_url") async for chunk in stream]

    monkeypatch.setattr(active_request, "stream_answer", moving)
    with HybridRouter(auto_discover_rpc=False) as router:
        assert run(urls(router._async)) == ["http://a", None, "http://b", None, "http://b"]
