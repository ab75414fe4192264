"""One exchange with a server on this machine: short requests, then a streamed answer, over one connection.

An answer of a llama-server takes two requests within milliseconds (its prompt is rendered, then the answer is
streamed), and the server closes the connection after a streamed answer. For such an exchange a general HTTP client
takes longer than the server does, so this module speaks by itself the little of HTTP/1.1 that is needed. What the
peer sends is limited as in `http_client.py`, and errors are the same.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import urlsplit

from sollol_nb.errors import ConnectFailedError, ConnectionBrokenError, TransportError, TransportTimeoutError
from sollol_nb.runtime.http_client import (
    ANSWER_LIMIT_BYTES,
    CANNOT_CONNECT,
    CONNECT_TIMEOUT_S,
    ERROR_LIMIT_BYTES,
    STREAM_LIMIT_BYTES,
    LineSplitter,
    decoded,
    is_compressed,
    refuse_compressed,
    status_error,
    too_long_error,
)

HEAD_LIMIT_BYTES: Final = 64 * 1024
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([2-5]\d\d)(?: (.*))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?\r\n")
_LENGTH = re.compile(r"\d{1,12}")


@dataclass(frozen=True, slots=True)
class _Head:
    """Status and headers of an answer, names in lower case."""

    status: int
    phrase: str
    headers: Mapping[str, str]


class Exchange:
    """Requests to one server over one connection, which is opened when it is needed; use it as a context manager.

    Leaving it closes the connection, and the engine stops generating. Errors are those of `JsonClient`.

    Args:
        base_url: `http://127.0.0.1:<port>`.
        api_key: sent as a bearer token; never in errors.
        read_timeout_s: the longest silence tolerated.
    """

    def __init__(self, base_url: str, *, api_key: str, read_timeout_s: float) -> None:
        self._base_url = base_url
        self._host = urlsplit(base_url).netloc
        self._api_key = api_key
        self._read_timeout_s = read_timeout_s
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    async def connect(self) -> None:
        """Open the connection now, without sending anything; nothing happens if it is open."""
        if self._connection is not None and self._connection[0].at_eof():
            self._close()  # the server has closed it
        if self._connection is None:
            self._connection = await self._opened()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The decoded JSON of a POST."""
        url = self._base_url + path
        content = bytearray()
        with self._translated(url):
            async with asyncio.timeout(self._read_timeout_s):
                reader = await self._send(path, body)
                head = await _read_head(reader)
                await self._check(url, reader, head)
                async for piece in _body(reader, head):
                    content += piece
                    if len(content) > ANSWER_LIMIT_BYTES:
                        raise too_long_error(url)
        if head.headers.get("connection", "").lower() == "close" or not _is_framed(head):
            self._close()
        return decoded(url, bytes(content))

    async def lines(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """POST, and give the answer line by line while it arrives. The connection is closed at its end."""
        url = self._base_url + path
        splitter = LineSplitter(url, limit_bytes=STREAM_LIMIT_BYTES)
        try:
            with self._translated(url):
                async with asyncio.timeout(self._read_timeout_s):
                    reader = await self._send(path, body)
                    head = await _read_head(reader)
                    await self._check(url, reader, head)
            pieces = _body(reader, head)
            while True:
                with self._translated(url):
                    async with asyncio.timeout(self._read_timeout_s):
                        piece = await anext(pieces, None)
                if piece is None:
                    break
                for line in splitter.feed(piece):
                    yield line
            for line in splitter.end():
                yield line
        finally:
            self._close()

    async def _send(self, path: str, body: Mapping[str, Any]) -> asyncio.StreamReader:
        """Send a request, over a new connection if there is none; returns where the answer comes."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        await self.connect()
        assert self._connection is not None
        reader, writer = self._connection
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {self._api_key}\r\n"
            "Accept-Encoding: identity\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode("ascii") + content)
        await writer.drain()
        return reader

    async def _opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._host.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(host, int(port), limit=HEAD_LIMIT_BYTES)
        except TimeoutError as error:
            raise ConnectFailedError(f"{self._base_url}: {CANNOT_CONNECT} (timed out)") from error
        except OSError as error:
            raise ConnectFailedError(f"{self._base_url}: {CANNOT_CONNECT}") from error

    async def _check(self, url: str, reader: asyncio.StreamReader, head: _Head) -> None:
        """Raise HttpStatusError unless the status is a success, TransportError if the answer is compressed."""
        encoding = head.headers.get("content-encoding", "")
        if head.status < 300:
            refuse_compressed(url, encoding)
            return
        text = bytearray()
        if head.status >= 400 and not is_compressed(encoding):
            async for piece in _body(reader, head):
                text += piece
                if len(text) > ERROR_LIMIT_BYTES:
                    break
        self._close()
        location = head.headers.get("location", "")
        raise status_error(url, head.status, head.phrase, text=text.decode(errors="replace"), location=location)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    @contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        try:
            yield
        except TransportError:  # some are TimeoutErrors
            self._close()
            raise
        except TimeoutError as error:
            self._close()
            raise TransportTimeoutError(f"{url}: no answer within the time limit") from error
        except (_NotHttpError, EOFError, asyncio.LimitOverrunError) as error:
            self._close()
            raise ConnectionBrokenError(f"{url}: the answer is incomplete or not HTTP") from error
        except OSError as error:
            self._close()
            raise ConnectionBrokenError(f"{url}: the connection was lost") from error
        except BaseException:
            self._close()
            raise


class _NotHttpError(Exception):
    """What was received is not HTTP."""


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise _NotHttpError
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return _Head(int(status[1]), status[2] or "", headers)


def _is_framed(head: _Head) -> bool:
    """Whether the answer says where it ends; else it ends with the connection."""
    return "transfer-encoding" in head.headers or "content-length" in head.headers


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncGenerator[bytes, None]:
    """The body of an answer in pieces of limited size; EOFError if it ends too early."""
    coding = head.headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked":
            raise _NotHttpError
        while (size := await _chunk_size(reader)) > 0:
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return
    length = head.headers.get("content-length")
    if length is None:
        while piece := await reader.read(HEAD_LIMIT_BYTES):
            yield piece
        return
    if _LENGTH.fullmatch(length) is None:
        raise _NotHttpError
    left = int(length)
    while left:
        piece = await reader.read(min(left, HEAD_LIMIT_BYTES))
        if not piece:
            raise EOFError
        left -= len(piece)
        yield piece


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    line = _CHUNK_SIZE.fullmatch(await reader.readuntil(b"\r\n"))
    if line is None or (size := int(line[1], 16)) > ANSWER_LIMIT_BYTES:
        raise _NotHttpError
    return size
