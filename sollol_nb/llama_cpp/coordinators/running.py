"""The coordinators that run for a router: the table of them, the watch over each, and the end of idle ones.

The end of a coordinator is reported as an event, with its reason. An idle one is checked for workers that are
gone, which no request would notice. Where workers or memory are short, the least recently used idle one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import psutil

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import WORKER_LOST, describe_exit, exit_reason
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.supervisor import FIRST_CLIENT_S
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.routing import Route
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.text.tables import format_bytes

CHECK_INTERVAL_S = 1.0
"""How often idle coordinators are checked: whether their workers are still connected."""
SECOND_CHECK_S = 0.1
END_LIMIT_S = 20.0
"""How long a start waits for what is being ended."""
LINK_LOST = "it lost its connection to a worker"
MAKING_ROOM = "making room for "

T = TypeVar("T")

RouteKey: TypeAlias = tuple[str, str, str]
"""Model file, backend, and what is added to the file: routes with the same key share one coordinator."""


def key_of(route: Route) -> RouteKey:
    """What a coordinator is found by."""
    return str(route.model_path), route.backend, repr(route.modelfile.of_engine)


class RunningCoordinators:
    """What a router runs. Lives on the I/O loop."""

    def __init__(self, workers: Workers, events: EventBus, measurements: TokenMeasurements) -> None:
        self._workers = workers
        self._events = events
        self._measurements = measurements
        self._table: dict[RouteKey, tuple[Route, Coordinator]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()

    @property
    def coordinators(self) -> list[Coordinator]:
        """The running ones, the most recently used last."""
        running = [coordinator for _, coordinator in self._table.values() if coordinator.is_running()]
        return sorted(running, key=lambda coordinator: coordinator.last_used_at)

    @property
    def known(self) -> list[Coordinator]:
        """All that were added and not ended here, also those that have ended by themselves."""
        return [coordinator for _, coordinator in self._table.values()]

    def find(self, route: Route) -> Coordinator | None:
        """The coordinator of a route, which may have ended by itself; None if there is none."""
        _, coordinator = self._table.get(key_of(route), (route, None))
        return coordinator

    def route_of(self, coordinator: Coordinator) -> Route:
        """The route that a known coordinator was started for."""
        return next(route for route, known in self._table.values() if known is coordinator)

    def needs_worker(self, coordinator: Coordinator) -> bool:
        """Whether a route leads to it that needs a worker."""
        return any(route.needs_worker for route, known in self._table.values() if known is coordinator)

    def note_route(self, route: Route) -> None:
        """Note that a route that needs a worker leads to a coordinator, which may have been started for another
        one."""
        found = self._table.get(key_of(route))
        if found is not None and route.needs_worker and not found[0].needs_worker:
            self._table[key_of(route)] = (route, found[1])

    def add(self, route: Route, coordinator: Coordinator) -> None:
        """Enter the coordinator of a route, and watch it."""
        self._table[key_of(route)] = (route, coordinator)
        self._in_background(self._report_end(coordinator))
        if coordinator.rpc_backends:
            self._in_background(self._check_links(coordinator))

    async def end(self, coordinator: Coordinator, *, unless_shared: bool = False, why: str = "stopped") -> None:
        """Take a coordinator out of the table and end it; before, save contexts where that is worth it.

        Args:
            unless_shared: leave it running if another process or router is connected to it.
            why: for those who ask why it ended.
        """

        async def stop() -> list[str]:
            if unless_shared:
                await coordinator.stop_unless_shared()
            else:
                await coordinator.stop(why=why)
            return []

        await self._end(coordinator, stop, has_lost_worker=why == LINK_LOST)

    async def let_go(self, coordinator: Coordinator) -> list[str]:
        """Take a coordinator out of the table, and end it unless somebody else uses it.

        Returns:
            Who uses it, and keeps it running; empty if it was ended.
        """
        return await self._end(coordinator, lambda: coordinator.stop_unless_used(leave=True))

    async def end_unless_used(self, coordinator: Coordinator) -> list[str]:
        """End a coordinator unless another process is connected to it, or anybody has a request there; then it
        stays in the table.

        Returns:
            Who uses it; empty if it was ended.
        """
        taken = self._take(coordinator)

        async def end() -> list[str]:
            await coordinator.save_contexts()
            users = await coordinator.stop_unless_used()
            if users:
                self._table = {**taken, **self._table}
            return users

        return await self._ended(end())

    async def _end(
        self,
        coordinator: Coordinator,
        stop: Callable[[], Awaitable[list[str]]],
        *,
        has_lost_worker: bool = False,
    ) -> list[str]:
        was_running = coordinator.is_running()
        taken = self._take(coordinator)

        async def end() -> list[str]:
            if not has_lost_worker:
                await coordinator.save_contexts()
            users = await stop()
            if taken and was_running:
                message = f"stopped {coordinator.model}"
                if users:
                    message = f"disconnected from {coordinator.model}, which is still used by {', '.join(users)}"
                self._events.publish(EventKind.COORDINATOR_STOPPED, coordinator.model, message)
            return users

        return await self._ended(end())

    async def _ended(self, end: Coroutine[Any, Any, list[str]]) -> list[str]:
        """Run the end of a coordinator. The caller may be cancelled; the engine must end anyway."""
        ending = self._in_background(end)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return await asyncio.shield(ending)

    async def until_ended(self) -> None:
        """Wait for the coordinators that are being ended: they hold their workers and memory until then."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=END_LIMIT_S)

    def _take(self, coordinator: Coordinator) -> dict[RouteKey, tuple[Route, Coordinator]]:
        """Take a coordinator out of the table; returns its entries."""
        taken = {key: known for key, known in self._table.items() if known[1] is coordinator}
        for key in taken:
            del self._table[key]
        return taken

    async def detach(self) -> None:
        """End the connections to all coordinators; they live on for their keep_alive."""
        table, self._table = self._table, {}
        for _, coordinator in table.values():
            await coordinator.save_contexts()  # nobody else knows what its slots hold
            await coordinator.detach()

    async def of_other_kernels(self) -> list[tuple[Coordinator, str]]:
        """Coordinators that other kernels of this user run, only to be shown, and who started them."""
        own_urls = {coordinator.base_url for coordinator in self.known}
        found = []
        for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
            if entry.about.get("url") not in own_urls:
                coordinator = await Coordinator.snapshot(entry)
                if coordinator is not None:
                    found.append((coordinator, registry.describe_owner(entry.about)))
        return found

    # --- making room ----------------------------------------------------------------------------

    async def free_memory(self, needed_bytes: int) -> None:
        """End standbys and idle coordinators that run on this machine alone, while its memory is short."""
        while psutil.virtual_memory().available < needed_bytes:
            if await self.end_standby(format_bytes(needed_bytes), here=True):
                continue
            if not await self._end_least_recently_used(
                lambda coordinator: not coordinator.rpc_backends, format_bytes(needed_bytes)
            ):
                return  # the engine will say what it lacks

    async def end_left(self, model: str) -> bool:
        """Free workers for a model by ending a coordinator that an ended kernel left; False if there is none."""
        return await self._end_one(
            await self._others(), model, "which an ended kernel left", EngineProcess.stop_unless_shared
        )

    async def end_idle(self, model: str) -> bool:
        """Free workers for a model by ending an idle coordinator of this router, else of another router of this
        process; False if there is none. One that another process is connected to is never ended.
        """
        return await self._end_least_recently_used(
            lambda coordinator: bool(coordinator.rpc_backends), model
        ) or await self._end_one(
            await self._others(), model, "which is idle in another router", _is_ended_unless_used
        )

    async def end_standby(self, needed_for: str, *, here: bool = False) -> bool:
        """End a standby, whichever kernel keeps it: it answers nobody, so it gives way before all others; False if
        there is none.

        Args:
            here: one that takes memory of this machine.
        """
        entries = await asyncio.to_thread(registry.entries)
        local = {entry.name for entry in entries if entry.kind == registry.WORKER}
        for entry in entries:
            is_elsewhere = here and entry.workers and not local & set(entry.workers)
            process = await EngineProcess.adopt(entry) if entry.standby_of and not is_elsewhere else None
            if process is None:
                continue
            known = registry.find(entry.id)
            if known is not None and known.standby_of:  # else it has taken over meanwhile
                await process.stop(why=f"{MAKING_ROOM}{needed_for}")
                return True
            process.detach()
        return False

    async def _others(self) -> list[Entry]:
        """The running coordinators over workers that are not in the table."""
        own_urls = {coordinator.base_url for coordinator in self.known}
        return [
            entry
            for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR)
            if entry.workers
            and not entry.standby_of
            and entry.about.get("url") not in own_urls
            # The process that has just started one may not be connected to it yet.
            and (entry.about.get("load_ms") or entry.age_s > FIRST_CLIENT_S)
        ]

    async def _end_one(
        self, entries: list[Entry], model: str, whose: str, end: Callable[[EngineProcess], Awaitable[bool]]
    ) -> bool:
        """End the first that `end` can end. Its model file is not read: it may be gone by now."""
        for entry in entries:
            process = await EngineProcess.adopt(entry)
            if process is None:
                continue
            if await end(process):
                message = f"stopped {entry.name}, {whose}, to make room for {model}"
                self._events.publish(EventKind.COORDINATOR_MADE_ROOM, entry.name, message)
                return True
        return False

    async def _end_least_recently_used(self, eligible: Callable[[Coordinator], bool], needed_for: str) -> bool:
        for coordinator in self.coordinators:
            if not eligible(coordinator) or not coordinator.is_idle:
                continue
            if await self.end_unless_used(coordinator):
                continue
            message = f"stopped {coordinator.model} (idle) to make room for {needed_for}"
            self._events.publish(EventKind.COORDINATOR_MADE_ROOM, coordinator.model, message)
            return True
        return False

    # --- watching -------------------------------------------------------------------------------

    async def _report_end(self, coordinator: Coordinator) -> None:
        report = await coordinator.wait_ended()
        self._measurements.keep(coordinator, self._workers.round_trips_ms)
        if coordinator not in self.known:  # it was ended here
            return
        model = coordinator.model
        if report.why and report.code is not None:  # its keep_alive or another process ended it
            self._events.publish(EventKind.COORDINATOR_STOPPED, model, f"{model} ended: {report.why}")
        elif exit_reason(report.tail) is WORKER_LOST:
            found = await self._workers.find_lost(coordinator.rpc_backends)
            lost = ", ".join(map(self._workers.name_of, found))
            message = f"{model} ended because {f'worker {lost}' if lost else 'a worker'} was lost"
            self._events.publish(EventKind.COORDINATOR_LOST, model, message)
        else:
            reason = exit_reason(report.tail) or describe_exit(report.code)
            self._events.publish(EventKind.COORDINATOR_LOST, model, f"{model} ended: {reason}")

    async def _check_links(self, coordinator: Coordinator) -> None:
        while coordinator.is_running():
            await asyncio.sleep(CHECK_INTERVAL_S)
            if not coordinator.is_idle or not coordinator.is_running():
                continue  # a request notices by itself
            broken = await asyncio.to_thread(coordinator.broken_links)
            if broken:  # a list of connections that change while it is read may lack one
                await asyncio.sleep(SECOND_CHECK_S)
                broken = await asyncio.to_thread(coordinator.broken_links)
            if broken and coordinator.is_running():
                names = ", ".join(map(self._workers.name_of, broken))
                message = f"{coordinator.model} lost its connection to {names}"
                self._events.publish(EventKind.COORDINATOR_LOST, coordinator.model, message)
                await self.end(coordinator, why=LINK_LOST)
                await self._workers.find_lost(coordinator.rpc_backends)

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _is_ended_unless_used(process: EngineProcess) -> bool:
    return not await process.stop_unless_used(leave=True)
