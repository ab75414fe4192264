"""The live state of a router's cluster: kept up to date while somebody watches, and sent as small patches.

Most changes come from the event bus. What no event reports (requests that wait at a gate, the models of an Ollama
node) is read from this process's own objects after each event, and once a second while requests run. A watcher
gets the whole state once, then patches (`data.patch_between`), at most `PATCHES_PER_S` of them per second.

An idle worker that dies sends no event, so workers are probed while somebody watches: `PROBES_PER_S` each second,
in turn (all of ten workers in one second, all of a hundred in ten), `PROBES_TOGETHER` at the same time, so that
their results make a small patch. Two ends are known without a probe: that of a local worker from its supervisor,
and that of a held worker from its coordinator. Ollama nodes and the coordinators of other kernels are checked
every `OTHERS_EVERY_S` seconds. Nothing of this runs while nobody watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.cluster.data import cluster_data, patch_between
from sollol_nb.cluster.live_figures import LiveFigures, RequestCounts
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.io_loop import io_bound, is_exiting

logger = logging.getLogger(__name__)

PATCHES_PER_S = 4
PROBES_PER_S = 10
PROBES_TOGETHER = 5
PROBE_TIMEOUT_S = 1.0
OTHERS_EVERY_S = 10.0

_HELD_WORKERS_CHANGED = (
    EventKind.COORDINATOR_READY,
    EventKind.COORDINATOR_ADOPTED,
    EventKind.COORDINATOR_STOPPED,
    EventKind.COORDINATOR_LOST,
    EventKind.STANDBY_READY,
    EventKind.STANDBY_ENDED,
)

Listener = Callable[[Mapping[str, Any]], None]
"""Gets patches, on the I/O loop; must be quick."""


class LiveState(Protocol):
    """The live state of a cluster, whoever keeps it; see `ClusterState` for the methods."""

    is_closed: bool

    @property
    def data(self) -> dict[str, Any]: ...

    @property
    def is_watched(self) -> bool: ...

    async def watch(self, listener: Listener, /) -> dict[str, Any]: ...

    async def unwatch(self, listener: Listener, /) -> None: ...

    async def current(self) -> dict[str, Any]: ...

    async def refresh(self) -> ClusterStatus: ...

    def status(self) -> ClusterStatus: ...


class ClusterState:
    """One router's cluster, live. Lives on the I/O loop.

    Attributes:
        is_closed: whether its router was closed; the state then stays as it was last sent.
    """

    def __init__(
        self, coordinators: CoordinatorPool, workers: Workers, ollama: OllamaPool, events: EventBus
    ) -> None:
        self.is_closed = False
        self._coordinators = coordinators
        self._workers = workers
        self._ollama = ollama
        self._events = events
        self._listeners: list[Listener] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unsubscribe: Callable[[], None] | None = None
        self._changed = asyncio.Event()
        self._probe_now = asyncio.Event()
        self._numbers = itertools.count()
        self._others: list[tuple[Coordinator, str]] = []
        self._requests = RequestCounts()
        self._live = LiveFigures()
        self._data: dict[str, Any] = {}
        events.subscribe(self._requests.count)

    @property
    def data(self) -> dict[str, Any]:
        """The state as last sent; empty before the first watcher. See `cluster_data` for its keys."""
        return self._data

    @property
    def is_watched(self) -> bool:
        """Whether it is kept up to date."""
        return bool(self._listeners)

    @io_bound
    async def watch(self, listener: Listener) -> dict[str, Any]:
        """Send changes to a listener from now on.

        Changes since the last watcher left are sent as a first patch, for those who still hold that state.

        Returns:
            The state to which the next patch applies. Call it on the I/O loop, where no patch can come in between.
        """
        if not self.is_closed:
            self._listeners.append(listener)
            if len(self._listeners) == 1:
                self._start()
        return self._data

    @io_bound
    async def unwatch(self, listener: Listener) -> None:
        """Stop sending to a listener. All work ends with the last one. Calling it twice is fine."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            if not self.is_watched:
                await self._stop()

    async def close(self) -> None:
        """Stop sending for good. The last patch reports it: `closed`."""
        listeners, self._listeners = self._listeners, []
        if not self.is_closed:
            self.is_closed = True
            self._data = {**self._data, "closed": True}
            self._send({"closed": True}, listeners)
        await self._stop()

    @io_bound
    async def refresh(self) -> ClusterStatus:
        """The status after a check of all workers, all Ollama nodes and the coordinators of other kernels."""
        await asyncio.gather(self._workers.refresh(), self._ollama.refresh())
        self._others = await self._coordinators.of_other_kernels()
        return self.status()

    @io_bound
    async def current(self) -> dict[str, Any]:
        """The state as plain data: as it is kept while somebody watches, else after a check as by `refresh`."""
        if not self.is_watched and not self.is_closed:
            await self.refresh()
            await self.watch(_no_listener)
            await self.unwatch(_no_listener)
        return self._data

    def status(self) -> ClusterStatus:
        """Workers, coordinators, nodes and events as known now; sends no request to them."""
        standbys = self._coordinators.standbys
        statuses = [
            CoordinatorStatus.of(
                coordinator,
                standbys.note_of(coordinator),
                token_ms=self._coordinators.token_ms(coordinator),
                drift=self._coordinators.drift(coordinator),
                token=self._coordinators.predict(coordinator),
                advice=self._coordinators.advice_for(coordinator),
            )
            for coordinator in self._coordinators.coordinators
        ]
        statuses += [CoordinatorStatus.of(standby) for standby in standbys.coordinators]
        own = {status.url for status in statuses}
        statuses += [
            CoordinatorStatus.of(coordinator, f"started by {owner}")
            for coordinator, owner in self._others
            if coordinator.base_url not in own
        ]
        nodes = tuple(node for node in self._ollama.nodes if not node.is_only_looked_for)
        workers = [*self._workers.statuses(), *self._workers.held_by_others()]
        live = self._live.copy() if self.is_watched else LiveFigures.of(self._events.recent())
        live.requests = replace(self._requests)
        return ClusterStatus(tuple(workers), tuple(statuses), nodes, self._workers.invitations, live)

    # --- patches ----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._live = LiveFigures()
        for event in self._events.recent():
            self._record(event)
        for endpoint, round_trip_ms in self._workers.round_trips_ms.items():
            if round_trip_ms is not None:
                self._live.round_trips_ms[endpoint] = {next(self._numbers): round_trip_ms}
        self._changed, self._probe_now = asyncio.Event(), asyncio.Event()
        loop, changed = asyncio.get_running_loop(), self._changed

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(self._record, event)
            loop.call_soon_threadsafe(changed.set)

        self._unsubscribe = self._events.subscribe(on_event)
        self._record_memory(self._workers.endpoints)
        self._send_changes()
        self._tasks = [asyncio.create_task(self._follow_changes()), asyncio.create_task(self._poll())]

    async def _stop(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._others = []

    async def _follow_changes(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._requests.running > 0 else None):
                    await self._changed.wait()
            self._changed.clear()
            try:
                self._send_changes()
            except Exception:
                logger.exception("could not send the changes of the cluster's state")
            await asyncio.sleep(1 / PATCHES_PER_S)

    def _send_changes(self) -> None:
        own = [coordinator.base_url for coordinator in self._coordinators.coordinators]
        after = cluster_data(self.status(), own)
        patch = patch_between(self._data, after)
        self._data = after
        if patch:
            self._send(patch, self._listeners)

    def _send(self, patch: Mapping[str, Any], listeners: Iterable[Listener]) -> None:
        """Send a patch to each listener, also if another listener fails."""
        for listener in list(listeners):
            try:
                listener(patch)
            except Exception:
                logger.exception("a view of the cluster failed to apply a change")

    # --- what no event reports --------------------------------------------------------------------

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        position, others_due_s = 0, 0.0
        while True:
            endpoints = self._workers.endpoints
            count = min(PROBES_TOGETHER, len(endpoints))
            batch = [endpoints[(position + step) % len(endpoints)] for step in range(count)]
            position += count
            try:
                await self._workers.probe(batch, timeout_s=PROBE_TIMEOUT_S)
                self._record_memory(batch)
                if loop.time() >= others_due_s:
                    others_due_s = loop.time() + OTHERS_EVERY_S
                    await self._ollama.refresh()
                    self._record_nodes()
                    self._others = await self._coordinators.of_other_kernels()
                    self._changed.set()
            except OSError as error:  # of the registry's folder; the next attempt may succeed
                logger.warning("could not check the cluster: %s", error)
            except Exception:
                if is_exiting():
                    return
                logger.exception("could not check the cluster")
            with contextlib.suppress(TimeoutError):
                # A few workers are each probed once a second, not more often.
                async with asyncio.timeout(count / min(PROBES_PER_S, len(endpoints)) if endpoints else 1.0):
                    await self._probe_now.wait()
            self._probe_now.clear()

    def _record_memory(self, endpoints: Collection[str]) -> None:
        for worker in self._workers.statuses():
            if worker.endpoint in endpoints and worker.probe is not None and worker.probe.total_bytes:
                self._live.free_bytes[worker.endpoint] = worker.capacity.free_bytes

    def _record_nodes(self) -> None:
        for node in self._ollama.nodes:
            if node.round_trip_ms is not None:
                self._live.record_round_trip(node.url, next(self._numbers), node.round_trip_ms)

    # --- events -----------------------------------------------------------------------------------

    def _record(self, event: Event) -> None:
        self._live.record(next(self._numbers), event)
        if event.kind in _HELD_WORKERS_CHANGED:
            self._probe_now.set()


def _no_listener(_: Mapping[str, Any]) -> None:
    """A listener for a single read of the state."""
