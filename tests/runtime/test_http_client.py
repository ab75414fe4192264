"""HTTP to engines and nodes: every way to fail has one name, and secrets stay secret."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sollol_nb.errors import (
    ConfigError,
    ConnectFailedError,
    ConnectionBrokenError,
    HttpStatusError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.runtime import exchange, http_client
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.runtime.http_client import JsonClient
from tests.support.engines import Peer, eventually_async, listening, run

KEY = "a-very-secret-key"


def response(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


CERTIFICATE = Path(__file__).parents[1] / "support" / "tls" / "loopback.pem"
COMPRESSED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((int(line.split(":")[1]) for line in head.lower().splitlines() if "content-length" in line), 0)
    return head, await reader.readexactly(length)


def says(*pieces: bytes, then: str = "close") -> Peer:
    """Answers a request with these pieces, each in a separate packet, then closes or stays silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if then == "silence":
            await asyncio.Event().wait()
        while then == "drip":
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    return serve


@contextlib.asynccontextmanager
async def client_of(peer: Peer, **options: Any) -> AsyncIterator[JsonClient]:
    async with listening(peer) as port:
        client = JsonClient(f"http://127.0.0.1:{port}/", **options)
        try:
            yield client
        finally:
            await client.aclose()
            await client.aclose()


async def get(peer: Peer, **options: Any) -> Any:
    async with client_of(peer, **options) as client:
        return await client.get("/props")


async def read_lines(peer: Peer, **options: Any) -> list[str]:
    async with client_of(peer, **options) as client, client.stream_lines("/api/chat", {}) as lines:
        return [line async for line in lines]


@contextlib.asynccontextmanager
async def exchange_with(peer: Peer, **options: Any) -> AsyncIterator[Exchange]:
    settings: Any = {"api_key": KEY, "read_timeout_s": 30.0} | options
    async with listening(peer) as port, Exchange(f"http://127.0.0.1:{port}", **settings) as exchange:
        yield exchange


async def post_once(peer: Peer, **options: Any) -> Any:
    async with exchange_with(peer, **options) as exchange:
        return await exchange.post("/props", {})


async def exchanged_lines(peer: Peer, **options: Any) -> list[str]:
    async with exchange_with(peer, **options) as exchange:
        return [line async for line in exchange.lines("/api/chat", {})]


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [(b'{"a": [1, "\xc3\xa9"]}', {"a": [1, "\u00e9"]}), (b"[]", []), (b"null", None), (b"", None)],
)
def test_answer_is_decoded_json(body: bytes, value: object) -> None:
    assert run(get(says(response(body)))) == value


@pytest.mark.parametrize("method", ["post", "delete"])
def test_body_is_sent_as_json_with_the_key_as_a_bearer_token(method: str) -> None:
    seen: dict[str, Any] = {}

    async def notes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen["head"], body = await read_request(reader)
        seen["body"] = json.loads(body)
        writer.write(response(b"{}"))

    async def ask() -> None:
        async with client_of(notes, api_key=KEY) as client:
            await getattr(client, method)("/api/x", {"model": "caf\u00e9"})

    run(ask())

    assert seen["head"].startswith(f"{method.upper()} /api/x HTTP/1.1")
    assert f"authorization: bearer {KEY}" in seen["head"].lower()
    assert seen["body"] == {"model": "caf\u00e9"}


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert run(get(says(response(b'{"direct": true}')))) == {"direct": True}


