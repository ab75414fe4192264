"""HTTP/1.1 to one server, as much of it as engines and nodes need (RFC 9112).

A general HTTP library takes a millisecond for a request and 0.1 ms for each token of a streamed answer; this takes
a tenth of that. Nothing is followed, decompressed or sent a second time. Heads and framing have limits here; the
length of a body is the caller's to limit.
"""

from __future__ import annotations

import asyncio
import re
import select
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

CONNECT_TIMEOUT_S: Final = 5.0  # for the name, the connection and TLS together
HEAD_LIMIT_BYTES: Final = 64 * 1024  # of status line and headers, and of a line of the framing
PIECE_BYTES: Final = 64 * 1024  # read at once
MAX_IDLE: Final = 32
IDLE_LIMIT_S: Final = 4.0  # llama-server closes a connection that has been idle for 5 s
MAX_INTERIM: Final = 8  # answers such as "100 Continue" before the real one

_STATUS = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d)(?: (.*))?")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_LENGTH = re.compile(r"[0-9]{1,18}")
_IN_TARGETS = "/?&=%:@+,;~!$'()*"


class HttpError(Exception):
    """A request failed."""


class NotHttpError(HttpError):
    """What the peer sends is incomplete, or not HTTP."""


class SilentError(HttpError):
    """The peer has sent, or read, nothing for longer than the limit."""


class LostError(HttpError):
    """The connection was lost."""


class NoConnectionError(HttpError):
    """The cause says why: an OSError, a TimeoutError, or a ValueError for the address."""


class Connection:
    """One connection, with what was received and not read yet.

    Attributes:
        idle_since: when the last answer was complete, on the loop's clock.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.idle_since = 0.0
        self._reader, self._writer = reader, writer
        self._received = bytearray()

    def is_usable(self, now: float) -> bool:
        """Whether another request may be sent: the peer keeps it open, and owes nothing."""
        if now - self.idle_since > IDLE_LIMIT_S or self._received or self._writer.is_closing():
            return False
        descriptor = self._writer.get_extra_info("socket").fileno()
        return descriptor >= 0 and not select.select([descriptor], [], [], 0)[0]

    def close(self) -> None:
        """Close it at once, whatever is still to be sent."""
        self._writer.transport.abort()

    async def send(self, data: bytes, timeout_s: float | None) -> None:
        """Send a request. That the peer has stopped reading is no error: its answer may say why."""
        self._writer.write(data)
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
        except TimeoutError as error:
            raise SilentError from error
        except OSError:
            pass

    async def line(self, timeout_s: float | None, end: bytes = b"\r\n") -> bytes:
        """Everything up to `end`. Raises HttpError."""
        while (length := self._received.find(end)) < 0:
            if len(self._received) > HEAD_LIMIT_BYTES or not await self._receive(timeout_s):
                raise NotHttpError
        line = bytes(self._received[:length])
        del self._received[: length + len(end)]
        return line

    async def some(self, most: int, timeout_s: float | None) -> bytes:
        """At least one byte, and at most so many; b"" at the end. Raises HttpError."""
        if not self._received and not await self._receive(timeout_s):
            return b""
        piece = bytes(self._received[:most])
        del self._received[:most]
        return piece

    async def _receive(self, timeout_s: float | None) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                received = await self._reader.read(PIECE_BYTES)
        except TimeoutError as error:
            raise SilentError from error
        except OSError as error:
            raise LostError from error
        self._received += received
        return bool(received)


class Response:
    """The answer to one request. Its body can be read once.

    Attributes:
        status: 200 to 599.
        reason: the text after the status.
        headers: by lower-case names.
        is_whole: whether all of it was read, and the connection can be used again.
    """

    def __init__(self, connection: Connection, read_timeout_s: float | None) -> None:
        self.status = 0
        self.reason = ""
        self.headers: dict[str, str] = {}
        self.is_whole = False
        self._connection = connection
        self._read_timeout_s = read_timeout_s
        self._stays_open = False

    async def read_head(self) -> None:
        """Read status and headers.

        Raises:
            HttpError: of the kind that fits.
        """
        for _ in range(MAX_INTERIM):
            head = await self._connection.line(self._read_timeout_s, b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            status = _STATUS.fullmatch(first)
            if status is None:
                raise NotHttpError
            self.status, self.reason, self.headers = int(status[2]), status[3] or "", {}
            for line in lines:
                header = _HEADER.fullmatch(line)
                if header is None:
                    raise NotHttpError
                self.headers[header[1].lower()] = header[2]
            if self.status >= 200:
                self._stays_open = status[1] == "1" and self.headers.get("connection", "").lower() != "close"
                return
        raise NotHttpError

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            HttpError: of the kind that fits.
        """
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self.status in (204, 304):
            pass
        elif coding is not None:
            if coding.lower() != "chunked":
                raise NotHttpError
            while size := await self._chunk_size():
                while size:
                    piece = await self._connection.some(size, self._read_timeout_s)
                    if not piece:
                        raise NotHttpError
                    size -= len(piece)
                    yield piece
                if await self._connection.line(self._read_timeout_s):
                    raise NotHttpError
            while await self._connection.line(self._read_timeout_s):  # trailers
                pass
        elif length is not None:
            if not _LENGTH.fullmatch(length):
                raise NotHttpError
            size = int(length)
            while size:
                piece = await self._connection.some(size, self._read_timeout_s)
                if not piece:
                    raise NotHttpError
                size -= len(piece)
                yield piece
        else:
            while piece := await self._connection.some(PIECE_BYTES, self._read_timeout_s):
                yield piece
            return
        self.is_whole = self._stays_open

    async def _chunk_size(self) -> int:
        size = _CHUNK_SIZE.fullmatch(await self._connection.line(self._read_timeout_s))
        if size is None:
            raise NotHttpError
        return int(size[1], 16)


