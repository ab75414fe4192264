from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.gate import AGEING_S, Gate, first_slot
from sollol_nb.runtime.priority import Priority


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def settle() -> None:
    """Let everything that can happen happen."""
    for _ in range(10):
        await asyncio.sleep(0)


def use(
    gate: Gate, priority: int, done: Callable[[], object], work: Awaitable[object] | None = None
) -> asyncio.Task[None]:
    async def request() -> None:
        async with gate.slot(priority):
            done()
            if work is not None:
                await work

    return asyncio.get_running_loop().create_task(request())


def order_of_service(requests: list[tuple[float, int]], ageing_s: float = AGEING_S) -> list[int]:
    """Numbers of the requests, each (arrival in seconds, priority), in the order one slot serves them in."""

    async def run() -> list[int]:
        clock = Clock()
        gate = Gate(1, ageing_s=ageing_s, clock=clock)
        served: list[int] = []
        async with gate.slot():
            tasks = []
            for number, (arrives_s, priority) in enumerate(requests):
                clock.now_s = arrives_s
                tasks.append(use(gate, priority, lambda number=number: served.append(number)))  # type: ignore[misc]
                await settle()
        await asyncio.gather(*tasks)
        return served

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("requests", "order"),
    [
        pytest.param([(0, 5), (0, 5), (0, 5)], [0, 1, 2], id="first come, first served within a level"),
        pytest.param([(0, 1), (0, 5), (0, 10), (0, 7)], [2, 3, 1, 0], id="higher first"),
        pytest.param([(0, 5), (AGEING_S - 1, 6)], [1, 0], id="a level is worth its seconds"),
        pytest.param([(0, 5), (AGEING_S + 1, 6)], [0, 1], id="and no more"),
        pytest.param([(0, 5), (AGEING_S, 6)], [0, 1], id="equal: who came first"),
        pytest.param([(0, 1), (8.9 * AGEING_S, 10)], [1, 0], id="critical overtakes batch"),
        pytest.param([(0, 1), (9.1 * AGEING_S, 10)], [0, 1], id="until batch has waited nine levels"),
    ],
)
def test_slots_go_by_priority_with_ageing(requests: list[tuple[float, int]], order: list[int]) -> None:
    assert order_of_service(requests) == order


def test_batch_is_served_while_critical_requests_never_end() -> None:
    critical_every_second = [(float(second), int(Priority.CRITICAL)) for second in range(1, 200)]
    order = order_of_service([(0.0, int(Priority.BATCH)), *critical_every_second])
    assert order.index(0) == 9 * AGEING_S - 1  # behind those that came less than nine levels after it


def test_a_free_slot_is_taken_without_waiting() -> None:
    gate = Gate(2)
    for _ in range(2):
        # A coroutine that ends at its first step never gave the event loop a turn.
        with pytest.raises(StopIteration):
            first_slot([gate]).send(None)
    assert gate.running == 2
    assert not gate.has_free_slot


def test_the_time_waited_is_told() -> None:
    async def run() -> list[float]:
        clock, waited_ms = Clock(), []
        gate = Gate(1, clock=clock)

        async def request() -> None:
            async with gate.slot() as wait_ms:
                waited_ms.append(wait_ms)

        async with gate.slot() as wait_ms:
            waited_ms.append(wait_ms)
            task = asyncio.create_task(request())
            await settle()
            clock.now_s = 1.5
        await task
        return waited_ms

    assert asyncio.run(run()) == [0.0, 1500.0]


def test_no_more_run_than_there_are_slots_and_nothing_is_lost_when_some_are_cancelled() -> None:
    async def run() -> None:
        chance = random.Random(7)
        gate = Gate(3)
        most = 0
        finished = 0

        async def request(priority: int) -> None:
            nonlocal most, finished
            async with gate.slot(priority):
                most = max(most, gate.running)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                finished += 1

        tasks = [asyncio.create_task(request(chance.randint(1, 10))) for _ in range(500)]
        cancelled = 0
        while gate.waiting or gate.running or not finished:
            await asyncio.sleep(0)
            cancelled += chance.choice(tasks).cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert finished == ends.count(None)
        assert cancelled > 20
        assert most == 3
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())


def test_a_cancelled_waiter_frees_its_place() -> None:
    async def run() -> None:
        gate, served = Gate(1), []
        async with gate.slot():
            impatient = use(gate, Priority.CRITICAL, lambda: served.append("impatient"))
            patient = use(gate, Priority.BATCH, lambda: served.append("patient"))
            await settle()
            assert gate.waiting == 2
            impatient.cancel()
            await settle()
            assert gate.waiting == 1
        await patient
        assert served == ["patient"]
        assert gate.running == 0

    asyncio.run(run())