async def get_over_tls(scheme: str = "https") -> Any:
    """An answer of a server whose certificate no authority of the system has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            await says(response(b'{"over": "tls"}'))(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        client = JsonClient(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await client.get("/api/tags")
        finally:
            await client.aclose()


def test_an_unknown_certificate_is_refused_and_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in http_client.CERTIFICATE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(TransportError, match=r"self-signed certificate.*SSL_CERT_FILE or SSL_CERT_DIR") as refused:
        run(get_over_tls())
    assert not isinstance(refused.value, ConnectFailedError)  # a server runs there
    assert "\n" not in str(refused.value)


def test_certificates_of_ssl_cert_file_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    assert run(get_over_tls("HTTPS")) == {"over": "tls"}


def test_certificates_in_ssl_cert_dir_are_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # OpenSSL finds a certificate by the hash of its subject.
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    (tmp_path / "fb53fb52.0").write_bytes(CERTIFICATE.read_bytes())
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert run(get_over_tls()) == {"over": "tls"}


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_an_unusable_certificate_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for variable in http_client.CERTIFICATE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(tmp_path / "missing"))
    with pytest.raises(TransportError, match=f"^{name}="):
        JsonClient("https://127.0.0.1:1")
    JsonClient("http://127.0.0.1:1")  # needs none


def test_http_where_https_is_requested_is_named() -> None:
    async def ask() -> None:
        async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(response(b"", "400 Bad Request"))

        async with listening(refuses) as port:
            client = JsonClient(f"https://127.0.0.1:{port}")
            try:
                await client.get("/api/tags")
            finally:
                await client.aclose()

    with pytest.raises(TransportError, match="no HTTPS server answers; if it speaks HTTP, write http://"):
        run(ask())


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "error", "message"),
    [
        pytest.param(says(), ConnectionBrokenError, "incomplete or not HTTP", id="closes without an answer"),
        pytest.param(
            says(response(b'{"a": 1}')[:-3]),
            ConnectionBrokenError,
            "incomplete or not HTTP",
            id="closes in mid-answer",
        ),
        pytest.param(says(b"SSH-2.0-OpenSSH\r\n"), ConnectionBrokenError, "incomplete or not HTTP", id="not HTTP"),
        pytest.param(says(then="silence"), TransportTimeoutError, "no answer within the time limit", id="silent"),
        pytest.param(
            says(response(b'{"a": 1}')[:-3], then="silence"),
            TransportTimeoutError,
            "within the time limit",
            id="silent in mid-answer",
        ),
        pytest.param(says(response(b"hello")), TransportError, "is not JSON", id="text"),
        pytest.param(
            says(response(b"<!DOCTYPE html>\n<html><title>Sign \x1bin</title>")),
            TransportError,
            r"sent a web page \(Sign in\)",
            id="a web page",
        ),
        pytest.param(says(response(b"<html>")), TransportError, "a web page", id="a web page without a title"),
        pytest.param(
            says(COMPRESSED + gzip.compress(b"{}")), TransportError, "compressed answer", id="compressed"
        ),
        pytest.param(
            says(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", then="drip"),
            TransportTimeoutError,
            "within the time limit",
            id="a byte at a time",
        ),
        pytest.param(says(response(b'{"a": ')), TransportError, "is not JSON", id="half of JSON"),
        pytest.param(says(response(b'"\xff"')), TransportError, "is not JSON", id="not UTF-8"),
        pytest.param(says(response(b"[" * 200_000)), TransportError, "is not JSON", id="nested too deeply"),
    ],
)
@pytest.mark.parametrize("ask", [get, post_once])
def test_failure_has_its_own_error(peer: Peer, error: type[Exception], message: str, ask: Any) -> None:
    with pytest.raises(TransportError, match=message) as caught:
        run(ask(peer, api_key=KEY, read_timeout_s=0.2 if error is TransportTimeoutError else 30.0))

    assert type(caught.value) is error
    assert "127.0.0.1" in str(caught.value)
    assert "/props" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_an_endless_answer_ends() -> None:
    endless = says(CHUNKED, *[chunk(b"a" * 2**20)] * 40, then="silence")
    for ask in (get, post_once):
        with pytest.raises(TransportError, match=r"/props: the answer is longer than 32 MiB"):
            run(ask(endless))


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        pytest.param(
            response(
                b'{"error":{"code":401,"message":"Invalid API Key","type":"authentication_error"}}',
                "401 Unauthorized",
            ),
            401,
            "Invalid API Key",
            id="llama-server's shape",
        ),
        pytest.param(
            response(b'{"error":"model \'x\' not found"}', "404 Not Found"),
            404,
            "model 'x' not found",
            id="Ollama's shape",
        ),
        pytest.param(
            response(rb'{"error":"{\"error\":{\"code\":400,\"message\":\"too long\"}}"}', "400 Bad Request"),
            400,
            "too long",
            id="Ollama's shape around llama-server's",
        ),
        pytest.param(response(rb'{"error":"{not JSON"}', "400 Bad"), 400, "{not JSON", id="text like JSON"),
        pytest.param(response(b"two\nlines", "500 Oops", "text/plain"), 500, "two lines", id="plain text"),
        pytest.param(response(b"", "503 Service Unavailable"), 503, "Service Unavailable", id="empty"),
        pytest.param(
            response(b'{"error": {"code": 1}}', "400 Bad"), 400, '{"error": {"code": 1}}', id="no message"
        ),
        pytest.param(response(b'["x"]', "400 Bad"), 400, '["x"]', id="a list"),
        pytest.param(response(b"x" * 9000, "400 Bad"), 400, "x" * 500, id="long text is cut"),
        pytest.param(response(b"[" * 200_000, "400 Bad"), 400, "[" * 500, id="nested too deeply"),
        pytest.param(response(b"\xff\xfe", "400 Bad"), 400, None, id="not UTF-8"),
        pytest.param(response(b"E" * 10**7, "500 Oops"), 500, "E" * 500, id="megabytes"),
        pytest.param(
            response(rb'{"error": "\u001b[2Jred\u202e\u0007"}', "500 Oops"),
            500,
            "[2Jred",
            id="control characters",
        ),
        pytest.param(
            response(b"<html><head><title>502 Bad Gateway</title>", "502 Bad Gateway"),
            502,
            "Bad Gateway",
            id="a web page",
        ),
        pytest.param(
            b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n",
            301,
            "it redirects to https://elsewhere/; use that address instead",
            id="a redirect",
        ),
        pytest.param(COMPRESSED.replace(b"200 OK", b"503 Busy"), 503, "Busy", id="compressed"),
    ],
)
def test_error_status_carries_the_peers_own_words(answer: bytes, status: int, reason: str | None) -> None:
    for ask in (get, read_lines, post_once, exchanged_lines):
        with pytest.raises(HttpStatusError) as caught:
            run(ask(says(answer), api_key=KEY))

        assert caught.value.status == status
        assert reason is None or caught.value.reason == reason
        assert str(status) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert KEY not in str(caught.value)


def unused_url() -> str:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{trial.getsockname()[1]}"


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9", "http://node.invalid:11434", "http://[::1", "http://a b:1"],
    ids=["refused", "an unknown host", "half an address", "a space"],
)
def test_address_where_nothing_listens_is_a_failed_connection(url: str) -> None:
    async def ask() -> None:
        client = JsonClient(url, api_key=KEY)
        try:
            await client.get("/health")
        finally:
            await client.aclose()

    with pytest.raises(ConnectFailedError) as caught:
        run(ask())
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_repr_tells_the_address_and_never_the_key() -> None:
    assert repr(JsonClient("http://127.0.0.1:1/", api_key=KEY)) == "JsonClient('http://127.0.0.1:1')"


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        pytest.param([b"one\ntwo\n"], ["one", "two"], id="one piece"),
        pytest.param([b"on", b"e\nt", b"wo", b"\n"], ["one", "two"], id="cut anywhere"),
        pytest.param([b"one\r\n\r\ntwo"], ["one", "", "two"], id="CRLF, no line feed at the end"),
        pytest.param([b"caf\xc3", b"\xa9\n"], ["caf\u00e9"], id="cut within a character"),
        pytest.param(
            ['"a\u2028b\u0085c\x0bd"\n'.encode()], ['"a\u2028b\u0085c\x0bd"'], id="other line ends are text"
        ),
        pytest.param([b"\xff\n"], ["\ufffd"], id="not UTF-8"),
        pytest.param([], [], id="nothing"),
        pytest.param([b"z"] * 1000 + [b"\n"], ["z" * 1000], id="a thousand pieces"),
    ],
)
def test_stream_gives_lines_as_they_were_sent(pieces: list[bytes], lines: list[str]) -> None:
    peer = says(CHUNKED, *map(chunk, pieces), b"0\r\n\r\n")
    assert run(read_lines(peer)) == lines
    assert run(exchanged_lines(peer)) == [line for line in lines if line]


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        pytest.param(says(CHUNKED, *[chunk(b"z" * 900)] * 5), "a line of the answer is longer", id="a giant line"),
        pytest.param(says(CHUNKED, *[chunk(b"z\n" * 900)] * 5), "the answer is longer than", id="endless lines"),
        pytest.param(says(COMPRESSED), "compressed", id="compressed"),
    ],
)
def test_a_stream_has_limits(monkeypatch: pytest.MonkeyPatch, peer: Peer, message: str) -> None:
    monkeypatch.setattr(http_client, "STREAM_LIMIT_BYTES", 4_000)

    async def read() -> None:
        async with client_of(peer) as client, client.stream_lines("/x", {}, line_limit_bytes=2_000) as lines:
            async for line in lines:
                assert len(line) < 3_000

    with pytest.raises(TransportError, match=message):
        run(read())


def test_an_endless_stream_has_only_limited_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "STREAM_LIMIT_BYTES", 4_000)

    async def read() -> int:
        peer = says(CHUNKED, *[chunk(b"z\n" * 900)] * 5, chunk(b""))
        async with client_of(peer) as client, client.stream_lines("/x", None, is_endless=True) as lines:
            return len([line async for line in lines])

    assert run(read()) == 4_500


@pytest.mark.parametrize(("then", "error"), [("close", ConnectionBrokenError), ("silence", TransportTimeoutError)])
def test_stream_that_breaks_gives_its_lines_and_then_the_error(then: str, error: type[Exception]) -> None:
    seen: list[str] = []

    async def shorten(response: httpx.Response) -> None:
        """Only the silence is limited. httpcore reads the limit once, when the body begins."""
        if then == "silence":
            response.request.extensions["timeout"]["read"] = 0.2

    async def read() -> None:
        peer = says(CHUNKED + chunk(b"one\ntw"), then=then)
        async with client_of(peer) as client:
            client._client.event_hooks = {"response": [shorten]}
            async with client.stream_lines("/api/chat", {}, read_timeout_s=30.0) as lines:
                async for line in lines:
                    seen.append(line)

    with pytest.raises(error):
        run(read())
    assert seen == ["one"]


def test_leaving_a_stream_early_closes_the_connection() -> None:
    async def read() -> None:
        closed = asyncio.Event()

        async def talks_until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(CHUNKED + chunk(b"one\n"))
            assert await reader.read() == b""
            closed.set()

        async with client_of(talks_until_closed) as client:
            async with client.stream_lines("/api/chat", {}) as lines:
                assert await anext(lines) == "one"
            await closed.wait()

    run(read())


def test_error_of_the_reader_passes_through_unchanged() -> None:
    async def read() -> None:
        async with (
            client_of(says(CHUNKED, chunk(b"one\n"), then="silence")) as client,
            client.stream_lines("/api/chat", {}) as lines,
        ):
            async for _ in lines:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(read())


def test_a_key_that_no_header_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="the API key has characters that no HTTP header can have"):
        JsonClient("http://127.0.0.1:1", api_key="key\r\nX-Other: header")


# --- one connection for an answer -------------------------------------------------------------


def test_an_exchange_uses_one_connection_for_its_requests_and_the_stream() -> None:
    heads: list[str] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            head, body = await read_request(reader)
            heads.append(head)
            assert json.loads(body) == {"model": "caf\u00e9"}
            writer.write(response(b'{"prompt": "x"}'))
        await read_request(reader)
        writer.write(CHUNKED + chunk(b"one\n") + chunk(b"two\n") + b"0\r\n\r\n")
        assert await reader.read() == b""

    async def ask() -> list[str]:
        async with exchange_with(serve) as exchange:
            for _ in range(2):
                assert await exchange.post("/render", {"model": "caf\u00e9"}) == {"prompt": "x"}
            return [line async for line in exchange.lines("/chat", {})]

    assert run(ask()) == ["one", "two"]
    assert connections == 1
    assert all(f"authorization: bearer {KEY}" in head.lower() for head in heads)


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(response(b"1").replace(b"\r\n", b"\r\nConnection: close\r\n", 1), id="announced"),
        pytest.param(response(b"1"), id="unannounced"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n1", id="the end of the connection ends the answer"),
    ],
)
def test_an_exchange_opens_another_connection_where_the_server_closed_it(ends: bytes) -> None:
    async def ask() -> list[Any]:
        async with exchange_with(says(ends)) as exchange:
            answers = []
            for _ in range(3):
                answers.append(await exchange.post("/x", {}))
                if (open_one := exchange._connection) is not None:
                    await eventually_async(open_one[0].at_eof, "the server has closed it")
            return answers

    assert run(ask()) == [1, 1, 1]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(CHUNKED + b"zz\r\n", id="no size"),
        pytest.param(CHUNKED + b"fffffff0\r\n", id="a giant piece"),
        pytest.param(CHUNKED + b"5\r\non", id="half a piece"),
        pytest.param(CHUNKED + chunk(b"one"), id="no last piece"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", id="an unknown coding"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", id="no length"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, id="an endless head"),
        pytest.param(b"HTTP/9.9 999\r\n\r\n", id="an unknown version"),
    ],
)
def test_what_is_not_http_is_refused(answer: bytes) -> None:
    for ask in (post_once, exchanged_lines):
        with pytest.raises(ConnectionBrokenError, match="the answer is incomplete or not HTTP"):
            run(ask(says(answer)))


def test_bytes_after_an_answer_are_no_part_of_the_next_one() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError):
            while True:
                await read_request(reader)
                writer.write(response(b'"true"') + response(b'"forged"'))

    async def ask() -> list[Any]:
        async with exchange_with(serve) as exchange:
            return [await exchange.post("/x", {}) for _ in range(3)]

    assert run(ask()) == ["true"] * 3


def test_an_interim_answer_is_skipped() -> None:
    assert run(post_once(says(b"HTTP/1.1 100 Continue\r\n\r\n", response(b"1")))) == 1


def test_silence_is_no_end_of_an_answer_without_a_length() -> None:
    with pytest.raises(TransportTimeoutError):
        run(exchanged_lines(says(b"HTTP/1.1 200 OK\r\n\r\none\n", then="silence"), read_timeout_s=0.1))


def test_a_stream_of_an_exchange_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STREAM_LIMIT_BYTES", 4_000)
    with pytest.raises(TransportError, match="the answer is longer than"):
        run(exchanged_lines(says(CHUNKED, *[chunk(b"z\n" * 900)] * 5)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_lines_of_an_exchange_do_not_depend_on_the_packets(size: int) -> None:
    answer = CHUNKED + chunk(b"one\ntwo") + chunk(b"\n") + chunk(b"three\r\n" * 20) + b"0\r\n\r\n"
    packets = [answer[begin : begin + size] for begin in range(0, len(answer), size)]
    assert run(exchanged_lines(says(*packets))) == ["one", "two", *["three"] * 20]


@pytest.mark.parametrize(("then", "error"), [("close", ConnectionBrokenError), ("silence", TransportTimeoutError)])
def test_an_exchange_that_breaks_gives_its_lines_and_then_the_error(then: str, error: type[Exception]) -> None:
    seen: list[str] = []

    async def read() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            exchange._read_timeout_s = 0.2  # connecting and asking may take longer
            writer.write(CHUNKED + chunk(b"one\ntw"))
            if then == "silence":
                await asyncio.Event().wait()

        async with exchange_with(serve) as exchange:
            async for line in exchange.lines("/api/chat", {}):
                seen.append(line)
                await asyncio.sleep(0.5)  # this time is the reader's

    with pytest.raises(error):
        run(read())
    assert seen == ["one"]


def test_an_exchange_answers_after_one_that_was_too_slow() -> None:
    peers = iter([says(CHUNKED + chunk(b"one\n"), then="silence"), says(response(b"1"))])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await next(peers)(reader, writer)

    async def ask() -> Any:
        async with exchange_with(serve, read_timeout_s=0.2) as exchange:
            with pytest.raises(TransportTimeoutError):
                [line async for line in exchange.lines("/api/chat", {})]
            exchange._read_timeout_s = 30.0
            return await exchange.post("/props", {})

    assert run(ask()) == 1


def test_leaving_an_exchange_closes_its_connection() -> None:
    async def read() -> None:
        closed = asyncio.Event()

        async def talks_until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(CHUNKED + chunk(b"one\n"))
            assert await reader.read() == b""
            closed.set()

        async with listening(talks_until_closed) as port:
            url = f"http://127.0.0.1:{port}"
            async with Exchange(url, api_key=KEY, read_timeout_s=30.0) as exchange:
                assert await anext(exchange.lines("/api/chat", {})) == "one"
            await closed.wait()

    run(read())


def test_an_exchange_with_nobody_is_a_failed_connection() -> None:
    async def ask() -> None:
        async with Exchange(unused_url(), api_key=KEY, read_timeout_s=30.0) as exchange:
            await exchange.post("/x", {})

    with pytest.raises(ConnectFailedError, match="cannot connect"):
        run(ask())
