"""`/health`: whether the gateway is alive. `/ready`: whether it can answer. For load balancers and supervisors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from sollol_nb._version import __version__
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.errors import EngineError, SollolError
from sollol_nb.gateway.gateway import Gateway
from sollol_nb.llama_cpp.engine.find import locate_engine

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 5.0
CHECK_WAIT_S = 0.8
"""How long a request waits for a check; supervisors often allow one second. The check itself continues."""


class Health:
    """The routes of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._check: asyncio.Task[None] | None = None
        self._checked_at: float | None = None
        self._engine_problem: str | None = "the gateway is still looking for llama.cpp; try again"

    async def health(self, request: Request) -> Response:
        """200 as long as the gateway serves."""
        return JSONResponse({"status": "ok", "version": __version__}, headers={"Cache-Control": "no-store"})

    async def ready(self, request: Request) -> Response:
        """200 if it can answer, else 503; the body has the reason and the facts."""
        if not self._gateway.draining.is_set():
            await self._checked()
        status = await self._gateway.router.status()
        reason = self._reason_against(status)
        content: dict[str, Any] = {
            "ready": not reason,
            "reason": reason or _reason_for(status),
            "workers": Counter(worker.state for worker in status.workers),
            "nodes": Counter(node.state for node in status.nodes),
            "coordinators": len(status.coordinators),
            "engine": self._engine_problem is None,
        }
        headers = {"Cache-Control": "no-store"} | ({"Retry-After": "5"} if reason else {})
        return JSONResponse(content, 503 if reason else 200, headers=headers)

    def _reason_against(self, status: ClusterStatus) -> str:
        if self._gateway.draining.is_set():
            return "the gateway is being stopped and accepts no new requests"
        if any(node.state == "ready" for node in status.nodes) or status.coordinators:
            return ""
        if self._engine_problem is not None:
            return f"no Ollama node answers, and {self._engine_problem}"
        return ""

    async def _checked(self) -> None:
        """Check the cluster, unless it was checked recently or a viewer watches it."""
        is_due = self._checked_at is None or time.monotonic() - self._checked_at > CHECK_EVERY_S
        if self._check is None and is_due:
            self._check = asyncio.create_task(self._run_check())
        if self._check is not None:
            await asyncio.wait([self._check], timeout=CHECK_WAIT_S)

    async def _run_check(self) -> None:
        try:
            try:
                await asyncio.to_thread(locate_engine)
                self._engine_problem = None
            except (EngineError, SollolError) as error:
                self._engine_problem = str(error)
            if not self._gateway.router.state.is_watched:
                await self._gateway.router.state.refresh()
        except Exception:
            logger.exception("could not check the cluster")
        finally:
            self._checked_at = time.monotonic()
            self._check = None


def _reason_for(status: ClusterStatus) -> str:
    if status.coordinators:
        return "a model is loaded"
    if any(node.state == "ready" for node in status.nodes):
        return "an Ollama node answers"
    if any(worker.state in ("free", "held") for worker in status.workers):
        return "llama.cpp is installed, and a worker answers"
    return "llama.cpp is installed on this machine"


def routes(gateway: Gateway) -> list[BaseRoute]:
    """The routes of a gateway."""
    health = Health(gateway)
    return [Route("/health", health.health, methods=["GET"]), Route("/ready", health.ready, methods=["GET"])]
