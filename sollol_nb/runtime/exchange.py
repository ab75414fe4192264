"""One exchange with a server on this machine: short requests, then a streamed answer, over one connection.

An answer of a llama-server takes two requests within milliseconds (its prompt is rendered, then the answer is
streamed), and the server closes the connection after a streamed answer. For such an exchange a general HTTP client
takes longer than the server does, so this module drives the HTTP/1.1 parser of httpx, `h11`, by itself. What the
peer sends is limited as in `http_client.py`, and errors are the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Self
from urllib.parse import urlsplit

import h11

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
        self._headers = [
            ("Host", self._host),
            ("Authorization", f"Bearer {api_key}"),
            ("Accept-Encoding", "identity"),
            ("Content-Type", "application/json"),
        ]
        self._read_timeout_s = read_timeout_s
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._http: h11.Connection
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle | None = None
        self._reading_since: float | None
        self._is_late: bool

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def connect(self) -> None:
        """Open the connection now, without sending anything; nothing happens if it is open."""
        if self._connection is not None and self._connection[0].at_eof():
            self.close()  # the server has closed it
        if self._connection is not None:
            return
        host, _, port = self._host.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                self._connection = await asyncio.open_connection(host, int(port), limit=HEAD_LIMIT_BYTES)
        except TimeoutError as error:
            raise ConnectFailedError(f"{self._base_url}: {CANNOT_CONNECT} (timed out)") from error
        except OSError as error:
            raise ConnectFailedError(f"{self._base_url}: {CANNOT_CONNECT}") from error
        self._loop, self._reading_since, self._is_late = asyncio.get_running_loop(), None, False
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT_BYTES)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The decoded JSON of a POST."""
        url = self._base_url + path
        with self._translated(url):
            async with asyncio.timeout(self._read_timeout_s):
                await self._send(path, body)
                await self._check(url)
                content = await self._body(ANSWER_LIMIT_BYTES)
            if len(content) > ANSWER_LIMIT_BYTES:
                raise too_long_error(url)
        http = self._http
        if http.our_state is h11.DONE and http.their_state is h11.DONE and not http.trailing_data[0]:
            http.start_next_cycle()
        else:
            self.close()
        return decoded(url, content)

    async def lines(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """POST, and give the lines of the answer that are not empty while they arrive. The connection is closed at
        the end."""
        url = self._base_url + path
        splitter = LineSplitter(url, limit_bytes=STREAM_LIMIT_BYTES)
        try:
            with self._translated(url):
                async with asyncio.timeout(self._read_timeout_s):
                    await self._send(path, body)
                    await self._check(url)
                self._watch_silence()
                while isinstance(event := await self._event(), h11.Data):
                    for line in splitter.feed(event.data):
                        if line:
                            yield line
            for line in splitter.end():
                yield line
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection. Closing twice is fine."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    async def _send(self, path: str, body: Mapping[str, Any]) -> None:
        """Send a request, over a new connection if there is none."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        await self.connect()
        assert self._connection is not None
        _, writer = self._connection
        headers = [*self._headers, ("Content-Length", str(len(content)))]
        request = h11.Request(method="POST", target=path, headers=headers)
        events = (request, h11.Data(data=content), h11.EndOfMessage())
        writer.write(b"".join(self._http.send(event) or b"" for event in events))
        await writer.drain()

    async def _check(self, url: str) -> None:
        """Read the head of the answer. Raise HttpStatusError unless the status is a success, TransportError if the
        answer is compressed."""
        while isinstance(head := await self._event(), h11.InformationalResponse):
            pass
        assert isinstance(head, h11.Response)
        if head.http_version not in (b"1.0", b"1.1"):
            raise h11.RemoteProtocolError("unknown version")
        headers = {name: value.decode("latin-1") for name, value in head.headers}
        encoding, status = headers.get(b"content-encoding", ""), head.status_code
        if status < 300:
            refuse_compressed(url, encoding)
            return
        is_shown = status >= 400 and not is_compressed(encoding)
        text = (await self._body(ERROR_LIMIT_BYTES)).decode(errors="replace") if is_shown else ""
        self.close()
        phrase = head.reason.decode("latin-1")
        raise status_error(url, status, phrase, text=text, location=headers.get(b"location", ""))

    async def _body(self, limit_bytes: int) -> bytes:
        """The body, or somewhat more than its first `limit_bytes`."""
        content = bytearray()
        while len(content) <= limit_bytes and isinstance(event := await self._event(), h11.Data):
            content += event.data
        return bytes(content)

    async def _event(self) -> object:
        """The next part of the answer."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            assert self._connection is not None
            self._reading_since = self._loop.time()
            self._http.receive_data(await self._connection[0].read(HEAD_LIMIT_BYTES))
            self._reading_since = None
            if self._is_late:
                raise TimeoutError
        return event

    def _watch_silence(self) -> None:
        """Abort the connection when it is silent for too long: one timer, as one for each token takes time."""
        now = self._loop.time()
        left_s = self._read_timeout_s - (0.0 if self._reading_since is None else now - self._reading_since)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._watch_silence)
        elif self._connection is not None:
            self._is_late = True
            self._connection[1].transport.abort()

    @contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        """Close the connection at an error, and give the error its name."""
        try:
            try:
                yield
            except BaseException:
                self.close()
                raise
        except TransportError:  # some are TimeoutErrors
            raise
        except TimeoutError as error:
            raise TransportTimeoutError(f"{url}: no answer within the time limit") from error
        except h11.RemoteProtocolError as error:
            raise ConnectionBrokenError(f"{url}: the answer is incomplete or not HTTP") from error
        except OSError as error:
            raise ConnectionBrokenError(f"{url}: the connection was lost") from error
