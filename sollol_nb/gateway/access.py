"""Who may ask: the application around all routes."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.gateway.keys import ANYBODY


class Access:
    """Lets requests in."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["sollol.key"] = ANYBODY
        scope["sollol.stopped"] = self._gateway.stopped
        status, began = 0, time.perf_counter()

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            finished = FinishedRequest(
                method=scope.get("method", ""),
                path=scope.get("path", ""),
                status=status,
                duration_s=time.perf_counter() - began,
                key=scope["sollol.key"].name,
                answer=scope.get("sollol.answer"),
            )
            for note in self._gateway.on_finished:
                note(finished)
