"""Answers that survive their coordinator.

When a coordinator is lost in mid-answer, each request that ran on it gets a coordinator again (the first request
starts it, over the workers that are left; the others wait for it) and continues from the tokens it has. It keeps
its slot at the gate meanwhile, so order and priorities hold: running requests continue first, and waiting requests
keep their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress

from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import AnswerInterruptedError, CoordinatorLostError, RequestTimeoutError, SollolError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.models.routing import Route
from sollol_nb.router.record import RequestRecord
from sollol_nb.runtime.gate import Gate
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.text.tables import counted

MAX_FAILOVERS = 10
MAX_WITHOUT_A_TOKEN = 3
"""A request that loses one coordinator after another without a token in between may be what kills them."""
ENDING_LIMIT_S = 30.0


async def stream_answer(
    coordinators: CoordinatorPool,
    route: Route,
    record: RequestRecord,
    begin: Callable[[Coordinator], Answer],
    *,
    priority: int,
    timeout_s: float,
    keep_alive: object = None,
    alone: bool = False,
    speculation: str | None = None,
) -> AsyncGenerator[Chunk, None]:
    """Stream one answer, continued on another coordinator whenever one is lost.

    Args:
        record: gets the coordinator, the times and the failovers.
        begin: makes the answer; called once, with the first coordinator.
        keep_alive: if given, how long the coordinator lives without a request from now on.
        timeout_s: limit from when the first coordinator is ready; the start of another one does not count.
        alone: no other request of this router runs on the coordinator meanwhile.
        speculation: as for `CoordinatorPool.get`.

    Raises:
        AnswerInterruptedError: no coordinator could take over, or too many were lost.
        RequestTimeoutError: the limit has passed.
        RequestRejectedError: the engine refused the request.
        SollolError: the first coordinator could not be started.
    """
    coordinator, record.load_ms = await coordinators.get(route, speculation)
    record.loaded_by = coordinator.loaded_by if record.load_ms is not None else ""
    answer: Answer | None = None
    lost: CoordinatorLostError | None = None
    last: Chunk | None = None
    try:
        async with (
            asyncio.timeout(timeout_s) as limit,
            _slot(coordinators.gate(route), priority, alone) as record.queue_ms,
        ):
            record.set_sent()
            while True:
                lease, tokens_before = coordinator.ask_lease(), answer.token_count if answer else 0
                try:
                    record.set_coordinator(coordinator)
                    if keep_alive is not None:
                        await coordinator.keep_alive(keep_alive_seconds(keep_alive))
                    answer = answer or begin(coordinator)
                    async with aclosing(coordinator.stream(answer, lease)) as chunks:
                        async for chunk in chunks:
                            chunk["model"] = route.model  # a file may be loaded under another name
                            if answer.recovery:
                                record.set_recovery(answer.recovery)
                            if chunk.get("done"):
                                last = chunk
                                if lost is not None:
                                    await coordinators.found_lost(route)
                                    record.set_lost_workers(coordinators.lost_workers(route))
                            else:
                                yield chunk
                    break
                except CoordinatorLostError as error:
                    tokens = answer.token_count if answer else 0
                    if tokens > tokens_before or await lease.is_granted():
                        lost = error
                        record.add_failover(str(error), tokens)
                        if record.has_too_many_failovers(MAX_FAILOVERS, MAX_WITHOUT_A_TOKEN):
                            reason = f"the coordinator was lost {len(record.failovers)} times: {error}"
                            raise _interrupted(route, answer, reason) from error
                    # else it had ended while the request waited, or was ending
                finally:
                    lease.free()
                try:
                    coordinator = await _next_coordinator(coordinators, route, limit, coordinator, speculation)
                except SollolError as error:
                    if lost is None:
                        raise
                    reason = f"{lost}; no other coordinator could take over: {error}"
                    raise _interrupted(route, answer, reason) from error
                if lost is not None:
                    record.set_lost_workers(coordinators.lost_workers(route))
                    coordinators.report_continued(route, answer, coordinator)
    except TimeoutError as error:
        if not limit.expired():  # the start of a coordinator has its own limit
            raise
        raise RequestTimeoutError(
            f"{route.name} did not finish within {timeout_s:g} s and was cancelled after {len(record.text)} "
            "characters; give a larger timeout or a smaller max_tokens"
        ) from error
    assert last is not None
    yield last  # without slot, lease and time limit, however long the reader takes to read it


def _slot(gate: Gate, priority: int, alone: bool) -> AbstractAsyncContextManager[float]:
    return gate.all_slots(priority) if alone else gate.slot(priority)


async def _next_coordinator(
    coordinators: CoordinatorPool,
    route: Route,
    limit: asyncio.Timeout,
    ended: Coordinator,
    speculation: str | None,
) -> Coordinator:
    """The next coordinator, which may be the same; the time limit is paused while it starts."""
    loop = asyncio.get_running_loop()
    when, began = limit.when(), loop.time()
    limit.reschedule(None)
    try:
        if not ended.is_running() or await _is_stopping(ended):
            coordinator, _ = await coordinators.get(route, speculation)
            return coordinator
        return ended  # only the connection broke
    finally:
        if when is not None:
            limit.reschedule(when + loop.time() - began)


async def _is_stopping(coordinator: Coordinator) -> bool:
    """Whether it refuses leases, since it is being stopped; returns when it has ended."""
    if await coordinator.hold():
        coordinator.free()
        return False
    with suppress(TimeoutError):  # its supervisor ends it long before
        async with asyncio.timeout(ENDING_LIMIT_S):
            await coordinator.wait_ended()
    return True


def _interrupted(route: Route, answer: Answer | None, reason: str) -> AnswerInterruptedError:
    tokens = counted(answer.token_count if answer is not None else 0, "token")
    error = AnswerInterruptedError(
        f"{route.name}: the answer was interrupted after {tokens}; {reason}; the text so far is kept, and "
        "router.resume(error) continues it when workers are available again"
    )
    error.state = answer.state() if answer is not None else None
    return error
