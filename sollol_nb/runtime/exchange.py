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
_SIZE_LIMIT_BYTES: Final = 1024  # of the line before each chunk
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")
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
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle | None = None
        self._reading_since: float | None = None
        self._is_late = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def connect(self) -> None:
        """Open the connection now, without sending anything; nothing happens if it is open."""
        if self._connection is not None and self._connection[0].at_eof():
            self.close()  # the server has closed it
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
                pieces = _Body(head)
                while not pieces.is_whole:
                    content += pieces.feed(await reader.read(HEAD_LIMIT_BYTES))
                    if len(content) > ANSWER_LIMIT_BYTES:
                        raise too_long_error(url)
        if head.headers.get("connection", "").lower() == "close" or "content-length" not in head.headers:
            self.close()
        return decoded(url, bytes(content))

    async def lines(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """POST, and give the lines of the answer that are not empty while they arrive. The connection is closed at
        the end."""
        url = self._base_url + path
        splitter = LineSplitter(url, limit_bytes=STREAM_LIMIT_BYTES)
        try:
            with self._translated(url):
                async with asyncio.timeout(self._read_timeout_s):
                    reader = await self._send(path, body)
                    head = await _read_head(reader)
                    await self._check(url, reader, head)
                pieces = _Body(head)
                self._begin_watch()
            while not pieces.is_whole:
                with self._translated(url):
                    self._reading_since = self._loop.time()
                    received = await reader.read(HEAD_LIMIT_BYTES)
                    self._reading_since = None
                    piece = pieces.feed(received)
                for line in splitter.feed(piece):
                    if line:
                        yield line
            for line in splitter.end():
                yield line
        finally:
            self.close()

    def _begin_watch(self) -> None:
        """Abort the connection when it is silent for too long: one timer, whatever the number of pieces."""
        self._loop, self._reading_since = asyncio.get_running_loop(), None
        self._timer = self._loop.call_later(self._read_timeout_s, self._check_silence)

    def _check_silence(self) -> None:
        now = self._loop.time()
        since = now if self._reading_since is None else self._reading_since
        left_s = since + self._read_timeout_s - now
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_silence)
        elif self._connection is not None:
            self._is_late = True
            self._connection[1].transport.abort()

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
            pieces = _Body(head)
            while not pieces.is_whole and len(text) <= ERROR_LIMIT_BYTES:
                text += pieces.feed(await reader.read(HEAD_LIMIT_BYTES))
        self.close()
        location = head.headers.get("location", "")
        raise status_error(url, head.status, head.phrase, text=text.decode(errors="replace"), location=location)

    def close(self) -> None:
        """Close the connection. Closing twice is fine."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    @contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        try:
            yield
        except TransportError:  # some are TimeoutErrors
            self.close()
            raise
        except TimeoutError as error:
            self.close()
            raise TransportTimeoutError(f"{url}: no answer within the time limit") from error
        except (_NotHttpError, EOFError, asyncio.LimitOverrunError) as error:
            self.close()
            if self._is_late:
                raise TransportTimeoutError(f"{url}: no answer within the time limit") from error
            raise ConnectionBrokenError(f"{url}: the answer is incomplete or not HTTP") from error
        except OSError as error:
            self.close()
            raise ConnectionBrokenError(f"{url}: the connection was lost") from error
        except BaseException:
            self.close()
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


class _Body:
    """The body of an answer, from what is received after its head.

    Attributes:
        is_whole: nothing more belongs to it.
    """

    def __init__(self, head: _Head) -> None:
        coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
        if (coding or "chunked").lower() != "chunked" or (not coding and length and not _LENGTH.fullmatch(length)):
            raise _NotHttpError
        self._is_chunked = coding is not None
        self._left: int | None = None if coding is not None or length is None else int(length)
        self._received = bytearray()
        self.is_whole = self._left == 0

    def feed(self, received: bytes) -> bytes:
        """What this adds to the body. Nothing was received at the end of the connection; EOFError if that is too
        early."""
        if not received:
            if self._is_chunked or self._left is not None:
                raise EOFError
            self.is_whole = True
        if self._is_chunked:
            return self._unchunked(received)
        if self._left is not None:
            received = received[: self._left]  # what follows does not belong to it
            self._left -= len(received)
            self.is_whole = self._left == 0
        return received

    def _unchunked(self, received: bytes) -> bytes:
        """Chunks are `size CRLF data CRLF`; one of size 0 is the last."""
        content, buffer = bytearray(), self._received
        buffer += received
        begin = 0
        while (end := buffer.find(b"\r\n", begin, begin + _SIZE_LIMIT_BYTES)) >= 0:
            line = _CHUNK_SIZE.fullmatch(buffer[begin:end])
            if line is None or (size := int(line[1], 16)) > ANSWER_LIMIT_BYTES:
                raise _NotHttpError
            if size == 0:
                self.is_whole = True
                return bytes(content)
            end += 2
            if len(buffer) < end + size + 2:
                break
            content += buffer[end : end + size]
            begin = end + size + 2
        if end < 0 and len(buffer) - begin >= _SIZE_LIMIT_BYTES:
            raise _NotHttpError
        del buffer[:begin]
        return bytes(content)
