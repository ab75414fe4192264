"""The standby: a second coordinator of the same model, kept ready, so that a death costs a switch and not a load.

With the setting `standby`, each coordinator over workers gets one, in the background and once it is ready itself:
over the workers that are free then, else on this machine if it is calibrated and holds the model. It has the same
context, slots, adapters and drafts, so it continues any answer of the other one. Where the coordinator dies, loses
a worker or goes silent, its standby is the coordinator of the model at once, and a new standby is started from
what is left.

A standby answers nobody, so it gives way before everything else: any start that lacks workers, of any kernel, ends
it (`RunningCoordinators.end_standby`), and the planner never ends anything for a standby. Its registry entry names
the coordinator that it may have to replace (`standby_of`). So other kernels use the same standby for the same
coordinator, take it over when that one dies, and do not use it before that. It lives as long as the other one:
while that one runs, this process holds a lease on it.

Where none is possible, that is said once, and tried again when a worker has become free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.errors import (
    ConnectFailedError,
    ConnectionBrokenError,
    SollolError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.running import (
    CHECK_INTERVAL_S,
    LINK_LOST,
    MAKING_ROOM,
    SECOND_CHECK_S,
    RouteKey,
    RunningCoordinators,
    key_of,
)
from sollol_nb.llama_cpp.coordinators.start import CoordinatorStarter
from sollol_nb.llama_cpp.coordinators.streams import SILENT
from sollol_nb.llama_cpp.processes.process import ExitReport
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import DISTRIBUTED, Route
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.gate import Gate

logger = logging.getLogger(__name__)

STARTING, READY = "starting", "ready"
LOOK_AGAIN_S, SELDOM_S = 2.0, 60.0
"""How often to look for free workers where none is known to have come: less and less often."""
TRY_AGAIN_S = 600.0
"""A start that failed is tried again then, also over the same workers."""
ROOM_S = 30.0
"""After a standby gave way, its workers are left to who needs them for so long."""
TRUSTED_S = 60.0
"""A standby that ended sooner is not started again before a worker has become free: it might end the same way."""
PROVE_EVERY_S = 30.0
"""An idle standby generates a token so often, since nothing else would show that a worker of it hangs."""
PROOF_LIMIT_S, PROOF_MARGIN = 15.0, 20.0
SWITCH_S = 5.0
"""Instead of the time of a start: how long a coordinator with a standby may be silent in any case (see `pace.py`).
A wrong verdict costs that the known tokens are processed again."""

_WORKERS_CAME = (
    EventKind.WORKER_ADDED,
    EventKind.WORKER_DISCOVERED,
    EventKind.WORKER_STARTED,
    EventKind.WORKER_ADOPTED,
    EventKind.WORKER_RETURNED,
    EventKind.LINK_READY,
    EventKind.COORDINATOR_STOPPED,
    EventKind.COORDINATOR_MADE_ROOM,
)


def is_fault(report: ExitReport) -> bool:
    """Whether a coordinator ended by a fault: by itself, or because it was silent or without a worker; not because
    somebody stopped it, or nobody used it."""
    return report.why in ("", LINK_LOST) or report.why.startswith(SILENT)


@dataclass(eq=False, slots=True)
class _Kept:
    """The standby of one model, as far as there is one.

    Attributes:
        main: the coordinator that it may have to replace.
        standby: it, once it is ready.
        is_starting: whether it is being planned or started.
        settled: set while nothing is being started.
        missing: why there is none; "" while none is missing.
        lost: workers that were just found lost, which are chosen last.
        changed: set where its task has something to do.
    """

    route: Route
    main: Coordinator
    gate: Gate
    standby: Coordinator | None = None
    is_starting: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    missing: str = ""
    lost: frozenset[str] = frozenset()
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> Coordinator | None:
        """The standby, if it can take over now."""
        return self.standby if self.standby is not None and self.standby.is_running() else None


class Standbys:
    """The standbys of a router's coordinators. Lives on the I/O loop.

    Args:
        starter: starts them, with the settings of the pool.
        locks: of the models that are being started.
        lost: gets the workers that were found lost when a standby has taken over.
        promoted: called when a standby is the coordinator of a route from now on.
    """

    def __init__(
        self,
        workers: Workers,
        events: EventBus,
        running: RunningCoordinators,
        starter: CoordinatorStarter,
        *,
        locks: Mapping[RouteKey, asyncio.Lock],
        lost: MutableMapping[RouteKey, frozenset[str]],
        promoted: Callable[[Route, Coordinator], None],
    ) -> None:
        self._workers = workers
        self._events = events
        self._running = running
        self._starter = starter
        self._locks = locks
        self._lost = lost
        self._promoted = promoted
        self._table: dict[RouteKey, _Kept] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._searches: dict[RouteKey, asyncio.Task[Any]] = {}
        events.subscribe(self._on_event)

    # --- what there is --------------------------------------------------------------------------

    @property
    def coordinators(self) -> list[Coordinator]:
        """The standbys that are ready."""
        return [kept.ready for kept in self._table.values() if kept.ready is not None]

    def note_of(self, coordinator: Coordinator) -> str:
        """One line about the standby of a coordinator; "" where none is to be kept."""
        for kept in self._table.values():
            if kept.main is coordinator:
                if kept.ready is not None:
                    return f"a standby is ready {kept.ready.settings.describe_workers()}"
                return f"no standby: {kept.missing}" if kept.missing else "a standby is being started"
        return ""

    async def describe(self, route: Route, *, even_if_off: bool = True) -> str:
        """One line: the standby of a route, or what it would take, or why none is possible.

        Args:
            even_if_off: also where the settings keep none; without it, the line is "" there.
        """
        if not even_if_off and not self._starter.settings.standby:
            return ""
        if route.backend != DISTRIBUTED:
            return f"{route.name} has no standby: it runs over no workers"
        main = self._running.find(route)
        kept = self._table.get(key_of(route))
        if kept is not None and kept.ready is not None and kept.ready.plan is not None:
            return f"a standby of {route.name} is ready: {kept.ready.plan.describe_cost()}"
        try:
            plan = await self._plan(route, main)
        except SollolError as error:
            return f"no standby of {route.name} is possible: {error}"
        return f"a standby of {route.name} would take {plan.describe_cost()}"

    async def _plan(self, route: Route, main: Coordinator | None) -> LayerPlan:
        await self._workers.refresh_holders()
        if main is not None and main.is_running() and main.plan is not None:
            return await self._starter.foresee(route, standby_of=main.plan)
        return await self._starter.foresee(route, standby_of=await self._starter.foresee(route))

    # --- keeping --------------------------------------------------------------------------------

    def follow(self, route: Route, main: Coordinator) -> None:
        """Keep a standby of a coordinator that is ready from now on, if the settings want one."""
        if not self._starter.settings.standby or route.backend != DISTRIBUTED or main.plan is None:
            return
        kept = self._table.get(key_of(route))
        if kept is None:
            kept = self._table[key_of(route)] = _Kept(route, main, main.gate)
            kept.settled.set()
            kept.task = self._in_background(self._keep(kept))
        elif kept.main is not main:
            kept.route, kept.main, kept.missing = route, main, ""
            kept.changed.set()

    def take(self, route: Route) -> Coordinator | None:
        """The standby of a coordinator that has ended, which is the coordinator of the route from now on; None if
        none is ready."""
        kept = self._table.get(key_of(route))
        if kept is None or kept.main.is_running() or kept.ready is None:
            return None
        ended, main = kept.main, kept.ready
        main.compromise = ended.compromise
        kept.main, kept.standby = main, None
        self._promoted(route, main)
        self._lost[key_of(route)] = frozenset()
        self._searches[key_of(route)] = self._in_background(self._settle(kept, ended, main))
        message = f"the standby of {route.name} took over {main.settings.describe_workers()}"
        self._events.publish(EventKind.STANDBY_TAKEN, route.name, message)
        return main

    async def take_started(self, route: Route) -> Coordinator | None:
        """As `take`; waits for a standby that is being started: it is further than a new start."""
        kept = self._table.get(key_of(route))
        if kept is not None and not kept.main.is_running():
            await kept.settled.wait()
        return self.take(route)

    async def found_lost(self, route: Route) -> None:
        """Wait until the lost workers are known, after a standby has taken over."""
        search = self._searches.get(key_of(route))
        if search is not None:
            await asyncio.wait({search})

    async def _settle(self, kept: _Kept, ended: Coordinator, main: Coordinator) -> None:
        """What is due after a switch, but need not delay a token."""
        try:
            await main.set_standby_of("")  # first: until then, any start that lacks workers ends it
            await main.keep_alive(ended.keep_alive_s)
            kept.lost = self._lost[key_of(kept.route)] = await self._workers.find_lost(ended.rpc_backends)
            await ended.stop()  # it has ended; this closes its connections
        finally:
            main.free()  # from now on it lives for its keep_alive, as any other
            kept.changed.set()

    async def _keep(self, kept: _Kept) -> None:
        """Start standbys, one after the other, while their coordinator lives."""
        key = key_of(kept.route)
        try:
            while kept.main.is_running() or await self._goes_on(kept):
                kept.changed.clear()
                if kept.standby is None:
                    await self._search_ended(key)
                    await self._start(kept)
                if kept.standby is not None:
                    await self._watch(kept, kept.main, kept.standby)
        except Exception:
            logger.exception("could not keep a standby of %s", kept.main.model)
        finally:
            if self._table.get(key) is kept:
                del self._table[key]
            if kept.standby is not None:
                self._in_background(self._end(kept.standby))

    async def _search_ended(self, key: RouteKey) -> None:
        if (search := self._searches.get(key)) is not None:
            await asyncio.wait({search})

    async def _goes_on(self, kept: _Kept) -> bool:
        """Whether the model still runs after the end of its coordinator: on the standby, or started again."""
        report = await kept.main.wait_ended()
        if is_fault(report) and not kept.main.is_running():
            return self.take(kept.route) is not None or kept.main.is_running()
        async with self._locks[key_of(kept.route)]:  # where it is being moved to another layout
            return kept.main.is_running()

    async def _start(self, kept: _Kept) -> None:
        """Start a standby; where that is impossible, return when a worker has become free."""
        for lock in [*self._locks.values()]:  # who waits for a model comes first
            async with lock:
                pass
        if not kept.main.is_running():
            return
        free, missing = self._free(), "it ended while it was started"
        lost, kept.lost = kept.lost, frozenset()
        kept.is_starting = True
        kept.settled.clear()
        try:
            standby = await self._starter.start(kept.route, kept.gate, lost, standby_of=kept.main)
            try:
                is_held = await standby.hold()
            except asyncio.CancelledError:  # nobody else knows of it
                self._in_background(self._end(standby))
                raise
            if is_held:
                kept.standby, kept.missing = standby, ""
            else:
                await standby.detach()  # it has ended; this closes its connections
        except (SollolError, OSError) as error:
            missing = str(error)
        finally:
            kept.is_starting = False
            kept.settled.set()
        if kept.standby is not None:
            self._report_ready(kept, kept.standby)
        elif kept.main.is_running():
            await self._wait_for_workers(kept, free, missing)

    def _report_ready(self, kept: _Kept, standby: Coordinator) -> None:
        kept.main.pace.set_load_time(min(SWITCH_S, kept.main.load_ms / 1000))
        cost = standby.plan.describe_cost() if standby.plan is not None else standby.settings.describe_workers()
        message = f"a standby of {kept.main.model} is ready at {standby.base_url}: {cost}"
        self._events.publish(EventKind.STANDBY_READY, kept.main.model, message, load_ms=standby.load_ms)

    async def _watch(self, kept: _Kept, main: Coordinator, standby: Coordinator) -> None:
        """Return when the coordinator has ended or is another one, or when the standby has ended."""
        if standby.id == main.id:  # the start of the model has adopted it over a second connection
            kept.standby = None
            await standby.detach()
            return
        if not _serves_as(standby, main):  # the model was started again with other settings
            kept.standby = None
            await self._end(standby)
            return
        if standby.standby_of != main.id:
            await standby.set_standby_of(main.id)
        began, proven_s = asyncio.get_running_loop().time(), 0.0
        while main.is_running() and standby.is_running() and kept.main is main:
            await _first(main.wait_ended(), standby.wait_ended(), kept.changed.wait(), limit_s=CHECK_INTERVAL_S)
            kept.changed.clear()
            if not standby.is_running() or not main.is_running() or kept.standby is not standby:
                break
            now = asyncio.get_running_loop().time()
            if await self._has_broken_link(standby):
                await standby.stop(why=LINK_LOST)
            elif now - began - proven_s > PROVE_EVERY_S:
                proven_s = now - began
                await self._prove(kept, standby)
        if kept.standby is not standby or standby.is_running():
            return
        kept.standby = None
        report = await standby.wait_ended()
        await standby.stop()  # closes its connections
        main.pace.set_load_time(main.load_ms / 1000)
        why = report.why or "it was lost"
        self._events.publish(EventKind.STANDBY_ENDED, main.model, f"the standby of {main.model} ended: {why}")
        if not main.is_running():
            return
        kept.lost = await self._workers.find_lost(standby.rpc_backends)
        ended_soon = asyncio.get_running_loop().time() - began < TRUSTED_S
        if why.startswith(MAKING_ROOM):
            kept.missing = f"it gave way, {why}"
            await _first(main.wait_ended(), limit_s=ROOM_S)
        elif not is_fault(report) or (ended_soon and not kept.lost):
            await self._wait_for_workers(kept, self._free(), f"the last one ended: {why}")

    async def _has_broken_link(self, standby: Coordinator) -> bool:
        if not standby.rpc_backends or not await asyncio.to_thread(standby.broken_links):
            return False
        await asyncio.sleep(SECOND_CHECK_S)  # a list of connections that change while it is read may lack one
        return bool(await asyncio.to_thread(standby.broken_links)) and standby.is_running()

    async def _prove(self, kept: _Kept, standby: Coordinator) -> None:
        """Have a standby generate a token; end it if nothing comes."""
        limit_s = max(PROOF_LIMIT_S, PROOF_MARGIN * (standby.pace.seconds_per_token or 0.0))
        try:
            await standby.timings([0], 1, timeout_s=limit_s)
        except (TransportTimeoutError, ConnectionBrokenError, ConnectFailedError):
            if kept.standby is standby:  # else it has taken over, and its requests are watched
                await standby.stop(grace_s=0.0, why=f"{SILENT} for {limit_s:.0f} s")
        except TransportError as error:
            logger.info("the standby of %s reports no times: %s", standby.model, error)

    def _free(self) -> frozenset[str]:
        return frozenset(
            worker.endpoint
            for worker in self._workers.statuses()
            if worker.state == "free" and not self._workers.cool_down_s(worker.endpoint)
        )

    async def _wait_for_workers(self, kept: _Kept, known: frozenset[str], missing: str) -> None:
        """Say why there is no standby, unless that was said; return when another worker is free, or when the
        coordinator is another one."""
        main, pause_s, until_s = kept.main, LOOK_AGAIN_S, asyncio.get_running_loop().time() + TRY_AGAIN_S
        if missing != kept.missing:
            message = f"no standby of {main.model} is possible now: {missing}"
            self._events.publish(EventKind.STANDBY_MISSING, main.model, message)
        kept.missing = missing
        known &= self._free()
        while main.is_running() and kept.main is main:
            await _first(main.wait_ended(), kept.changed.wait(), limit_s=pause_s)
            pause_s = min(2 * pause_s, SELDOM_S)
            kept.changed.clear()
            if not main.is_running() or kept.main is not main:
                return
            with suppress(SollolError, OSError):
                await self._workers.refresh()
            if self._free() - known or asyncio.get_running_loop().time() > until_s:
                return
            known &= self._free()

    def _on_event(self, event: Event) -> None:
        if event.kind in _WORKERS_CAME:
            for kept in self._table.values():
                if kept.missing:
                    kept.changed.set()

    # --- ending ---------------------------------------------------------------------------------

    async def apply_settings(self) -> None:
        """Keep standbys of all running coordinators, or end them, as the settings say now."""
        if self._starter.settings.standby:
            for coordinator in self._running.coordinators:
                self.follow(self._running.route_of(coordinator), coordinator)
        else:
            await self.stop(self._running.coordinators)

    async def stop(self, mains: list[Coordinator], *, force: bool = False) -> None:
        """End the standbys of these coordinators, unless another process uses them.

        Args:
            force: end them in any case.
        """
        for kept in [kept for kept in self._table.values() if kept.main in mains]:
            standby = await self._give_up(kept)
            if standby is not None and force:
                await standby.stop()
            elif standby is not None:
                await self._end(standby)

    async def end_over(self, endpoints: set[str]) -> None:
        """End the standbys that hold one of these workers."""
        await self.stop(
            [
                kept.main
                for kept in self._table.values()
                if kept.is_starting or (kept.ready is not None and endpoints & set(kept.ready.rpc_backends))
            ]
        )

    async def detach(self) -> None:
        """Disconnect from all standbys; they live on for their keep_alive."""
        for kept in [*self._table.values()]:
            standby = await self._give_up(kept)
            if standby is not None:
                await standby.detach()

    async def _give_up(self, kept: _Kept) -> Coordinator | None:
        """Keep no standby of this model any more; returns the one that was ready."""
        standby, kept.standby = kept.standby, None
        self._table.pop(key_of(kept.route), None)
        if kept.task is not None:
            kept.task.cancel()
            await asyncio.wait({kept.task})  # one that is being started ends with it
        return standby

    async def _end(self, standby: Coordinator) -> None:
        if await standby.stop_unless_shared():
            message = f"stopped the standby of {standby.model}"
            self._events.publish(EventKind.STANDBY_ENDED, standby.model, message)

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _serves_as(standby: Coordinator, main: Coordinator) -> bool:
    """Whether it serves every request that the other one serves."""
    ours, theirs = standby.settings, main.settings
    return (
        ours.context_tokens >= theirs.context_tokens
        and ours.slots >= theirs.slots
        and ours.speculation.kind == theirs.speculation.kind
    )


async def _first(*works: Coroutine[Any, Any, Any], limit_s: float) -> None:
    """Wait for the first of these, for so long at most."""
    tasks = {asyncio.create_task(work) for work in works}
    try:
        await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
