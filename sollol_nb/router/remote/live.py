"""The streams of a gateway: its events, and the live state of its cluster.

Each stream has a JSON object per line. If it breaks, it is opened again after a pause that grows; it then begins
with the present state. Text that a gateway sends is bounded, and shown as text only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sollol_nb.cluster.data import patch_between, patched
from sollol_nb.cluster.live_figures import LiveFigures
from sollol_nb.cluster.state import Listener
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.errors import GatewayUnavailableError, SollolError
from sollol_nb.router.remote.calls import CALLS, Known
from sollol_nb.router.remote.connection import GatewayConnection
from sollol_nb.router.remote.plain_data import from_plain
from sollol_nb.runtime.events import KEPT_EVENTS, Event, EventBus, EventKind
from sollol_nb.runtime.http_client import one_line
from sollol_nb.runtime.io_loop import io_bound

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
REFUSED_PAUSE_S = 30.0
"""After an error that a later attempt hardly changes, such as a refused key."""
FIRST_STATE_LIMIT_S = 5.0
"""How long a first watcher waits for the state."""
STATUS_EVERY_S = 1.0

NOT_KEPT = (EventKind.PROBE_DONE, EventKind.COORDINATOR_LOADING, EventKind.LINK_CONNECTING)
"""Events that come often."""


def event_data(event: Event) -> dict[str, Any]:
    """An event as plain data."""
    return {
        "kind": event.kind.value,
        "subject": event.subject,
        "message": event.message,
        "data": dict(event.data),
        "at": event.at,
    }


def event_of(data: Any) -> Event | None:
    """The event whose `event_data` this is; None if it is none, or of a kind that is not known here."""
    try:
        kind, at = EventKind(data["kind"]), float(data["at"])
        details = data["data"] if isinstance(data["data"], dict) else {}
        return Event(kind, one_line(str(data["subject"])), one_line(str(data["message"]), 2000), details, at)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


class GatewayEvents:
    """Passes the events of a gateway on to the bus of a router, and keeps what is known of the gateway.

    Attributes:
        known: the gateway's coordinators, workers and strategy, as last reported.
    """

    def __init__(self, connection: GatewayConnection, bus: EventBus) -> None:
        self.known = Known()
        self._connection = connection
        self._bus = bus
        self._newest_at = 0.0
        self._is_lost = False
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Follow the events, unless that is done already, or it was closed."""
        if self._task is None and not self._is_closed:
            self._task = asyncio.create_task(_follow(self._connection, "/sollol/events", self._read, self.lost))

    async def close(self) -> None:
        """Follow them no more, for good."""
        self._is_closed = True
        await _cancelled(self._task)

    def note_known(self, data: Any) -> None:
        """Note what the gateway reports as known."""
        with contextlib.suppress(ValueError):
            self.known = from_plain(Known, data)

    def lost(self, error: SollolError) -> None:
        """Report that the gateway does not answer; once until it returns."""
        if not self._is_lost and isinstance(error, GatewayUnavailableError):
            self._is_lost = True
            url = self._connection.url
            message = f"the gateway {url} does not answer; trying to reach it again"
            self._bus.publish(EventKind.GATEWAY_LOST, url, message)

    def returned(self) -> None:
        """Report that the gateway answers again, if it was lost."""
        if self._is_lost:
            self._is_lost = False
            url = self._connection.url
            self._bus.publish(EventKind.GATEWAY_RETURNED, url, f"the gateway {url} answers again")

    def _read(self, data: Mapping[str, Any]) -> None:
        if "known" in data:
            self.note_known(data["known"])
        if isinstance(data.get("recent"), list):
            self.returned()
            events = [event_of(item) for item in data["recent"][-KEPT_EVENTS:]]
            new = [event for event in events if event is not None and event.at > self._newest_at]
            self._bus.keep(new)
            self._newest_at = max([self._newest_at, *(event.at for event in new)])
        if (event := event_of(data.get("event"))) is not None:
            is_kept = event.kind not in NOT_KEPT
            if is_kept:
                self._newest_at = max(self._newest_at, event.at)
            self._bus.pass_on(event, keep=is_kept)