class HttpServer:
    """Requests to one server, over connections that are used again; each has one request at a time.

    It belongs to the event loop of its first request.

    Args:
        base_url: scheme, host and port, and perhaps the beginning of all paths. It is checked with each request.
        context: for https, says what certificates are trusted.
        headers: sent with each request.
    """

    def __init__(self, base_url: str, context: ssl.SSLContext | None, headers: Mapping[str, str]) -> None:
        self._base_url = base_url
        self._context = context
        self._headers = dict(headers)
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._is_closed = False

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        content: bytes,
        *,
        read_timeout_s: float | None,
        is_last: bool = False,
    ) -> AsyncIterator[Response]:
        """Send a request with JSON as its body (b"" for none); yields the answer when its head was received.

        Leaving before the body was read closes the connection.

        Args:
            read_timeout_s: the longest silence; None waits for ever, but not for the connection.
            is_last: the connection is not used again.

        Raises:
            HttpError: of the kind that fits.
        """
        try:
            address = self._address()
            request = self._encoded(address, method, path, content, is_last=is_last)
        except ValueError as error:
            raise NoConnectionError from error
        connection = await self._connection(address, min(CONNECT_TIMEOUT_S, read_timeout_s or CONNECT_TIMEOUT_S))
        self._busy.add(connection)
        response = Response(connection, read_timeout_s)
        try:
            await connection.send(request, read_timeout_s)
            await response.read_head()
            yield response
        finally:
            self._busy.discard(connection)
            if response.is_whole and not is_last and not self._is_closed and len(self._idle) < MAX_IDLE:
                connection.idle_since = asyncio.get_running_loop().time()
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close all connections, those in use too."""
        self._is_closed = True
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    def _address(self) -> SplitResult:
        """Raises ValueError if the base URL is none."""
        address = urlsplit(self._base_url)
        host = address.hostname or ""
        if not host or not host.isprintable() or " " in host or address.username is not None:
            raise ValueError
        host.encode("idna").decode("idna")  # raises UnicodeError for what no host can be called
        return address

    def _encoded(self, address: SplitResult, method: str, path: str, content: bytes, *, is_last: bool) -> bytes:
        host = address.netloc if address.netloc.isascii() else address.netloc.encode("idna").decode()
        headers = {"Host": host, **self._headers}
        if content:
            headers["Content-Type"] = "application/json"
        if content or method == "POST":
            headers["Content-Length"] = str(len(content))
        if is_last:
            headers["Connection"] = "close"
        lines = [f"{method} {quote(address.path + path, safe=_IN_TARGETS)} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content

    async def _connection(self, address: SplitResult, timeout_s: float) -> Connection:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable(now):
                return connection
            connection.close()
        port = address.port or (443 if self._context is not None else 80)
        try:
            async with asyncio.timeout(timeout_s):
                return Connection(*await asyncio.open_connection(address.hostname, port, ssl=self._context))
        except (OSError, ValueError) as error:  # also a limit that is over
            raise NoConnectionError from error
