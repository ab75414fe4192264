"""All coordinators of a router: the running one for a model, an adopted one, or a new one over free workers.

Two requests at once for a model that is not running start one coordinator, also when they come from two kernels.
One that died is noticed, and the next request plans again over the workers that are left. Where workers or memory
are short, the least recently used idle coordinator makes room.

A coordinator that runs already for the same model and settings, started by another kernel or one that has been
restarted, is adopted instead of loading the model once more.

What tokens took on each layout is remembered, so that the time of a token on another layout can be told.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from sollol_nb.errors import ConfigError, CoordinatorStartError, ModelDoesNotFitError
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.token_time import TokenTime, WorkerSpeeds, parts_of, predict
from sollol_nb.layers.what_if import Forecast, forecast, without_layout
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.start import CoordinatorStarter, PoolSettings
from sollol_nb.llama_cpp.engine.find import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import code_words, exit_reason
from sollol_nb.llama_cpp.workers.choice import check_free
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import Route
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import Gate
from sollol_nb.text.tables import format_bytes

LOOK_INTERVAL_S = 1.0
"""How often idle coordinators are looked at: whether their workers are still connected."""
SECOND_LOOK_S = 0.1
_Key = tuple[str, str]
"""Model file and backend."""


class CoordinatorPool:
    """Starts, keeps and stops coordinators. Lives on the I/O loop."""

    def __init__(self, settings: PoolSettings, workers: Workers, events: EventBus) -> None:
        self._workers = workers
        self._events = events
        self._running: dict[_Key, Coordinator] = {}
        # A gate outlives its coordinator: who waits for the model keeps the place when it starts anew.
        self._gates: dict[_Key, Gate] = {}
        self._lost: dict[_Key, frozenset[str]] = {}
        self._starting: defaultdict[_Key, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._routes: dict[_Key, Route] = {}
        self._measured = TokenMeasurements(events)
        self._starter = CoordinatorStarter(
            settings, workers, events, self._make_room, self._make_room_here, self.predict
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings = 0

    @property
    def settings(self) -> PoolSettings:
        """How coordinators are started."""
        return self._starter.settings

    @settings.setter
    def settings(self, settings: PoolSettings) -> None:
        self._starter.settings = settings

    @property
    def coordinators(self) -> list[Coordinator]:
        """The running ones, the most recently used last."""
        return sorted(
            (one for one in self._running.values() if one.is_running()), key=lambda one: one.last_used_at
        )

    async def engine(self) -> Engine:
        """The llama.cpp binaries: found, or installed on first need, with progress told as events."""
        return await self._starter.engine()

    async def get(self, route: Route) -> tuple[Coordinator, float | None]:
        """The running coordinator for a route, adopted or started if this router has none.

        Returns:
            The coordinator, and the milliseconds waited for its start; None if it was running.

        Raises:
            ModelFileError, ModelDoesNotFitError, WorkersUnavailableError, CoordinatorError, EngineError: why not.
        """
        key = _key(route)
        began = time.perf_counter()
        coordinator = self._running.get(key)
        if coordinator is not None and coordinator.is_running():
            return coordinator, None
        async with self._starting[key]:
            coordinator = self._running.get(key)
            if coordinator is not None and coordinator.is_running():  # another request has started it meanwhile
                return coordinator, (time.perf_counter() - began) * 1000
            lost: frozenset[str] = frozenset()
            if coordinator is not None:
                await self._forget(coordinator)
                lost = await self._workers.look_for_lost(coordinator.rpc_backends)
            self._lost[key] = lost
            coordinator = await self._start(route, lost)
            return coordinator, (time.perf_counter() - began) * 1000

    async def lay_out(self, model: str, layout: Mapping[str, int]) -> Coordinator:
        """Start the coordinator of a model anew, with so many units on each worker; answers go on over it.

        Args:
            model: one that runs sharded.
            layout: units of each worker (its endpoint), in the order of their layers. 0 leaves it out.

        Raises:
            ConfigError: no sharded coordinator of this router runs the model, or this is no layout of it.
            ModelDoesNotFitError: a worker's memory does not hold what it would get; the running one goes on.
            WorkersUnavailableError: a worker is not free; the running one goes on. Or it was taken or lost while
                the new one started.
            CoordinatorError: the new one could not be started; the old one has ended.
        """
        async with self._starting[self._key_of(self._sharded(model))]:
            coordinator = self._sharded(model)  # another, if it was laid out or started anew meanwhile
            foreseen = self.what_if(model, layout)
            if not foreseen.fits:
                raise ModelDoesNotFitError(f"{foreseen.shortage}; move layers to a worker with more memory")
            await self._check_free(model, foreseen.plan.endpoints, coordinator)
            before = "/".join(map(str, coordinator.plan.unit_counts)) if coordinator.plan else ""
            words = f"{model} is laid out anew: {foreseen.describe()}, instead of {before}"
            self._events.publish(EventKind.COORDINATOR_PLANNED, model, words)
            route = self._routes[self._key_of(coordinator)]
            await self._forget(coordinator)
            return await self._start(route, frozenset(), layout)

    async def _check_free(self, model: str, endpoints: Iterable[str], coordinator: Coordinator) -> None:
        """Refuse workers that are neither free nor this coordinator's, before it is ended for them."""
        others = [one for one in endpoints if one not in coordinator.rpc_backends]
        await self._workers.look_at(others)
        statuses = [one for one in self._workers.statuses() if one.endpoint in others]
        check_free(model, statuses)

    def _key_of(self, coordinator: Coordinator) -> _Key:
        return next(key for key, one in self._running.items() if one is coordinator)

    def what_if(self, model: str, layout: Mapping[str, int]) -> Forecast:
        """What another layout of a running model would need and bring.

        Args:
            model, layout: as in `lay_out`; whether it fits is told in the forecast.

        Raises:
            ConfigError: no sharded coordinator of this router runs the model, or this is no layout of it.
        """
        coordinator = self._sharded(model)
        assert coordinator.plan is not None
        capacities = {one.endpoint: one.capacity for one in self._workers.statuses()}
        unknown = [endpoint for endpoint in layout if endpoint not in capacities]
        if unknown:
            known = ", ".join(capacities) or "none"
            raise ConfigError(f"{unknown[0]} is not a known worker; known are {known}")
        return forecast(
            coordinator.settings.facts,
            without_layout(coordinator.plan, [capacities[endpoint] for endpoint in layout]),
            list(layout.values()),
            context_tokens=coordinator.settings.context_tokens,
            speeds=self._speeds(coordinator.settings.model_path),
        )

    def predict(self, model_path: Path, plan: LayerPlan) -> TokenTime:
        """The time of a token under a plan for a model file, from what its tokens took so far."""
        return predict(self._speeds(model_path), parts_of(plan, self._workers.round_trips_ms))

    def token_ms(self, coordinator: Coordinator) -> float | None:
        """Milliseconds of a token of one answer alone, as measured; None before the first token."""
        return self._measured.token_ms(coordinator)

    def _speeds(self, model_path: Path) -> WorkerSpeeds | None:
        return self._measured.speeds(model_path, self.coordinators, self._workers.round_trips_ms)

    def _sharded(self, model: str) -> Coordinator:
        found = [one for one in self.coordinators if one.model == model and one.plan is not None]
        if not found:
            running = ", ".join(one.model for one in self.coordinators if one.plan is not None) or "none"
            raise ConfigError(f"no coordinator of this router shards {model}; running are {running}")
        return found[-1]

    async def _start(
        self, route: Route, lost: frozenset[str], layout: Mapping[str, int] | None = None
    ) -> Coordinator:
        closings = self._closings
        coordinator = await self._starter.start(route, self.gate(route), lost, layout=layout)
        if self._closings != closings:
            await coordinator.stop_unless_shared()
            raise CoordinatorStartError(f"the router was closed while {route.model} was starting; ask again")
        self._running[_key(route)] = coordinator
        self._routes[_key(route)] = route
        self._watch(coordinator)
        return coordinator

    async def others(self) -> list[tuple[Coordinator, str]]:
        """Coordinators of this user's other kernels, only to be shown, and who started them."""
        mine = {one.base_url for one in self._running.values()}
        found = []
        for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
            if entry.about.get("url") not in mine and (other := await Coordinator.glance(entry)) is not None:
                found.append((other, registry.owner_words(entry.about)))
        return found

    def lost_workers(self, route: Route) -> frozenset[str]:
        """Workers that were found lost when the coordinator of a route was last started anew."""
        return self._lost.get(_key(route), frozenset())

    def tell_continued(self, route: Route, token_count: int, coordinator: Coordinator) -> None:
        """An answer goes on over this coordinator, after so many tokens from one that was lost."""
        plan = coordinator.plan
        layers = f" over layers {'/'.join(map(str, plan.unit_counts))}" if plan else ""
        words = f"an answer of {route.model} goes on after {token_count} tokens at {coordinator.base_url}{layers}"
        self._events.publish(EventKind.ANSWER_CONTINUED, route.model, words)

    def gate(self, route: Route) -> Gate:
        """The gate before the coordinator of a route, which it keeps when it starts anew."""
        return self._gates.setdefault(_key(route), Gate(self.settings.slots))

    async def stop(self, model: str | None = None) -> list[str]:
        """Stop the coordinators of a model, or all. Returns the models that were stopped."""
        chosen = [one for one in self._running.values() if model is None or one.model == model]
        for coordinator in chosen:
            await self._forget(coordinator)
        return [one.model for one in chosen]

    async def close(self) -> None:
        """Stop all coordinators that no other kernel uses, also those that are being started."""
        self._closings += 1
        for coordinator in list(self._running.values()):
            await self._forget(coordinator, unless_shared=True)

    async def let_go(self) -> None:
        """End the connections to all coordinators; they live on for their keep_alive."""
        self._closings += 1
        running, self._running = self._running, {}
        for coordinator in running.values():
            await coordinator.let_go()

    async def _make_room_here(self, needed_bytes: int) -> None:
        """End idle coordinators that run on this machine while its memory is short."""
        while psutil.virtual_memory().available < needed_bytes:
            if not await self._stop_least_recently_used(lambda one: one.plan is None, format_bytes(needed_bytes)):
                return  # the engine will say what it lacks

    async def _make_room(self, model: str) -> bool:
        """Free workers: of a coordinator that an ended kernel left, else of the least recently used idle one."""
        mine = {one.base_url for one in self._running.values()}
        for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
            # One that is still loading may be so new that its kernel is not connected to it yet.
            if not entry.workers or not entry.about.get("load_ms") or entry.about.get("url") in mine:
                continue
            left = await Coordinator.attach(entry)
            if left is not None and await left.stop_unless_shared():
                words = f"stopped {left.model}, left by an ended kernel, to make room for {model}"
                self._events.publish(EventKind.COORDINATOR_MADE_ROOM, left.model, words)
                return True
        return await self._stop_least_recently_used(lambda one: bool(one.rpc_backends), model)

    async def _stop_least_recently_used(self, eligible: Callable[[Coordinator], bool], needed_for: str) -> bool:
        idle = [one for one in self.coordinators if eligible(one) and one.is_idle]
        if not idle:
            return False
        self._events.publish(
            EventKind.COORDINATOR_MADE_ROOM,
            idle[0].model,
            f"stopping {idle[0].model} (idle) to make room for {needed_for}",
        )
        await self._forget(idle[0])
        return True

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, coordinator: Coordinator) -> None:
        async def forgotten_at_end() -> None:
            report = await coordinator.wait_ended()
            self._measured.keep(coordinator, self._workers.round_trips_ms)
            if coordinator not in self._running.values():
                return
            if report.why and report.code is not None:  # it was ended, by its keep_alive or by someone
                words = f"{coordinator.model} was ended: {report.why}"
                self._events.publish(EventKind.COORDINATOR_STOPPED, coordinator.model, words)
            else:
                reason = exit_reason(report.tail) or code_words(report.code)
                self._events.publish(
                    EventKind.COORDINATOR_LOST, coordinator.model, f"{coordinator.model} ended: {reason}"
                )

        async def looked_at() -> None:
            while coordinator.is_running():
                await asyncio.sleep(LOOK_INTERVAL_S)
                if not coordinator.is_idle or not coordinator.is_running():
                    continue  # a request notices by itself
                broken = await asyncio.to_thread(coordinator.broken_links)
                if broken:  # a list of connections that change while it is read may lack one
                    await asyncio.sleep(SECOND_LOOK_S)
                    broken = await asyncio.to_thread(coordinator.broken_links)
                if broken and coordinator.is_running():
                    words = f"{coordinator.model} lost its connection to {', '.join(broken)}"
                    self._events.publish(EventKind.COORDINATOR_LOST, coordinator.model, words)
                    await self._forget(coordinator)
                    await self._workers.look_for_lost(coordinator.rpc_backends)

        self._in_background(forgotten_at_end())
        if coordinator.rpc_backends:
            self._in_background(looked_at())

    async def _forget(self, coordinator: Coordinator, *, unless_shared: bool = False) -> None:
        was_running = coordinator.is_running()
        known = [key for key, one in self._running.items() if one is coordinator]
        for key in known:
            del self._running[key]

        async def stopped() -> None:
            if unless_shared:
                await coordinator.stop_unless_shared()
            else:
                await coordinator.stop()
            if known and was_running:
                self._events.publish(
                    EventKind.COORDINATOR_STOPPED, coordinator.model, f"{coordinator.model} is stopped"
                )

        # Whoever waits for this may be cancelled; the engine must be ended all the same.
        await asyncio.shield(self._in_background(stopped()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _key(route: Route) -> _Key:
    return str(route.model_path), route.backend