class GatewayState:
    """The live state of a gateway's cluster, for watchers such as the widget; the twin of `ClusterState`.

    Attributes:
        is_closed: whether its router was closed; the state then stays as it was last sent.
    """

    def __init__(self, connection: GatewayConnection, note_known: Callable[[Any], None], events: EventBus) -> None:
        """
        Args:
            note_known: gets what the gateway reports as known.
            events: has the gateway's events.
        """
        self.is_closed = False
        self._connection = connection
        self._note_known = note_known
        self._events = events
        self._listeners: list[Listener] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._data: dict[str, Any] = {}
        self._status = ClusterStatus((), ())
        self._status_due = asyncio.Event()
        self._has_begun = asyncio.Event()

    @property
    def data(self) -> dict[str, Any]:
        """The state as last sent; empty before the first watcher."""
        return self._data

    @property
    def is_watched(self) -> bool:
        """Whether it is kept up to date."""
        return bool(self._listeners)

    @io_bound
    async def watch(self, listener: Listener) -> dict[str, Any]:
        """Send changes to a listener from now on; see `ClusterState.watch`."""
        if self.is_closed:
            return self._data
        self._listeners.append(listener)
        if not self._tasks:
            self._has_begun, self._status_due = asyncio.Event(), asyncio.Event()
            self._tasks = [
                asyncio.create_task(_follow(self._connection, "/sollol/state", self._read, self._lost)),
                asyncio.create_task(self._keep_status()),
            ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_STATE_LIMIT_S):
                await self._has_begun.wait()
        return self._data

    @io_bound
    async def unwatch(self, listener: Listener) -> None:
        """Stop sending to a listener. The connection ends with the last one. Calling it twice is fine."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            if not self.is_watched:
                await self._stop()

    async def close(self) -> None:
        """Stop sending for good. The last patch reports it: `closed`."""
        if not self.is_closed:
            self._apply({"closed": True})
            self.is_closed = True
            self._listeners = []
        await self._stop()

    @io_bound
    async def refresh(self) -> ClusterStatus:
        """The status after a check of all workers and nodes."""
        return await self._ask("cluster")

    async def known_status(self) -> ClusterStatus:
        """The status as the gateway knows it; nothing is probed."""
        return await self._ask("status")

    @io_bound
    async def current(self) -> dict[str, Any]:
        """The state as plain data: as it is kept while somebody watches, else as the gateway has it now."""

        def listener(patch: Mapping[str, Any]) -> None:
            pass

        await self.watch(listener)
        await self.unwatch(listener)
        return self._data

    def status(self) -> ClusterStatus:
        """The status as last reported; while somebody watches, a second old at most."""
        return replace(self._status, live=LiveFigures.of(self._events.recent()))

    async def _ask(self, name: str) -> ClusterStatus:
        data, known = await self._connection.call(name, {})
        self._note_known(known)
        self._status = CALLS[name].result(data)
        return self.status()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            await _cancelled(task)

    def _read(self, data: Mapping[str, Any]) -> None:
        patch = data.get("patch")
        if isinstance(data.get("state"), dict):
            patch = patch_between(self._data, data["state"])
        if isinstance(patch, dict) and patch:
            self._apply(patch)
        if isinstance(data.get("state"), dict) or not {"events", "coordinators", "nodes"}.isdisjoint(patch or ()):
            self._status_due.set()

    def _lost(self, error: SollolError) -> None:
        message = f"{error}; trying again"
        if self._data.get("unreachable") != message:
            self._apply({"unreachable": message})
        self._has_begun.set()

    def _apply(self, patch: Mapping[str, Any]) -> None:
        self._data = patched(self._data, patch)
        for listener in list(self._listeners):
            try:
                listener(patch)
            except Exception:
                logger.exception("a view of the cluster failed to apply a change")

    async def _keep_status(self) -> None:
        while True:
            await self._status_due.wait()
            self._status_due.clear()
            with contextlib.suppress(SollolError, ValueError):
                await self.known_status()
            self._has_begun.set()
            await asyncio.sleep(STATUS_EVERY_S)


async def _follow(
    connection: GatewayConnection,
    path: str,
    read: Callable[[Mapping[str, Any]], None],
    lost: Callable[[SollolError], None],
) -> None:
    """Read the lines of a path for ever; open it again after an error."""
    pause_s = FIRST_PAUSE_S
    while True:
        began = time.monotonic()
        try:
            async with connection.lines(path) as lines:
                async for data in lines:
                    read(data)
            lost(GatewayUnavailableError(f"the gateway {connection.url} ended the connection"))
        except SollolError as error:
            lost(error)
            if not isinstance(error, GatewayUnavailableError):
                pause_s = REFUSED_PAUSE_S
        except Exception:
            logger.exception("what the gateway %s reports cannot be used", connection.url)
        if time.monotonic() - began > LONGEST_PAUSE_S:  # it worked for a while
            pause_s = FIRST_PAUSE_S
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, max(pause_s, LONGEST_PAUSE_S))


async def _cancelled(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
