"""All coordinators of a router: the running one for a model, or a new one over free workers.

Two requests at once for a model that is not running start one coordinator. One that died is noticed, its workers
are released, and the next request starts another. Where workers or memory are short, the least recently used
idle coordinator makes room.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sollol_nb import config
from sollol_nb.coordinator import DEFAULT_SLOTS, Coordinator, CoordinatorSettings, exit_reason
from sollol_nb.errors import CoordinatorStartError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.events import EventBus
from sollol_nb.gguf_facts import ModelFacts, read_facts
from sollol_nb.layer_plan import LayerPlan, plan_layers
from sollol_nb.routing import DISTRIBUTED, Route
from sollol_nb.toolchain import Engine, ensure_engine
from sollol_nb.units import format_bytes
from sollol_nb.workers import Workers, WorkerStatus

DEFAULT_WORKERS = 3
MAX_DEFAULT_CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How coordinators are started. See `HybridRouter` for the meaning of each."""

    num_rpc_backends: int | None = None
    auto_discover_rpc: bool = True
    auto_setup_rpc: bool = False
    coordinator_timeout_s: float = 1200.0
    coordinator_port: int = config.DEFAULT_COORDINATOR_PORT
    rpc_port: int = config.DEFAULT_RPC_PORT
    layer_strategy: str = "memory_aware"
    context_tokens: int | None = None
    slots: int = DEFAULT_SLOTS
    llama_cpp: Path | None = None


