"""HTTP to engines and nodes: with `download.py`, the only module that imports the HTTP client library.

A `JsonClient` speaks to one base URL in JSON. Foreign exceptions are translated here, once, by a table (the
most specific class wins), so that no other module depends on the library. A client belongs to the event loop on
which it is first used; close it there with `aclose()`. Closing a stream early (leaving its `async with`) closes
the connection, and the engine stops generating.

What a peer sends is not trusted: every body and line has a limit; compressed answers are refused (nobody requested
them, and a small one can unfold to gigabytes); redirects are not followed; a limit in seconds holds for the whole
of a short answer, however slowly it drips; and reading costs time in proportion to what arrives.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any, Final

import httpx

from sollol_nb.errors import (
    ConfigError,
    ConnectFailedError,
    ConnectionBrokenError,
    HttpStatusError,
    TransportError,
    TransportTimeoutError,
)

CONNECT_TIMEOUT_S = 5.0

ANSWER_LIMIT_BYTES: Final = 32 * 2**20  # of an answer that is not streamed: the longest are thousands of token ids
LINE_LIMIT_BYTES: Final = 16 * 2**20  # of a line: the longest has the token ids of a whole context
STREAM_LIMIT_BYTES: Final = 256 * 2**20  # of all lines of an answer: half a million tokens are 200 MB
LINE_COST_BYTES: Final = 128  # what a line counts more than its bytes, since each becomes some objects
ERROR_LIMIT_BYTES: Final = 64 * 1024  # of the body of an error, whose first 500 characters are shown

CANNOT_CONNECT: Final = "cannot connect"
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

_TRANSLATIONS: tuple[tuple[type[Exception], type[TransportError], str], ...] = (
    (httpx.ConnectTimeout, ConnectFailedError, "cannot connect (timed out)"),
    (httpx.ConnectError, ConnectFailedError, CANNOT_CONNECT),
    (httpx.TimeoutException, TransportTimeoutError, "no answer within the time limit"),
    (httpx.RemoteProtocolError, ConnectionBrokenError, "the answer is incomplete or not HTTP"),
    (httpx.ReadError, ConnectionBrokenError, "the connection was lost"),
    (httpx.WriteError, ConnectionBrokenError, "the connection was lost"),
    (httpx.CloseError, ConnectionBrokenError, "the connection was lost"),
    (httpx.InvalidURL, ConnectFailedError, "the address is not valid"),
    (httpx.HTTPError, TransportError, "the HTTP request failed"),
)


class JsonClient:
    """JSON over HTTP to one base URL.

    Args:
        base_url: scheme, host and port, such as `http://127.0.0.1:18080`.
        api_key: sent as a bearer token; never shown in the repr or in errors.
        read_timeout_s: the longest silence tolerated within an answer; None waits for ever, so callers
            that pass None need a limit of their own.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, read_timeout_s: float | None = 30.0) -> None:
        self.base_url = base_url.rstrip("/")
        headers = {"Accept-Encoding": "identity"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ConfigError("the API key has characters that no HTTP header can have; correct it")
            headers["Authorization"] = f"Bearer {api_key}"
        self._read_timeout_s = read_timeout_s
        # trust_env=False: a proxy meant for the web must not see prompts, nor stand before loopback.
        self._client = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            verify=not self.base_url.lower().startswith("http:") and _certificates(),
            timeout=_timeout(read_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )

    def __repr__(self) -> str:
        return f"JsonClient({self.base_url!r})"

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The decoded JSON of a GET. Raises a TransportError of the matching kind."""
        return await self._request("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """The decoded JSON of a POST. Raises a TransportError of the matching kind."""
        return await self._request("POST", path, body, timeout_s)

    async def put(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """PUT JSON; returns the JSON of the answer. Limit and errors as for `get`."""
        return await self._request("PUT", path, body, timeout_s)

    async def delete(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """The decoded JSON of a DELETE with a body. Raises a TransportError of the matching kind."""
        return await self._request("DELETE", path, body, timeout_s)

    @asynccontextmanager
    async def stream_lines(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        read_timeout_s: float | None = None,
        line_limit_bytes: int = LINE_LIMIT_BYTES,
        is_endless: bool = False,
    ) -> AsyncIterator[AsyncIterator[str]]:
        """POST (without a body GET), and read the answer line by line while it arrives.

        Example:
            async with client.stream_lines("/api/chat", body) as lines:
                async for line in lines: ...

        Args:
            read_timeout_s: the longest silence between two pieces; by default the client's.
            line_limit_bytes: the longest line.
            is_endless: whether all lines together may be longer than any answer is.

        Raises:
            TransportError: of the matching kind, before the answer or within it.
        """
        timeout = _timeout(read_timeout_s if read_timeout_s is not None else self._read_timeout_s)
        with self._translated(path):
            # llama-server closes the connection after a streamed answer without notice; do not use it again.
            async with self._client.stream(
                "GET" if body is None else "POST",
                self.base_url + path,
                json=body,
                timeout=timeout,
                headers={"Connection": "close"},
            ) as response:
                await self._check(path, response)
                limit_bytes = None if is_endless else max(STREAM_LIMIT_BYTES, line_limit_bytes)
                yield self._lines(path, response, line_limit_bytes, limit_bytes)

    async def aclose(self) -> None:
        """Close all connections. Closing twice is fine."""
        await self._client.aclose()

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> Any:
        limit_s = timeout_s if timeout_s is not None else self._read_timeout_s
        url = self.base_url + path
        try:
            async with asyncio.timeout(limit_s):
                content = await self._content(method, path, body, limit_s)
        except TimeoutError as error:
            if isinstance(error, TransportError):
                raise
            raise TransportTimeoutError(f"{url}: no answer within the time limit") from error
        return decoded(url, content)

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:  # the body has half a surrogate pair
            raise
        except UnicodeError as error:  # a host name that is wrong Punycode
            raise ConnectFailedError(f"{self.base_url}{path}: the address is not valid") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                reason = str(error).partition("CERTIFICATE_VERIFY_FAILED] ")[2].partition(" (_ssl")[0]
                variables = " or ".join(CERTIFICATE_VARIABLES)
                raise TransportError(
                    f"{self.base_url}{path}: {reason or 'its certificate is not trusted'}; name a file or folder "
                    f"with the certificate of its authority in {variables}"
                ) from error
            if "SSL: " in str(error):
                raise TransportError(
                    f"{self.base_url}{path}: no HTTPS server answers; if it speaks HTTP, write http://"
                ) from error
            if _is_unknown_name(error):
                raise ConnectFailedError(f"{self.base_url}{path}: no host has this name") from error
            for theirs, ours, message in _TRANSLATIONS:
                if isinstance(error, theirs):
                    raise ours(f"{self.base_url}{path}: {message}") from error
            raise

    async def _content(
        self, method: str, path: str, body: Mapping[str, Any] | None, read_timeout_s: float | None
    ) -> bytes:
        url = self.base_url + path
        with self._translated(path):
            async with self._client.stream(method, url, json=body, timeout=_timeout(read_timeout_s)) as response:
                await self._check(path, response)
                content = await _read(response, ANSWER_LIMIT_BYTES)
        if len(content) > ANSWER_LIMIT_BYTES:
            raise too_long_error(url)
        return content

    async def _check(self, path: str, response: httpx.Response) -> None:
        """Raise HttpStatusError unless the status is a success, TransportError if the answer is compressed."""
        url, encoding = self.base_url + path, response.headers.get("content-encoding", "")
        if 200 <= response.status_code < 300:
            refuse_compressed(url, encoding)
            return
        is_shown = response.status_code >= 400 and not is_compressed(encoding)
        text = (await _read(response, ERROR_LIMIT_BYTES)).decode(errors="replace") if is_shown else ""
        location = response.headers.get("location", "")
        raise status_error(url, response.status_code, response.reason_phrase, text=text, location=location)

    async def _lines(
        self, path: str, response: httpx.Response, line_limit_bytes: int, limit_bytes: int | None
    ) -> AsyncIterator[str]:
        splitter = LineSplitter(self.base_url + path, line_limit_bytes, limit_bytes)
        async for piece in response.aiter_raw():
            for line in splitter.feed(piece):
                yield line
        for line in splitter.end():
            yield line


class LineSplitter:
    """Splits a streamed answer into lines. They end with a line feed and nothing else: JSON text may contain
    U+2028, U+0085 and the like, at which other readers would split.

    Args:
        url: for errors.
        line_limit_bytes: the longest line.
        limit_bytes: of all lines together; None for none.
    """

    def __init__(self, url: str, line_limit_bytes: int = LINE_LIMIT_BYTES, limit_bytes: int | None = None) -> None:
        self._url = url
        self._line_limit_bytes, self._limit_bytes = line_limit_bytes, limit_bytes
        self._line, self._total_bytes = bytearray(), 0

    def feed(self, piece: bytes) -> Iterator[str]:
        """Take the next piece; gives the lines that it completes. Raises TransportError at a limit."""
        self._total_bytes += len(piece)
        if self._limit_bytes is not None and self._total_bytes > self._limit_bytes:
            raise TransportError(f"{self._url}: the answer is longer than {self._limit_bytes >> 20} MiB")
        first, *others = piece.split(b"\n")
        self._line += first
        for following in others:
            self._total_bytes += LINE_COST_BYTES if self._line else 0
            yield self._line.removesuffix(b"\r").decode(errors="replace")
            self._line = bytearray(following)
        if len(self._line) > self._line_limit_bytes:
            raise TransportError(
                f"{self._url}: a line of the answer is longer than {self._line_limit_bytes >> 20} MiB"
            )

    def end(self) -> Iterator[str]:
        """The last line, if no line feed ends it."""
        if self._line:
            yield self._line.decode(errors="replace")


def decoded(url: str, content: bytes) -> Any:
    """A body as JSON; None if it is empty. Raises TransportError if it is not JSON."""
    if not content:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # nested too deeply is not JSON for us either
        page = _title(content.decode(errors="replace"))
        what = f"a web page ({page})" if page else "an answer that is not JSON"
        raise TransportError(f"{url} sent {what}") from error


def is_compressed(encoding: str) -> bool:
    """Whether the header `Content-Encoding` says so."""
    return encoding.strip().lower() not in ("", "identity")


def refuse_compressed(url: str, encoding: str) -> None:
    """Raise TransportError if an answer is compressed."""
    if is_compressed(encoding):
        raise TransportError(f"{url} sent a compressed answer ({one_line(encoding, 40)}), which was not requested")


def too_long_error(url: str) -> TransportError:
    """The error for a body longer than `ANSWER_LIMIT_BYTES`."""
    return TransportError(f"{url}: the answer is longer than {ANSWER_LIMIT_BYTES >> 20} MiB")


def status_error(url: str, status: int, phrase: str, *, text: str = "", location: str = "") -> HttpStatusError:
    """The error for a status that is not a success.

    Args:
        phrase: the text after the status.
        text: the beginning of the body.
        location: where it redirects to.
    """
    if status < 400:
        target = one_line(location, 200)
        reason = f"it redirects to {target}; use that address instead" if target else "a redirect"
    else:
        reason = _reason(text) or one_line(phrase) or "no reason"
        reason = reason.removeprefix(f"{status} ")  # in titles of web pages
    return HttpStatusError(f"{url} answered {status}: {reason}", status=status, reason=reason, body=text)


def _is_unknown_name(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


async def _read(response: httpx.Response, limit_bytes: int) -> bytes:
    """The body, or somewhat more than its first `limit_bytes`."""
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > limit_bytes:
            break
    return bytes(content)


@cache
def _context(file: str | None, folder: str | None) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=file, capath=folder) if file or folder else True


def _certificates() -> ssl.SSLContext | bool:
    """The certificates to trust: those that `SSL_CERT_FILE` or `SSL_CERT_DIR` names, else the usual authorities.

    Reading all of them takes 3 MB and 20 ms, so it is done for https only.

    Raises:
        TransportError: a variable names no usable file or folder.
    """
    file, folder = (os.environ.get(name) or None for name in CERTIFICATE_VARIABLES)
    if folder is not None and file is None and not os.path.isdir(folder):  # noqa: PTH112 - as OpenSSL reads it
        raise TransportError(f"SSL_CERT_DIR={folder!r} is not a folder; correct or unset it")
    try:
        return _context(file, folder)
    except (OSError, ValueError) as error:
        raise TransportError(
            f"SSL_CERT_FILE={file!r} has no usable certificates ({error}); correct or unset it"
        ) from None


def _timeout(read_timeout_s: float | None) -> httpx.Timeout:
    connect = CONNECT_TIMEOUT_S if read_timeout_s is None else min(CONNECT_TIMEOUT_S, read_timeout_s)
    return httpx.Timeout(read_timeout_s, connect=connect)


def _reason(text: str) -> str:
    """The peer's message on one line: in llama-server's (`error.message`) or Ollama's (`error`) shape, the title
    of a web page, or the text itself."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    error = message_of(body.get("error")) if isinstance(body, dict) else ""
    return one_line(error or _title(text) or text)


def message_of(error: Any) -> str:
    """The message of an `error` field: text, an object with `message`, or such an object as JSON text (so Ollama
    passes on the errors of its llama-server); "" if it is none of these."""
    if isinstance(error, str) and error.startswith("{"):
        try:
            inner = json.loads(error)
        except (ValueError, RecursionError):
            return error
        inner = inner.get("error", inner)
        error = inner if isinstance(inner, dict) and isinstance(inner.get("message"), str) else error
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def _title(text: str) -> str:
    """The title of a web page; "" if the text is none."""
    start = text[:4096]
    if not re.match(r"\s*<(!doctype html|html|head|body)\b", start, re.IGNORECASE):
        return ""
    title = re.search(r"<title[^<>]*>([^<]*)", start, re.IGNORECASE)
    return one_line(title[1] if title else "", 100) or "without a title"


def one_line(text: str, limit: int = 500) -> str:
    """The beginning of a peer's text as one line without control characters, which could steer a terminal."""
    visible = "".join(character if character.isprintable() else " " for character in text[: 4 * limit])
    return " ".join(visible.split())[:limit]
