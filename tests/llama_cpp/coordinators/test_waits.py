"""How much of a token's time each worker takes is measured for each coordinator apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from sollol_nb.llama_cpp.coordinators import waits
from sollol_nb.llama_cpp.coordinators.waits import LEAST_WATCHED_S, WaitWatch
from sollol_nb.llama_cpp.processes.machine import Address
from sollol_nb.llama_cpp.processes.traffic import Waits
from sollol_nb.settings.endpoints import addresses_of
from tests.support.engines import linux_only, run

FIRST, SECOND = "127.0.0.1:50052", "127.0.0.1:50053"


class Stub:
    """A coordinator that generates until the watching has begun."""

    base_url = "http://127.0.0.1:18080"

    def __init__(self, *rpc_backends: str, pid: int = 1) -> None:
        self.rpc_backends = list(rpc_backends)
        self.pid = pid
        self.pace = SimpleNamespace(seconds_per_token=0.01, is_generating=True, at_next_token=None)

    def is_running(self) -> bool:
        return True


@linux_only
def test_an_ended_coordinator_leaves_nothing_to_the_next_one_at_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Stub(FIRST, pid=1), Stub(SECOND, pid=2)
    watched = {1: (FIRST, LEAST_WATCHED_S / 2), 2: (SECOND, LEAST_WATCHED_S)}
    measured: list[tuple[object, Mapping[str, float]]] = []

    def watch_waits(
        pid: int, peers: Collection[Address], found: Waits, *, every_s: float, is_wanted: Callable[[], bool]
    ) -> bool:
        endpoint, seconds = watched[pid]
        (address,) = addresses_of(endpoint)
        found.seconds[address] = found.seconds.get(address, 0.0) + seconds
        (before if pid == 1 else after).pace.is_generating = False
        while is_wanted():
            time.sleep(0.001)
        return True

    async def generate(watch: WaitWatch, coordinator: Any) -> None:
        watch.watch(coordinator)
        coordinator.pace.at_next_token()
        await asyncio.gather(*watch._tasks)

    async def both() -> None:
        watch = WaitWatch(lambda coordinator, shares: measured.append((coordinator, shares)))
        await generate(watch, before)
        await generate(watch, after)

    monkeypatch.setattr(waits, "watch_waits", watch_waits)
    run(both())
    assert measured == [(after, {SECOND: 1.0})]


def test_a_coordinator_without_workers_is_not_watched() -> None:
    alone: Any = Stub()
    WaitWatch(lambda *_: None).watch(alone)
    assert alone.pace.at_next_token is None
