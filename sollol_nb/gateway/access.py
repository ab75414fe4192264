"""Who may ask: the application around all routes."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from sollol_nb.gateway.gateway import Gateway
from sollol_nb.gateway.keys import ANYBODY


class Access:
    """Lets requests in."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["sollol.key"] = ANYBODY
        scope["sollol.stopped"] = self._gateway.stopped
        await self._app(scope, receive, send)
