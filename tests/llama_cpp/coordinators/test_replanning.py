"""When the layout of a model is computed again, and when a worker is measured again that was left as slow."""

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


def replanner_over(workers: object, **parts: Any) -> Replanner:
    nothing: Any = SimpleNamespace(coordinators=[])
    given: dict[str, Any] = {
        "running": nothing,
        "measurements": nothing,
        "settings": lambda: SimpleNamespace(replan="auto", layer_strategy="auto"),
        "best_plan": nothing,
        "predicted_ms": nothing,
        "move": nothing,
        "calibrate": nothing,
    }
    return Replanner(workers, EventBus(), **{**given, **parts})  # type: ignore[arg-type]


def test_what_workers_take_is_planned_with_as_soon_as_it_is_known_again() -> None:
    """As with tokens that take 76 to 96 ms: an answer in which the waits were measured was not a usual one, then
    they are measured in one that takes as long as the others."""
    planned: list[str] = []
    known: dict[str, Any] = {"ms": 92.0, "shares": None}
    plan = SimpleNamespace(shards=(), workers=(), predicted_token_ms=None)

    def best_plan(_: object) -> object:
        planned.append("")
        return plan

    coordinator: Any = SimpleNamespace(plan=plan, base_url="http://127.0.0.1:1", model="m")
    route = SimpleNamespace(model_path="m", backend="sharded", modelfile=SimpleNamespace(of_engine={}))
    replanner = replanner_over(
        SimpleNamespace(refresh=lambda: asyncio.sleep(0)),
        running=SimpleNamespace(coordinators=[coordinator], route_of=lambda _: route),
        measurements=SimpleNamespace(
            meaningful_ms=lambda _: known["ms"],
            shares=lambda _: known["shares"],
            slow_workers=lambda _: [],
            is_unexplained=lambda _: False,
        ),
        best_plan=best_plan,
        predicted_ms=lambda _: known["ms"],
    )

    def plans_after_answer(**now: Any) -> int:
        known.update(now)
        planned.clear()
        run(replanner._check(coordinator, after_answers=1))
        return len(planned)

    assert plans_after_answer() == 1
    assert plans_after_answer(ms=95.0) == 0, "nothing is known that was not known before"
    assert plans_after_answer(shares={SLOW: 0.8}) == 1
    assert plans_after_answer(ms=93.0) == 0
    assert plans_after_answer(shares={SLOW: 0.8}) == 1, "they were measured again"
    assert plans_after_answer(ms=120.0) == 1


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
    replanner = replanner_over(workers, calibrate=calibrate)

    async def recheck() -> None:
        for _ in range(2):  # it is found slow by two answers
            replanner._recheck_later([SLOW])
        await asyncio.gather(*replanner._tasks)

    monkeypatch.setattr(replanning.asyncio, "sleep", sleep_quickly)
    run(recheck())

    first = replanning.RECHECK_S
    assert slept == [first, 2 * first, 2 * first, 4 * first]
    assert calibrated == [SLOW, SLOW], "also after a calibration that failed"
