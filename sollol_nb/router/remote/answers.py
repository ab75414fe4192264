"""An answer over a gateway, continued after the gateway was started again.

The gateway itself continues an answer whose coordinator is lost. If the gateway is lost, the tokens are unknown;
only their text is left, and `router/continuing.py` says how the answer continues.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from sollol_nb.chat.chunk import RESTARTED, ROUTING, Chunk, Failover
from sollol_nb.chat.journaling import JournalEntry
from sollol_nb.chat.request import ChatRequest
from sollol_nb.errors import (
    AnswerInterruptedError,
    GatewayBusyError,
    GatewayError,
    GatewayUnavailableError,
    RequestRejectedError,
    SollolError,
)
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.answers.base import SEEDS
from sollol_nb.router.continuing import AsItComes, Received, is_exact, next_request, with_tokens_before
from sollol_nb.router.journaled import AnswerJournal
from sollol_nb.router.record import RequestRecord
from sollol_nb.router.remote.connection import GatewayConnection
from sollol_nb.router.remote.live import GatewayEvents
from sollol_nb.router.remote.plain_data import to_plain
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings import config
from sollol_nb.settings.table import SETTINGS
from sollol_nb.text.tables import counted

MOST_LOSSES = 10
SHORTEST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S = 0.2, 5.0


class GatewayRequest:
    """One request over a gateway, from its arguments to its latency row. Lives on the I/O loop.

    Args:
        connection: to the gateway.
        events: whom to inform when the gateway is lost.
        latency: where the row is written.
        counts: requests that have ended, by backend.
        model: as the caller names it.
        check: gives the checked request; called when the request begins, so that a refused one is recorded too.
        options: of requests that do not have them.
        router: the router, which must live as long as the request.
        interrupted: an answer that is to be continued, as `Answer.state` gives it; None begins a new one.
        text: what was received of that answer.
        entry: of the journal, where the answer has one already.
    """

    def __init__(
        self,
        connection: GatewayConnection,
        events: GatewayEvents,
        *,
        latency: LatencyLog,
        counts: Counter[str],
        model: str,
        check: Callable[[], ChatRequest],
        options: Mapping[str, Any],
        router: object,
        interrupted: Mapping[str, Any] | None = None,
        text: str = "",
        entry: JournalEntry | None = None,
    ) -> None:
        self._connection = connection
        self._events = events
        self._latency = latency
        self._counts = counts
        self._check = check
        self._options = options
        self._router = router
        self._interrupted = interrupted
        self._record = RequestRecord(model, text=text)
        self._journal = AnswerJournal(self._record, entry)
        self._losses: list[Failover] = []
        self._is_known_there = False  # whether the gateway has a row of it
        self._text, self._thinking = "", ""  # received by this request
        self._texts = 0  # chunks with text: about as many as tokens
        self._has_tool_calls = False
        self._continues_after = 0  # tokens that the present answer of the gateway does not count

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Ollama-shaped chunks, as those of `ActiveRequest`; errors are those of `Router.route_request`."""
        record, status, failure = self._record, "cancelled", None
        record.start()
        self._events.start()
        try:
            saved = await asyncio.to_thread(config.saved_model, str(record.model))
            request = self._check().with_defaults(saved.options, saved.system).with_defaults(self._options)
            record.priority = request.priority
            body = self._body(request)
            self._journal.begin(request, body)
            try:
                async with aclosing(self._answer(request, body)) as answer:
                    async for chunk in answer:
                        yielded = self._recorded(chunk)
                        if yielded.get("done"):  # readers of the log see the row from now on
                            status = "ok"
                            self._write("ok")
                        self._journal.add(yielded)
                        yield yielded
            except AnswerInterruptedError as error:
                error.backend, error.schema, error.partial = request.backend, request.schema, record.partial()
                error.answer_id = record.answer_id
                if self._losses:  # its state has only what came after the last loss
                    error.state = None
                self._journal.set_state_of(error)
                raise
            except RequestRejectedError as error:
                error.partial = record.partial() if record.text else None
                raise
        except Exception as error:
            status, failure = "timeout" if isinstance(error, TimeoutError) else "error", error
            raise
        finally:
            if status != "ok":
                self._write(status, str(failure or ""))
            self._journal.end(failure)
            self._counts[record.backend] += 1

    def _write(self, status: str, error: str = "") -> None:
        """Write the latency row, unless the gateway writes its own into the same file."""
        info = self._connection.info
        if info is None or not self._is_known_there or info.latency_log != self._latency.identity:
            self._latency.record_later(self._record.row(status, error))

    async def _answer(self, request: ChatRequest, first: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        body = first
        form, waited_s = AsItComes(), 0.0
        while True:
            try:
                async with self._connection.lines("/sollol/chat", body) as lines:
                    self._is_known_there = True
                    self._record.set_sent()
                    async for data in lines:
                        chunk = form.apply(self._connection.chunk_of(data), self._record.name)
                        self._note(chunk)
                        yield chunk
                        if chunk.get("done"):
                            return
                raise GatewayUnavailableError(f"the gateway {self._connection.url} ended the answer early")
            except GatewayBusyError as error:
                pause_s = min(max(SHORTEST_BUSY_PAUSE_S, error.retry_after_s), LONGEST_BUSY_PAUSE_S)
                if waited_s + pause_s > request.timeout_s:
                    raise
                waited_s += pause_s
                await asyncio.sleep(pause_s)
            except GatewayUnavailableError as error:
                if self._connection.info is None or self._interrupted is not None:
                    raise
                await self._wait_for_gateway(error)
                body, form = self._next(first)
            except SollolError as error:
                self._is_known_there |= not isinstance(error, GatewayError)
                raise

    async def _wait_for_gateway(self, error: GatewayUnavailableError) -> None:
        """Wait until the lost gateway answers again, and note the failover.

        Raises:
            GatewayError: it does not, or it was lost too often.
        """
        self._events.lost(error)
        received = f"the answer was interrupted after {counted(self._texts, 'token')}; the text so far is kept"
        self._record.add_failover(str(error), self._texts)
        self._losses.append(self._record.failovers[-1])
        if len(self._losses) > MOST_LOSSES:
            raise GatewayUnavailableError(f"{error} ({counted(len(self._losses), 'time')}); {received}") from error
        try:
            await self._connection.wait_until_back()
        except SollolError as lasting:
            if self._texts:
                raise type(lasting)(f"{lasting}; {received}") from error
            raise
        self._events.returned()

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """What is sent for a request."""
        options = dict(request.options)
        if is_exact(options) and "seed" not in {*options, *(options.get("options") or {})}:
            options["seed"] = secrets.randbelow(SEEDS)  # so that it can be generated again
        is_default = request.timeout_s == SETTINGS["timeout"].default
        return {
            "model": str(self._record.model),
            "messages": request.messages,
            "prompt": None if request.prompt is None else to_plain(request.prompt),
            "options": options,
            "backend": request.backend,
            # Without one it is the key's.
            "priority": None if request.priority == Priority.NORMAL else request.priority,
            "timeout": None if is_default else request.timeout_s,  # then it is the gateway's
            "interrupted": self._interrupted,
        }

    def _next(self, body: dict[str, Any]) -> tuple[dict[str, Any], AsItComes]:
        """The body of the request after a loss, and the changes to its chunks.

        Args:
            body: what was sent first.
        """
        received = Received(
            text=self._text,
            thinking=self._thinking,
            texts=self._texts,
            has_tool_calls=self._has_tool_calls,
        )
        found = next_request(body, received, may_repeat=True)
        if found.recovery:
            self._record.set_recovery(found.recovery)
        if found.begins_again:
            self._losses[-1]["continued"] = False
        self._continues_after = found.tokens_before
        return found.body, found.form

    def _note(self, chunk: Chunk) -> None:
        message = chunk.get("message") or {}
        content, thinking = message.get("content") or "", message.get("thinking") or ""
        if chunk.get(RESTARTED):
            self._text, self._thinking, self._texts, self._has_tool_calls = "", "", 0, False
        self._text += content
        self._thinking += thinking
        self._texts += bool(content or thinking)
        self._has_tool_calls = self._has_tool_calls or bool(message.get("tool_calls"))

    def _recorded(self, chunk: Chunk) -> Chunk:
        """Note what a chunk brings; returns it with the whole `_routing`, where it has one."""
        record = self._record
        if isinstance(chunk.get(ROUTING), dict):
            record.set_gateway_routing(chunk[ROUTING], self._losses)
        if chunk.get("done") and self._continues_after:
            chunk = with_tokens_before(chunk, self._continues_after)
        record.add_chunk(chunk)
        if ROUTING in chunk:
            chunk = {**chunk, ROUTING: {**record.routing(), "gateway": self._connection.url}}
        return chunk
