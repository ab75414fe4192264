"""When the layout of a model is computed again, and when a worker is measured again that was left as slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import plan_from_counts
from sollol_nb.llama_cpp.coordinators import replanning
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.coordinators.replanning import Replanner
from sollol_nb.runtime.events import Event, EventBus, EventKind
from tests.support.engines import eventually, run
from tests.support.layer_plans import GB, TWELVE, workers

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


class Planned:
    """A replanner of one running model whose plans are counted, and what is known of the model."""

    def __init__(self) -> None:
        self.plans = self.refreshes = 0
        self.known: dict[str, Any] = {"ms": 92.0, "shares": None}
        plan = SimpleNamespace(shards=(), workers=(), predicted_token_ms=None)

        async def best_plan(_: object) -> object:
            self.plans += 1
            return plan

        self.coordinator: Any = SimpleNamespace(plan=plan, base_url="http://127.0.0.1:1", model="m")
        route = SimpleNamespace(model_path="m", backend="sharded", modelfile=SimpleNamespace(of_engine={}))
        self.replanner = replanner_over(
            SimpleNamespace(refresh=self.refresh),
            running=SimpleNamespace(coordinators=[self.coordinator], route_of=lambda _: route),
            measurements=SimpleNamespace(
                meaningful_ms=lambda _: self.known["ms"],
                shares=lambda _: self.known["shares"],
                slow_workers=lambda _: [],
                is_unexplained=lambda _: False,
            ),
            best_plan=best_plan,
            predicted_ms=lambda _: self.known["ms"],
        )

    async def refresh(self) -> None:
        self.refreshes += 1

    def plans_after_answer(self, **now: Any) -> int:
        self.known.update(now)
        self.plans = 0
        run(self.replanner._check(self.coordinator, after_answers=1))
        return self.plans


def test_what_workers_take_is_planned_with_as_soon_as_it_is_known_again() -> None:
    """As with tokens that take 76 to 96 ms: an answer in which the waits were measured was not a usual one, then
    they are measured in one that takes as long as the others."""
    planned = Planned()

    assert planned.plans_after_answer() == 1
    assert planned.plans_after_answer(ms=95.0) == 0, "nothing is known that was not known before"
    assert planned.plans_after_answer(shares={SLOW: 0.8}) == 1
    assert planned.plans_after_answer(ms=93.0) == 0
    assert planned.plans_after_answer(shares={SLOW: 0.8}) == 1, "they were measured again"
    assert planned.plans_after_answer(ms=120.0) == 1


def test_a_worker_that_is_added_while_others_are_probed_is_probed_before_a_plan() -> None:
    planned = Planned()

    async def refresh() -> None:
        planned.refreshes += 1
        if planned.refreshes == 1:  # as the event of another worker does
            planned.replanner._of(planned.coordinator).workers_changed = True

    planned.replanner._workers.refresh = refresh  # type: ignore[method-assign]
    assert planned.plans_after_answer() == 1
    assert planned.refreshes == 2


def test_a_model_that_runs_here_alone_is_planned_again_for_a_new_worker() -> None:
    planned = Planned()
    planned.plans_after_answer()
    planned.plans = 0
    added = Event(kind=EventKind.WORKER_ADDED, subject=SLOW, message="added")

    async def publish() -> None:
        planned.replanner.on_event(added)

    run(publish())
    eventually(lambda: planned.plans == 1, "it is planned again")


def test_a_model_that_cannot_be_planned_again_does_not_keep_the_others_from_it() -> None:
    async def replan(model: str) -> str:
        if model == "alone":
            raise WorkersUnavailableError("there is no worker to place layers on")
        return f"{model} stays as it is"

    running = [SimpleNamespace(model=name, plan=object()) for name in ("alone", "big")]
    pool: Any = SimpleNamespace(coordinators=running, _replan=replan)
    assert run(CoordinatorPool.replan(pool)) == [
        "alone: there is no worker to place layers on",
        "big stays as it is",
    ]


def test_a_model_that_has_the_best_layout_is_not_restarted_for_slow_tokens() -> None:
    def plan(predicted_ms: float) -> LayerPlan:
        found = plan_from_counts(TWELVE, workers(20 * GB), [13])
        return replace(found, strategy="latency_aware", predicted_token_ms=predicted_ms)

    async def refresh() -> None:
        pass

    async def best_for(*_: object) -> LayerPlan:
        return plan(1.76)

    coordinator = SimpleNamespace(plan=plan(1.3))
    pool: Any = SimpleNamespace(
        settings=None,
        _starting={("big.gguf", "sharded", "{}"): asyncio.Lock()},
        _sharded=lambda _: coordinator,
        _running=SimpleNamespace(
            route_of=lambda _: SimpleNamespace(
                model_path="big.gguf", backend="sharded", modelfile=SimpleNamespace(of_engine={})
            )
        ),
        _workers=SimpleNamespace(refresh=refresh),
        _suspects=lambda _: [],
        _starter=SimpleNamespace(planner=SimpleNamespace(best_for=best_for)),
        _predicted_ms=lambda _: 2.03,
    )
    assert run(CoordinatorPool._replan(pool, "big")) == (
        "big stays as it is: no other layout is clearly faster than 2.03 ms per token"
    )


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

    # The other coordinators of the process sleep as usual.
    quick = SimpleNamespace(sleep=sleep_quickly, create_task=asyncio.create_task)
    monkeypatch.setattr(replanning, "asyncio", quick)
    run(recheck())

    first = replanning.RECHECK_S
    assert slept == [first, 2 * first, 2 * first, 4 * first]
    assert calibrated == [SLOW, SLOW], "also after a calibration that failed"
