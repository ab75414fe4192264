"""`/cluster`: the live state of the cluster (`cluster/data.py` has its keys), once or as server-sent events.

As JSON it is the state after a check of all workers and nodes. As `text/event-stream` its events are:

- `state`: the whole state. It comes first, and again if a viewer reads too slowly to get every change.
- `patch`: a change, as a JSON merge patch (RFC 7396).
- `alive`: nothing has changed for `ALIVE_EVERY_S`; it shows the viewer that the gateway still answers.
- `end`: the stream ends now, after `STREAM_S`; connect again. Some proxies, such as jupyter-server-proxy, keep a
  stream open after its viewer has disconnected.

Events have ids, counted from 0. A stream also ends, without `end`, when the gateway ends. The cluster is watched
only while there are viewers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sollol_nb.cluster.state import LiveState
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import Gateway

EVENT_STREAM = "text/event-stream"
MAX_VIEWERS = 64
MAX_PENDING = 100
"""Changes kept for a viewer that does not read; after further changes it gets the whole state."""
ALIVE_EVERY_S = 5.0
STREAM_S = 120.0
CHECK_TIMEOUT_S = 20.0


class ClusterView:
    """The route of one gateway.

    Attributes:
        viewers: how many get events now.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.viewers = 0

    async def answer(self, request: Request) -> ASGIApp:
        """The response to a request for the cluster.

        Raises:
            ApiError: there are too many viewers, or the check took too long.
        """
        if EVENT_STREAM in request.headers.get("accept", "") and request.method == "GET":
            if self.viewers >= MAX_VIEWERS:
                message = f"{MAX_VIEWERS} viewers already watch the cluster; close one of them"
                raise ApiError(429, "busy", message, retry_after_s=5)
            return self._stream
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                state = await self._gateway.router.state.current()
        except TimeoutError:
            message = f"the check of the cluster took longer than {CHECK_TIMEOUT_S:.0f} s; try again"
            raise ApiError(504, "timeout", message) from None
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        viewer = Viewer(self._gateway.router.state)
        self.viewers += 1
        tasks: list[asyncio.Task[Any]] = []
        try:
            await self._gateway.router.state.watch(viewer.add)
            tasks = [
                asyncio.create_task(send_events(viewer, send)),
                asyncio.create_task(_disconnect(receive)),
                asyncio.create_task(self._gateway.draining.wait()),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.viewers -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._gateway.router.state.unwatch(viewer.add)
        if not tasks[1].done() or tasks[1].cancelled():
            await send({"type": "http.response.body", "body": b""})


class Viewer:
    """The changes that one viewer has not been sent yet; bounded.

    Args:
        state: what it watches.
    """

    def __init__(self, state: LiveState) -> None:
        self._state = state
        self._pending: list[Mapping[str, Any]] = []
        self._needs_state = True
        self._changed = asyncio.Event()
        self._numbers = itertools.count()

    def add(self, patch: Mapping[str, Any]) -> None:
        """Note a change, which the state has already."""
        if len(self._pending) >= MAX_PENDING:
            self._needs_state = True
        if not self._needs_state:
            self._pending.append(patch)
        self._changed.set()

    async def next(self) -> bytes:
        """The next events, as soon as there are some; b"" after the last change."""
        if not self._needs_state and not self._pending:
            if self._state.is_closed:
                return b""
            self._changed.clear()
            try:
                async with asyncio.timeout(ALIVE_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                return self.event("alive", {})
        changes, self._pending = self._pending, []
        if self._needs_state:
            self._needs_state = False
            return self.event("state", self._state.data)
        return b"".join(self.event("patch", patch) for patch in changes)

    def event(self, name: str, data: Mapping[str, Any]) -> bytes:
        """An event with the next id."""
        content = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"id: {next(self._numbers)}\nevent: {name}\ndata: {content}\n\n".encode("utf-8", "replace")


async def send_events(viewer: Viewer, send: Send) -> None:
    """Send a viewer's events, for `STREAM_S` or until the last change."""
    ends_at = asyncio.get_running_loop().time() + STREAM_S
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would keep events back
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while content := await viewer.next():
        is_last = asyncio.get_running_loop().time() >= ends_at
        body = content + viewer.event("end", {}) if is_last else content
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if is_last:
            return


async def _disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The route of a gateway."""
    return [Route("/cluster", ClusterView(gateway).answer, methods=["GET"])]
