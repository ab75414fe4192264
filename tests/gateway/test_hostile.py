"""Bodies that no good client sends: each is refused in one line, and the gateway answers the next request."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.engines import HANG_GUARD_S
from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine

CHATS = {
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "demo", "prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/api/chat": {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": False},
    "/api/generate": {"model": "demo", "prompt": "Hi", "stream": False},
}
OTHERS = ("/v1/embeddings", "/v1/messages/count_tokens", "/api/embed", "/api/embeddings", "/api/show", "/api/pull")
POSTS = (*CHATS, *OTHERS)
DEEP = 100_000
MEMORY_MARGIN_BYTES = 90 * 1024 * 1024
"""More than a body of the longest allowed length takes while it is read, less than one of 100 MB."""

BODIES = {
    "nothing": b"",
    "no JSON": b"{'model': 'demo'}",
    "half of a JSON": b'{"model": "demo", "messages": [',
    "a list": b"[1, 2]",
    "a text": b'"demo"',
    "null": b"null",
    "deep lists": b'{"model": "demo", "messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"model": "demo", "tools": [' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"]}",
    "deep but readable": b'{"model": "demo", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    "not UTF-8": b'{"model": "demo\xff\xfe"}',
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "half a surrogate pair": b'{"model": "demo", "prompt": "\\udfff", "input": "\\udfff", "messages": "\\ud800"}',
    "NaN": b'{"model": "demo", "temperature": NaN}',
    "a number of 100,000 digits": b'{"model": "demo", "max_tokens": ' + b"9" * 100_000 + b"}",
    "an infinite number": b'{"model": "demo", "temperature": 1e999, "messages": "Hi", "prompt": "Hi", "input": 1}',
    "no model": b'{"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi"}',
    "a model that is a number": b'{"model": 1, "messages": "Hi"}',
    "an empty model": b'{"model": "  ", "messages": "Hi"}',
    "a model with control characters": b'{"model": "de\\u0000\\u001b[2J", "messages": "", "prompt": ""}',
    "a very long model": b'{"model": "' + b"m" * 200_000 + b'", "messages": "Hi", "prompt": "Hi", "input": "Hi"}',
    "a million lists": b'{"model": "demo", "messages": [' + b"[]," * 1_000_000 + b"[]]}",
    "the same field twice": b'{"model": "demo", "model": 7}',
}


def is_one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < 1000


def is_refusal(response: httpx.Response) -> bool:
    """Whether the response says in one line why the request was not answered."""
    return 400 <= response.status_code < 500 and is_one_line(message_in(response.json()))


def message_in(body: Any) -> str:
    """The message of an error in the shape of any API."""
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def assert_answers(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"])
    assert response.status_code == 200, response.text
    assert "Traceback" not in gateway.output


@pytest.mark.parametrize("path", CHATS)
def test_a_usual_body_is_answered(gateway: GatewayProcess, path: str) -> None:
    with gateway.client() as client:
        response = client.post(path, json=CHATS[path])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_cannot_be_used_is_refused_in_one_line(gateway: GatewayProcess, path: str) -> None:
    wrong = {}
    with gateway.client() as client:
        for name, body in BODIES.items():
            response = client.post(path, content=body)
            if not is_refusal(response):
                wrong[name] = (response.status_code, response.text[:300])
    assert not wrong
    assert_answers(gateway)


@pytest.mark.parametrize("path", CHATS)
def test_a_field_of_a_wrong_type_is_refused_by_name(gateway: GatewayProcess, path: str) -> None:
    values: tuple[Any, ...] = (7, -1, True, "text", [], [[]], {}, {"a": {}}, [None], 1.5)
    wrong = []
    with gateway.client() as client:
        for field in CHATS[path]:
            for value in values:
                body = {**CHATS[path], field: value}
                response = client.post(path, json=body)
                if response.status_code != 200 and not is_refusal(response):
                    wrong.append((field, value, response.status_code, response.text[:300]))
    assert not wrong


def test_a_body_of_100_mb_is_refused_without_being_kept(gateway: GatewayProcess) -> None:
    assert_answers(gateway)
    before = peak_memory_bytes(gateway)

    def pieces() -> Iterator[bytes]:
        yield b'{"model": "demo", "prompt": "'
        for _ in range(100):
            yield b"a" * 1024 * 1024

    for path in ("/v1/chat/completions", "/api/generate", "/v1/messages"):
        with gateway.client() as client:
            announced = client.post(path, content=b"a" * 100 * 1024 * 1024)
            assert announced.status_code == 413
        with gateway.client() as client:
            try:
                unannounced = client.post(path, content=pieces())
                assert unannounced.status_code == 413
            except httpx.WriteError:
                pass  # the gateway has answered and closed the connection, while the client still sends
    assert peak_memory_bytes(gateway) < before + MEMORY_MARGIN_BYTES
    assert_answers(gateway)


def peak_memory_bytes(gateway: GatewayProcess) -> int:
    """The most memory that the gateway has used so far; where the system does not say it, what it uses now."""
    process = psutil.Process(gateway.process.pid)
    if sys.platform == "linux":
        status = Path(f"/proc/{process.pid}/status").read_text()
        (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(peak_kib) * 1024
    return process.memory_info().rss


@contextmanager
def connection(gateway: GatewayProcess) -> Iterator[socket.socket]:
    url = httpx.URL(gateway.url)
    with socket.create_connection((url.host, url.port or 80), timeout=HANG_GUARD_S) as raw:
        yield raw


def reply(raw: socket.socket) -> bytes:
    """All that is sent until the gateway closes the connection."""
    received = b""
    while data := raw.recv(65536):
        received += data
    return received


CHAT_HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
RAW = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "a wrong version": b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "a header without a name": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    "two different lengths": CHAT_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a negative length": CHAT_HEAD + b"Content-Length: -2\r\n\r\n{}",
    "a wrong chunk size": CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a header of a megabyte": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1024 * 1024 + b"\r\n\r\n",
    "a hundred thousand headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "options of the whole server": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path of a megabyte": b"GET /" + b"p" * 1024 * 1024 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", RAW.values(), ids=RAW)
def test_a_malformed_request_ends_its_connection_and_nothing_else(
    gateway: GatewayProcess, request_bytes: bytes
) -> None:
    with connection(gateway) as raw:
        try:
            raw.sendall(request_bytes)
            raw.shutdown(socket.SHUT_WR)
            received = reply(raw)
        except OSError:
            received = b""  # closed while the client still sends
    assert not received or received.startswith(b"HTTP/1.1 4"), received[:200]
    assert_answers(gateway)


def test_pipelined_requests_are_answered_in_order(gateway: GatewayProcess) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connection(gateway) as raw:
        raw.sendall(one * 20 + last)
        received = reply(raw)
    assert received.count(b"HTTP/1.1 200") == 20
    assert b"HTTP/1.1 404" in received[received.rindex(b"HTTP/1.1") :]


def test_an_http_1_0_client_gets_an_answer(gateway: GatewayProcess) -> None:
    body = json.dumps(CHATS["/v1/chat/completions"] | {"stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with connection(gateway) as raw:
        raw.sendall(head.encode() + body)
        received = reply(raw)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" in received


@pytest.mark.parametrize("value", ["0", "11", "-3", "1e3", "topmost", "\u00b2", ""])
def test_a_priority_that_does_not_exist_is_refused(gateway: GatewayProcess, value: str) -> None:
    with gateway.client() as client:
        response = client.post(
            "/v1/chat/completions",
            json=CHATS["/v1/chat/completions"],
            headers={"X-Sollol-Priority": value.encode("utf-8")},  # type: ignore[dict-item]
        )
    assert response.status_code == 400
    assert "riority" in message_in(response.json())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Sollol-Timeout", "soon"),
        ("X-Sollol-Timeout", "-1"),
        ("X-Sollol-Timeout", "nan"),
        ("X-Sollol-Backend", "cloud"),
        ("X-Sollol-Recovery", "slow"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(gateway: GatewayProcess, name: str, value: str) -> None:
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"], headers={name: value})
    assert response.status_code == 400
    assert is_one_line(message_in(response.json()))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/v1/messages"])
def test_a_wrong_method_or_path_has_the_shape_of_its_api(gateway: GatewayProcess, path: str) -> None:
    with gateway.client() as client:
        wrong_method = client.get(path)
        assert (wrong_method.status_code, wrong_method.headers["Allow"]) == (405, "POST")
        assert is_one_line(message_in(wrong_method.json()))
        unknown = client.post(f"{path}/nothing", json={})
    assert unknown.status_code == 404
    assert is_one_line(message_in(unknown.json()))
