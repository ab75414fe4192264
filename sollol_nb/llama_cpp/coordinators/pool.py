"""All coordinators of a router: the running one for a model, an adopted one, or a new one over free workers.

Two requests at the same time for a model that is not running start one coordinator, also when they come from two
kernels. One that died is noticed, and the next request plans again over the workers that are left.

A coordinator that runs already for the same model and settings, started by another kernel or by this one before
its restart, is adopted instead of loading the model once more.

The pool owns the parts that do this: the table of what runs (`running.py`), the starter (`start.py`), the standbys
(`standby.py`), the search for better layouts (`replanning.py`), and what tokens took on each layout
(`measurements.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sollol_nb.errors import ConfigError, CoordinatorStartError, ModelDoesNotFitError, SollolError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.plan import GIVEN, LayerPlan
from sollol_nb.layers.replan import layout_of
from sollol_nb.layers.strategies import SPLITS
from sollol_nb.layers.token_time import TokenTime
from sollol_nb.layers.what_if import Forecast, forecast, without_layout
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.coordinators.calibrator import Calibrated, Calibrator
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.replanning import Advice, Replanner
from sollol_nb.llama_cpp.coordinators.running import RouteKey, RunningCoordinators, key_of
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings, context_tokens_for
from sollol_nb.llama_cpp.coordinators.speculation import OFF
from sollol_nb.llama_cpp.coordinators.standby import Standbys
from sollol_nb.llama_cpp.coordinators.start import CoordinatorStarter
from sollol_nb.llama_cpp.coordinators.waits import WaitWatch
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.choice import check_free
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import Route
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.gate import Gate
from sollol_nb.runtime.io_loop import submit
from sollol_nb.text.tables import counted

logger = logging.getLogger(__name__)

LEAST_GAIN = 0.03
"""Share of the time per token, below which nobody would load a model again."""
ANSWERS_PER_CORRECTION = 5
"""After so many measured answers of a coordinator, the calibrations of its workers are corrected once."""


class CoordinatorPool:
    """Starts, keeps and stops coordinators. Lives on the I/O loop."""

    def __init__(self, settings: PoolSettings, workers: Workers, events: EventBus) -> None:
        self._workers = workers
        self._events = events
        self._measurements = TokenMeasurements(events, workers.calibration_of)
        self._waits = WaitWatch(self._measurements.set_waits)
        self._calibrator = Calibrator(workers, events)
        self._running = RunningCoordinators(workers, events, self._measurements)
        self._starter = CoordinatorStarter(settings, workers, events, self._running, self._measurements)
        self._replanner = Replanner(
            workers,
            events,
            self._running,
            self._measurements,
            settings=lambda: self.settings,
            best_plan=lambda coordinator: self._starter.planner.best_for(coordinator, self.settings),
            predicted_ms=self._predicted_ms,
            move=self._move_if_unused,
            calibrate=self.calibrate,
        )
        # A gate outlives its coordinator: requests that wait for the model keep their turn when it restarts.
        self._gates: dict[RouteKey, Gate] = {}
        self._lost: dict[RouteKey, frozenset[str]] = {}
        self._starting: defaultdict[RouteKey, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._closings = 0
        self._standbys = Standbys(
            workers,
            events,
            self._running,
            self._starter,
            locks=self._starting,
            lost=self._lost,
            promoted=self._enter,
        )
        events.subscribe(self._on_event)

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
        return self._running.coordinators

    async def engine(self) -> Engine:
        """The llama.cpp programs: found, or built on first need, with progress reported as events."""
        return await self._starter.engine()

    async def get(self, route: Route, speculation: str | None = None) -> tuple[Coordinator, float | None]:
        """The running coordinator for a route, adopted or started if this router has none.

        Args:
            speculation: `off` if it must not draft: one that does is restarted. Other values count for one that is
                started now, instead of what the settings say.

        Returns:
            The coordinator, and the milliseconds waited for its start; None if it was running.

        Raises:
            ModelFileError, ModelDoesNotFitError, WorkersUnavailableError, CoordinatorError, EngineError: why not.
        """
        key = key_of(route)
        began = time.perf_counter()
        # Who has the lock may have ended the coordinator, to start another one: that is no case for the standby.
        standby = None if self._starting[key].locked() else self._standbys.take(route)
        coordinator = standby or self._running.find(route)
        if coordinator is not None and self._serves(coordinator, route, speculation):
            self._running.note_route(route)
            return coordinator, None
        if self._starting[key].locked():
            self._starter.report_again(route.name)
        async with self._starting[key]:
            if self._running.find(route) is None:  # if it is being ended, its standby takes over after that
                await self._running.until_ended()
            coordinator = await self._standbys.take_started(route) or self._running.find(route)
            # Another request may have started it meanwhile.
            if coordinator is not None and self._serves(coordinator, route, speculation):
                self._running.note_route(route)
                return coordinator, (time.perf_counter() - began) * 1000
            lost: frozenset[str] = frozenset()
            if coordinator is not None:
                # Lost, too small, drafting, or without a worker; answers that run on it continue on the next one.
                await self._running.end(coordinator, unless_shared=coordinator.is_running())
                lost = await self._workers.find_lost(coordinator.rpc_backends)
            self._lost[key] = lost
            coordinator = await self._start(route, lost, speculation=speculation)
            return coordinator, (time.perf_counter() - began) * 1000

    def _serves(self, coordinator: Coordinator, route: Route, speculation: str | None) -> bool:
        """Whether it runs, with the context that the route needs (names of one file may want different ones), on
        a worker where it needs one, and without drafts where these are not wanted."""
        if speculation == OFF and coordinator.settings.speculation.is_on:
            return False
        plan = coordinator.plan
        if route.needs_worker and plan is not None and not plan.workers and plan.strategy != GIVEN:
            return False
        if self.settings.context_tokens is not None:  # for all of them
            return coordinator.is_running()
        wanted = context_tokens_for(self.settings, route.modelfile, coordinator.settings.facts)
        return coordinator.is_running() and coordinator.settings.context_tokens >= wanted

    async def context_tokens(self, route: Route) -> int:
        """Tokens of context of the running coordinator for a route, or of the one that would be started.

        Raises:
            ModelFileError: the model's file cannot be read.
        """
        coordinator = self._running.find(route)
        if coordinator is not None and coordinator.is_running():
            return coordinator.settings.context_tokens
        assert route.model_path is not None
        facts = await asyncio.to_thread(read_facts, route.model_path)
        return context_tokens_for(self.settings, route.modelfile, facts)

    async def plan(self, route: Route) -> LayerPlan | None:
        """The plan of the running coordinator for a route to workers, or the one that a start would make now over
        the workers as last seen; contacts nothing and starts nothing.

        Returns:
            The plan; None where a running coordinator has none.

        Raises:
            ModelFileError: the model's file cannot be read.
            WorkersUnavailableError, ModelDoesNotFitError: there is no plan, as far as workers are known.
        """
        coordinator = self._running.find(route)
        if coordinator is not None and coordinator.is_running():
            return coordinator.plan
        return await self._starter.foresee(route)

    async def lay_out(self, model: str, layout: Mapping[str, int]) -> Coordinator:
        """Restart the coordinator of a model with another layout; its answers continue on the new one.

        Args:
            model: one that runs sharded.
            layout: units of each worker (its endpoint), in the order of their layers. 0 leaves it out.

        Raises:
            ConfigError: no sharded coordinator of this router runs the model, or this is not a layout of it.
            ModelDoesNotFitError: a worker's memory does not hold what it would get; the running one continues.
            WorkersUnavailableError: a worker is not free; the running one continues. Or it was taken or lost while
                the new one started.
            CoordinatorError: the new one could not be started; the old one has ended.
        """
        async with self._starting[key_of(self._running.route_of(self._sharded(model)))]:
            coordinator = self._sharded(model)  # another, if it was restarted meanwhile
            route = self._running.route_of(coordinator)
            foreseen = self.what_if(model, layout)
            await self._standbys.end_over(set(foreseen.plan.endpoints))
            await self._check_free(model, foreseen.plan.endpoints, coordinator)  # one that is gone has no memory
            foreseen = self.what_if(model, layout)  # their memory was just read
            if not foreseen.fits:
                raise ModelDoesNotFitError(f"{foreseen.shortage}; move layers to a worker with more memory")
            before = "/".join(map(str, coordinator.plan.unit_counts)) if coordinator.plan else ""
            message = f"new layout for {route.name}: {foreseen.describe()}; before: {before}"
            self._events.publish(EventKind.COORDINATOR_PLANNED, route.name, message)
            await self._running.end(coordinator)
            speculation = None if coordinator.settings.speculation.is_on else OFF  # an answer may need it off
            return await self._start(route, frozenset(), layout, speculation)

    async def replan(self, model: str | None = None) -> list[str]:
        """As `ClusterControl.replan`."""
        if model is not None:
            return [await self._replan(self._sharded(model).model)]
        lines = []
        for each in [coordinator.model for coordinator in self.coordinators if coordinator.plan is not None]:
            try:
                lines.append(await self._replan(each))
            except SollolError as error:
                lines.append(f"{each}: {error}")
        return lines

    async def _replan(self, model: str) -> str:
        async with self._starting[key_of(self._running.route_of(self._sharded(model)))]:
            coordinator = self._sharded(model)  # another, if it was restarted meanwhile
            route = self._running.route_of(coordinator)
            await self._workers.refresh()
            suspects = self._suspects(coordinator)
            if suspects:
                message = f"measuring the workers of {model} again, for a new layout"
            else:
                plan = await self._starter.planner.best_for(coordinator, self.settings)
                now_ms, then_ms = self._predicted_ms(coordinator), plan.predicted_token_ms
                if now_ms is None or then_ms is None or plan.strategy in SPLITS:
                    raise ConfigError(
                        f"nothing is known of how fast the workers of {model} are; measure them with "
                        "`%sollol_cluster calibrate`, or ask the model something"
                    )
                is_same = coordinator.plan is not None and layout_of(plan) == layout_of(coordinator.plan)
                if is_same or then_ms > now_ms * (1 - LEAST_GAIN):
                    return (
                        f"{model} stays as it is: no other layout is clearly faster than {now_ms:.3g} ms per token"
                    )
                counts = "/".join(map(str, plan.unit_counts))
                message = (
                    f"new layout for {model}: {counts} {plan.describe_devices()}, {then_ms:.3g} ms per token "
                    f"(predicted) instead of {now_ms:.3g}"
                )
            await self._running.end(coordinator)
            await self._start_again(coordinator, route, message, suspects)
            return message

    async def _move_if_unused(self, coordinator: Coordinator) -> bool:
        """Move a model to its best layout, unless there is a request at its coordinator or another process uses
        it; whether it was moved."""
        route = self._running.route_of(coordinator)
        async with self._starting[key_of(route)]:
            if self._running.find(route) is not coordinator or not coordinator.is_idle:
                return False
            suspects = self._suspects(coordinator)
            if await self._running.end_unless_used(coordinator):
                return False
            await self._start_again(coordinator, route, f"moving {route.name} to a faster layout", suspects)
            return True

    def _suspects(self, coordinator: Coordinator) -> list[str]:
        """The workers of a coordinator, if one of them is slow and it is not known which."""
        return coordinator.rpc_backends if self._measurements.is_unexplained(coordinator) else []

    async def _start_again(self, ended: Coordinator, route: Route, message: str, suspects: Sequence[str]) -> None:
        """Start a model that was just ended, with the fastest layout; before, calibrate suspects."""
        self._events.publish(EventKind.COORDINATOR_PLANNED, route.name, message)
        if suspects:
            await self.calibrate(suspects)
        speculation = None if ended.settings.speculation.is_on else OFF  # an answer may need it off
        await self._start(route, frozenset(), speculation=speculation, by_speed=True)

    def advice_for(self, coordinator: Coordinator) -> Advice | None:
        """What a better layout of one of its coordinators would bring; None if none is known."""
        return self._replanner.advice_for(coordinator) if coordinator.plan is not None else None

    def _predicted_ms(self, coordinator: Coordinator) -> float | None:
        token = self.predict(coordinator)
        return token.token_ms if token is not None else None

    async def _check_free(self, model: str, endpoints: Iterable[str], coordinator: Coordinator) -> None:
        """Refuse workers that are neither free nor this coordinator's, before it is ended for them."""
        others = [endpoint for endpoint in endpoints if endpoint not in coordinator.rpc_backends]
        await self._workers.probe(others)
        check_free(model, [worker for worker in self._workers.statuses() if worker.endpoint in others])

    def what_if(self, model: str, layout: Mapping[str, int]) -> Forecast:
        """What another layout of a running model would need, and how fast it would be.

        Args:
            model, layout: as in `lay_out`; the forecast says whether it fits.

        Raises:
            ConfigError: no sharded coordinator of this router runs the model, or this is not a layout of it.
        """
        coordinator = self._sharded(model)
        assert coordinator.plan is not None
        statuses = self._workers.statuses()
        capacities = {worker.endpoint: worker.capacity for worker in statuses}
        capacities |= {device.endpoint: device for device in self._workers.own.capacities()}
        unknown = [endpoint for endpoint in layout if endpoint not in capacities]
        if unknown:
            known = ", ".join(worker.label for worker in statuses) or "none"
            raise ConfigError(f"{unknown[0]} is not a known worker; known workers: {known}")
        return forecast(
            coordinator.settings.facts,
            without_layout(coordinator.plan, [capacities[endpoint] for endpoint in layout]),
            list(layout.values()),
            context_tokens=coordinator.settings.context_tokens,
            speeds=self._measurements.speeds(
                coordinator.settings.model_path,
                self.coordinators,
                self._workers.round_trips_ms,
                facts=coordinator.settings.facts,
                endpoints=layout,
            ),
        )

    def predict(self, coordinator: Coordinator) -> TokenTime | None:
        """The time of a token of a coordinator, from what tokens of its model took so far, else from calibrations;
        None where nothing is sharded."""
        if coordinator.plan is None:
            return None
        settings = coordinator.settings
        return self._measurements.predict(
            settings.model_path,
            coordinator.plan,
            self.coordinators,
            self._workers.round_trips_ms,
            settings.facts,
        )

    async def calibrate(self, endpoints: Iterable[str] | None = None) -> list[Calibrated]:
        """Measure how fast this machine and all known workers are, or these; see `Calibrator.calibrate`."""
        engine = await self.engine()
        return await self._calibrator.calibrate(engine, endpoints, self.settings.coordinator_port)

    def _on_event(self, event: Event) -> None:
        """After measured answers, correct the calibrations of their workers, and look whose time has changed."""
        self._replanner.on_event(event)
        if event.kind != EventKind.REQUEST_FINISHED:
            return
        for coordinator in self.coordinators:
            if coordinator.base_url != event.data.get("place"):
                continue
            if drafts := event.data.get("drafts"):
                self._starter.drafting.add_answer(coordinator, drafts, self._workers.round_trips_ms)
            if self._measurements.take_answers(coordinator, ANSWERS_PER_CORRECTION):
                submit(self._correct_calibrations(coordinator))
            if self._measurements.wants_waits(coordinator):
                self._waits.watch(coordinator)

    async def _correct_calibrations(self, coordinator: Coordinator) -> None:
        factors = self._measurements.corrections(coordinator, self.coordinators, self._workers.round_trips_ms)
        try:
            await self._workers.correct_calibrations(factors)
        except SollolError as error:
            logger.warning("calibrations were not corrected: %s", error)

    def token_ms(self, coordinator: Coordinator) -> float | None:
        """Milliseconds per token of one answer alone, as measured; None before the first token."""
        return self._measurements.token_ms(coordinator)

    def drift(self, coordinator: Coordinator) -> float | None:
        """As `TokenMeasurements.drift`."""
        return self._measurements.drift(coordinator)

    def _sharded(self, model: str) -> Coordinator:
        sharded = [coordinator for coordinator in self.coordinators if coordinator.plan is not None]
        found = [coordinator for coordinator in sharded if coordinator.settings.is_named(model)]
        if not found:
            running = ", ".join(coordinator.model for coordinator in sharded) or "none"
            raise ConfigError(f"{model} is not running sharded in this router; running sharded: {running}")
        return found[-1]

    async def _start(
        self,
        route: Route,
        lost: frozenset[str],
        layout: Mapping[str, int] | None = None,
        speculation: str | None = None,
        by_speed: bool = False,
    ) -> Coordinator:
        closings = self._closings
        coordinator = await self._starter.start(
            route, self.gate(route), lost, layout=layout, speculation=speculation, by_speed=by_speed
        )
        if self._closings != closings:
            await coordinator.stop_unless_shared()
            raise CoordinatorStartError(f"the router was closed while {route.name} was starting; ask again")
        self._enter(route, coordinator)
        self._standbys.follow(route, coordinator)
        return coordinator

    def _enter(self, route: Route, coordinator: Coordinator) -> None:
        """From now on this is the coordinator of a route."""
        self._running.add(route, coordinator)
        self._measurements.expect(coordinator, self._workers.round_trips_ms)

    def route_of(self, coordinator: Coordinator) -> Route:
        """The route that one of its coordinators was started for."""
        return self._running.route_of(coordinator)

    async def of_other_kernels(self) -> list[tuple[Coordinator, str]]:
        """Coordinators that other kernels of this user run, only to be shown, and who started them."""
        own_urls = {standby.base_url for standby in self._standbys.coordinators}
        return [each for each in await self._running.of_other_kernels() if each[0].base_url not in own_urls]

    @property
    def standbys(self) -> Standbys:
        """The standbys of its coordinators."""
        return self._standbys

    async def use_standbys(self, wanted: bool) -> list[str]:
        """Keep standbys from now on, or end them.

        Returns:
            What that takes for each running model over workers, a line of text; empty where they are ended.
        """
        running = [self._running.route_of(each) for each in self.coordinators if each.plan is not None]
        lines = [await self._standbys.describe(route) for route in running] if wanted else []
        self.settings = replace(self.settings, standby=wanted)
        await self._standbys.apply_settings()
        return lines

    async def found_lost(self, route: Route) -> None:
        """Wait until `lost_workers` are known: where a standby took over, they are looked for meanwhile."""
        await self._standbys.found_lost(route)

    def lost_workers(self, route: Route) -> frozenset[str]:
        """The names of workers that were found lost when the coordinator of a route was last restarted."""
        return frozenset(map(self._workers.name_of, self._lost.get(key_of(route), ())))

    async def wait_started(self) -> None:
        """Wait until no coordinator is being started any more, whether it runs then or has failed."""
        for lock in list(self._starting.values()):
            async with lock:
                pass

    async def save_contexts(self) -> int:
        """Save now what the coordinators' slots hold, where it is worth it; returns how many contexts."""
        return sum([await coordinator.save_contexts() for coordinator in self.coordinators])

    async def forget_contexts(self, contents: Sequence[str] = ()) -> int:
        """Delete the saved contexts of a conversation, also from the slots of running coordinators.

        Args:
            contents: of its messages, in order; none for all contexts.

        Returns:
            How many files were deleted.
        """
        for coordinator in self.coordinators:
            await coordinator.forget_contexts(contents)
        store = ContextStore()
        deleted = await asyncio.to_thread(
            store.forget, lambda context: not contents or context.has_turns(contents)
        )
        return len(deleted)

    def report_continued(self, route: Route, answer: Answer | None, coordinator: Coordinator) -> None:
        """Publish that an answer continues on this coordinator; None is one that had not begun."""
        where = coordinator.settings.describe_workers()
        tokens = answer.token_count if answer is not None else 0
        repeats = answer is not None and answer.recovers_exactly and tokens > 0
        message = f"resumed an answer from {route.name} at token {tokens} {where}"
        if repeats:
            message = f"generating {counted(tokens, 'known token')} of an answer from {route.name} again {where}"
        self._events.publish(EventKind.ANSWER_CONTINUED, route.name, message, repeats=repeats)

    def gate(self, route: Route) -> Gate:
        """The gate before the coordinator of a route, which it keeps when it restarts."""
        return self._gates.setdefault(key_of(route), Gate(self.settings.slots))

    async def stop(self, model: str | None = None, *, force: bool = False) -> list[Ended]:
        """Stop the coordinators of a model, or all; those that others use are only disconnected from.

        Args:
            force: end them in any case.
        """
        chosen = [
            coordinator
            for coordinator in self._running.known
            if model is None or coordinator.settings.is_named(model)
        ]
        ended = []
        await self._standbys.stop(chosen, force=force)
        for coordinator in chosen:
            users: list[str] = []
            if force:
                await self._running.end(coordinator)
            else:
                users = await self._running.let_go(coordinator)
            ended.append(Ended(kind=registry.COORDINATOR, name=coordinator.model, users=tuple(users)))
        return ended

    async def close(self) -> None:
        """Stop all coordinators that no other kernel uses, also those that are being started."""
        self._closings += 1
        self._replanner.close()
        await self._standbys.stop(self._running.known)
        for coordinator in self._running.known:
            await self._running.end(coordinator, unless_shared=True)
        await self._starter.drafting.save()
        await self._workers.cached.saved()

    async def detach(self) -> None:
        """End the connections to all coordinators; they live on for their keep_alive."""
        self._closings += 1
        self._replanner.close()
        await self._standbys.detach()
        await self._running.detach()
        await self._starter.drafting.save()
        await self._workers.cached.saved()
