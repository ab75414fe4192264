"""Starting a coordinator: adopt the one that runs for the same model and settings, else choose workers and launch.

Workers are chosen and claimed under one lock for all kernels of this user (`registry.claims`), so that two kernels
that start at once get disjoint workers, or one adopts the other's coordinator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sollol_nb.errors import (
    CoordinatorError,
    CoordinatorStartError,
    ModelDoesNotFitError,
    WorkersUnavailableError,
)
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.layers.plan import GIVEN, LayerPlan, plan_from_counts
from sollol_nb.layers.token_time import TokenTime
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.load_progress import LoadProgress, told_loading
from sollol_nb.llama_cpp.coordinators.readiness import PortTakenError
from sollol_nb.llama_cpp.coordinators.settings import DEFAULT_SLOTS, CoordinatorSettings, file_identity
from sollol_nb.llama_cpp.engine.find import Engine, ensure_engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.choice import DEFAULT_WORKERS, check_free, no_workers_words, plan_over
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import DISTRIBUTED, Route
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import Gate
from sollol_nb.settings import config

MAX_DEFAULT_CONTEXT_TOKENS = 8192
MAX_CHANCES = 2
"""So often a start is tried again that failed for no lasting reason, with all its workers well."""
START_TRIES = 5
"""A start is tried again where a worker was lost while it loaded, or another program took the port."""


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
    keep_alive_s: float | None = 600.0
    keep_alive_of: Mapping[str, float | None] = field(default_factory=dict)

    def keep_alive(self, model: str) -> float | None:
        """Seconds that this model's coordinator lives without a request; None is for ever."""
        return self.keep_alive_of.get(model, self.keep_alive_s)


@dataclass(slots=True)
class _Start:
    """One start under way: what is wanted, and what was learned by failing."""

    route: Route
    gate: Gate
    engine: Engine
    facts: ModelFacts
    context_tokens: int
    wanted: Mapping[str, Any]
    first_port: int
    lost: frozenset[str]
    layout: Mapping[str, int] | None
    elsewhere: set[str] = field(default_factory=set)
    chances_left: int = MAX_CHANCES

    @property
    def model_path(self) -> Path:
        assert self.route.model_path is not None
        return self.route.model_path


