"""Clients that send half of a request, drip, or stop reading, on real sockets with both parsers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sollol_nb.gateway import answers, connections
from sollol_nb.gateway.app import application
from sollol_nb.gateway.connections import (
    HEADER_LIMIT_BYTES,
    MAX_UNANSWERED,
    H11Connection,
    HttpServer,
    HttpToolsConnection,
)
from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import HANG_GUARD_S, eventually_async
from tests.support.fake_node import HEAD as HEAD_OF_NODE
from tests.support.fake_node import MODEL, fake_node

HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
PIECE = b"x" * 65536
SHORT_S = 0.1
LONG_S = HANG_GUARD_S


class Site:
    """A server with short limits.

    Attributes:
        flood_ended: set when the endless answer is no longer generated.
    """

    def __init__(self) -> None:
        routes = [
            Route("/echo", self.echo, methods=["GET", "POST"]),
            Route("/flood", self.flood),
            Route("/refuse", self.refuse, methods=["POST"]),
            Route("/wait", self.wait),
        ]
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.server = HttpServer(Starlette(routes=routes), self.listening)
        self.flood_ended = asyncio.Event()
        self.waiting = asyncio.Event()
        self.seen_headers: list[str] = []

    async def echo(self, request: Request) -> PlainTextResponse:
        body = await request.body()
        self.seen_headers = list(request.headers)
        return PlainTextResponse(body)

    async def refuse(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("no", 413)

    async def wait(self, request: Request) -> PlainTextResponse:
        self.waiting.set()
        await asyncio.Event().wait()
        return PlainTextResponse("never")

    async def flood(self, request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield PIECE
                    await asyncio.sleep(0)
            finally:
                self.flood_ended.set()

        return StreamingResponse(pieces())

    async def connect(self) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", self.listening.getsockname()[1]))


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := await self.reader.read(65536):
                received += data
        self.writer.close()
        return received

    async def drip(self, drop: bytes) -> bytes:
        """Send something again and again until the server ends the connection; returns what it has sent."""
        reading = asyncio.create_task(self.rest())
        while not reading.done():
            with contextlib.suppress(ConnectionError):
                self.writer.write(drop)
                await self.writer.drain()
            await asyncio.sleep(SHORT_S / 10)
        return await reading


Test = Callable[[Site], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture(params=[HttpToolsConnection, H11Connection])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test on a server on which only the given limits are short."""
    monkeypatch.setattr(connections, "connection_class", request.param)
    monkeypatch.setattr(connections, "CHECK_EVERY_S", SHORT_S / 4)

    def run_test(test: Test, *short: str) -> None:
        limits: dict[Any, float] = {name: SHORT_S if name in short else LONG_S for name in connections.LIMITS_S}
        monkeypatch.setattr(connections, "LIMITS_S", limits)

        async def run_on_site() -> None:
            site = Site()
            await site.server.start()
            try:
                async with asyncio.timeout(HANG_GUARD_S):
                    await test(site)
            finally:
                await site.server.close()

        asyncio.run(run_on_site())

    return run_test


