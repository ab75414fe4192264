"""The gateway: its router, its Ollama nodes, and the requests that run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp

from sollol_nb.gateway.answers import AnswerRecord, AnswerResponse, AnswerWriter
from sollol_nb.gateway.calls import ChatCall
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.keys import Keys
from sollol_nb.gateway.limits import Limits
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.ollama.pool import OllamaPool


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """One HTTP request that has ended, for the log and the metrics.

    Attributes:
        request_id: in the headers of its response.
        method, path: of the request, without the query.
        status: of the response; 0 if none was sent.
        duration_s: from its headers to the end of its response.
        key: the name of its key; "" without one.
        client: its address.
        error_kind: as in `ApiError.kind`, or `cancelled` where the client disconnected; "" without an error.
        answer: the record of the answer; None where none was requested.
    """

    request_id: str
    method: str
    path: str
    status: int
    duration_s: float
    key: str
    client: str
    error_kind: str
    answer: AnswerRecord | None


class Gateway:
    """What the routes of one gateway share. Lives on the I/O loop.

    Attributes:
        ollama: its Ollama nodes.
        router: its router, over these nodes and the workers of the settings.
        keys, limits: which requests are allowed, and how many.
        draining: set once it ends and accepts no new requests.
        stopped: the error with which running requests end, once the time to drain is over.
        readers: number of streams of events and states that notebooks read now.
        on_finished: called with each request that has ended; each must be quick.
    """

    def __init__(
        self, router: HybridRouter, ollama: OllamaPool, *, keys: Keys | None = None, limits: Limits | None = None
    ) -> None:
        self.router = router
        self.ollama = ollama
        self.keys = keys or Keys()
        self.limits = limits or Limits()
        self.draining = asyncio.Event()
        self.stopped: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self.readers = 0
        self.on_finished: list[Callable[[FinishedRequest], None]] = []


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def answer(request: Request, call: ChatCall, writer: AnswerWriter, *, api: str) -> ASGIApp:
    """The response with the answer to a call."""
    return AnswerResponse(gateway_of(request).router, call, writer, api=api)


async def prompt_tokens(request: Request, call: ChatCall) -> int:
    """How many tokens the prompt of a call has."""
    options = call.options
    return await gateway_of(request).router.count_tokens(
        call.model,
        call.messages,
        tools=None if options.get("tool_choice") == "none" else options.get("tools"),
        think=options.get("think"),
        backend=call.backend,
        priority=call.priority,
        timeout=call.timeout_s,
    )
