"""One exchange with one Ollama node: a request sent, its chunks read, and its silences watched.

A node that has sent nothing for `probe_after_s` is asked for its version; if not even that is answered in the
same time, it is left. A node that does answer may be loading the model or reading a long prompt: it has
`first_chunk_s` for its first chunk, and `between_chunks_s` from one chunk to the next.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sollol_nb.errors import (
    ConfigError,
    ConnectionBrokenError,
    HttpStatusError,
    OllamaError,
    OllamaResponseError,
    RequestTimeoutError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.ollama.nodes import OllamaNode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long silence is borne; None is for ever, as long as the server itself answers."""

    first_chunk_s: float | None
    between_chunks_s: float | None
    probe_after_s: float


class Deadline:
    """The end of a request's `timeout` seconds; None never ends.

    Raises:
        ConfigError: the timeout is not a positive number.
    """

    def __init__(self, timeout_s: float | None, model: str) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout must be a positive number of seconds, not {timeout_s!r}")
        self._timeout_s = timeout_s
        self._model = model
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._paused_at_s: float | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds left, at least 0; None for no end, and while its clock stands still."""
        if self._end_s is None or self._paused_at_s is not None:
            return None
        return max(0.0, self._end_s - time.monotonic())

    def pause(self) -> None:
        """Let its clock stand still, until `go_on`."""
        if self._paused_at_s is None:
            self._paused_at_s = time.monotonic()

    def go_on(self) -> None:
        """Let its clock go on, if it stands still."""
        if self._end_s is not None and self._paused_at_s is not None:
            self._end_s += time.monotonic() - self._paused_at_s
        self._paused_at_s = None

    def check(self) -> None:
        """Raise RequestTimeoutError if the time is over."""
        if self.left_s == 0.0:
            raise self._error()

    async def bound(self, doing: Awaitable[T]) -> T:
        """What `doing` gives, or RequestTimeoutError if it takes longer than is left."""
        try:
            async with asyncio.timeout(self.left_s) as limit:
                return await doing
        except TimeoutError:
            if limit.expired():
                raise self._error() from None
            raise

    def _error(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"{self._model} was not finished within {self._timeout_s:g} s and was cancelled; "
            "give it more time with timeout="
        )


class NodeLostError(OllamaError):
    """A node did not bring an answer to its end; another may.

    Attributes:
        said: Ollama's own words, if it gave a reason.
        lacks_model: it says that it does not have the model.
        broke_off: the connection ended; a server that was restarted would answer now.
    """

    def __init__(
        self, message: str, *, said: str | None = None, lacks_model: bool = False, broke_off: bool = False
    ) -> None:
        super().__init__(message)
        self.said = said
        self.lacks_model = lacks_model
        self.broke_off = broke_off


async def exchange(
    node: OllamaNode, path: str, body: Mapping[str, Any], *, deadline: Deadline, patience: Patience
) -> AsyncGenerator[Any, None]:
    """POST to a node and give the chunks of its answer. Closing this closes the connection.

    Raises:
        NodeLostError: another node may do better. If this one failed, it knows already.
        OllamaResponseError: Ollama refused the request; no other node would take it.
        RequestTimeoutError: the deadline has passed.
        ConfigError: the request cannot be written as JSON.
    """
    lines: asyncio.Queue[str | Exception | None] = asyncio.Queue()
    reader = asyncio.get_running_loop().create_task(_read(node, path, body, lines))
    limit_s = patience.first_chunk_s
    try:
        while True:
            line = await _next_line(node, lines, limit_s, deadline, patience)
            if line is None:
                return
            if isinstance(line, Exception):
                raise _translated(node, line)
            yield _chunk(node, line)
            limit_s = patience.between_chunks_s
    finally:
        reader.cancel()
        await asyncio.wait([reader])


async def _read(
    node: OllamaNode, path: str, body: Mapping[str, Any], lines: asyncio.Queue[str | Exception | None]
) -> None:
    """Bring the lines of the answer into a queue, so that waiting for one can be given up without losing it."""
    try:
        async with node.client.stream_lines(path, body) as received:
            async for line in received:
                if line.strip():
                    lines.put_nowait(line)
        lines.put_nowait(None)
    except Exception as error:  # told to the one who waits
        lines.put_nowait(error)


async def _next_line(
    node: OllamaNode,
    lines: asyncio.Queue[str | Exception | None],
    limit_s: float | None,
    deadline: Deadline,
    patience: Patience,
) -> str | Exception | None:
    quiet_since_s = time.monotonic()
    while lines.empty():
        waits_s = [patience.probe_after_s]
        if limit_s is not None:
            waits_s.append(max(0.0, limit_s - (time.monotonic() - quiet_since_s)))
        if (left_s := deadline.left_s) is not None:
            waits_s.append(left_s)
        try:
            async with asyncio.timeout(min(waits_s)):
                return await lines.get()
        except TimeoutError:
            deadline.check()
        quiet_s = time.monotonic() - quiet_since_s
        if limit_s is not None and quiet_s >= limit_s:
            raise lost(node, TransportTimeoutError(f"{node.url} sent nothing for {limit_s:g} s"))
        if not await deadline.bound(node.answers(patience.probe_after_s)) and lines.empty():
            raise lost(
                node, TransportTimeoutError(f"{node.url} accepted the request, then answered nothing any more")
            )
    return lines.get_nowait()


def lost(node: OllamaNode, error: TransportError) -> NodeLostError:
    """Tell a node that it failed, and the request that it must go elsewhere."""
    node.failed(error)
    return NodeLostError(str(error), broke_off=isinstance(error, ConnectionBrokenError))


def _translated(node: OllamaNode, error: Exception) -> Exception:
    if isinstance(error, HttpStatusError):
        return _refused(node, error.status, error.reason)
    if isinstance(error, TransportError):
        return lost(node, error)
    if isinstance(error, TypeError | ValueError):
        return ConfigError(f"the request cannot be written as JSON ({error}); give images as base64 text")
    return error


def _refused(node: OllamaNode, status: int, reason: str) -> Exception:
    said = f"Ollama at {node.url}: {reason}"
    if status == 404 and "model" in reason.lower():
        return NodeLostError(said, said=said, lacks_model=True)
    # 429 and 5xx are about this node (queue full, no memory, runner crashed), other 4xx about the request.
    if status == 429 or status >= 500:
        return NodeLostError(said, said=said)
    return OllamaResponseError(said)


def _chunk(node: OllamaNode, line: str) -> Any:
    try:
        chunk = json.loads(line)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise lost(node, ConnectionBrokenError(f"{node.url} sent a line that is not JSON"))
    if chunk.get("error"):
        status = chunk.get("status")
        raise _refused(node, status if isinstance(status, int) else 500, str(chunk["error"]))
    return chunk