def test_a_usual_request_is_answered_without_naming_the_software(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi")
        received = await connection.rest()
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(b"\r\n\r\nhi")
        assert b"date: " in received
        assert b"uvicorn" not in received

    run(test, "headers", "body", "reading")


def test_a_silent_client_is_disconnected_after_a_while(run: Run) -> None:
    async def test(site: Site) -> None:
        assert await (await site.connect()).rest() == b""

    run(test, "new")


def test_headers_that_arrive_slowly_have_a_time_limit(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: ")
        received = await connection.drip(b"x")
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in received

    run(test, "headers")


def test_empty_lines_do_not_keep_a_connection(run: Run) -> None:
    async def test(site: Site) -> None:
        await (await site.connect()).drip(b"\r\n")

    run(test, "new", "headers")


def test_a_slow_body_ends_the_connection(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert await connection.drip(b"x") == b""

    run(test, "body")


def test_a_slow_body_that_no_route_reads_ends_the_connection(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD.replace(b"/echo", b"/refuse") + b"Content-Length: 1000000\r\n\r\n")
        assert (await connection.reader.readuntil(b"\r\n\r\nno")).startswith(b"HTTP/1.1 413 ")
        monkeypatch.setitem(connections.LIMITS_S, "body", SHORT_S)
        assert await connection.drip(b"x") == b""

    run(test)


def test_a_client_that_stops_reading_loses_its_connection_and_its_answer(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
        connection.writer.write(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await site.flood_ended.wait()
        connection.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert not (await connection.rest()).endswith(b"\r\n0\r\n\r\n")

    run(test, "reading")


def test_a_client_that_leaves_after_its_next_request_ends_the_running_answer(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        flood = b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.writer.write(flood + HEAD + b"Content-Length: 0\r\n\r\n")
        await connection.reader.readexactly(len(PIECE))
        connection.writer.transport.abort()
        await site.flood_ended.wait()

    run(test)


@pytest.mark.parametrize(
    ("first", "kind"), [("the connection ends", "cancelled"), ("the buffer is full", "unavailable")]
)
def test_a_client_that_stops_reading_holds_no_engine(
    first: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_s = dict.fromkeys(connections.LIMITS_S, LONG_S)
    monkeypatch.setattr(connections, "CHECK_EVERY_S", SHORT_S / 4)
    monkeypatch.setattr(connections, "LIMITS_S", limits_s)
    if first == "the connection ends":
        limits_s["reading"] = SHORT_S
        monkeypatch.setattr(answers, "STALLED_S", LONG_S)
    else:
        monkeypatch.setattr(answers, "STALLED_S", SHORT_S)
    node_ended = threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            yield HEAD_OF_NODE
            while True:
                yield json.dumps({"message": {"role": "assistant", "content": "x" * 65536}}).encode() + b"\n"
        finally:
            node_ended.set()

    async def test(url: str) -> None:
        pool = OllamaPool(url)
        finished: list[FinishedRequest] = []
        async with HybridRouter(pool, enable_distributed=False) as router:
            gateway = Gateway(router, pool)
            gateway.on_finished.append(finished.append)
            listening = socket.create_server(("127.0.0.1", 0))
            server = HttpServer(application(gateway), listening)
            await server.start()
            body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
            head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client = socket.create_connection(listening.getsockname())
            client.sendall(head.encode() + body)
            await eventually_async(node_ended.is_set, "the node generates no longer")
            limits_s["reading"] = SHORT_S
            await eventually_async(lambda: finished, "the connection has ended")
            assert gateway.limits.running == 0
            assert finished[0].error_kind == kind
            client.close()
            await server.close()

    with fake_node({"/api/chat": endless}) as (url, _):
        run_blocking(test(url))


def test_a_connection_is_kept_for_the_next_request_and_closed_when_none_comes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD + b"Content-Length: 1\r\n\r\na")
        await connection.reader.readuntil(b"\r\n\r\na")
        connection.writer.write(HEAD + b"Content-Length: 1\r\n\r\nb")
        received = await connection.reader.readuntil(b"\r\n\r\nb")
        assert received.startswith(b"HTTP/1.1 200 ")
        monkeypatch.setitem(connections.LIMITS_S, "idle", SHORT_S)
        assert await connection.rest() == b""

    run(test)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), b"400"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (HEAD + b"X: " + b"x" * 16 * HEADER_LIMIT_BYTES + b"\r\n\r\n", b"4"),
        (HEAD + b"X: y\r\n" * HEADER_LIMIT_BYTES, b"4"),
    ],
    ids=["no HTTP", "two lengths", "a long header", "many headers"],
)
def test_an_invalid_request_is_refused_without_a_log_line(
    run: Run, request_bytes: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(request_bytes)
        received = await connection.rest()
        assert received.startswith(b"HTTP/1.1 " + status) or (status == b"4" and not received)

    caplog.set_level("ERROR")
    run(test)
    assert not caplog.text


def test_headers_without_end_are_refused(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD + b"X: ")
        received = await connection.drip(b"x" * 4096)
        assert received.startswith(b"HTTP/1.1 4") or not received

    run(test)


def test_what_follows_a_body_changes_nothing_and_has_an_end(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Late: 1\r\n\r\n")
        assert b"\r\n\r\nhi" in await connection.reader.readuntil(b"\r\n\r\nhi")
        assert "x-late" not in site.seen_headers
        connection.writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Late: ")
        await connection.drip(b"x" * 4096)

    run(test)


def test_a_request_for_another_protocol_keeps_its_body(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(
            HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
            b"Content-Length: 2\r\n\r\nhi"
        )
        assert (await connection.reader.readuntil(b"\r\n\r\nhi")).startswith(b"HTTP/1.1 200 ")

    run(test)


@pytest.mark.parametrize("run", [HttpToolsConnection], indirect=True)  # the other parser keeps such bodies
@pytest.mark.parametrize("upgrades", [1, 2])
def test_a_request_for_another_protocol_whose_body_would_be_the_next_request_is_refused(
    run: Run, upgrades: int
) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(HEAD)
        if upgrades == 1:  # the header comes after the server has begun to read the request
            await eventually_async(
                lambda: any(known.missing() for known in site.server._state.connections), "the request has begun"
            )
        connection.writer.write(b"Connection: Upgrade\r\n" + b"Upgrade: h2c\r\n" * upgrades)
        connection.writer.write(b"Content-Length: 100\r\n\r\n")
        assert (await connection.rest()).startswith(b"HTTP/1.1 400 ")

    run(test, "idle")


@pytest.mark.parametrize("run", [HttpToolsConnection], indirect=True)  # the other parser waits for each answer
def test_a_connection_with_many_unanswered_requests_is_ended(run: Run) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
        connection.writer.write(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n" * (MAX_UNANSWERED + 1))
        await site.flood_ended.wait()
        connection.writer.transport.abort()

    run(test)


def test_a_server_that_is_closed_ends_what_still_runs_and_logs_nothing(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(site: Site) -> None:
        connection = await site.connect()
        connection.writer.write(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await site.waiting.wait()
        assert site.server.running == 1
        await site.server.close()
        assert site.server.running == 0
        assert await connection.rest() == b""

    caplog.set_level("ERROR")
    run(test)
    assert not caplog.text


def test_one_connection_too_many_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)

    async def test(site: Site) -> None:
        kept = [await site.connect() for _ in range(2)]
        for connection in kept:  # an answer shows that the server has accepted it
            connection.writer.write(HEAD + b"Content-Length: 1\r\n\r\na")
            await connection.reader.readuntil(b"\r\n\r\na")
        refused = await (await site.connect()).rest()
        assert refused.startswith(b"HTTP/1.1 503 ")
        kept[0].writer.close()
        await kept[0].writer.wait_closed()
        while not (received := await _ask(site)).startswith(b"HTTP/1.1 200 "):
            assert received.startswith(b"HTTP/1.1 503 ")
        kept[1].writer.close()

    run(test)


async def _ask(site: Site) -> bytes:
    connection = await site.connect()
    connection.writer.write(HEAD + b"Content-Length: 1\r\nConnection: close\r\n\r\na")
    return await connection.rest()
