"""HTTP to one gateway: its key, its errors, and the wait for one that is being started again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import (
    ConnectFailedError,
    GatewayError,
    GatewayKeyError,
    GatewayUnavailableError,
    HttpStatusError,
    SollolError,
    TransportError,
)
from sollol_nb.router.remote.calls import CALLS, PROTOCOL, SHORT_S, GatewayInfo
from sollol_nb.router.remote.plain_data import error_of, from_plain, to_plain
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.settings.endpoints import gateway_url

SILENCE_S = 60.0
"""The longest silence within a stream; a gateway sends an empty line every 15 s."""
RETURN_LIMIT_S = 30.0
"""How long a notebook waits for a lost gateway to return."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_HELLO_LIMIT_S = 10.0
_GATEWAY_PROXY_STATUS = (502, 503, 504)


class GatewayConnection:
    """HTTP to a gateway. Lives on the I/O loop.

    Args:
        url: the gateway's address, such as `http://head:11440`.
        key: its key, if it needs one; never shown.

    Attributes:
        url: the address in full.
        info: the facts that the gateway reports about itself; None before it has answered.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = gateway_url(url)
        self.info: GatewayInfo | None = None
        self._is_closed, self._has_key = False, bool(key)
        self._client = JsonClient(self.url, api_key=key, read_timeout_s=SILENCE_S)

    def __repr__(self) -> str:
        return f"<GatewayConnection: {self.url}>"

    async def hello(self) -> GatewayInfo:
        """Request the facts about the gateway (`info`).

        Raises:
            GatewayUnavailableError: nothing answers there.
            GatewayError: it refuses the key, or it is not a gateway, or one of another version; or the connection
                was closed.
        """
        if self._is_closed:
            raise GatewayError(f"the router that used the gateway {self.url} was closed; make a new one")
        try:
            data = await self._client.get("/sollol/hello", timeout_s=_HELLO_LIMIT_S)
        except TransportError as error:
            raise self._translated(error) from error
        try:
            info: GatewayInfo = from_plain(GatewayInfo, data)
        except ValueError:
            raise self._no_gateway("its answer is not that of a gateway") from None
        if info.protocol != PROTOCOL:
            raise GatewayError(
                f"the gateway {self.url} has version {info.version} of sollol_nb, which this version cannot use; "
                "install the same version on both machines"
            )
        self.info = info
        return info

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
        """Call a method of the gateway's engines; returns its result and what is `Known` then, as plain data.

        Raises:
            SollolError: the error of the method, or a `GatewayError`.
        """
        await self.ensure()
        path, limit_s = f"/sollol/call/{name}", CALLS[name].limit_s if name in CALLS else SHORT_S
        try:
            reply = await self._client.post(path, to_plain(arguments), timeout_s=limit_s)
        except TransportError as error:
            raise self._translated(error) from error
        if not isinstance(reply, dict) or "result" not in reply:
            raise self._no_gateway("its answer is not that of a gateway")
        return reply["result"], reply.get("known")

    @asynccontextmanager
    async def lines(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The lines of a streamed answer, each a JSON object; without a body, a GET.

        Raises:
            SollolError: the error that the gateway reports, before or within the stream.
            GatewayUnavailableError: the connection was lost, or the gateway went silent.
        """
        await self.ensure()
        try:
            # A feed, which has no body, may run for weeks; only its lines are limited.
            stream = self._client.stream_lines(path, body, read_timeout_s=SILENCE_S, is_endless=body is None)
            async with stream as lines:
                yield self._objects(lines)
        except TransportError as error:
            raise self._translated(error) from error

    def chunk_of(self, data: dict[str, Any]) -> Chunk:
        """A line as a chunk of an answer.

        Raises:
            GatewayError: it is none.
        """
        message = data.get("message")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(part, ""), str) for part in ("content", "thinking")
        ):
            raise self._no_gateway("its answer is not that of a gateway")
        return cast(Chunk, data)

    async def ensure(self) -> None:
        """Request the facts about the gateway, unless they are known."""
        if self.info is None or self._is_closed:
            await self.hello()

    async def wait_until_back(self) -> None:
        """Wait until a lost gateway answers again, for `RETURN_LIMIT_S`.

        Raises:
            GatewayUnavailableError: it does not.
            GatewayError: something else answers, or it refuses the key now.
        """
        pause_s, last = _FIRST_PAUSE_S, ""
        try:
            async with asyncio.timeout(RETURN_LIMIT_S):
                while True:
                    try:
                        await self.hello()
                        return
                    except GatewayUnavailableError as error:
                        last = str(error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            waited = f"after {RETURN_LIMIT_S:.0f} s of trying"
            raise GatewayUnavailableError(f"{last or f'no gateway answers at {self.url}'} ({waited})") from None

    async def aclose(self) -> None:
        """Close all connections, for good. Closing twice is fine."""
        self._is_closed = True
        await self._client.aclose()

    async def _objects(self, lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
        async for line in lines:
            if not line.strip():  # it says only that the gateway is alive
                continue
            try:
                data = json.loads(line)
            except (ValueError, RecursionError):
                data = None
            if not isinstance(data, dict):
                raise self._no_gateway("its answer is not that of a gateway")
            if isinstance(data.get("error"), dict):
                raise self._reported(data["error"])
            yield data

    def _translated(self, error: TransportError) -> SollolError:
        if isinstance(error, HttpStatusError):
            try:
                body = json.loads(error.body)
            except (ValueError, RecursionError):
                body = None
            if isinstance(body, dict) and isinstance(body.get("error"), dict) and "class" in body["error"]:
                return self._reported(body["error"])
            if error.status in _GATEWAY_PROXY_STATUS:
                return GatewayUnavailableError(f"no gateway answers at {self.url}: {error.reason}")
            return self._no_gateway(f"it answered {error.status} ({error.reason})")
        reason = str(error).removeprefix(self.url).partition(": ")[2] or str(error)
        if isinstance(error, ConnectFailedError):
            return GatewayUnavailableError(
                f"no gateway answers at {self.url}: {reason}; start it there with `sollol-nb gateway`, or correct "
                "the address"
            )
        if type(error) is TransportError:
            return self._no_gateway(str(error))
        return GatewayUnavailableError(f"the gateway {self.url} was lost: {reason}")

    def _reported(self, data: Mapping[str, Any]) -> SollolError:
        """The error that the gateway reports; its own errors name it."""
        error = error_of(data)
        if isinstance(error, GatewayKeyError) and not self._has_key:
            return GatewayKeyError(
                f"the gateway {self.url} needs a key; give it as gateway_key, or as SOLLOL_GATEWAY_KEY before the "
                "kernel starts"
            )
        if isinstance(error, GatewayError) and self.url not in str(error):
            named = type(error)(f"the gateway {self.url}: {error}")
            named.__dict__.update(error.__dict__)
            return named
        return error

    def _no_gateway(self, reason: str) -> GatewayError:
        return GatewayError(
            f"{self.url} is not a gateway of sollol_nb: {reason}; give the address that `sollol-nb gateway` prints"
        )
