"""It stays right: what a better layout of a running model would bring, said, and moved to where that is wanted.

After an answer whose tokens took another time than before, and after a change of the known workers, the best plan
is computed again, over the workers that the coordinator holds and those that are free. Where it is clearly faster,
that is published with its reason (the worker that has become slow, where that is known), and with `replan="auto"`
the model moves there between two requests (`layers/replan.py` decides when).

A worker that was left because it was slow is idle then, and nothing shows that it has recovered. With "auto" it is
calibrated again in idle moments, less and less often while it stays slow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.layers.plan import GIVEN, LayerPlan
from sollol_nb.layers.replan import (
    MIN_GAIN,
    Layout,
    MoveHistory,
    Offer,
    after_answer,
    after_failed_move,
    after_judgement,
    after_move,
    are_alike,
    layout_of,
    reason_to_stay,
)
from sollol_nb.layers.strategies import SPLITS
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import SLOWER, SlowWorker, TokenMeasurements
from sollol_nb.llama_cpp.coordinators.running import RouteKey, RunningCoordinators, key_of
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.io_loop import submit

logger = logging.getLogger(__name__)

SAID_AFTER = 2
"""Answers one after the other, after which there was an offer."""
CHANGED_TIME = 0.1
"""Share by which tokens must take another time for the plan to be computed again."""
STILL_BETTER = 0.1
"""An offer that was said is withdrawn below this gain."""
RATE_OVER_S = 600.0
RECHECK_S, LONGEST_RECHECK_S = 60.0, 3600.0
NAMED_WORKERS = 4

_WORKERS_CHANGED = (
    EventKind.WORKER_ADDED,
    EventKind.WORKER_DISCOVERED,
    EventKind.WORKER_STARTED,
    EventKind.WORKER_ADOPTED,
    EventKind.WORKER_RETURNED,
    EventKind.WORKER_REMOVED,
    EventKind.WORKER_LOST,
    EventKind.WORKER_CALIBRATED,
    EventKind.LINK_READY,
    EventKind.LINK_LOST,
    EventKind.COORDINATOR_STOPPED,
    EventKind.COORDINATOR_LOST,
    EventKind.COORDINATOR_MADE_ROOM,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What a better layout of a running model would bring.

    Attributes:
        text: one line.
        layout: the better one; empty where the workers have to be measured first.
        slow: endpoints of workers that have become slow.
    """

    text: str
    layout: Layout = ()
    slow: tuple[str, ...] = ()


@dataclass(slots=True)
class _Watched:
    """What is known about one running model, beyond its measurements."""

    history: MoveHistory
    url: str
    planned_ms: float | None = None  # time per token when its plan was last computed again
    planned_shares: Mapping[str, float] | None = None  # of its workers, then
    workers_changed: bool = True
    advice: Advice | None = None
    tokens: deque[tuple[float, int]] = field(default_factory=deque)  # of its answers: when, and how many