class CoordinatorStarter:
    """Adopts or starts coordinators. Lives on the I/O loop.

    Args:
        settings: how; may be changed later, for the starts after that.
        make_room: frees workers for a model by ending an idle coordinator; False when there is none.
        make_room_here: frees so many bytes of this machine's memory, as far as idle coordinators hold it.
        predict: the time of a token under a plan for this model file, as far as it can be told.
    """

    def __init__(
        self,
        settings: PoolSettings,
        workers: Workers,
        events: EventBus,
        make_room: Callable[[str], Awaitable[bool]],
        make_room_here: Callable[[int], Awaitable[None]],
        predict: Callable[[Path, LayerPlan], TokenTime],
    ) -> None:
        self.settings = settings
        self._workers = workers
        self._events = events
        self._make_room = make_room
        self._make_room_here = make_room_here
        self._predict = predict
        self._claiming = asyncio.Lock()  # planning and holding workers is one step

    async def engine(self) -> Engine:
        """The llama.cpp binaries: found, or installed on first need, with progress told as events."""

        def tell(step: str, share: float | None) -> None:
            words = step if share is None else f"{step}: {share:.0%}"
            self._events.publish(EventKind.ENGINE_BUILDING, "llama.cpp", words, share=share)

        return await asyncio.to_thread(ensure_engine, self.settings.llama_cpp, progress=tell)

    async def start(
        self,
        route: Route,
        gate: Gate,
        lost: frozenset[str] = frozenset(),
        *,
        layout: Mapping[str, int] | None = None,
    ) -> Coordinator:
        """A coordinator for a route, ready to be asked.

        Args:
            gate: the gate that it gets.
            lost: workers that were just found lost, to be chosen last.
            layout: units of each worker, in the order of their layers, instead of a strategy's choice.

        Raises:
            ModelFileError, ModelDoesNotFitError, WorkersUnavailableError, CoordinatorError, EngineError: why not.
        """
        assert route.model_path is not None
        engine = await self.engine()
        facts = await asyncio.to_thread(read_facts, route.model_path)
        context_tokens = self.settings.context_tokens or min(facts.context_length, MAX_DEFAULT_CONTEXT_TOKENS)
        wanted = self._wanted(route, engine, context_tokens, layout)
        first_port = self.settings.coordinator_port
        start = _Start(route, gate, engine, facts, context_tokens, wanted, first_port, lost, layout)
        failed: BaseException | None = None
        for tries_left in reversed(range(START_TRIES)):
            coordinator: Coordinator | None = None
            try:
                coordinator = await self._adopt(start) or await self._launch(start)
                async with self._progress_told(route.model, coordinator):
                    await coordinator.until_ready(self.settings.coordinator_timeout_s)
            except BaseException as error:
                words = str(error) or "the start was cancelled"
                self._events.publish(EventKind.COORDINATOR_FAILED, route.model, words)
                if failed is not None and isinstance(error, WorkersUnavailableError | ModelDoesNotFitError):
                    raise type(error)(f"{failed}; {error}") from failed  # without the workers lost before
                failed = error
                if (
                    coordinator is None
                    or not tries_left
                    or not await self._worth_another_try(start, coordinator, error)
                ):
                    raise
            else:
                await self._tell_ready(route, coordinator)
                return coordinator
        raise AssertionError("the last try raises")

    def _progress_told(self, model: str, coordinator: Coordinator) -> AbstractAsyncContextManager[None]:
        def tell(progress: LoadProgress) -> None:
            self._events.report(EventKind.COORDINATOR_LOADING, model, progress.words, **progress.as_dict())

        return told_loading(coordinator.settings, coordinator.pid, coordinator.log_path, tell)

    async def _worth_another_try(self, start: _Start, coordinator: Coordinator, error: BaseException) -> bool:
        """Whether it can go better next time: on another port, without the lost workers, or by chance."""
        if isinstance(error, PortTakenError):
            start.first_port = coordinator.port + 1
            return True
        if not isinstance(error, CoordinatorError):
            return False
        if not coordinator.adopted:  # else its workers are for the one that started it to look at
            lost = await self._workers.look_for_lost(coordinator.rpc_backends)
            start.lost |= lost
            if lost:
                return True
        start.chances_left -= 1
        return isinstance(error, CoordinatorStartError) and error.may_pass and start.chances_left >= 0

    async def _tell_ready(self, route: Route, coordinator: Coordinator) -> None:
        if coordinator.adopted:
            await self._workers.take_over(coordinator.rpc_backends)
            kind, words = EventKind.COORDINATOR_ADOPTED, f"{route.model} runs already at {coordinator.base_url}"
        else:
            seconds = f"{coordinator.load_ms / 1000:.1f} s"
            kind, words = (
                EventKind.COORDINATOR_READY,
                f"{route.model} is ready at {coordinator.base_url} after {seconds}",
            )
        self._events.publish(kind, route.model, words, load_ms=coordinator.load_ms)
        for difference in coordinator.placement_differences:
            self._events.publish(EventKind.COORDINATOR_PLACED_OTHERWISE, route.model, difference)

    # --- adopting -------------------------------------------------------------------------------

    def _wanted(
        self, route: Route, engine: Engine, context_tokens: int, layout: Mapping[str, int] | None
    ) -> dict[str, Any]:
        """What a running coordinator must agree with to be used instead of a new one."""
        assert route.model_path is not None
        sharded = route.backend == DISTRIBUTED
        strategy, workers = self.settings.layer_strategy, self.settings.num_rpc_backends
        return {
            "model_file": file_identity(route.model_path),
            "engine": str(engine.server),
            "engine_version": engine.version,
            "backend": route.backend,
            "context_tokens": context_tokens,
            "slots": self.settings.slots,
            "strategy": (GIVEN if layout else strategy) if sharded else None,
            "wanted_workers": ([list(one) for one in layout.items()] if layout else workers) if sharded else None,
        }

    async def _adopt(self, start: _Start) -> Coordinator | None:
        """A coordinator for the same model and settings that another kernel started, or None."""
        for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
            if any(entry.about.get(name) != value for name, value in start.wanted.items()):
                continue
            if self._workers.has_given and not set(entry.workers) <= set(self._workers.endpoints):
                continue  # this router was told which workers to use
            coordinator = await Coordinator.adopt(entry, gate=start.gate)
            if coordinator is None:
                continue
            if not entry.about.get("load_ms"):
                owner = registry.owner_words(entry.about)
                words = f"{start.route.model} is being loaded by {owner}; waiting for it"
                self._events.publish(EventKind.COORDINATOR_STARTING, start.route.model, words)
            return coordinator
        return None

    # --- launching ------------------------------------------------------------------------------

    async def _launch(self, start: _Start) -> Coordinator:
        """Plan, and start a coordinator that holds its workers; it is not ready yet.

        If another kernel was quicker with the same model, that one is adopted.
        """
        sharded = start.route.backend == DISTRIBUTED
        async with self._claiming:
            if not sharded:
                await self._make_room_here(start.facts.file_bytes)
            while True:
                try:
                    plan, devices = await self._plan(start) if sharded else (None, {})
                except (WorkersUnavailableError, ModelDoesNotFitError):
                    # Another kernel may have taken them a moment ago, for the same model.
                    if (running := await self._adopt(start)) is not None:
                        return running
                    raise
                settings = CoordinatorSettings(
                    start.route.model,
                    start.model_path,
                    start.facts,
                    plan,
                    start.context_tokens,
                    self.settings.slots,
                    devices,
                )
                async with registry.claims():
                    running = await self._adopt(start)
                    if running is not None:
                        return running
                    taken = set(registry.holders()) & set(plan.endpoints if plan else ())
                    if not taken:
                        return await self._launch_on_free_port(start, settings)
                start.elsewhere |= taken  # by another router or kernel in the meantime

    async def _launch_on_free_port(self, start: _Start, settings: CoordinatorSettings) -> Coordinator:
        model, plan = start.route.model, settings.plan
        layers = "/".join(map(str, plan.unit_counts)) if plan else ""
        where = f"over {len(plan.endpoints)} workers, layers {layers}" if plan else "on this machine"
        self._events.publish(EventKind.COORDINATOR_STARTING, model, f"starting {model} {where}")
        (port,) = free_ports(start.first_port, 1)
        return await Coordinator.launch(
            start.engine,
            settings,
            port=port,
            keep_alive_s=self.settings.keep_alive(model),
            about=start.wanted,
            gate=start.gate,
            holds=self._workers.entries_of(plan.endpoints) if plan else (),
        )

    # --- choosing workers -----------------------------------------------------------------------

    async def _plan(self, start: _Start) -> tuple[LayerPlan, dict[str, tuple[int, ...]]]:
        """Choose workers and plan; idle coordinators make room where free workers do not suffice."""
        if start.layout is not None:
            return await self._plan_as_given(start, start.layout)
        avoided = start.lost | {one for one in self._workers.endpoints if self._workers.cools_down_s(one)}
        while True:
            free = await self._free_workers(start, avoided)
            try:
                if not free:
                    statuses = self._workers.statuses()
                    raise WorkersUnavailableError(no_workers_words(start.route.model, statuses))
                plan = plan_over(
                    free,
                    start.facts,
                    wanted=self.settings.num_rpc_backends,
                    strategy=self.settings.layer_strategy,
                    context_tokens=start.context_tokens,
                )
                return self._predicted(start, plan), _device_free_bytes(free)
            except (WorkersUnavailableError, ModelDoesNotFitError):
                if avoided:  # better a shaky worker than none
                    avoided = frozenset()
                    continue
                if await self._make_room(start.route.model):
                    continue
                raise

    async def _plan_as_given(
        self, start: _Start, layout: Mapping[str, int]
    ) -> tuple[LayerPlan, dict[str, tuple[int, ...]]]:
        """The plan over exactly these workers."""
        statuses = {one.endpoint: one for one in await self._workers.refresh()}
        endpoints = [endpoint for endpoint, count in layout.items() if count]
        removed = [endpoint for endpoint in endpoints if endpoint not in statuses]
        if removed:
            raise WorkersUnavailableError(
                f"{start.route.model} cannot be laid out as asked: {removed[0]} is not known any more; "
                "choose other workers"
            )
        chosen = [statuses[endpoint] for endpoint in endpoints]
        check_free(start.route.model, chosen, taken=start.elsewhere)
        capacities, counts = [one.capacity for one in chosen], [layout[one.endpoint] for one in chosen]
        plan = plan_from_counts(start.facts, capacities, counts, context_tokens=start.context_tokens)
        return self._predicted(start, plan), _device_free_bytes(chosen)

    def _predicted(self, start: _Start, plan: LayerPlan) -> LayerPlan:
        return replace(plan, predicted_token_ms=self._predict(start.model_path, plan).token_ms)

    async def _free_workers(self, start: _Start, avoided: Collection[str]) -> list[WorkerStatus]:
        """The free workers that are not taken elsewhere; adopted, discovered and started as far as allowed."""
        wanted = self.settings.num_rpc_backends
        enough = wanted or (1 if self._workers.has_given else DEFAULT_WORKERS)

        fresh: set[str] = set()  # started in the place of lost ones

        def free() -> list[WorkerStatus]:
            statuses = self._workers.statuses()
            barred = {*start.elsewhere, *avoided} - fresh
            return [one for one in statuses if one.state == "free" and one.endpoint not in barred]

        await self._workers.refresh(except_for=avoided)
        if len(free()) < (wanted or 1) and (self.settings.auto_discover_rpc or self.settings.auto_setup_rpc):
            found = await self._workers.take_over()
            if len(free()) + len(found) < (wanted or 1) and self.settings.auto_discover_rpc:
                found += await self._workers.discover()
            if found:
                await self._workers.refresh(except_for=avoided)
        # More workers on this machine bring no more memory: those that another coordinator holds count too.
        missing = min(enough - len(free()), (wanted or DEFAULT_WORKERS) - self._workers.running_local)
        if missing > 0 and self.settings.auto_setup_rpc:
            fresh |= set(
                await self._workers.start_local(
                    start.engine,
                    missing,
                    first_port=self.settings.rpc_port,
                    keep_alive_s=self.settings.keep_alive_s,
                )
            )
        return free()


def _device_free_bytes(workers: list[WorkerStatus]) -> dict[str, tuple[int, ...]]:
    return {one.endpoint: one.probe.device_free_bytes for one in workers if one.probe}
