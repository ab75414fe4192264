"""Gates: which request may use a server next.

A `Gate` guards one server (an Ollama node or a coordinator) that serves `slots` requests at the same time. While a
slot is free, no request waits; otherwise requests get a slot by priority, and within a level in order of arrival.

Ageing: a waiting request gains one level every `AGEING_S` seconds, so its level is

    priority + waited_s / AGEING_S

Two waiting requests gain at the same pace, so their order never changes while they wait, and it is the order
of `arrived_s - priority * AGEING_S`: each level is worth a head start of `AGEING_S` seconds. The waiting list
is therefore simply kept sorted, and BATCH (1) is overtaken by CRITICAL (10) only while it has waited less than
nine times `AGEING_S` longer.

A request may wait at several gates (`first_slot`) and takes the first slot that becomes free at any of them, so it
is never bound to one queue while another server is idle.

A gate belongs to one event loop, from the first wait on.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.priority import Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

AGEING_S = 10.0

_arrivals = itertools.count()


@dataclass(order=True, slots=True)
class _Waiter:
    """One waiting request; the same object is in the list of every gate at which it waits."""

    virtual_arrival_s: float
    number: int
    granted: asyncio.Future[Gate | None] = field(compare=False)
    gates: Sequence[Gate] = field(compare=False)

    def withdraw(self) -> None:
        for gate in self.gates:
            index = bisect.bisect_left(gate._waiters, self)
            if index < len(gate._waiters) and gate._waiters[index] is self:
                del gate._waiters[index]


class Gate:
    """Admits `slots` requests at a time to one server, by priority with ageing.

    Args:
        slots: how many requests the server serves at the same time, at least 1; may be changed later.
        ageing_s: seconds of waiting that are worth one level of priority.
        clock: monotonic seconds; a test may pass another one.

    Raises:
        ConfigError: `slots` is less than 1.
    """

    def __init__(
        self, slots: int, *, ageing_s: float = AGEING_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slots = _checked_slots(slots)
        self._ageing_s = ageing_s
        self._clock = clock
        self._running = 0
        self._waiters: list[_Waiter] = []
        self._alone: Gate | None = None

    def __repr__(self) -> str:
        return f"<Gate {self._running}/{self._slots} running, {self.waiting} waiting>"

    @property
    def slots(self) -> int:
        """How many requests may run at the same time."""
        return self._slots

    @slots.setter
    def slots(self, slots: int) -> None:
        self._slots = _checked_slots(slots)
        self._admit_waiting()

    @property
    def running(self) -> int:
        """How many requests hold a slot."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many requests wait here, some of them perhaps at other gates too."""
        return len(self._waiters)

    @property
    def has_free_slot(self) -> bool:
        """Whether a request arriving now would not wait."""
        return self._running < self._slots

    @asynccontextmanager
    async def slot(
        self, priority: int = Priority.NORMAL, *, arrived_s: float | None = None
    ) -> AsyncIterator[float]:
        """Hold a slot for the length of an `async with`, which yields the milliseconds of waiting for it.

        Args:
            priority: 1 to 10, higher is served sooner.
            arrived_s: when the request arrived, on the gate's clock; by default now.
        """
        began_s = self._clock()
        arrived_s = began_s if arrived_s is None else arrived_s
        while await first_slot([self], priority, arrived_s=arrived_s) is None:
            pass
        try:
            yield (self._clock() - began_s) * 1e3
        finally:
            self.release()

    @asynccontextmanager
    async def all_slots(self, priority: int = Priority.NORMAL) -> AsyncIterator[float]:
        """Hold all slots, so that nothing else runs meanwhile; yields the milliseconds of waiting for them.

        Requests that want all slots get them one after the other, by priority: two that had half of them each
        would wait forever.
        """
        began_s, taken = self._clock(), 0
        if self._alone is None:
            self._alone = Gate(1, ageing_s=self._ageing_s, clock=self._clock)
        async with self._alone.slot(priority, arrived_s=began_s):
            try:
                while taken < self._slots:
                    if await first_slot([self], priority, arrived_s=began_s) is not None:
                        taken += 1
                yield (self._clock() - began_s) * 1e3
            finally:
                for _ in range(taken):
                    self.release()

    def release(self) -> None:
        """Give back a slot taken with `first_slot`; the next request in order gets it."""
        self._running -= 1
        self._admit_waiting()

    def dismiss(self) -> None:
        """Wake all waiting requests, in order, without a slot: what their choice was based on has changed."""
        while self._waiters:
            self._wake_first(None)

    def _admit_waiting(self) -> None:
        while self._waiters and self.has_free_slot:
            if self._wake_first(self):
                self._running += 1

    def _wake_first(self, answer: Gate | None) -> bool:
        """Take the first waiter off all lists. False if its wait was cancelled just before."""
        waiter = self._waiters[0]
        waiter.withdraw()
        if waiter.granted.done():
            return False
        waiter.granted.set_result(answer)
        return True


async def first_slot(
    gates: Sequence[Gate], priority: int = Priority.NORMAL, *, arrived_s: float | None = None
) -> Gate | None:
    """Take the first slot that is free at any of `gates`; the caller must `release()` it.

    Returns:
        The gate whose slot is now held, or None if a gate was asked to `dismiss()` its waiters: choose the gates
        again, and call again with the same `arrived_s`, which keeps the position in the order.
    """
    for gate in gates:
        if gate.has_free_slot:
            gate._running += 1
            return gate
    # For requests that wait at several gates, the clock and the ageing of the first gate count.
    arrived = gates[0]._clock() if arrived_s is None else arrived_s
    granted: asyncio.Future[Gate | None] = asyncio.get_running_loop().create_future()
    waiter = _Waiter(arrived - priority * gates[0]._ageing_s, next(_arrivals), granted, gates)
    for gate in gates:
        bisect.insort(gate._waiters, waiter)
    try:
        return await granted
    except asyncio.CancelledError:
        waiter.withdraw()
        # A slot may have been granted in the same turn of the loop in which the wait was cancelled.
        if not granted.cancelled() and (gate_of_slot := granted.result()) is not None:
            gate_of_slot.release()
        raise


def _checked_slots(slots: int) -> int:
    if slots < 1:
        raise ConfigError(f"a gate needs at least 1 slot, not {slots}")
    return slots