class Replanner:
    """Watches the layouts of a router's coordinators. Lives on the I/O loop.

    Args:
        settings: those of the pool, now.
        best_plan: the fastest plan for a running coordinator, over its workers and free ones; raises SollolError.
        predicted_ms: the time per token of a running coordinator, from the same speeds.
        move: ends a coordinator if nobody uses it, and starts its model anew with the best plan; whether it did.
        calibrate: measures workers anew.
    """

    def __init__(
        self,
        workers: Workers,
        events: EventBus,
        running: RunningCoordinators,
        measurements: TokenMeasurements,
        *,
        settings: Callable[[], PoolSettings],
        best_plan: Callable[[Coordinator], Awaitable[LayerPlan]],
        predicted_ms: Callable[[Coordinator], float | None],
        move: Callable[[Coordinator], Awaitable[bool]],
        calibrate: Callable[[Sequence[str]], Awaitable[object]],
    ) -> None:
        self._workers = workers
        self._events = events
        self._running = running
        self._measurements = measurements
        self._settings = settings
        self._best_plan = best_plan
        self._predicted_ms = predicted_ms
        self._move = move
        self._calibrate = calibrate
        self._watched: dict[RouteKey, _Watched] = {}
        self._rechecks: dict[str, float] = {}  # of slow workers: seconds until the next one
        self._tasks: set[asyncio.Task[None]] = set()
        self._checking: set[RouteKey] = set()

    def close(self) -> None:
        """End all work in the background."""
        for task in self._tasks:
            task.cancel()

    def advice_for(self, coordinator: Coordinator) -> Advice | None:
        """What was last found for a running coordinator."""
        watched = self._watched.get(key_of(self._running.route_of(coordinator)))
        return watched.advice if watched is not None and watched.url == coordinator.base_url else None

    def on_event(self, event: Event) -> None:
        """Look at the layouts that an event may concern. Call it on the I/O loop."""
        if self._settings().replan == "off":
            return
        if event.kind == EventKind.REQUEST_FINISHED:
            for coordinator in self._running.coordinators:
                if coordinator.plan is not None and coordinator.base_url == event.data.get("place"):
                    watched = self._of(coordinator)
                    watched.tokens.append((time.monotonic(), event.data.get("tokens") or 0))
                    if event.data.get("token_ms"):
                        submit(self._check(coordinator, after_answers=1))
        elif event.kind in _WORKERS_CHANGED:
            for coordinator in self._running.coordinators:
                if coordinator.plan is not None:
                    self._of(coordinator).workers_changed = True
                    submit(self._check(coordinator, after_answers=0))

    def _of(self, coordinator: Coordinator) -> _Watched:
        """What is known about the model of a coordinator; another layout than the known one was not moved to."""
        assert coordinator.plan is not None
        key, layout = key_of(self._running.route_of(coordinator)), layout_of(coordinator.plan)
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(MoveHistory(layout=layout), coordinator.base_url)
        if (watched.url, watched.history.layout) != (coordinator.base_url, layout):
            if not are_alike(watched.history.layout, layout):
                watched.history = replace(watched.history, before_ms=None, promised_ms=None)
            watched.history = replace(watched.history, layout=layout, confirmed=0)
            watched.url, watched.planned_ms, watched.workers_changed = coordinator.base_url, None, True
            watched.planned_shares = watched.advice = None
        return watched

    # --- looking ----------------------------------------------------------------------------------

    async def _check(self, coordinator: Coordinator, *, after_answers: int) -> None:
        if coordinator not in self._running.coordinators:
            return
        key = key_of(self._running.route_of(coordinator))
        if key in self._checking:
            return
        self._checking.add(key)
        try:
            await self._look(coordinator, self._of(coordinator), after_answers)
        except SollolError as error:  # there is no plan now, or a move has failed, which was published
            logger.info("no better layout for %s: %s", coordinator.model, error)
        except Exception:
            logger.exception("could not look for a better layout for %s", coordinator.model)
        finally:
            self._checking.discard(key)

    async def _look(self, coordinator: Coordinator, watched: _Watched, after_answers: int) -> None:
        measured_ms = self._measurements.meaningful_ms(coordinator)
        if measured_ms is not None:
            watched.history = after_judgement(watched.history, measured_ms)
        elif after_answers:
            return
        if not _is_worth_planning(watched, measured_ms, self._measurements.shares(coordinator)):
            return
        while watched.workers_changed:  # also while they were probed
            watched.workers_changed = False
            await self._workers.refresh()  # a worker that was just added has not been probed yet
            if coordinator not in self._running.coordinators:
                return
        watched.planned_ms = self._measurements.meaningful_ms(coordinator)
        watched.planned_shares = self._measurements.shares(coordinator)
        slow = self._measurements.slow_workers(coordinator)
        offer, plan = await self._offer(coordinator, watched)
        if coordinator not in self._running.coordinators:
            return
        if after_answers:
            watched.history = after_answer(watched.history, offer)
        self._say(coordinator, watched, offer, plan, slow, is_confirmed=not after_answers)
        self._recheck_later([worker.endpoint for worker in slow])
        if offer is None or plan is None or not self._may_move(coordinator):
            return
        reason = reason_to_stay(watched.history, offer, time.monotonic())
        if reason:
            logger.debug("%s stays: %s", coordinator.model, reason)
        elif coordinator.is_idle:
            await self._take(coordinator, watched, offer)

    async def _take(self, coordinator: Coordinator, watched: _Watched, offer: Offer) -> None:
        history = watched.history  # an answer on the new coordinator may change it before the move is noted
        try:
            if await self._move(coordinator):
                watched.history = after_move(history, offer, time.monotonic())
        except SollolError:
            watched.history = after_failed_move(history, time.monotonic())
            raise

    async def _offer(self, coordinator: Coordinator, watched: _Watched) -> tuple[Offer | None, LayerPlan | None]:
        """The best layout, if it is another one; with the plan that it is from."""
        plan, now_ms = await self._best_plan(coordinator), self._predicted_ms(coordinator)
        if plan.predicted_token_ms is None or now_ms is None or plan.strategy in SPLITS:
            return None, None
        layout = layout_of(plan)
        if coordinator.plan is None or layout == layout_of(coordinator.plan):
            return None, None
        offer = Offer(
            layout=layout,
            now_ms=now_ms,
            then_ms=plan.predicted_token_ms,
            load_s=coordinator.load_ms / 1000,
            tokens_per_s=_rate(watched.tokens, time.monotonic()),
        )
        return offer, plan

    def _may_move(self, coordinator: Coordinator) -> bool:
        """Whether it moves unasked: not from a layout or strategy that somebody has chosen."""
        settings = self._settings()
        is_chosen = coordinator.plan is None or coordinator.plan.strategy == GIVEN
        return settings.replan == "auto" and not is_chosen and settings.layer_strategy not in SPLITS

    # --- saying -----------------------------------------------------------------------------------

    def _say(
        self,
        coordinator: Coordinator,
        watched: _Watched,
        offer: Offer | None,
        plan: LayerPlan | None,
        slow: Sequence[SlowWorker],
        *,
        is_confirmed: bool,
    ) -> None:
        """Publish an offer that is confirmed, once for the same layout; withdraw one that is none any more."""
        before = watched.advice
        if offer is None or plan is None or offer.gain < (STILL_BETTER if before else MIN_GAIN):
            watched.advice = self._unexplained(coordinator)
        elif before or is_confirmed or watched.history.confirmed >= SAID_AFTER:
            names = tuple(worker.endpoint for worker in slow)
            watched.advice = Advice(
                text=self._describe(coordinator, offer, plan, slow), layout=offer.layout, slow=names
            )
        advice = watched.advice
        is_same = advice and before and before.slow == advice.slow and are_alike(before.layout, advice.layout)
        if advice is not None and not is_same:
            self._events.publish(
                EventKind.COORDINATOR_ADVICE,
                coordinator.model,
                advice.text,
                layout=[list(part) for part in advice.layout],
                slow=list(advice.slow),
            )

    def _describe(
        self, coordinator: Coordinator, offer: Offer, plan: LayerPlan, slow: Sequence[SlowWorker]
    ) -> str:
        names = [shard.worker for shard in plan.shards]
        where = f"over {', '.join(names)}" if len(names) <= NAMED_WORKERS else plan.describe_devices()
        counts = "/".join(map(str, plan.unit_counts))
        because = f"{coordinator.model} has a faster layout"
        if slow:
            name = self._workers.name_of(slow[0].endpoint)
            because = f"{name} takes {slow[0].factor:.1f} times as long as expected for {coordinator.model}"
        return (
            f"{because}: {counts} {where} would take {offer.then_ms:.3g} ms per token instead of "
            f"{offer.now_ms:.3g}; `%sollol_cluster replan` applies it"
        )

    def _unexplained(self, coordinator: Coordinator) -> Advice | None:
        """The advice where tokens are slow, and nobody knows which worker is."""
        if not self._measurements.is_unexplained(coordinator):
            return None
        text = (
            f"the tokens of {coordinator.model} take at least {SLOWER:g} times as long as predicted, and it is "
            "not known which worker is slow; `%sollol_cluster replan` measures the workers and applies the best "
            "layout"
        )
        return Advice(text=text)

    # --- looking again at slow workers ------------------------------------------------------------

    def _recheck_later(self, endpoints: Sequence[str]) -> None:
        """Calibrate slow workers again once they are free, if models move unasked."""
        for endpoint in endpoints:
            if self._settings().replan == "auto" and endpoint not in self._rechecks:
                self._rechecks[endpoint] = RECHECK_S
                self._in_background(self._recheck(endpoint))

    async def _recheck(self, endpoint: str) -> None:
        try:
            while self._settings().replan == "auto" and endpoint in self._workers.endpoints:
                await asyncio.sleep(self._rechecks[endpoint])
                if not all(coordinator.is_idle for coordinator in self._running.coordinators):
                    continue
                await self._workers.probe([endpoint])
                states = {worker.endpoint: worker.state for worker in self._workers.statuses()}
                if states.get(endpoint) == "held":
                    if not self._is_slow(endpoint):  # in use again
                        return
                elif states.get(endpoint) == "free":
                    self._rechecks[endpoint] = min(self._rechecks[endpoint] * 2, LONGEST_RECHECK_S)
                    try:
                        await self._calibrate([endpoint])
                    except SollolError as error:
                        logger.info("%s was not measured again: %s", endpoint, error)
        finally:
            self._rechecks.pop(endpoint, None)

    def _is_slow(self, endpoint: str) -> bool:
        return any(
            worker.endpoint == endpoint
            for coordinator in self._running.coordinators
            for worker in self._measurements.slow_workers(coordinator)
        )

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_worth_planning(watched: _Watched, measured_ms: float | None, shares: Mapping[str, float] | None) -> bool:
    """Whether anything has changed since the plan was last computed, or an offer is to be confirmed."""
    if watched.workers_changed or watched.history.confirmed or watched.advice is not None:
        return True
    if measured_ms is None or watched.planned_ms is None or shares is not watched.planned_shares:
        return True
    return abs(measured_ms / watched.planned_ms - 1) > CHANGED_TIME


def _rate(tokens: deque[tuple[float, int]], now_s: float) -> float:
    """Tokens generated per second lately, pauses included; forgets older ones."""
    while tokens and tokens[0][0] < now_s - RATE_OVER_S:
        tokens.popleft()
    seconds = now_s - tokens[0][0] if tokens else 0.0
    # The first answer ended when the time began.
    return sum(count for _, count in list(tokens)[1:]) / seconds if seconds > 0 else 0.0
