"""Connections to the gateway: HTTP as uvicorn speaks it, with the limits that it does not have.

uvicorn waits without a limit for a request that arrives byte by byte, for headers of any length, and for clients
that stop reading. Here a task checks once a second what each connection waits for, and since when, which costs a
request no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Literal, NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

MAX_CONNECTIONS = 4096
HEADER_LIMIT_BYTES = 64 * 1024
"""Bytes that neither belong to the content of a request nor complete its headers."""
MAX_UNANSWERED = 100
"""Requests of one connection that wait for their answers; clients rarely send a second one."""
BACKLOG = 2048
HANDSHAKE_TIMEOUT_S = 20.0
CHECK_EVERY_S = 1.0
NEVER_S = 24 * 3600
CLOSE_TIMEOUT_S = 2.0
CLOSE_CHECK_S = 0.02

Phase = Literal["new", "headers", "body", "reading", "closing", "idle"]
LIMITS_S: Mapping[Phase, float] = {
    "new": 20.0,
    "headers": 20.0,
    "body": 90.0,
    "reading": 60.0,
    "closing": 30.0,
    "idle": 75.0,
}
"""How long a client may take: to send anything, its headers, its body; to read the response; to close its side;
and to send the next request on the same connection."""
_TOO_LONG = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"the headers are longer than {HEADER_LIMIT_BYTES >> 10} KiB",
)


class _Limited:
    """The limits of connections with either parser. A subclass says which part of a request is missing."""

    transport: asyncio.Transport
    flow: Any
    cycle: Any
    connections: set[Any]
    _seen_phase: Phase | None = None
    _seen_cycle: object = None
    _since = 0.0

    def missing(self) -> Literal["headers", "body"] | None:
        """The missing part of a request that has begun to arrive."""
        raise NotImplementedError

    @property
    def is_answering(self) -> bool:
        """Whether a response has not been sent completely."""
        return self.cycle is not None and not self.cycle.response_complete

    def check(self, now: float) -> None:
        """End the connection if its client has taken too long."""
        phase = self._phase()
        if phase != self._seen_phase or self.cycle is not self._seen_cycle:  # each request has its own cycle
            self._seen_phase, self._seen_cycle, self._since = phase, self.cycle, now
        elif phase is not None and now - self._since > LIMITS_S[phase]:
            self._end(phase)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer data that is not a valid request with an error, and close the connection."""
        if self.transport.is_closing():
            return
        if not self.is_answering:  # else it would be within the answer to an earlier request
            content = message.encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
                f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
        self.transport.close()

    def _phase(self) -> Phase | None:
        if self.transport.is_closing():
            return "closing"
        if self.flow.write_paused:
            return "reading"
        missing = self.missing()
        if missing == "body":
            return None if self.flow.read_paused else "body"  # paused: the gateway has not read what has arrived
        if self.is_answering:
            return None
        return missing or ("new" if self.cycle is None else "idle")

    def _end(self, phase: Phase) -> None:
        if phase == "headers":
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive in time")
        elif phase in ("new", "idle"):
            self.transport.close()
        else:
            self.transport.abort()  # `close` waits until the client has read everything

    def _refuse_one_too_many(self) -> None:
        if len(self.connections) > MAX_CONNECTIONS:
            message = f"the gateway already has {MAX_CONNECTIONS} connections; try again later"
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, message)


