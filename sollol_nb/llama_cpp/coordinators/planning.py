"""Which workers a starting coordinator gets, and how many layers each.

Free workers are used first; then, as far as the settings allow, workers of this user's other processes are shared,
others on this machine discovered (only where that was requested), and more started here; last, coordinators that
ended kernels left end to free theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import plan_from_counts
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.running import RunningCoordinators
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.choice import check_free, describe_missing_workers, plan_over
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import Route
from sollol_nb.runtime.gate import Gate
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
        taken: workers that another router or kernel took during the start.
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
        cooling = {endpoint for endpoint in self._workers.endpoints if self._workers.cool_down_s(endpoint)}
        avoided = start.lost | cooling
        while True:
            free = await self._free_workers(start, settings, avoided)
            try:
                if not free:
                    raise WorkersUnavailableError(describe_missing_workers(start.model, self._workers.statuses()))
                plan = plan_over(
                    free,
                    start.facts,
                    wanted=settings.num_rpc_backends,
                    strategy=settings.layer_strategy,
                    context_tokens=start.context_tokens,
                )
                if await self._workers.find_second_names(plan.endpoints):
                    continue
                return self._with_prediction(start, plan, free)
            except (WorkersUnavailableError, ModelDoesNotFitError):
                if avoided:  # better an unreliable worker than none
                    avoided = frozenset()
                elif not await self._running.end_left(start.model):
                    raise

    async def _plan_layout(self, start: Start, layout: Mapping[str, int]) -> PlanOverDevices:
        """The plan over exactly these workers."""
        statuses = {worker.endpoint: worker for worker in await self._workers.refresh()}
        endpoints = [endpoint for endpoint, count in layout.items() if count]
        removed = [endpoint for endpoint in endpoints if endpoint not in statuses]
        if removed:
            raise WorkersUnavailableError(
                f"cannot use this layout for {start.model}: {removed[0]} was removed; choose other workers"
            )
        free = [endpoint for endpoint in endpoints if statuses[endpoint].state == "free"]
        if await self._workers.find_second_names(free):
            statuses = {worker.endpoint: worker for worker in self._workers.statuses()}
        chosen = [statuses[endpoint] for endpoint in endpoints]
        check_free(start.model, chosen, taken=start.taken)
        plan = plan_from_counts(
            start.facts,
            [worker.capacity for worker in chosen],
            [layout[endpoint] for endpoint in endpoints],
            context_tokens=start.context_tokens,
        )
        return self._with_prediction(start, plan, chosen)

    def _with_prediction(self, start: Start, plan: LayerPlan, chosen: Collection[WorkerStatus]) -> PlanOverDevices:
        token = self._measurements.predict(
            start.model_path, plan, self._running.coordinators, self._workers.round_trips_ms, start.facts
        )
        device_free_bytes = {worker.endpoint: worker.probe.device_free_bytes for worker in chosen if worker.probe}
        return replace(plan, predicted_token_ms=token.token_ms), device_free_bytes

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
        while not free() and not avoided and self._workers.may_return and time.monotonic() < deadline:
            await asyncio.sleep(RETURN_POLL_S)
            await self._workers.refresh()
        return free()
