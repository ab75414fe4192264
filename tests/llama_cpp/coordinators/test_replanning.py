"""A worker that was left because it was slow is measured again until it is in use, whatever happens before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.coordinators import replanning
from sollol_nb.llama_cpp.coordinators.replanning import Replanner
from sollol_nb.runtime.events import EventBus
from tests.support.engines import run

SLOW = "w1:1"


def test_a_slow_worker_is_measured_again_less_and_less_often_until_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    calibrated: list[str] = []
    states = iter(["free", "down", "free", "held"])
    sleep = asyncio.sleep

    async def sleep_quickly(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async def probe(endpoints: Sequence[str]) -> None:
        workers.state = next(states)

    async def calibrate(endpoints: Sequence[str]) -> None:
        calibrated.extend(endpoints)
        if len(calibrated) == 1:
            raise WorkersUnavailableError("another kernel has just taken it")

    workers = SimpleNamespace(endpoints=[SLOW], probe=probe, state="held")
    workers.statuses = lambda: [SimpleNamespace(endpoint=SLOW, state=workers.state)]
    nothing: Any = SimpleNamespace(coordinators=[])
    replanner = Replanner(
        workers,  # type: ignore[arg-type]
        EventBus(),
        nothing,
        nothing,
        settings=lambda: SimpleNamespace(replan="auto"),  # type: ignore[arg-type,return-value]
        best_plan=nothing,
        predicted_ms=nothing,
        move=nothing,
        calibrate=calibrate,
    )

    async def recheck() -> None:
        for _ in range(2):  # it is found slow by two answers
            replanner._recheck_later([SLOW])
        await asyncio.gather(*replanner._tasks)

    monkeypatch.setattr(replanning.asyncio, "sleep", sleep_quickly)
    run(recheck())

    first = replanning.RECHECK_S
    assert slept == [first, 2 * first, 2 * first, 4 * first]
    assert calibrated == [SLOW, SLOW], "also after a calibration that failed"