class H11Connection(_Limited, H11Protocol):
    """A connection with a parser in Python, which has a limit for headers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refuse_one_too_many()

    def send_400_response(self, msg: str) -> None:
        self.refuse(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")

    def missing(self) -> Literal["headers", "body"] | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        return "headers" if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] else None

    def _should_upgrade(self) -> bool:
        return False


connection_class: type[asyncio.Protocol]
try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # not built for this Python
    connection_class = H11Connection
else:

    class HttpToolsConnection(_Limited, HttpToolsProtocol):
        """A connection with a parser in C."""

        _missing: Literal["headers", "body"] | None = None
        _has_advanced = False
        _unused_bytes = 0
        _refusal = (HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")
        _unanswered: list[Any]

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._unanswered = []
            super().connection_made(transport)
            self._refuse_one_too_many()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for cycle in self._unanswered:  # uvicorn informs only the last one, which may wait behind another
                cycle.disconnected = True
                cycle.message_event.set()

        def data_received(self, data: bytes) -> None:
            self._has_advanced = False
            super().data_received(_without_upgrade(data) if self._missing is None else data)
            if self._has_advanced:
                self._unused_bytes = 0
                return
            self._unused_bytes += len(data)
            if self._unused_bytes > HEADER_LIMIT_BYTES:
                self.refuse(*_TOO_LONG)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._missing = "headers"

        def on_headers_complete(self) -> None:
            self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
            if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEADER_LIMIT_BYTES:
                self._raise(*_TOO_LONG)
            if self.parser.should_upgrade():  # the parser would take the body for the next request
                self._raise(HTTPStatus.BAD_REQUEST, "the gateway supports only HTTP/1.1")
            if len(self._unanswered) >= MAX_UNANSWERED:
                self._raise(HTTPStatus.TOO_MANY_REQUESTS, "too many requests of this connection wait for answers")
            super().on_headers_complete()
            self._unanswered.append(self.cycle)
            self.headers = []  # what follows the body must not change what was checked
            self._missing, self._has_advanced = "body", True

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            self._has_advanced = True

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._missing, self._has_advanced = None, True

        def send_400_response(self, msg: str) -> None:
            self.refuse(*self._refusal)

        def missing(self) -> Literal["headers", "body"] | None:
            return self._missing

        def _raise(self, status: HTTPStatus, message: str) -> NoReturn:
            """End the parsing, for which the parser raises its own error; then `send_400_response` is called."""
            self._refusal = (status, message)
            raise ValueError(message)

    connection_class = HttpToolsConnection


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request without an upgrade to another protocol, which HTTP lets a server ignore.

    The parser in C treats the rest of the connection as that protocol, so such requests are refused otherwise. But
    Java's standard client requests HTTP/2 in this way with its first request; it sends all headers at once.
    """
    head = data[: data.find(b"\r\n\r\n")].lower()
    found = head.find(b"\r\nupgrade:")
    return data if found < 0 else data[: found + 2] + b"ignored" + data[found + 9 :]


def _without_cancellation(app: ASGIApp) -> ASGIApp:
    """The application, whose requests may be cancelled, by `HttpServer.close` alone, without a traceback."""

    async def cancellable(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return cancellable


class HttpServer:
    """Serves an application on a socket, on the running loop.

    Args:
        listening: the socket; closed with the server.
        tls: for HTTPS.
    """

    def __init__(self, app: ASGIApp, listening: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self._config = uvicorn.Config(
            _without_cancellation(app),
            http=connection_class,
            ws="none",
            interface="asgi3",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=NEVER_S,  # limited here instead
            h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
        )
        self._config.load()
        self._listening = listening
        self._tls = tls
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._checking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        self._set_date()
        self._server = await loop.create_server(
            lambda: self._config.http_protocol_class(  # type: ignore[call-arg]
                config=self._config, server_state=self._state, app_state={}, _loop=loop
            ),
            sock=self._listening,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._tls else None,
            backlog=BACKLOG,
        )
        self._checking = asyncio.create_task(self._check())

    def stop_listening(self) -> None:
        """Stop accepting connections; open ones stay."""
        if self._server is not None:
            self._server.close()

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return len(self._state.tasks)

    async def wait_for_requests(self, limit_s: float) -> None:
        """Wait until no request is being answered, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._state.tasks:
                    await asyncio.wait(self._state.tasks)

    async def close(self) -> None:
        """Close all connections, once their clients have read what was sent, or after a short time."""
        self.stop_listening()
        if self._checking is not None:
            self._checking.cancel()
        for connection in list(self._state.connections):
            connection.transport.close()
        for _ in range(int(CLOSE_TIMEOUT_S / CLOSE_CHECK_S)):
            if not self._state.connections:
                break
            await asyncio.sleep(CLOSE_CHECK_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await self.wait_for_requests(CLOSE_TIMEOUT_S)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self._set_date()
            now = time.monotonic()
            for connection in list(self._state.connections):
                assert isinstance(connection, _Limited)
                connection.check(now)

    def _set_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
