"""The API for kernels whose router uses this gateway (`router/remote/`), below `/sollol/`.

| path | gives |
|---|---|
| `GET /sollol/hello` | version, machine, and the rights of the key |
| `POST /sollol/chat` | an answer: its chunks as the router yields them, one JSON object per line |
| `POST /sollol/call/METHOD` | the result of a method of the router (`router/remote/calls.py`) |
| `GET /sollol/events` | the known state and the latest events, then each new event, one JSON object per line |
| `GET /sollol/state` | the live state of the cluster, then JSON merge patches, one JSON object per line |

An empty line says that the gateway is alive. An error is `{"error": {"class": ..., "message": ..., ...}}`, from
which the kernel makes the same exception; a stream that has begun ends with it.
"""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb._version import __version__
from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import GatewayBusyError, GatewayError, GatewayKeyError, GatewayUnavailableError, SollolError
from sollol_nb.gateway.answers import AnswerWriter
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, key_of, model_of
from sollol_nb.gateway.failures import ApiError, api_error, invalid
from sollol_nb.gateway.gateway import Gateway, answer, gateway_of
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.router.remote.calls import CALLS, MODEL_ARGUMENTS, PROTOCOL, GatewayCoordinator, GatewayInfo, Known
from sollol_nb.router.remote.live import NOT_KEPT, event_data
from sollol_nb.router.remote.plain_data import error_data, to_plain
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.runtime.http_client import ERROR_LIMIT_BYTES
from sollol_nb.text.short_names import is_file_name

ALIVE_EVERY_S = 15.0
MOST_UNREAD = 1000
"""Lines of a stream that its kernel has not read yet; a kernel that falls further behind has to connect again."""
RECENT_EVENTS = 200
MOST_READERS = 1000
"""Streams at the same time; a kernel has one, and a second one while it shows the cluster."""
_NDJSON = "application/x-ndjson"
_CLASSES: dict[str, type[GatewayError]] = {
    "unavailable": GatewayUnavailableError,
    "timeout": GatewayUnavailableError,
    "busy": GatewayBusyError,
    "unauthorized": GatewayKeyError,
}
_FIELDS = {"model", "messages", "prompt", "options", "backend", "priority", "timeout", "interrupted"}


def error_shape(error: ApiError) -> Any:
    """An error in the shape that kernels read."""
    cause = error.__cause__
    if isinstance(cause, SollolError):
        return {"error": error_data(cause)}
    kind = _CLASSES.get(error.kind, GatewayError)
    attributes = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
    return {"error": {"class": kind.__name__, "message": error.message, "attributes": attributes}}


def known(router: HybridRouter) -> Any:
    """The facts about the router that kernels keep, as plain data."""
    return to_plain(
        Known(
            coordinators=tuple(map(GatewayCoordinator.of, router.own_coordinators)),
            worker_endpoints=tuple(router.worker_endpoints),
            worker_targets=tuple(router.worker_targets),
            layer_strategy=router.layer_strategy,
        )
    )


async def _hello(request: Request) -> Response:
    key = key_of(request)
    info = GatewayInfo(
        version=__version__,
        host=platform.node(),
        key=key.name,
        may_control=key.may_control,
        latency_log=gateway_of(request).router.latency.identity,
        protocol=PROTOCOL,
    )
    return JSONResponse(to_plain(info))


# --- answers --------------------------------------------------------------------------------------


class _ChunkWriter(AnswerWriter):
    """The chunks as they are."""

    media_type = _NDJSON
    takes_text_back = True

    def chunk(self, chunk: Chunk) -> bytes:
        return _line(chunk)

    def waiting(self) -> bytes:
        return b"\n"

    def failed(self, error: ApiError) -> bytes:
        return _line(error_shape(error))

    def refusal(self, error: ApiError) -> Any:
        shape = error_shape(error)
        if len(json.dumps(shape)) > ERROR_LIMIT_BYTES:  # the limit of what a kernel reads of a refusal
            shape["error"]["attributes"] = {}
        return shape


@dataclass(slots=True, kw_only=True)
class _ResumeCall(ChatCall):
    """An interrupted answer that is to be continued, as `Answer.state` gives it."""

    state: dict[str, Any]

    def chunks(self, router: HybridRouter) -> AsyncGenerator[Chunk, None]:
        return router.resumed(self.state, backend=self.backend, priority=self.priority, timeout=self.timeout_s)


async def _chat(request: Request) -> ASGIApp:
    body = await read_json(request)
    for name in body.keys() - _FIELDS:
        raise invalid(f"there is no field {name!r}", name)
    model, options, messages = model_of(request, body), body.get("options") or {}, body.get("messages") or []
    if not isinstance(options, dict) or not isinstance(messages, list):
        raise invalid('"options" must be an object, and "messages" a list')
    backend, timeout_s, state = body.get("backend"), body.get("timeout"), body.get("interrupted")
    options = {**options, "journal": False}  # the kernel has its own journal, from which it continues the answer
    common: dict[str, Any] = {"model": model, "stream": True, "timeout_s": timeout_s, "backend": backend}
    call = ChatCall(**common, messages=messages, options=options)
    if (prompt := body.get("prompt")) is not None:
        if not isinstance(prompt, dict):
            raise invalid('"prompt" must be an object with "text"', "prompt")
        extra = {name: prompt.get(name) or None for name in ("suffix", "images")}
        call = ChatCall(**common, options=options, is_generate=True, prompt=prompt.get("text", ""), extra=extra)
    if state is not None:
        if not isinstance(state, dict):
            raise invalid('"interrupted" must be the state of an answer', "interrupted")
        model_of(request, state)  # it is this one that answers
        call = _ResumeCall(**common, state=state)
    return answer(request, apply_headers(request, call, body), _ChunkWriter(), api="notebook")


