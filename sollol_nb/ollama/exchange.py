"""One exchange with one Ollama node: a request sent, its chunks read, and its silences watched.

A node that has sent nothing for `probe_after_s` is asked for its version; if it does not answer that in the same
time either, it counts as lost. A node that does answer may be loading the model or reading a long prompt: it has
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
from sollol_nb.ollama.answers import checked_chunk
from sollol_nb.ollama.nodes import OllamaNode
from sollol_nb.runtime.amounts import is_positive
from sollol_nb.runtime.http_client import LINE_LIMIT_BYTES, message_of, one_line

MOST_WAITING_LINES = 16
VECTOR_LIMIT_BYTES = 2**20  # of the vector of a text: 40,000 numbers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """The longest silences; None means no limit, as long as the server itself answers."""

    first_chunk_s: float | None
    between_chunks_s: float | None
    probe_after_s: float


class Deadline:
    """The time limit of a request; a `timeout_s` of None means no limit.

    Raises:
        ConfigError: the timeout is not a positive number.
    """

    def __init__(self, timeout_s: float | None, model: str) -> None:
        if timeout_s is not None and not is_positive(timeout_s):
            raise ConfigError(f"timeout={timeout_s!r} must be a positive number of seconds")
        self._timeout_s = timeout_s
        self._model = model
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        """Seconds left, at least 0; None without a limit."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    def check(self) -> None:
        """Raise RequestTimeoutError if the time is over."""
        if self.left_s == 0.0:
            raise self._error()

    async def wait_for(self, work: Awaitable[T]) -> T:
        """The result of `work`; RequestTimeoutError if it takes longer than the time left."""
        try:
            async with asyncio.timeout(self.left_s) as limit:
                return await work
        except TimeoutError:
            if limit.expired():
                raise self._error() from None
            raise

    def _error(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"{self._model} did not finish within {self._timeout_s:g} s and was cancelled; give a larger timeout"
        )


class NodeLostError(OllamaError):
    """A node did not finish an answer; another may.

    Attributes:
        reason: Ollama's own message, if it gave one.
        lacks_model: it answered that it does not have the model.
        connection_broke: the connection ended; a server that was restarted would answer now.
    """

    def __init__(
        self, message: str, *, reason: str | None = None, lacks_model: bool = False, connection_broke: bool = False
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.lacks_model = lacks_model
        self.connection_broke = connection_broke


async def exchange(
    node: OllamaNode, path: str, body: Mapping[str, Any], *, deadline: Deadline, patience: Patience
) -> AsyncGenerator[Any, None]:
    """POST to a node and yield the chunks of its answer. Closing this closes the connection.

    Raises:
        NodeLostError: another node may succeed. If this one failed, that is recorded already.
        OllamaResponseError: Ollama refused the request; no other node would take it.
        RequestTimeoutError: the deadline has passed.
        ConfigError: the request cannot be written as JSON.
    """
    # A slow reader slows the node, instead of filling the memory.
    lines: asyncio.Queue[str | Exception | None] = asyncio.Queue(MOST_WAITING_LINES)
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
    """Put the lines of the answer into a queue, so that a wait for a line can end without losing it."""
    texts = body.get("input")  # of which Ollama sends all vectors in one line
    text_count = len(texts) if isinstance(texts, list) else 1
    limit_bytes = max(LINE_LIMIT_BYTES, text_count * VECTOR_LIMIT_BYTES)
    try:
        async with node.client.stream_lines(path, body, line_limit_bytes=limit_bytes) as received:
            async for line in received:
                if line.strip():
                    await lines.put(line)
        await lines.put(None)
    except Exception as error:  # raised where the line is awaited
        await lines.put(error)


async def _next_line(
    node: OllamaNode,
    lines: asyncio.Queue[str | Exception | None],
    limit_s: float | None,
    deadline: Deadline,
    patience: Patience,
) -> str | Exception | None:
    silent_since_s = time.monotonic()
    while lines.empty():
        waits_s = [patience.probe_after_s]
        if limit_s is not None:
            waits_s.append(max(0.0, limit_s - (time.monotonic() - silent_since_s)))
        if (left_s := deadline.left_s) is not None:
            waits_s.append(left_s)
        try:
            async with asyncio.timeout(min(waits_s)):
                return await lines.get()
        except TimeoutError:
            deadline.check()
        silence_s = time.monotonic() - silent_since_s
        if limit_s is not None and silence_s >= limit_s:
            raise node_lost(node, TransportTimeoutError(f"{node.url} sent nothing for {limit_s:g} s"))
        if not await deadline.wait_for(node.is_alive(patience.probe_after_s)) and lines.empty():
            message = f"{node.url} accepted the request, then stopped responding"
            raise node_lost(node, TransportTimeoutError(message))
    return lines.get_nowait()


def node_lost(node: OllamaNode, error: TransportError) -> NodeLostError:
    """Record the failure at the node; the error that sends the request to another."""
    node.record_failure(error)
    return NodeLostError(str(error), connection_broke=isinstance(error, ConnectionBrokenError))


def _translated(node: OllamaNode, error: Exception) -> Exception:
    if isinstance(error, HttpStatusError):
        return _refused(node, error.status, error.reason)
    if isinstance(error, TransportError):
        return node_lost(node, error)
    if isinstance(error, TypeError | ValueError):
        return ConfigError(f"the request cannot be written as JSON ({error}); pass images as base64 text")
    return error


def _refused(node: OllamaNode, status: int, reason: str) -> Exception:
    message = f"Ollama at {node.url}: {reason}"
    if status == 404 and "model" in reason.lower():
        return NodeLostError(message, reason=message, lacks_model=True)
    # 429 and 5xx are about this node (queue full, no memory, runner crashed), other 4xx about the request.
    if status == 429 or status >= 500:
        return NodeLostError(message, reason=message)
    if status == 401:
        message += "; a cloud model needs `ollama signin` there, and this package sends no other login"
    return OllamaResponseError(message, status=status)


def _chunk(node: OllamaNode, line: str) -> dict[str, Any]:
    try:
        chunk = json.loads(line)
    except (ValueError, RecursionError):
        raise node_lost(node, TransportError(f"{node.url} sent a line that is not JSON")) from None
    if isinstance(chunk, dict) and chunk.get("error"):
        error, status = message_of(chunk["error"]) or str(chunk["error"]), chunk.get("status")
        raise _refused(node, status if isinstance(status, int) else 500, one_line(error))
    try:
        return checked_chunk(chunk)
    except ValueError as error:
        raise node_lost(node, TransportError(f"{node.url} sent an answer that is not Ollama's: {error}")) from None
