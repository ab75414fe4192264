"""The live state of a router's cluster: kept while somebody watches, told as small patches.

What changes is told by the event bus; what the bus does not tell (requests that wait at a gate, an Ollama node's
models) is read from this process's own objects when something happened, and once a second while requests run.
Watchers get the whole state once, then patches (`state_patch`), at most `PATCHES_PER_S` of them.

Looking costs, and a worker that dies idle tells nobody. So while somebody watches, `LOOKS_PER_S` workers are
probed each second, in turn: all of ten in one second, all of a hundred in ten; `LOOKS_AT_ONCE` together, so that
what they bring makes a small patch. The end of a local worker is
told by its supervisor, and a held one's by its coordinator, without looking. Ollama nodes, and coordinators of
other kernels, are looked at every `OTHERS_EVERY_S` seconds. When nobody watches any more, nothing of this runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sollol_nb.cluster.data import Live, RequestCounts, answer_words, cluster_data
from sollol_nb.cluster.state_patch import patch_between
from sollol_nb.cluster.status import ClusterStatus, CoordinatorStatus
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.io_loop import io_bound

logger = logging.getLogger(__name__)

PATCHES_PER_S = 4
LOOKS_PER_S = 10
LOOKS_AT_ONCE = 5
LOOK_TIMEOUT_S = 1.0
OTHERS_EVERY_S = 10.0
ROUND_TRIPS_KEPT = 20
EVENTS_KEPT = 30

_UNTOLD = (
    EventKind.REQUEST_STARTED,
    EventKind.REQUEST_FINISHED,
    EventKind.ENGINE_BUILDING,
    EventKind.COORDINATOR_LOADING,
    EventKind.PROBE_DONE,
)
"""Kinds that are shown as numbers, not in the event log."""
_STARTED = (EventKind.COORDINATOR_READY, EventKind.COORDINATOR_ADOPTED, EventKind.COORDINATOR_FAILED)
_TAKES_OR_FREES = (
    EventKind.COORDINATOR_READY,
    EventKind.COORDINATOR_ADOPTED,
    EventKind.COORDINATOR_STOPPED,
    EventKind.COORDINATOR_LOST,
)
"""After these, other workers are held than before."""

Listener = Callable[[Mapping[str, Any]], None]
"""Gets patches, on the I/O loop; must be quick."""


class ClusterState:
    """One router's cluster, live. Lives on the I/O loop.

    Attributes:
        is_closed: whether its router was closed; the state stays as it was last told.
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
        self._look_soon = asyncio.Event()
        self._numbers = itertools.count()
        self._others: list[tuple[Coordinator, str]] = []
        self._requests = RequestCounts()
        self._live = Live(self._requests)
        self._data: dict[str, Any] = {}
        events.subscribe(self._requests.note)

    @property
    def data(self) -> dict[str, Any]:
        """The state as last told; empty before anybody watched. See `cluster_data` for its keys."""
        return self._data

    @property
    def is_watched(self) -> bool:
        """Whether it is kept up to date."""
        return bool(self._listeners)

    @io_bound
    async def watch(self, listener: Listener) -> dict[str, Any]:
        """Tell changes from now on; returns the state that the next patch is for (ask on the I/O loop, where none
        can come in between).

        What has changed since anybody watched is told as a first patch, to those who still hold that state.
        """
        if not self.is_closed:
            self._listeners.append(listener)
            if len(self._listeners) == 1:
                self._begin()
        return self._data

    @io_bound
    async def unwatch(self, listener: Listener) -> None:
        """Tell no more. When the last one goes, all work ends. Twice is fine."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            if not self._listeners:
                await self._end()

    async def close(self) -> None:
        """Tell nobody any more, for good. The last patch says so: `closed`."""
        listeners, self._listeners = self._listeners, []
        if not self.is_closed:
            self.is_closed = True
            self._data = {**self._data, "closed": True}
            self._send({"closed": True}, listeners)
        await self._end()

    @io_bound
    async def look(self) -> ClusterStatus:
        """Look at all workers and Ollama nodes, and at other kernels' coordinators; then the status."""
        await asyncio.gather(self._workers.refresh(), self._ollama.refresh())
        self._others = await self._coordinators.others()
        return self.status()

    def status(self) -> ClusterStatus:
        """Workers, coordinators and nodes as known now; asks nobody."""
        statuses = [
            CoordinatorStatus.of(
                one,
                token_ms=self._coordinators.token_ms(one),
                token=self._coordinators.predict(one.settings.model_path, one.plan) if one.plan else None,
            )
            for one in self._coordinators.coordinators
        ]
        mine = {one.url for one in statuses}
        statuses += [
            CoordinatorStatus.of(one, f"started by {owner}")
            for one, owner in self._others
            if one.base_url not in mine
        ]
        return ClusterStatus(tuple(self._workers.statuses()), tuple(statuses), tuple(self._ollama.nodes))

    # --- kept up to date --------------------------------------------------------------------------

    def _begin(self) -> None:
        self._live = Live(self._requests)
        for event in self._events.recent():
            self._note(event)
        for endpoint, round_trip_ms in self._workers.round_trips_ms.items():
            if round_trip_ms is not None:
                self._live.round_trips_ms[endpoint] = {next(self._numbers): round_trip_ms}
        self._changed, self._look_soon = asyncio.Event(), asyncio.Event()
        loop, changed = asyncio.get_running_loop(), self._changed

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(self._note, event)
            loop.call_soon_threadsafe(changed.set)

        self._unsubscribe = self._events.subscribe(on_event)
        self._note_memory(self._workers.endpoints)
        self._tell()
        self._tasks = [asyncio.create_task(self._tell_changes()), asyncio.create_task(self._look_around())]

    async def _end(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._others = []

    async def _tell_changes(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._requests.under_way > 0 else None):
                    await self._changed.wait()
            self._changed.clear()
            try:
                self._tell()
            except Exception:
                logger.exception("the cluster's state could not be told")
            await asyncio.sleep(1 / PATCHES_PER_S)

    def _tell(self) -> None:
        after = self._current()
        patch = patch_between(self._data, after)
        self._data = after
        if patch:
            self._send(patch, self._listeners)

    def _send(self, patch: Mapping[str, Any], listeners: Iterable[Listener]) -> None:
        """Tell each; one that fails keeps it from no other."""
        for listener in list(listeners):
            try:
                listener(patch)
            except Exception:
                logger.exception("a view of the cluster could not take a change")

    def _current(self) -> dict[str, Any]:
        own = [one.base_url for one in self._coordinators.coordinators]
        return cluster_data(self.status(), self._live, own)

    async def _look_around(self) -> None:
        loop = asyncio.get_running_loop()
        position, others_due = 0, 0.0
        while True:
            endpoints = self._workers.endpoints
            count = min(LOOKS_AT_ONCE, len(endpoints))
            turn = [endpoints[(position + step) % len(endpoints)] for step in range(count)]
            position += count
            try:
                await self._workers.probe(turn, timeout_s=LOOK_TIMEOUT_S)
                self._note_memory(turn)
                if loop.time() >= others_due:
                    others_due = loop.time() + OTHERS_EVERY_S
                    await self._ollama.refresh()
                    self._note_nodes()
                    self._others = await self._coordinators.others()
                    self._changed.set()
            except OSError as error:  # of the registry's folder; the next look may go well
                logger.warning("the cluster could not be looked at: %s", error)
            except Exception:
                logger.exception("the cluster could not be looked at")
            with contextlib.suppress(TimeoutError):
                # All of a few workers are looked at once a second, not more often.
                async with asyncio.timeout(count / min(LOOKS_PER_S, len(endpoints)) if endpoints else 1.0):
                    await self._look_soon.wait()
            self._look_soon.clear()

    def _note_memory(self, endpoints: Collection[str]) -> None:
        for one in self._workers.statuses():
            if one.endpoint in endpoints and one.probe is not None and one.probe.total_bytes:
                self._live.free_bytes[one.endpoint] = one.capacity.free_bytes

    def _note_nodes(self) -> None:
        for node in self._ollama.nodes:
            if node.round_trip_ms is not None:
                looks = self._live.round_trips_ms.setdefault(node.url, {})
                looks[next(self._numbers)] = node.round_trip_ms
                _keep_last(looks, ROUND_TRIPS_KEPT)

    # --- what the bus tells -----------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        live, number = self._live, next(self._numbers)
        match event.kind:
            case EventKind.PROBE_DONE:
                if event.data.get("round_trip_ms") is not None:
                    looks = live.round_trips_ms.setdefault(event.subject, {})
                    looks[number] = event.data["round_trip_ms"]
                    _keep_last(looks, ROUND_TRIPS_KEPT)
            case EventKind.WORKER_LOST:
                live.last_error[event.subject] = event.message
            case EventKind.WORKER_REMOVED | EventKind.WORKER_STOPPED:
                live.last_error.pop(event.subject, None)
                live.round_trips_ms.pop(event.subject, None)
                live.free_bytes.pop(event.subject, None)
            case EventKind.COORDINATOR_STARTING | EventKind.COORDINATOR_LOADING:
                live.starting[event.subject] = (event.message, event.data.get("share"))
            case EventKind.REQUEST_FINISHED:
                if event.data.get("place") and (words := answer_words(event.data)):
                    live.last_answer[event.data["place"]] = words
        if event.kind in _STARTED:
            live.starting.pop(event.subject, None)
        if event.kind in _TAKES_OR_FREES:
            self._look_soon.set()
        if event.kind not in _UNTOLD:
            live.events[number] = event
            _keep_last(live.events, EVENTS_KEPT)


def _keep_last(numbered: dict[int, Any], count: int) -> None:
    while len(numbered) > count:
        del numbered[next(iter(numbered))]
