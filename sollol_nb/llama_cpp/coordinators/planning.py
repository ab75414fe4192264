"""Which workers a starting coordinator gets, and how many layers each.

Free workers are used first; then, as far as the settings allow, workers of this user's other processes are shared,
others on this machine discovered (only where that was requested), and more started here; last, coordinators that
ended kernels left end to free theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from sollol_nb.errors import ModelDoesNotFitError, SollolError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.cached import Cached
from sollol_nb.layers.plan import THIS_MACHINE, LayerPlan, is_own
from sollol_nb.layers.planner import plan_from_counts, plan_layers
from sollol_nb.layers.strategies import AUTO, LATENCY_AWARE, SPLITS, WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.running import RunningCoordinators
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings, file_identity
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.choice import best_plan, check_free, describe_missing_workers
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import Route
from sollol_nb.runtime.gate import Gate
from sollol_nb.settings import config
from sollol_nb.settings.table import DEFAULT_WORKERS

RETURN_LIMIT_S = 30.0
"""How long a start without any worker waits for a machine whose connection was lost."""
RETURN_POLL_S = 0.25
MAX_CHANCES = 2
"""How often a start is repeated that failed for no lasting reason, with all its workers well."""

PlanOverDevices: TypeAlias = tuple[LayerPlan, dict[str, tuple[int, ...]]]
"""A plan, and the free bytes of each device of its workers, by endpoint."""


@dataclass(kw_only=True, slots=True)
class Start:
    """One start in progress: what is wanted, and what failed attempts have shown.

    Attributes:
        wanted: what a running coordinator must agree with to be adopted instead.
        layout: units of each worker, in the order of their layers, instead of a strategy's choice.
        speculation: the request's, else the router's: `auto`, `off`, `ngram` or `draft`.
        first_port: the coordinator listens on this port or the next free one.
        lost: workers that were just found lost, to be chosen last.
        taken: workers that another router or kernel took during the start, or that cannot be used now.
        by_speed: plan by predicted times, whatever the strategy of the settings.
        standby_of: the registry id of the coordinator whose standby is started, from what nobody else needs.
        is_seeded: whether caches of workers were seeded for it, as far as that was worth it.
        chances_left: how often it may still be repeated without a known reason.
    """

    route: Route
    gate: Gate
    engine: Engine
    facts: ModelFacts
    context_tokens: int
    wanted: Mapping[str, Any]
    layout: Mapping[str, int] | None
    speculation: str
    first_port: int
    lost: frozenset[str]
    taken: set[str] = field(default_factory=set)
    by_speed: bool = False
    standby_of: str = ""
    is_seeded: bool = False
    chances_left: int = MAX_CHANCES

    @property
    def model(self) -> str:
        """The model's name for display."""
        return self.route.name

    @property
    def model_path(self) -> Path:
        """The GGUF file."""
        assert self.route.model_path is not None
        return self.route.model_path


