"""The answers that one llama-server streams, and the watch over their silence (see `pace.py`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from sollol_nb.chat.chunk import CACHED, CONTEXT_FULL, Chunk
from sollol_nb.chat.context_window import DROP_OLDEST, turn_starts
from sollol_nb.errors import (
    ConnectFailedError,
    ConnectionBrokenError,
    CoordinatorLostError,
    HttpStatusError,
    RequestRejectedError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.fitting import FittingAnswer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.llama_cpp.answers.prompts import ForeseenPrompts
from sollol_nb.llama_cpp.answers.protocol import parse_event, refusal, request_body, sampling_settings
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from sollol_nb.llama_cpp.answers.tokens import prompt_tokens
from sollol_nb.llama_cpp.contexts.keeper import ContextKeeper
from sollol_nb.llama_cpp.contexts.visit import Visit
from sollol_nb.llama_cpp.coordinators.pace import Pace
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit, exit_reason
from sollol_nb.llama_cpp.processes.process import EngineProcess, Lease
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.runtime.http_client import JsonClient

SLOTS_INTERVAL_S = 0.1
SILENT = "it went silent"
LATE_CHECKS, LATE_CHECK_S = 10, 0.02
"""What arrived while this process was busy is read within a few turns of the loop."""


class _ReportedError(Exception):
    """The engine reports an error within a stream."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AnswerStreams:
    """The answers that one llama-server streams.

    Args:
        client: sends requests to it.
        exchange: makes a connection to it, for one answer.
        slots: how many it has.

    Attributes:
        context_tokens: its limit for one request, prompt and answer. With one pool of context for all slots that
            is the whole pool, if the model was trained for as much; requests that run at the same time share it.
        chat_template: of the model; "" until the engine is ready.
        pace: the time that it usually needs for a token.
        last_used_at: `time.monotonic()` of the last request's begin or end.
        contexts: what its slots hold, and what is saved of that.
    """

    def __init__(
        self,
        model: str,
        process: EngineProcess,
        client: JsonClient,
        exchange: Callable[[], Exchange],
        *,
        context_tokens: int,
        slots: int,
    ) -> None:
        self.contexts = ContextKeeper(
            client,
            slots,
            lambda: process.ask_lease(),
            lambda seconds: process.note_about(acts_until=time.time() + seconds),
        )
        self.context_tokens = context_tokens
        self.chat_template = ""
        self.pace = Pace()
        self.last_used_at = time.monotonic()
        self._model = model
        self._process = process
        self._client = client
        self._exchange = exchange
        self._prompts = ForeseenPrompts()
        self._renderers: list[Exchange] = []  # those whose connection renders no prompt now
        self._watch: asyncio.Task[None] | None = None
        self._is_closed = False

    def new_answer(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], model: str | None = None
    ) -> Answer:
        """As `Coordinator.answer`."""
        model = self._model if model is None else model
        if options.get("overflow") == DROP_OLDEST and len(turn_starts(messages)) > 1:
            return FittingAnswer(
                model,
                messages,
                options,
                chat_template=self.chat_template,
                context_tokens=self.context_tokens,
            )
        return answer_for(model, messages, options, chat_template=self.chat_template, prompts=self._prompts)

    def new_raw_answer(self, prompt: str, options: Mapping[str, Any], model: str | None = None) -> Answer:
        """As `Coordinator.raw_answer`."""
        return RawAnswer(self._model if model is None else model, [], options, prompt=prompt)

    async def count_tokens(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> int:
        """As `Coordinator.count_tokens`."""
        self.last_used_at = time.monotonic()
        try:
            return await prompt_tokens(self._client.post, request_body(messages, options))
        except HttpStatusError as error:
            raise self._refusal(error.reason) from error
        except (ConnectionBrokenError, ConnectFailedError, TransportTimeoutError) as error:
            raise await self._lost_error(error) from error

    async def stream(self, answer: Answer, lease: Lease | None = None) -> AsyncGenerator[Chunk, None]:
        """As `Coordinator.stream`."""
        self.last_used_at = time.monotonic()
        stream, visit, is_marked = self.pace.open(answer), Visit(), False
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._kill_when_silent())
        try:
            async with self._exchange() as exchange:
                if lease is not None:
                    await exchange.connect()  # meanwhile the supervisor answers
                    if not await lease.is_granted():  # another program may have its port by now
                        raise CoordinatorLostError(f"the coordinator of {self._model} is ending")
                while (request := await answer.request(exchange.post)) is not None:
                    with stream.reader_busy():  # the engine owes it nothing before it is sent
                        earlier, visit = visit, await self._visit(answer, lease)
                    # A damaged context, say, is gone when the answer is requested again.
                    if visit.restored is None:
                        visit.note = visit.note or earlier.note
                    stream.on_sent()
                    try:
                        path, body = request
                        async with (
                            self._rendering(answer) as confirmed,
                            aclosing(exchange.lines(path, {**body, **visit.body})) as lines,
                        ):
                            async for line in lines:
                                event = _checked_event(line)
                                if event is None:
                                    continue
                                stream.on_event(event)
                                visit.read(event)
                                if answer.unconfirmed is not None:
                                    await confirmed()
                                chunk = answer.translate(event)
                                if chunk is not None:
                                    if not is_marked:
                                        chunk, is_marked = {**chunk, CACHED: visit.mark}, True
                                    with stream.reader_busy():
                                        yield chunk
                                if answer.is_abandoned:
                                    break
                    except (HttpStatusError, _ReportedError) as error:
                        if not answer.recover(error.reason):
                            raise self._refusal(error.reason) from error
                        continue
                    finally:
                        self.contexts.end(visit, answer.context_text)
                    if not answer.is_complete and not answer.is_abandoned:
                        raise ConnectionBrokenError(
                            f"{self._client.base_url}: the answer ended without its last event"
                        )
        except HttpStatusError as error:
            raise self._refusal(error.reason) from error
        except (ConnectionBrokenError, ConnectFailedError, TransportTimeoutError) as error:
            stream.close()
            raise await self._lost_error(error) from error
        finally:  # before the last chunk is yielded: the engine owes nothing more, however long the reader takes
            stream.close()
            self.last_used_at = time.monotonic()
        last = self._with_context_full(answer.final(), sampling_settings(answer.options).get("max_tokens"))
        yield {**last, CACHED: visit.mark}

    async def _visit(self, answer: Answer, lease: Lease | None) -> Visit:
        """A slot for the request, with a saved context in it where that saves time.

        Raises:
            TransportError: the engine was lost, or does not answer; then it is killed.
        """
        try:
            return await self.contexts.visit(
                answer.prompt_text,
                is_cached=not answer.recovers_exactly,
                lease=lease,
                is_repeatable=answer.is_deterministic,
            )
        except TransportTimeoutError:
            if not await self._acts_for_others():
                await self._process.stop(grace_s=0.0, why="it went silent while it restored a saved context")
            raise

    @asynccontextmanager
    async def _rendering(self, answer: Answer) -> AsyncGenerator[Callable[[], Awaitable[None]], None]:
        """Have the prompt rendered meanwhile, if it was foreseen; what it yields waits until it is confirmed. An
        error of the engine counts only if it was about the real prompt."""
        if answer.unconfirmed is None:
            yield _nothing
            return

        async def confirm() -> None:
            answer.confirm(await rendered)

        rendered = asyncio.create_task(self._render(answer.unconfirmed))
        rendered.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio reports it
        try:
            yield confirm
        except (HttpStatusError, _ReportedError):
            if answer.unconfirmed is None:
                raise
            await confirm()
            if not answer.is_abandoned:
                raise
        finally:
            rendered.cancel()

    async def _render(self, body: Mapping[str, Any]) -> str:
        """A prompt, over a connection that is kept for the next one."""
        exchange = self._renderers.pop() if self._renderers else self._exchange()
        try:
            answer = await exchange.post("/apply-template", body)
        except ConnectionBrokenError:  # the engine closes connections that are idle for some seconds
            answer = await exchange.post("/apply-template", body)
        if self._is_closed:
            exchange.close()
        else:
            self._renderers.append(exchange)
        return str(answer["prompt"])

    def close(self) -> None:
        """End the watch over silence, and close connections."""
        self._is_closed = True
        self.contexts.close()
        for exchange in self._renderers:
            exchange.close()
        self._renderers.clear()
        if self._watch is not None:
            self._watch.cancel()

    def _refusal(self, reason: str) -> RequestRejectedError:
        return refusal(self._model, reason, self.context_tokens)

    def _with_context_full(self, chunk: Chunk, max_tokens: int | None) -> Chunk:
        """Where the answer ended for want of context, say so. With drafts the engine stops some tokens earlier, so
        an answer shorter than wanted shows it too."""
        tokens = chunk.get("eval_count") or 0
        used_tokens = (chunk.get("prompt_eval_count") or 0) + tokens
        is_as_wanted = max_tokens is not None and 0 <= max_tokens <= tokens
        if chunk.get("done_reason") != "length" or (is_as_wanted and used_tokens < self.context_tokens):
            return chunk
        return {**chunk, CONTEXT_FULL: self.context_tokens}

    async def _kill_when_silent(self) -> None:
        """Kill the engine when all its streams have been silent for longer than it can need."""
        question: asyncio.Task[None] | None = None
        try:
            while self._process.is_running() and (left_s := self.pace.patience_s()) is not None:
                if self.contexts.is_acting or (left_s <= 0 and await self._acts_for_others()):
                    self.pace.on_moved()  # it sends no tokens during a slot action, which has its own limit
                elif left_s <= 0 and not await self._arrives_late():
                    why = f"{SILENT} for {self.pace.silence_s():.1f} s"
                    await self._process.stop(grace_s=0.0, why=why)
                    return
                if self.pace.is_doubtful and (question is None or question.done()):
                    question = asyncio.create_task(self._ask_whether_it_works())
                await asyncio.sleep(max(left_s, 0))
        finally:
            if question is not None:
                question.cancel()

    async def _ask_whether_it_works(self) -> None:
        """Look at the engine's slots, while it is doubtful, whether any of them moves: those that are busy with
        the requests of other kernels do, those of an engine that waits for a lost worker do not."""
        leases = (await self._process.status()).get("leases", 0)
        self.pace.is_shared = leases > self.pace.streams
        before: object = None
        with suppress(TransportError):
            while self.pace.is_doubtful:
                now = await self._client.get("/slots")
                if before is not None and now != before:
                    self.pace.on_moved()
                before = now
                await asyncio.sleep(SLOTS_INTERVAL_S)

    async def _acts_for_others(self) -> bool:
        """Whether another kernel has announced that the engine saves or restores a context now."""
        await self._process.status()  # what this process has announced has ended by then
        entry = await asyncio.to_thread(registry.find, self._process.entry.id)
        return entry is not None and float(entry.about.get("acts_until") or 0.0) > time.time()

    async def _arrives_late(self) -> bool:
        """Whether something of the engine had only not been read yet, because this process was busy."""
        for _ in range(LATE_CHECKS):
            await asyncio.sleep(LATE_CHECK_S)
            left_s = self.pace.patience_s()
            if left_s is None or left_s > 0:
                return True
        return False

    async def _lost_error(self, error: Exception) -> CoordinatorLostError:
        report = await self._process.ended_within(2.0)
        log_path = self._process.log_path
        if report is None:
            return CoordinatorLostError(
                f"lost the connection to the coordinator of {self._model}: {error}; log: {log_path}"
            )
        reason = report.why or exit_reason(report.tail)
        because = f": {reason}" if reason else ""
        return CoordinatorLostError(
            f"the coordinator of {self._model} ended ({describe_exit(report.code)}){because}; log: {log_path}"
        )


async def _nothing() -> None:
    """There is nothing to confirm."""


def _checked_event(line: str) -> dict[str, Any] | None:
    """The event of a line, None if there is none; raises the error that it reports."""
    event = parse_event(line)
    if event is not None and "error" in event:
        error = event["error"]
        raise _ReportedError(str(error.get("message", error) if isinstance(error, dict) else error))
    return event