@pytest.mark.parametrize("first", ["grant", "cancel"])
def test_a_waiter_cancelled_in_the_very_moment_of_its_turn_passes_the_slot_on(first: str) -> None:
    async def run() -> None:
        gate, served = Gate(1), []
        assert await first_slot([gate]) is gate
        unlucky = use(gate, Priority.HIGH, lambda: served.append("unlucky"))
        following = use(gate, Priority.LOW, lambda: served.append("next"))
        await settle()
        # Both in one turn of the loop, in either order.
        if first == "grant":
            gate.release()
            unlucky.cancel()
        else:
            unlucky.cancel()
            gate.release()
        await asyncio.gather(unlucky, following, return_exceptions=True)
        assert unlucky.cancelled()
        assert served == ["next"]
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())


def test_more_slots_let_waiters_in_and_fewer_let_runners_finish() -> None:
    async def run() -> None:
        gate, served = Gate(1), []
        may_end = asyncio.Event()
        tasks = [use(gate, 5, lambda: served.append(1), may_end.wait()) for _ in range(4)]
        await settle()
        assert (gate.running, gate.waiting) == (1, 3)
        gate.slots = 3
        await settle()
        assert (gate.running, gate.waiting) == (3, 1)
        gate.slots = 1
        await settle()
        assert (gate.slots, gate.running, gate.waiting) == (1, 3, 1)
        may_end.set()
        await asyncio.gather(*tasks)
        assert len(served) == 4

    asyncio.run(run())


def test_a_request_at_two_gates_takes_the_first_slot_and_leaves_the_other_line() -> None:
    async def run() -> None:
        slow, quick = Gate(1), Gate(1)
        for gate in (slow, quick):
            await first_slot([gate])
        both = asyncio.create_task(first_slot([slow, quick]))
        await settle()
        assert (slow.waiting, quick.waiting) == (1, 1)
        quick.release()
        assert await both is quick
        assert (slow.waiting, quick.waiting) == (0, 0)
        slow.release()
        assert (slow.running, quick.running) == (0, 1)

    asyncio.run(run())


def test_dismissed_waiters_look_again_and_keep_their_order() -> None:
    async def run() -> None:
        gate, served = Gate(1), []
        async with gate.slot():
            low = use(gate, Priority.LOW, lambda: served.append("low"))
            high = use(gate, Priority.HIGH, lambda: served.append("high"))
            await settle()
            gate.dismiss()
            assert gate.waiting == 0
            await settle()
            assert gate.waiting == 2
        await asyncio.gather(low, high)
        assert served == ["high", "low"]

    asyncio.run(run())


def test_an_error_inside_gives_the_slot_back() -> None:
    async def run() -> None:
        gate = Gate(1)
        with pytest.raises(ZeroDivisionError):
            async with gate.slot():
                raise ZeroDivisionError
        assert gate.has_free_slot

    asyncio.run(run())


@pytest.mark.parametrize("slots", [0, -1])
def test_a_gate_has_at_least_one_slot(slots: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 slot"):
        Gate(slots)
    gate = Gate(1)
    with pytest.raises(ConfigError, match="at least 1 slot"):
        gate.slots = slots


# --- all slots --------------------------------------------------------------------------------


def test_a_request_that_wants_all_slots_runs_alone() -> None:
    async def run() -> list[str]:
        gate, served = Gate(3), []

        async def alone(name: str, priority: int) -> None:
            async with gate.all_slots(priority):
                assert gate.running == 3
                served.append(name)
                await settle()
                assert gate.running == 3

        async def beside(name: str) -> None:
            async with gate.slot():
                served.append(name)
                await settle()

        async with gate.slot():
            tasks = [asyncio.create_task(alone("low", 1)), asyncio.create_task(alone("high", 9))]
            await settle()
            tasks.append(asyncio.create_task(beside("last")))
            await settle()
            assert not served, "one slot is still in use"
        await asyncio.gather(*tasks)
        assert gate.has_free_slot
        assert gate.running == 0
        return served

    assert sorted(asyncio.run(run())) == ["high", "last", "low"]


def test_a_request_that_is_cancelled_while_it_gathers_all_slots_gives_them_back() -> None:
    async def run() -> None:
        gate = Gate(2)

        async def alone() -> None:
            async with gate.all_slots():
                pass

        async with gate.slot():
            task = asyncio.create_task(alone())
            await settle()
            assert gate.running == 2
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert gate.running == 1
        async with gate.all_slots():
            assert gate.running == 2

    asyncio.run(run())
