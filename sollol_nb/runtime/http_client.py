"""HTTP to engines and nodes: the only module that imports the HTTP client library.

A `JsonClient` speaks to one base URL in JSON. Foreign exceptions are translated here, once, by a table (the
most specific class wins), so that no other module depends on the library. A client belongs to the event loop on
which it is first used; close it there with `aclose()`. Closing a stream early (leaving its `async with`) closes
the connection, and the engine stops generating.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from sollol_nb.errors import (
    ConnectFailedError,
    ConnectionBrokenError,
    HttpStatusError,
    TransportError,
    TransportTimeoutError,
)

CONNECT_TIMEOUT_S = 5.0

_TRANSLATIONS: tuple[tuple[type[Exception], type[TransportError], str], ...] = (
    (httpx.ConnectTimeout, ConnectFailedError, "cannot connect (timed out)"),
    (httpx.ConnectError, ConnectFailedError, "cannot connect"),
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
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._read_timeout_s = read_timeout_s
        # trust_env=False: a proxy meant for the web must not see prompts, nor stand before loopback.
        self._client = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            # Reading the certificates of all authorities takes 3 MB and 20 ms, for nothing without TLS.
            verify=not self.base_url.lower().startswith("http:"),
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

    async def delete(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """The decoded JSON of a DELETE with a body. Raises a TransportError of the matching kind."""
        return await self._request("DELETE", path, body, timeout_s)

    @asynccontextmanager
    async def stream_lines(
        self, path: str, body: Mapping[str, Any], *, read_timeout_s: float | None = None
    ) -> AsyncIterator[AsyncIterator[str]]:
        """POST, and read the answer line by line while it arrives.

        Example:
            async with client.stream_lines("/api/chat", body) as lines:
                async for line in lines: ...

        Args:
            read_timeout_s: the longest silence between two pieces; by default the client's.

        Raises:
            TransportError: of the matching kind, before the answer or within it.
        """
        timeout = _timeout(read_timeout_s if read_timeout_s is not None else self._read_timeout_s)
        with self._translated(path):
            # llama-server closes the connection after a streamed answer without notice; do not use it again.
            async with self._client.stream(
                "POST", self.base_url + path, json=body, timeout=timeout, headers={"Connection": "close"}
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise self._status_error(path, response)
                yield _lines(response)

    async def aclose(self) -> None:
        """Close all connections. Closing twice is fine."""
        await self._client.aclose()

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> Any:
        timeout = _timeout(timeout_s if timeout_s is not None else self._read_timeout_s)
        with self._translated(path):
            response = await self._client.request(method, self.base_url + path, json=body, timeout=timeout)
        if response.status_code >= 400:
            raise self._status_error(path, response)
        if not response.content:
            return None
        try:
            return response.json()
        except (ValueError, RecursionError) as error:  # nested too deeply is not JSON for us either
            raise TransportError(f"{self.base_url}{path} sent an answer that is not JSON") from error

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            for theirs, ours, message in _TRANSLATIONS:
                if isinstance(error, theirs):
                    raise ours(f"{self.base_url}{path}: {message}") from error
            raise

    def _status_error(self, path: str, response: httpx.Response) -> HttpStatusError:
        reason = _reason(response)
        return HttpStatusError(
            f"{self.base_url}{path} answered {response.status_code}: {reason}",
            status=response.status_code,
            reason=reason,
        )


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines that end with a line feed and nothing else: JSON text may contain U+2028, U+0085 and the like, at
    which the library's own reader would split."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _timeout(read_timeout_s: float | None) -> httpx.Timeout:
    connect = CONNECT_TIMEOUT_S if read_timeout_s is None else min(CONNECT_TIMEOUT_S, read_timeout_s)
    return httpx.Timeout(read_timeout_s, connect=connect)


def _reason(response: httpx.Response) -> str:
    """The peer's message, in llama-server's (`error.message`) or Ollama's (`error`) shape, on one line."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    text = error if isinstance(error, str) and error else response.text or response.reason_phrase
    return " ".join(text.split())[:500]
