"""Answers whose clients wait long, or leave at some moment, over real sockets. The node is a fake one."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from sollol_nb.gateway import answers
from sollol_nb.gateway.app import application
from sollol_nb.gateway.connections import HttpServer
from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import HANG_GUARD_S, eventually_async
from tests.support.fake_node import HEAD, MODEL, fake_node

CHAT = "/v1/chat/completions"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def line(content: str = "", **more: Any) -> bytes:
    return (
        json.dumps({"message": {"role": "assistant", "content": content}, "done": False, **more}).encode() + b"\n"
    )


LAST = line(done=True, done_reason="stop", eval_count=1)


class Node:
    """What a node sends: its headers, and the rest once that is released.

    Attributes:
        ended: how many answers have ended.
    """

    def __init__(self, *rest: bytes) -> None:
        self.rest = rest
        self.released = threading.Event()
        self.ended = 0

    def answer(self) -> Iterator[bytes]:
        try:
            yield HEAD
            while not self.released.wait(0.01):
                yield b"\n"  # so that it notices when nobody reads any more
            yield from self.rest
        finally:
            self.ended += 1


class Site:
    """A gateway over one node.

    Attributes:
        received: the requests that the node has received.
        finished: the requests to the gateway that have ended.
    """

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, received: list[tuple[str, Any]]) -> None:
        self.gateway = gateway
        self.client = client
        self.finished: list[FinishedRequest] = []
        gateway.on_finished.append(self.finished.append)
        self._received = received

    @property
    def chats(self) -> int:
        """How many chats the node has received."""
        return sum(path == "/api/chat" for path, _ in self._received)

    def leaving_client(self, body: Any, missing_bytes: int = 0) -> socket.socket:
        """A client that has sent a request, perhaps without its end, and reads nothing."""
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        url = self.client.base_url
        client = socket.create_connection((url.host, url.port or 80))
        client.sendall(head.encode() + content[: len(content) - missing_bytes])
        return client


@asynccontextmanager
async def gateway_over(url: str, received: list[tuple[str, Any]]) -> AsyncIterator[Site]:
    pool = OllamaPool(url)
    async with HybridRouter(pool, enable_distributed=False) as router:
        gateway = Gateway(router, pool)
        listening = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(application(gateway), listening)
        await server.start()
        base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=base_url, timeout=HANG_GUARD_S) as client:
            yield Site(gateway, client, received)
        await server.close()


async def waited_for(site: Site, node: Node, monkeypatch: pytest.MonkeyPatch) -> tuple[httpx.Headers, list[str]]:
    """The headers and the lines that a client receives which waits for the first token."""
    monkeypatch.setattr(answers, "HEADERS_AFTER_S", 0.05)
    received = []
    async with site.client.stream("POST", CHAT, json=ASKED | {"stream": True}) as response:
        assert response.status_code == 200
        async for text in response.aiter_lines():
            received.append(text)
            monkeypatch.setattr(answers, "HEADERS_AFTER_S", HANG_GUARD_S)  # the answer comes, however slowly
            node.released.set()
    return response.headers, [text for text in received if text]


def test_a_client_that_waits_long_gets_comments_until_the_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(line("hello"), LAST)

    async def test(*over: Any) -> None:
        async with gateway_over(*over) as site:
            headers, (first, *rest) = await waited_for(site, node, monkeypatch)
            assert first == ": waiting"
            assert "X-Sollol-Route" not in headers
            events = [json.loads(text[6:]) for text in rest if text.startswith("data: {")]
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "hello"
            assert rest[-1] == "data: [DONE]"

    with fake_node({"/api/chat": node.answer}) as over:
        run_blocking(test(*over))


def test_an_error_after_a_long_wait_is_sent_within_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(b'{"error": "the model has crashed"}\n')

    async def test(*over: Any) -> None:
        async with gateway_over(*over) as site:
            _, received = await waited_for(site, node, monkeypatch)
            assert received[0] == ": waiting"
            assert "the model has crashed" in json.loads(received[-1].removeprefix("data: "))["error"]["message"]
            await eventually_async(lambda: site.finished, "the request has ended")
            assert site.finished[0].error_kind == "unavailable"

    with fake_node({"/api/chat": node.answer}) as over:
        run_blocking(test(*over))


def test_a_client_that_leaves_within_its_body_has_cancelled_its_request() -> None:
    async def test(*over: Any) -> None:
        async with gateway_over(*over) as site:
            client = site.leaving_client(ASKED, missing_bytes=10)
            await eventually_async(lambda: site.gateway.limits.running, "the gateway reads the body")
            client.close()
            await eventually_async(lambda: site.finished, "the request has ended")
            assert site.finished[0].error_kind == "cancelled"
            assert site.gateway.limits.running == site.chats == 0

    with fake_node({}) as over:
        run_blocking(test(*over))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_begins_holds_no_engine(stream: bool) -> None:
    node = Node()

    async def test(*over: Any) -> None:
        async with gateway_over(*over) as site:
            client = site.leaving_client(ASKED | {"stream": stream})
            await eventually_async(lambda: site.chats, "the node has received the chat")
            client.close()
            await eventually_async(lambda: node.ended, "the node generates no longer")
            await eventually_async(lambda: site.finished, "the request has ended")
            assert site.finished[0].error_kind == "cancelled"
            assert site.gateway.limits.running == 0

    with fake_node({"/api/chat": node.answer}) as over:
        run_blocking(test(*over))


def test_a_client_that_leaves_the_queue_never_reaches_the_engine() -> None:
    node = Node(line("hello"), LAST)

    async def test(*over: Any) -> None:
        async with gateway_over(*over) as site:
            first = site.leaving_client(ASKED)
            await eventually_async(lambda: site.chats, "the node has received the first chat")
            second = site.leaving_client(ASKED)
            await eventually_async(lambda: site.gateway.limits.running == 2, "both requests run")
            second.close()
            await eventually_async(lambda: site.finished, "the second request has ended")
            assert site.finished[0].error_kind == "cancelled"
            node.released.set()
            await eventually_async(lambda: len(site.finished) == 2, "the first request has ended")
            assert (site.finished[1].status, site.finished[1].error_kind) == (200, "")
            assert site.chats == 1
            first.close()

    with fake_node({"/api/chat": node.answer}) as over:
        run_blocking(test(*over))


def waiting() -> set[str]:
    """What tasks of feeds wait for."""
    names = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
    return names & {"Queue.get", "Event.wait"}


@pytest.mark.parametrize("path", ["/sollol/events", "/sollol/state"])
def test_a_notebook_that_leaves_a_feed_leaves_nothing_behind(path: str) -> None:
    async def test() -> None:
        async with gateway_over("http://127.0.0.1:9", []) as site:
            router = site.gateway.router
            subscribers = list(router.events._subscribers)
            async with site.client.stream("GET", path) as response:
                await anext(response.aiter_lines())
                assert site.gateway.readers == 1
            await eventually_async(lambda: not (site.gateway.readers or router.state.is_watched), "it has ended")
            await eventually_async(lambda: not waiting(), "nothing waits for it any more")
            assert router.events._subscribers == subscribers

    run_blocking(test())