# --- methods --------------------------------------------------------------------------------------


async def _call(request: Request) -> Response:
    name, key, router = request.path_params["method"], key_of(request), gateway_of(request).router
    call = CALLS.get(name)
    if call is None:
        raise ApiError(404, "not_found", f"there is no method {name!r}; install the same version on both machines")
    if call.controls and not key.may_control:
        raise ApiError(
            403, "forbidden", f"this key may ask, but not change or inspect the cluster ({name}); use a key that "
            "was made with `sollol-nb key add NAME --control`"
        )  # fmt: skip
    body = await read_json(request)
    try:
        arguments = call.arguments(body)
    except ValueError as error:
        raise invalid(f"{name}: {error}") from None
    for argument in MODEL_ARGUMENTS:
        named = arguments.get(argument)
        if argument in body and not isinstance(named, str | None):
            raise invalid(f"{name}: {argument} must be the name of a model", argument)
        if isinstance(named, str) and is_file_name(named) and not key.may_control:
            raise ApiError(403, "forbidden", "this key may not name model files; give the name of a model")
    if call.asks:
        given = arguments.get("priority", key.priority)
        arguments["priority"] = min(given, key.priority) if key.limits_priority else given
    result: Any = getattr(router, name)
    try:
        result = await asyncio.to_thread(result, **arguments) if call.is_plain else await result(**arguments)
    except SollolError as error:
        raise api_error(error) from error
    return JSONResponse({"result": to_plain(result), "known": known(router)})


# --- streams --------------------------------------------------------------------------------------


async def _events(request: Request) -> Response:
    gateway = gateway_of(request)
    bus, router = gateway.router.events, gateway.router

    @asynccontextmanager
    async def opened(put: Callable[[Any], None]) -> AsyncIterator[None]:
        last = known(router)
        recent = [event for event in bus.recent() if event.kind not in NOT_KEPT][-RECENT_EVENTS:]
        put({"known": last, "recent": [event_data(event) for event in recent]})
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            nonlocal last
            now = known(router)
            put({"event": event_data(event), **({"known": now} if now != last else {})})
            last = now

        def on_event(event: Event) -> None:
            if event.kind is not EventKind.PROBE_DONE:
                loop.call_soon_threadsafe(send, event)

        unsubscribe = bus.subscribe(on_event)
        try:
            yield
        finally:
            unsubscribe()

    return _stream(gateway, opened)


async def _state(request: Request) -> Response:
    gateway = gateway_of(request)
    state = gateway.router.state

    @asynccontextmanager
    async def opened(put: Callable[[Any], None]) -> AsyncIterator[None]:
        def on_patch(patch: Mapping[str, Any]) -> None:
            put({"patch": patch})

        put({"state": await state.watch(on_patch)})
        try:
            yield
        finally:
            await state.unwatch(on_patch)

    return _stream(gateway, opened)


def _stream(gateway: Gateway, opened: Callable[[Callable[[Any], None]], Any]) -> Response:
    """A stream of lines, until its reader disconnects or falls behind, or the gateway ends.

    Args:
        opened: a context in which the function that it gets is called with each object to send, on the I/O loop.
    """

    if gateway.readers >= MOST_READERS:
        message = f"{MOST_READERS} streams are open already; close some notebooks"
        raise ApiError(429, "busy", message, retry_after_s=30)

    async def lines() -> AsyncGenerator[bytes, None]:
        unread: asyncio.Queue[Any] = asyncio.Queue(MOST_UNREAD)
        has_fallen_behind = False

        def put(data: Any) -> None:
            nonlocal has_fallen_behind
            try:
                unread.put_nowait(data)
            except asyncio.QueueFull:
                has_fallen_behind = True

        draining = asyncio.create_task(gateway.draining.wait())
        taking = asyncio.create_task(unread.get())
        gateway.readers += 1
        try:
            async with opened(put):
                while not (has_fallen_behind or draining.done()):
                    await asyncio.wait(
                        (taking, draining), timeout=ALIVE_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    if taking.done():
                        data, taking = taking.result(), asyncio.create_task(unread.get())
                        yield _line(data)
                    else:
                        yield b"\n"
        finally:
            gateway.readers -= 1
            taking.cancel()
            draining.cancel()
            await asyncio.gather(taking, draining, return_exceptions=True)

    return StreamingResponse(lines(), media_type=_NDJSON)


def _line(data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "replace") + b"\n"


ROUTES: list[BaseRoute] = [
    Route("/sollol/hello", _hello, methods=["GET"]),
    Route("/sollol/chat", _chat, methods=["POST"]),
    Route("/sollol/call/{method}", _call, methods=["POST"]),
    Route("/sollol/events", _events, methods=["GET"]),
    Route("/sollol/state", _state, methods=["GET"]),
]