class CoordinatorPool:
    """Starts, keeps and stops coordinators. Lives on the I/O loop."""

    def __init__(self, settings: PoolSettings, workers: Workers, events: EventBus) -> None:
        self.settings = settings
        self._workers = workers
        self._events = events
        self._running: dict[tuple[str, str], Coordinator] = {}
        self._starting: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._claiming = asyncio.Lock()  # choosing workers and holding them is one step
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings = 0

    @property
    def coordinators(self) -> list[Coordinator]:
        """The running ones, the most recently used last."""
        return sorted(
            (one for one in self._running.values() if one.is_running()), key=lambda one: one.last_used_at
        )

    async def engine(self) -> Engine:
        """The llama.cpp binaries: found, or installed on first need, with progress told as events."""

        def tell(step: str, share: float | None) -> None:
            words = step if share is None else f"{step}: {share:.0%}"
            self._events.publish("engine.building", "llama.cpp", words, share=share)

        return await asyncio.to_thread(ensure_engine, self.settings.llama_cpp, progress=tell)

    async def get(self, route: Route) -> tuple[Coordinator, float | None]:
        """The running coordinator for a route, started if there is none.

        Returns:
            The coordinator, and the milliseconds waited for its start; None if it was running.

        Raises:
            ModelFileError, ModelDoesNotFitError, WorkersUnavailableError, CoordinatorError, EngineError: why not.
        """
        assert route.model_path is not None
        key = (str(route.model_path), route.backend)
        began = time.perf_counter()
        coordinator = self._running.get(key)
        if coordinator is not None and coordinator.is_running():
            return coordinator, None
        async with self._starting[key]:
            coordinator = self._running.get(key)
            if coordinator is not None and coordinator.is_running():  # another request has started it meanwhile
                return coordinator, (time.perf_counter() - began) * 1000
            if coordinator is not None:
                await self._forget(coordinator)
            coordinator = await self._start(route)
            self._running[key] = coordinator
            self._watch(coordinator)
            return coordinator, (time.perf_counter() - began) * 1000

    async def stop(self, model: str | None = None) -> list[str]:
        """Stop the coordinators of a model, or all. Returns the models that were stopped."""
        chosen = [one for one in self._running.values() if model is None or one.model == model]
        for coordinator in chosen:
            await self._forget(coordinator)
        return [one.model for one in chosen]

    async def close(self) -> None:
        """Stop all coordinators, also those that are being started."""
        self._closings += 1
        await self.stop()

    async def _start(self, route: Route) -> Coordinator:
        assert route.model_path is not None
        closings = self._closings
        engine = await self.engine()
        facts = await asyncio.to_thread(read_facts, route.model_path)
        context_tokens = self.settings.context_tokens or min(facts.context_length, MAX_DEFAULT_CONTEXT_TOKENS)
        if route.backend == DISTRIBUTED:
            async with self._claiming:
                plan, devices = await self._plan_and_hold(route, facts, engine, context_tokens)
        else:
            await self._make_room_here(facts.file_bytes)
            plan, devices = None, {}
        layers = "/".join(map(str, plan.unit_counts)) if plan else ""
        where = f"over {len(plan.endpoints)} workers, layers {layers}" if plan else "on this machine"
        self._events.publish("coordinator.starting", route.model, f"starting {route.model} {where}")
        settings = CoordinatorSettings(
            route.model, route.model_path, facts, plan, context_tokens, self.settings.slots, devices
        )
        try:
            coordinator = await Coordinator.start(
                engine,
                settings,
                first_port=self.settings.coordinator_port,
                timeout_s=self.settings.coordinator_timeout_s,
            )
        except BaseException as error:
            if plan:
                self._workers.release(plan.endpoints)
            self._events.publish("coordinator.failed", route.model, str(error) or "the start was cancelled")
            raise
        if self._closings != closings:
            await coordinator.stop()
            self._workers.release(coordinator.rpc_backends)
            raise CoordinatorStartError(f"the router was closed while {route.model} was starting; ask again")
        self._events.publish(
            "coordinator.ready",
            route.model,
            f"{route.model} is ready at {coordinator.base_url} after {coordinator.load_ms / 1000:.1f} s",
            load_ms=coordinator.load_ms,
        )
        for difference in coordinator.placement_differences:
            self._events.publish("coordinator.placed_otherwise", route.model, difference)
        return coordinator

    async def _plan_and_hold(
        self, route: Route, facts: ModelFacts, engine: Engine, context_tokens: int
    ) -> tuple[LayerPlan, dict[str, tuple[int, ...]]]:
        """Choose workers, plan and lease; idle coordinators make room where free workers do not suffice."""
        elsewhere: set[str] = set()  # leased by another router or kernel in the meantime
        while True:
            free = await self._free_workers(engine, elsewhere)
            try:
                if not free:
                    raise WorkersUnavailableError(
                        no_workers_words(route.model, self._workers.statuses(), elsewhere)
                    )
                plan = self._plan_over(free, facts, context_tokens)
            except (WorkersUnavailableError, ModelDoesNotFitError):
                if await self._stop_least_recently_used(lambda one: bool(one.rpc_backends), route.model):
                    continue
                raise
            held = self._workers.hold(plan.endpoints, route.model)
            if len(held) == len(plan.endpoints):
                return plan, {one.endpoint: one.probe.device_free_bytes for one in free if one.probe}
            self._workers.release(held)
            elsewhere |= set(plan.endpoints) - set(held)

    def _plan_over(self, free: list[WorkerStatus], facts: ModelFacts, context_tokens: int) -> LayerPlan:
        """The plan over `num_rpc_backends` of these workers; by default over three, or as many as it takes."""
        count = min(self.settings.num_rpc_backends or DEFAULT_WORKERS, len(free))
        while True:
            try:
                return plan_layers(
                    facts,
                    [worker.capacity for worker in free[:count]],
                    strategy=self.settings.layer_strategy,
                    context_tokens=context_tokens,
                )
            except ModelDoesNotFitError:
                # Each worker costs a round trip per token, so more are only taken where memory asks for them.
                if self.settings.num_rpc_backends is not None or count == len(free):
                    raise
                count += 1

    async def _free_workers(self, engine: Engine, elsewhere: Collection[str]) -> list[WorkerStatus]:
        """The free workers that are not leased elsewhere; discovered and started as far as allowed."""
        wanted = self.settings.num_rpc_backends
        enough = wanted or (1 if self._workers.has_given else DEFAULT_WORKERS)

        def free() -> list[WorkerStatus]:
            statuses = self._workers.statuses()
            return [one for one in statuses if one.state == "free" and one.endpoint not in elsewhere]

        await self._workers.refresh()
        if len(free()) < (wanted or 1) and self.settings.auto_discover_rpc and await self._workers.discover():
            await self._workers.refresh()
        # More workers on this machine bring no more memory: those that another coordinator holds count too.
        missing = min(enough - len(free()), (wanted or DEFAULT_WORKERS) - self._workers.running_local)
        if missing > 0 and self.settings.auto_setup_rpc:
            await self._workers.start_local(engine, missing, first_port=self.settings.rpc_port)
        return free()

    async def _make_room_here(self, needed_bytes: int) -> None:
        """End idle coordinators that run on this machine while its memory is short."""
        while psutil.virtual_memory().available < needed_bytes:
            if not await self._stop_least_recently_used(lambda one: one.plan is None, format_bytes(needed_bytes)):
                return  # the engine will say what it lacks

    async def _stop_least_recently_used(self, eligible: Callable[[Coordinator], bool], needed_for: str) -> bool:
        idle = [
            one for one in self.coordinators if eligible(one) and not one.gate.running and not one.gate.waiting
        ]
        if not idle:
            return False
        self._events.publish(
            "coordinator.made_room",
            idle[0].model,
            f"stopping {idle[0].model} (idle) to make room for {needed_for}",
        )
        await self._forget(idle[0])
        return True

    def _watch(self, coordinator: Coordinator) -> None:
        async def released_at_end() -> None:
            report = await coordinator.wait_ended()
            if coordinator in self._running.values():  # it ended by itself
                reason = exit_reason(report.tail) or f"exit code {report.code}"
                self._events.publish("coordinator.lost", coordinator.model, f"{coordinator.model} ended: {reason}")
                await self._forget(coordinator)

        self._in_background(released_at_end())

    async def _forget(self, coordinator: Coordinator) -> None:
        for key in [key for key, one in self._running.items() if one is coordinator]:
            del self._running[key]

        async def stopped_and_released() -> None:
            await coordinator.stop()
            self._workers.release(coordinator.rpc_backends)
            self._events.publish("coordinator.stopped", coordinator.model, f"{coordinator.model} is stopped")

        # Whoever waits for this may be cancelled; the workers must be released all the same.
        await asyncio.shield(self._in_background(stopped_and_released()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def no_workers_words(model: str, statuses: list[WorkerStatus], elsewhere: Collection[str] = ()) -> str:
    """Why no worker can be used, and what to run."""
    what_to_do = (
        "start some here with `%sollol_cluster start 3` (or auto_setup_rpc=True), or on each machine "
        "`ggml-rpc-server -H <its address> -p 50052`, then name them in rpc_backends= or RPC_BACKENDS"
    )
    if not statuses:
        return f"{model} needs RPC workers and none is known; {what_to_do}"
    details = [
        f"{one.endpoint} is leased by another router or kernel of yours"
        if one.endpoint in elsewhere
        else one.detail
        for one in statuses
    ]
    seen = "; ".join(details[:5]) + (" ..." if len(statuses) > 5 else "")
    return f"{model} needs RPC workers and none of {len(statuses)} is free: {seen}; {what_to_do}"
