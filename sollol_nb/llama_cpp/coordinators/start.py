"""Starting a coordinator: adopt one that runs for the model and is as asked, else choose workers and launch.

Workers are chosen and claimed under one lock for all kernels of this user (`registry.claims`), so that two kernels
that start at the same time get disjoint workers, or one adopts the other's coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sollol_nb.errors import (
    ConfigError,
    CoordinatorError,
    CoordinatorStartError,
    ModelDoesNotFitError,
    WorkersUnavailableError,
)
from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.plan import GIVEN, LayerPlan
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.coordinators.adopting import Adopter
from sollol_nb.llama_cpp.coordinators.cached_weights import CachedWeights
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.drafting import Drafting
from sollol_nb.llama_cpp.coordinators.load_progress import LoadProgress, reporting_progress
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.planning import Planner, Start
from sollol_nb.llama_cpp.coordinators.readiness import PortTakenError
from sollol_nb.llama_cpp.coordinators.running import RunningCoordinators
from sollol_nb.llama_cpp.coordinators.seeding import Seeder
from sollol_nb.llama_cpp.coordinators.settings import (
    CoordinatorSettings,
    PoolSettings,
    context_tokens_for,
    file_identity,
)
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import ensure_engine, find_engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import DISTRIBUTED, Route
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import Gate
from sollol_nb.runtime.private_files import private_folder
from sollol_nb.settings.config import state_dir
from sollol_nb.text.tables import counted

logger = logging.getLogger(__name__)

START_TRIES = 5
"""A start is repeated where a worker was lost while it loaded, or another program took the port."""


class CoordinatorStarter:
    """Adopts or starts coordinators. Lives on the I/O loop.

    Args:
        settings: how; may be changed later, for the starts after that.
        running: ends idle coordinators where their workers or memory are needed.
        measurements: predict the time of a token under a plan.
    """

    def __init__(
        self,
        settings: PoolSettings,
        workers: Workers,
        events: EventBus,
        running: RunningCoordinators,
        measurements: TokenMeasurements,
    ) -> None:
        self.settings = settings
        self._workers = workers
        self._events = events
        self._running = running
        self.planner = Planner(workers, running, measurements)
        self.drafting = Drafting(workers.calibration_of)
        self._adopter = Adopter(workers, events)
        self._cached = CachedWeights()
        self.seeder = Seeder(workers, events)
        self._claiming = asyncio.Lock()  # planning and holding workers is one step
        self._progress: dict[str, LoadProgress] = {}  # of those that are loading, by the name in the route

    async def engine(self) -> Engine:
        """The llama.cpp programs: found, or built on first need, with progress reported as events."""
        if self.settings.adopt_only:
            return await asyncio.to_thread(find_engine, self.settings.llama_cpp)

        def report(step: str, share: float | None) -> None:
            message = step if share is None else f"{step}: {share:.0%}"
            self._events.publish(EventKind.ENGINE_BUILDING, "llama.cpp", message, share=share)

        return await asyncio.to_thread(ensure_engine, self.settings.llama_cpp, progress=report)

    async def foresee(self, route: Route, standby_of: LayerPlan | None = None) -> LayerPlan:
        """The plan that a start would make now; contacts nothing and starts nothing.

        Args:
            standby_of: the plan of the coordinator whose standby is started.

        Raises:
            ModelFileError: the model's file cannot be read.
            WorkersUnavailableError, ModelDoesNotFitError: there is no plan, as far as workers are known.
        """
        assert route.model_path is not None
        facts = await asyncio.to_thread(read_facts, route.model_path)
        context_tokens = context_tokens_for(self.settings, route.modelfile, facts)
        if standby_of is None:
            return await self.planner.foresee(route, facts, context_tokens, self.settings)
        return await self.planner.foresee(
            route, facts, standby_of.context_tokens, self.settings, except_for=standby_of.endpoints
        )

    async def start(
        self,
        route: Route,
        gate: Gate,
        lost: frozenset[str] = frozenset(),
        *,
        layout: Mapping[str, int] | None = None,
        speculation: str | None = None,
        by_speed: bool = False,
        standby_of: Coordinator | None = None,
    ) -> Coordinator:
        """A coordinator for a route, ready for requests.

        Args:
            gate: the gate that it gets.
            lost: workers that were just found lost, to be chosen last.
            layout: units of each worker, in the order of their layers, instead of a strategy's choice.
            speculation: what it drafts, instead of what the settings say.
            by_speed: plan by predicted times, whatever the strategy of the settings.
            standby_of: start a standby of this one, with its context, slots and drafts.

        Raises:
            ModelFileError, ModelDoesNotFitError, WorkersUnavailableError, CoordinatorError, EngineError: why not.
        """
        assert route.model_path is not None
        engine = await self.engine()
        facts = await asyncio.to_thread(read_facts, route.model_path)
        settings = self.settings
        if standby_of is not None:  # it must serve what that one serves
            main = standby_of.settings
            settings = replace(settings, context_tokens=main.context_tokens, slots=main.slots)
            speculation = main.speculation.kind
        context_tokens = context_tokens_for(settings, route.modelfile, facts)
        start = Start(
            route=route,
            gate=gate,
            engine=engine,
            facts=facts,
            context_tokens=context_tokens,
            wanted=_wanted(settings, route, engine, context_tokens, layout),
            layout=layout,
            speculation=settings.speculation if speculation is None else speculation,
            first_port=settings.coordinator_port,
            lost=lost,
            by_speed=by_speed,
            standby_of=standby_of.id if standby_of is not None else "",
        )
        given_draft = await self.drafting.check(start, settings.draft)
        failed: BaseException | None = None
        for tries_left in reversed(range(START_TRIES)):
            coordinator: Coordinator | None = None
            try:
                await self._running.until_ended()  # they would be adopted, or hold needed workers
                coordinator = await self._adopt(start, as_it_is=settings.adopt_only)
                coordinator = coordinator or await self._launch(start, given_draft, settings)
                async with self._progress_reported(route.name, coordinator):
                    await coordinator.until_ready(self.settings.coordinator_timeout_s)
            except BaseException as error:
                is_cancelled = isinstance(error, asyncio.CancelledError)
                message = f"the start of {route.name} was cancelled" if is_cancelled else str(error) or repr(error)
                if not start.standby_of:  # nobody waits for that one; who keeps it says what became of it
                    self._events.publish(EventKind.COORDINATOR_FAILED, route.name, message, cancelled=is_cancelled)
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
                coordinator.keep_contexts(ContextStore(), self._events)
                await self._report_ready(route, coordinator)
                return coordinator
        raise AssertionError("the last try raises")

    @contextlib.asynccontextmanager
    async def _progress_reported(self, model: str, coordinator: Coordinator) -> AsyncGenerator[None, None]:
        if coordinator.standby_of:
            yield
            return

        def report(progress: LoadProgress) -> None:
            self._progress[model] = progress
            self._events.report(EventKind.COORDINATOR_LOADING, model, progress.message, **progress.as_dict())

        try:
            async with reporting_progress(coordinator.settings, coordinator.pid, coordinator.log_path, report):
                yield
        finally:
            self._progress.pop(model, None)

    def report_again(self, model: str) -> None:
        """Report how far a start is, for a request that begins to wait for it: the next change may take long."""
        progress = self._progress.get(model)
        if progress is None:
            self._events.report(EventKind.COORDINATOR_STARTING, model, f"{model} is being started")
        else:
            self._events.report(EventKind.COORDINATOR_LOADING, model, progress.message, **progress.as_dict())

    async def _worth_another_try(self, start: Start, coordinator: Coordinator, error: BaseException) -> bool:
        """Whether it may succeed next time: on another port, without the lost workers, or by chance."""
        if isinstance(error, PortTakenError):
            start.first_port = coordinator.port + 1
            return True
        if not isinstance(error, CoordinatorError):
            return False
        if not coordinator.is_adopted:  # else the kernel that started it checks its workers
            lost = await self._workers.find_lost(coordinator.rpc_backends)
            start.lost |= lost
            if lost:
                return True
        if isinstance(error, CoordinatorStartError) and error.is_crash:
            return not coordinator.is_adopted and self._leave_out_repacking(coordinator)
        start.chances_left -= 1
        return isinstance(error, CoordinatorStartError) and error.may_pass and start.chances_left >= 0

    def _leave_out_repacking(self, coordinator: Coordinator) -> bool:
        """After a crash of one with layers on this machine's CPU: start without rearranged weights, now and later;
        False if that is so."""
        if not coordinator.settings.uses_own_cpu or not self._workers.own.repacks_weights:
            return False
        self._workers.own.repacks_weights = False
        model = coordinator.model
        message = f"{model} crashed; starting it without rearranging its weights for this CPU"
        self._events.publish(EventKind.COORDINATOR_STARTING, model, message)
        return True

    async def _report_ready(self, route: Route, coordinator: Coordinator) -> None:
        if coordinator.is_adopted:
            await self._workers.local.adopt(coordinator.rpc_backends)
        else:
            self.planner.note_loaded(coordinator)
            self._cached.settle(coordinator.settings, self._workers.entries_of(coordinator.rpc_backends))
        if coordinator.standby_of:
            return
        if coordinator.is_adopted:
            kind = EventKind.COORDINATOR_ADOPTED
            message = f"{route.name} is already running at {coordinator.base_url}"
        else:
            kind, seconds = EventKind.COORDINATOR_READY, f"{coordinator.load_ms / 1000:.1f} s"
            message = f"{route.name} is ready at {coordinator.base_url} after {seconds}"
            message = "; ".join(filter(None, (message, coordinator.sent_description)))
        self._events.publish(
            kind, route.name, message, load_ms=coordinator.load_ms, bytes_sent=coordinator.bytes_sent
        )
        for difference in coordinator.placement_differences:
            self._events.publish(EventKind.COORDINATOR_PLACED_OTHERWISE, route.name, difference)

    async def _adopt(self, start: Start, *, as_it_is: bool = False) -> Coordinator | None:
        return await self._adopter.adopt(start, exact=self.settings.exact, as_it_is=as_it_is)

    # --- launching ------------------------------------------------------------------------------

    async def _launch(self, start: Start, given_draft: Path | None, wanted: PoolSettings) -> Coordinator:
        """Plan, and start a coordinator that holds its workers; it is not ready yet.

        If another kernel was quicker with the same model, that one is adopted.

        Args:
            given_draft: the draft model that the user has named.
            wanted: the settings.
        """
        if wanted.adopt_only:
            raise CoordinatorStartError(f"{start.model} is not loaded, and nothing is started here; load it first")
        sharded = start.route.backend == DISTRIBUTED
        if sharded:  # not within the claim, since no other start is to wait for these machines
            await self.planner.connect(start, wanted)
            await self._seed(start, wanted)
        # Nor is one to wait for the plan of a standby, which gives way.
        async with nullcontext() if start.standby_of else self._claiming:
            if not sharded:
                await self._running.free_memory(start.facts.file_bytes)
            while True:
                plan, devices = None, dict[str, tuple[int, ...]]()
                if sharded:
                    try:
                        plan, devices = await self.planner.plan(start, wanted)
                    except (WorkersUnavailableError, ModelDoesNotFitError) as error:
                        if not start.standby_of:
                            if (
                                running := await self._adopter.adopt(
                                    start, exact=self.settings.exact, as_it_is=True
                                )
                            ) is not None:
                                return running
                            if start.layout is not None:
                                raise
                            if await self._running.end_idle(start.model):
                                continue
                        plan = self.planner.plan_alone(
                            start.route, start.facts, start.context_tokens, wanted, error
                        )
                        if plan is None:
                            raise
                    if not start.standby_of and await self._lacks_workers(start, plan, wanted):
                        continue
                speculation = await self.drafting.choose(start, plan, self._workers.round_trips_ms, given_draft)
                settings = CoordinatorSettings(
                    model=start.model,
                    model_path=start.model_path,
                    facts=start.facts,
                    plan=plan,
                    context_tokens=start.context_tokens,
                    slots=wanted.slots,
                    device_free_bytes=devices,
                    modelfile=start.route.modelfile,
                    speculation=speculation,
                    may_use_gpus=plan is not None and self._workers.may_be_gpus(plan.endpoints),
                    repacks_weights=self._workers.own.repacks_weights,
                    contexts=await asyncio.to_thread(_contexts_folder),
                )
                async with registry.claims():
                    running = await self._adopt(start)
                    if running is not None:
                        return running
                    taken = await self._workers.held_among(plan.endpoints) if plan else set()
                    if not taken and not (taken := await self._find_unsafe(start, settings)):
                        return await self._launch_on_free_port(start, settings)
                start.taken |= taken  # by another router or kernel in the meantime

    async def _find_unsafe(self, start: Start, settings: CoordinatorSettings) -> set[str]:
        """The workers of a plan that must not be used, since a damaged file may be in their caches."""
        endpoints = settings.plan.endpoints if settings.plan else ()
        unsafe = await self._cached.prepare(settings, self._workers.entries_of(endpoints))
        if unsafe:
            message = (
                f"{start.model} does not use {', '.join(sorted(unsafe))} now: its cache of weights could not be "
                "verified in time; see `sollol-nb weights` on its machine"
            )
            self._events.publish(EventKind.COORDINATOR_STARTING, start.model, message)
        return unsafe

    async def _lacks_workers(self, start: Start, plan: LayerPlan, wanted: PoolSettings) -> bool:
        """Whether a plan has fewer workers than wanted, and a standby was ended that may have held some."""
        count = min(wanted.num_rpc_backends or 0, start.facts.layer_count + 1)
        return len(plan.endpoints) < count and await self._running.end_standby(start.model)

    async def _seed(self, start: Start, wanted: PoolSettings) -> None:
        """Seed caches for the plan that is likely, once for a start. It may take minutes, so it holds no lock."""
        if start.is_seeded or not start.facts.cacheable_bytes or not self._workers.links.targets:
            return
        start.is_seeded = True
        with contextlib.suppress(WorkersUnavailableError, ModelDoesNotFitError):
            await self._workers.refresh()
            await self.seeder.seed(start, await self.planner.likely(start, wanted))

    async def _launch_on_free_port(self, start: Start, settings: CoordinatorSettings) -> Coordinator:
        message, plan = f"starting {start.model} {settings.describe_workers()}", settings.plan
        if start.standby_of and plan is not None:
            message = f"starting a standby of {start.model}: it takes {plan.describe_cost()}"
        if settings.speculation.is_on or settings.speculation.why:
            message += f"; speculation: {settings.speculation.describe()}"
        reasons = list(settings.plan.reasons) if settings.plan else []
        kind = EventKind.STANDBY_STARTING if start.standby_of else EventKind.COORDINATOR_STARTING
        self._events.publish(kind, start.model, message, reasons=reasons)
        (port,) = free_ports(start.first_port, 1)
        endpoints = settings.plan.endpoints if settings.plan else ()
        holds = self._workers.entries_of(endpoints)
        coordinator = await Coordinator.launch(
            start.engine,
            settings,
            port=port,
            keep_alive_s=self.settings.keep_alive(start.route.model),
            about={**start.wanted, "standby_of": start.standby_of, "probes": self._workers.probes_of(endpoints)},
            gate=start.gate,
            holds=holds,
        )
        wanted = start.wanted["wanted_workers"]
        if isinstance(wanted, int) and len(endpoints) < min(wanted, start.facts.layer_count + 1):
            coordinator.compromise = (
                f"it runs on {counted(len(endpoints), 'worker')} instead of {wanted}: no more were free"
            )
        return coordinator


def _wanted(
    settings: PoolSettings, route: Route, engine: Engine, context_tokens: int, layout: Mapping[str, int] | None
) -> dict[str, Any]:
    """What a running coordinator must agree with to be used instead of a new one."""
    assert route.model_path is not None
    sharded = route.backend == DISTRIBUTED
    strategy, workers = settings.layer_strategy, settings.num_rpc_backends
    return {
        "model_file": file_identity(route.model_path),
        "modelfile": route.modelfile.of_engine,
        "engine": str(engine.server),
        "engine_version": engine.version,
        "backend": route.backend,
        "context_tokens": context_tokens,
        "slots": settings.slots,
        "strategy": (GIVEN if layout else strategy) if sharded else None,
        "speculates": settings.speculation,
        "wanted_workers": (list(map(list, layout.items())) if layout else workers) if sharded else None,
    }


def _contexts_folder() -> Path:
    """Where contexts are saved. Where they are not, since that is off or the folder cannot be used, an empty
    folder: without any, the engine does not empty slots."""
    store = ContextStore()
    try:
        if store.is_on:
            return store.prepare()
    except ConfigError as error:
        logger.warning("contexts are not saved: %s", error)
    return private_folder(state_dir() / "no-contexts")