class Planner:
    """Chooses workers for starting coordinators. Lives on the I/O loop."""

    def __init__(self, workers: Workers, running: RunningCoordinators, measurements: TokenMeasurements) -> None:
        self._workers = workers
        self._running = running
        self._measurements = measurements

    async def connect(self, start: Start, settings: PoolSettings) -> None:
        """Connect the machines whose workers a start may use, before its plan. Where llama.cpp has to be installed
        on one, this takes minutes.

        Raises:
            EngineIncompatibleError: the engine here speaks another RPC protocol than workers do.
            WorkersUnavailableError: another process has been starting links for a minute.
        """
        self._workers.use_engine(start.engine)
        if start.layout is not None:  # over workers that are connected
            return

        async def engine() -> Engine:
            return start.engine

        if self._may_share(settings):
            await self._workers.links.share_invited()
        await self._workers.links.connect(keep_alive_s=settings.keep_alive_s, engine=engine)

    def _may_share(self, settings: PoolSettings) -> bool:
        """Whether workers are used that nobody has named: who has named some, or wants none to be found, gets no
        others unasked."""
        return settings.auto_discover_rpc or (settings.auto_discover_rpc is None and not self._workers.has_named)

    async def plan(self, start: Start, settings: PoolSettings) -> PlanOverDevices:
        """The plan for a start; coordinators that ended kernels left end where free workers do not suffice.

        Raises:
            WorkersUnavailableError: there are no free workers, or those of the given layout are not free.
            ModelDoesNotFitError: their memory does not hold the model.
        """
        if start.layout is not None:
            return await self._plan_layout(start, start.layout)
        if start.by_speed:
            settings = by_speed(settings)
        cooling = {endpoint for endpoint in self._workers.endpoints if self._workers.cool_down_s(endpoint)}
        avoided = start.lost | cooling
        await self._workers.own.refresh(start.engine)
        while True:
            free = await self._free_workers(start, settings, avoided)
            try:
                if not free:
                    raise WorkersUnavailableError(describe_missing_workers(start.model, self._workers.statuses()))
                plan = await asyncio.to_thread(self._search_of(start, free, settings))
                if await self._workers.find_second_names(plan.endpoints):
                    continue
                return plan, _device_free_bytes(free)
            except (WorkersUnavailableError, ModelDoesNotFitError):
                if start.standby_of:
                    raise
                if await self._running.end_standby(start.model):
                    continue
                if avoided:  # better an unreliable worker than none
                    avoided = frozenset()
                elif not await self._running.end_left(start.model):
                    raise

    async def best_for(self, coordinator: Coordinator, settings: PoolSettings) -> LayerPlan:
        """The fastest plan for a running coordinator, over its workers and those that are free, as last seen; by
        free memory where no speed is known.

        Raises:
            WorkersUnavailableError, ModelDoesNotFitError: there is none.
        """
        held = set(coordinator.rpc_backends)
        usable = [
            worker
            for worker in self._workers.statuses()
            if worker.endpoint in held
            or (worker.state == "free" and not self._workers.cool_down_s(worker.endpoint))
        ]
        running, settings = coordinator.settings, by_speed(settings)
        search = self._search(
            usable,
            running.model_path,
            running.facts,
            running.context_tokens,
            settings,
            running=running.plan,
            needs_worker=self._running.needs_worker(coordinator),
        )
        return await asyncio.to_thread(search)

    async def likely(self, start: Start, settings: PoolSettings) -> LayerPlan:
        """The plan that a start will probably get, over the workers that are free as last seen.

        Raises:
            ConfigError, WorkersUnavailableError, ModelDoesNotFitError: there is none.
        """
        free = {
            worker.endpoint: worker
            for worker in self._workers.statuses()
            if worker.state == "free" and worker.endpoint not in start.lost | start.taken
        }
        if start.layout is not None:
            own = {device.endpoint: device for device in self._workers.own.capacities()}
            used = {endpoint: count for endpoint, count in start.layout.items() if count}
            if missing := [endpoint for endpoint in used if endpoint not in own.keys() | free.keys()]:
                raise WorkersUnavailableError(f"{missing[0]} is not free")
            devices = [own.get(endpoint) or free[endpoint].capacity for endpoint in used]
            return plan_from_counts(start.facts, devices, list(used.values()), context_tokens=start.context_tokens)
        if not free:
            raise WorkersUnavailableError(describe_missing_workers(start.model, self._workers.statuses()))
        settings = by_speed(settings) if start.by_speed else settings
        return await asyncio.to_thread(self._search_of(start, free.values(), settings))

    async def foresee(
        self,
        route: Route,
        facts: ModelFacts,
        context_tokens: int,
        settings: PoolSettings,
        except_for: Collection[str] = (),
    ) -> LayerPlan:
        """The plan that a start would make now over the workers that are free, as last seen.

        Args:
            except_for: endpoints of workers that it must not use.

        Raises:
            WorkersUnavailableError: none is free, as far as known.
            ModelDoesNotFitError: their memory does not hold the model.
        """
        free = [
            worker
            for worker in self._workers.statuses()
            if worker.state == "free" and worker.endpoint not in except_for
        ]
        usable = [worker for worker in free if not self._workers.cool_down_s(worker.endpoint)] or free
        assert route.model_path is not None
        try:
            if not free:
                raise WorkersUnavailableError(describe_missing_workers(route.name, self._workers.statuses()))
            search = self._search(
                usable, route.model_path, facts, context_tokens, settings, needs_worker=route.needs_worker
            )
            return await asyncio.to_thread(search)
        except (WorkersUnavailableError, ModelDoesNotFitError) as error:
            alone = self.plan_alone(route, facts, context_tokens, settings, error)
            if alone is None:
                raise
            return alone

    def plan_alone(
        self, route: Route, facts: ModelFacts, context_tokens: int, settings: PoolSettings, problem: SollolError
    ) -> LayerPlan | None:
        """The plan over this machine alone, for a start that finds no free worker, or too small ones.

        Args:
            problem: why workers cannot be used.

        Returns:
            None where workers were requested, or this machine is not calibrated or does not hold the model.
        """
        assert route.model_path is not None
        if route.needs_worker or settings.num_rpc_backends is not None or settings.layer_strategy in SPLITS:
            return None
        speeds = self._speeds(route.model_path, facts, ())
        own = [
            device
            for device in self._workers.own.capacities()
            if speeds is not None and speeds.is_calibrated(device.endpoint)
        ]
        if not own:
            return None
        try:
            plan = plan_layers(facts, own, strategy=LATENCY_AWARE, context_tokens=context_tokens, speeds=speeds)
        except ModelDoesNotFitError:
            return None
        missing = "the free workers do not hold the model"
        if isinstance(problem, WorkersUnavailableError):
            missing = "no worker is free"
        return replace(plan, reasons=(f"all layers are on {THIS_MACHINE}, since {missing}",))

    def _search_of(
        self, start: Start, usable: Collection[WorkerStatus], settings: PoolSettings
    ) -> Callable[[], LayerPlan]:
        """The search for the best plan of a start, for a thread: over many workers that have much cached it
        takes a second."""
        return self._search(
            usable,
            start.model_path,
            start.facts,
            start.context_tokens,
            settings,
            needs_worker=start.route.needs_worker,
        )

    def _search(
        self,
        usable: Collection[WorkerStatus],
        model_path: Path,
        facts: ModelFacts,
        context_tokens: int,
        settings: PoolSettings,
        running: LayerPlan | None = None,
        needs_worker: bool = False,
    ) -> Callable[[], LayerPlan]:
        """The search for the best plan, with what is known now."""
        return partial(
            best_plan,
            facts,
            self._capacities(usable),
            strategy=settings.layer_strategy,
            context_tokens=context_tokens,
            wanted=settings.num_rpc_backends,
            own=self._workers.own.capacities(),
            speeds=self._speeds(model_path, facts, usable),
            running=running,
            requests=settings.slots,
            needs_worker=needs_worker,
            cached=self._cached(model_path, facts, usable),
        )

    def _cached(self, model_path: Path, facts: ModelFacts, workers: Collection[WorkerStatus]) -> Cached:
        """The units of a model that these workers have cached; none where its tensors are too small for that."""
        if not facts.cacheable_bytes or not config.default("tensor_cache_gb"):
            return {}
        known = self._workers.cached
        model = file_identity(model_path)
        return {
            worker.endpoint: units
            for worker in workers
            if (units := known.of(self._workers.cache_of(worker.endpoint), model))
        }

    def note_loaded(self, coordinator: Coordinator) -> None:
        """Remember what the workers of a coordinator have received, as the engine has placed it. If much was sent
        of what they were said to have cached, they do not cache it, or their caches were emptied."""
        settings, plan = coordinator.settings, coordinator.plan
        if plan is None or not settings.facts.cacheable_bytes:
            return
        placed = {shard.endpoint: tuple(shard.units) for shard in plan.workers}
        for endpoint in placed:
            device = coordinator.placement.of(endpoint) if coordinator.placement else None
            if device is not None and device.units:
                placed[endpoint] = device.units
        known, model, sizes = (
            self._workers.cached,
            file_identity(settings.model_path),
            settings.facts.cacheable_bytes,
        )
        loaded = [(self._workers.cache_of(endpoint), units) for endpoint, units in placed.items()]
        kept = sum(sizes[unit] for cache, units in loaded for unit in known.of(cache, model).intersection(units))
        sent, weights = coordinator.bytes_sent, sum(shard.weight_bytes for shard in plan.workers)
        if kept and sent is not None and sent > weights - kept / 2:
            known.forget([cache for cache, _ in loaded])
        known.note(model, loaded)

    def _capacities(self, workers: Collection[WorkerStatus]) -> list[WorkerCapacity]:
        """What a plan needs to know of workers; a round trip that no probe has measured is that of the
        calibration."""
        capacities = [worker.capacity for worker in workers]
        measured = {capacity.endpoint: capacity.round_trip_ms for capacity in capacities}
        round_trips_ms = self._measurements.round_trips_ms(measured, measured)
        return [replace(capacity, round_trip_ms=round_trips_ms[capacity.endpoint]) for capacity in capacities]

    def _speeds(
        self, model_path: Path, facts: ModelFacts, workers: Collection[WorkerStatus]
    ) -> WorkerSpeeds | None:
        """How fast these workers and the devices of this machine run a model, as far as that is known."""
        return self._measurements.speeds(
            model_path,
            self._running.coordinators,
            self._workers.round_trips_ms,
            facts=facts,
            endpoints=[*(worker.endpoint for worker in workers), *self._workers.own.endpoints()],
        )

    async def _plan_layout(self, start: Start, layout: Mapping[str, int]) -> PlanOverDevices:
        """The plan over exactly these workers and own devices."""
        statuses = {worker.endpoint: worker for worker in await self._workers.refresh()}
        endpoints = [endpoint for endpoint, count in layout.items() if count]
        await self._workers.own.refresh(start.engine)
        own = {capacity.endpoint: capacity for capacity in self._workers.own.capacities()}
        removed = [endpoint for endpoint in endpoints if endpoint not in statuses and endpoint not in own]
        if removed:
            raise WorkersUnavailableError(
                f"cannot use this layout for {start.model}: {removed[0]} was removed; choose other workers"
            )
        workers = [endpoint for endpoint in endpoints if not is_own(endpoint)]
        free = [endpoint for endpoint in workers if statuses[endpoint].state == "free"]
        if await self._workers.find_second_names(free):
            statuses = {worker.endpoint: worker for worker in self._workers.statuses()}
        chosen = [statuses[endpoint] for endpoint in workers]
        check_free(start.model, chosen, taken=start.taken)
        plan = plan_from_counts(
            start.facts,
            [own[endpoint] if is_own(endpoint) else statuses[endpoint].capacity for endpoint in endpoints],
            [layout[endpoint] for endpoint in endpoints],
            context_tokens=start.context_tokens,
        )
        token = self._measurements.predict(
            start.model_path, plan, self._running.coordinators, self._workers.round_trips_ms, start.facts
        )
        return replace(plan, predicted_token_ms=token.token_ms), _device_free_bytes(chosen)

    async def _free_workers(
        self, start: Start, settings: PoolSettings, avoided: Collection[str]
    ) -> list[WorkerStatus]:
        """The free workers that are not taken; adopted, discovered and started as far as allowed."""
        wanted = settings.num_rpc_backends
        enough = wanted or (1 if self._workers.has_external else DEFAULT_WORKERS)
        replacements: set[str] = set()  # started at the addresses of lost ones

        def free() -> list[WorkerStatus]:
            barred = {*start.taken, *avoided} - replacements
            return [
                worker
                for worker in self._workers.statuses()
                if worker.state == "free" and worker.endpoint not in barred
            ]

        may_share = self._may_share(settings)
        await self._workers.refresh(except_for=avoided)
        if len(free()) < (wanted or 1):
            found: list[str] = []
            if may_share or settings.auto_setup_rpc:
                found = await self._workers.local.adopt(only_left=not may_share)
            if settings.auto_discover_rpc and len(free()) + len(found) < (wanted or 1):
                found += await self._workers.discover()
            if found:
                await self._workers.refresh(except_for=avoided)
        # More workers on this machine bring no more memory: those that another coordinator holds count too.
        missing = min(enough - len(free()), (wanted or DEFAULT_WORKERS) - self._workers.running_local_count)
        if missing > 0 and settings.auto_setup_rpc:
            started = await self._workers.local.start(
                start.engine, missing, first_port=settings.rpc_port, keep_alive_s=settings.keep_alive_s
            )
            replacements.update(started)
        # Where nothing else is left, a lost machine may come back; nobody waits for one that was never there.
        deadline = time.monotonic() + RETURN_LIMIT_S
        may_wait = not start.standby_of and not avoided
        while may_wait and not free() and self._workers.may_return and time.monotonic() < deadline:
            await asyncio.sleep(RETURN_POLL_S)
            await self._workers.refresh()
        return free()


def by_speed(settings: PoolSettings) -> PoolSettings:
    """The settings with a strategy that goes by predicted times."""
    if settings.layer_strategy in SPLITS or settings.layer_strategy == AUTO:
        return replace(settings, layer_strategy=LATENCY_AWARE)
    return settings


def _device_free_bytes(workers: Collection[WorkerStatus]) -> dict[str, tuple[int, ...]]:
    return {worker.endpoint: worker.probe.device_free_bytes for worker in workers if worker.probe}
