"""An answer of the journal goes on: from its last token where its tokens are known, else from its text.

What cannot be continued is asked again; its reader is told so, and keeps the earlier text until there is more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import NOTE, ROUTING, Chunk
from sollol_nb.chat.journal import CANCELLED, DONE, INTERRUPTED, JournaledAnswer
from sollol_nb.chat.journaling import TEXT, JournalEntry
from sollol_nb.chat.request import ChatRequest, checked_timeout_s
from sollol_nb.errors import AnswerDivergedError, AnswerInterruptedError, ConfigError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.models.routing import checked_backend
from sollol_nb.router.continuing import NextRequest, Received, begun_again, next_request, with_tokens_before
from sollol_nb.runtime.priority import checked_priority
from sollol_nb.text.short_names import short_name

_Claim = tuple[JournaledAnswer | None, tuple[JournaledAnswer, str] | None]
"""An answer that was not claimed, if there is one of the id; or one that was, and its run."""
ASKED_AGAIN_NOTE = "the answer could not be continued, so the question was asked again"


class Engines(Protocol):
    """What answers: `OwnEngines` or `GatewayEngines`."""

    def chunks(
        self,
        model: str,
        check: Callable[[], ChatRequest],
        *,
        router: object,
        interrupted: Answer | None = None,
        entry: JournalEntry | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a request."""


async def claimed(answer_id: str) -> tuple[JournaledAnswer, str]:
    """An answer whose end is missing, for this process alone from now on, and the run to write it with.

    Raises:
        ConfigError: it cannot be continued, or not by this process.
    """
    claiming = asyncio.ensure_future(asyncio.to_thread(_claim, answer_id))
    try:
        found, taken = await asyncio.shield(claiming)
    except asyncio.CancelledError:
        # The thread may still claim the answer, which nobody continues then.
        claiming.add_done_callback(_give_back)
        raise
    if taken is not None:
        return taken
    if found is None:
        raise ConfigError(f"the journal has no answer {answer_id!r}; %sollol_answers lists those that it has")
    if found.is_running:
        where = "this process" if found.is_own else f"process {found.pid}"
        raise ConfigError(f"the answer of {short_name(found.model)} streams into {where} now; wait for it")
    raise ConfigError(f"the answer of {short_name(found.model)} is complete; there is nothing to continue")


def _claim(answer_id: str) -> _Claim:
    journal = journaling.journal()
    taken = journal.claim(answer_id)
    return (None, taken) if taken is not None else (journal.get(answer_id), None)


def _give_back(claiming: asyncio.Future[_Claim]) -> None:
    if claiming.cancelled() or claiming.exception() is not None:
        return
    _, taken = claiming.result()
    if taken is not None:
        row, run = taken
        journaling.resume(row, run, text=row.text, thinking=row.thinking).finish(row.status, row.error)


async def entry_of(error: AnswerInterruptedError, answer: Answer) -> JournalEntry | None:
    """The journal's entry of an interrupted answer that is continued now; None if there is none to write."""
    if not error.answer_id:
        return None
    try:
        row, run = await claimed(error.answer_id)
    except ConfigError:  # it was forgotten, or another kernel continues it
        return None
    return journaling.resume(row, run, text=answer.text, thinking=answer.thinking)


async def continued(
    engines: Engines,
    answer_id: str,
    *,
    router: object,
    may_repeat: bool,
    priority: int,
    timeout_s: float,
) -> AsyncGenerator[Chunk, None]:
    """The whole answer: as the first chunk what was received, then the rest as it is generated.

    Args:
        may_repeat: as for `next_request`.
        priority, timeout_s: of the request.

    Raises:
        ConfigError: it cannot be continued, or not by this process.
        SollolError: as for `Router.stream`; the journal keeps what was received.
    """
    row, run = await claimed(answer_id)
    begun = _begun(row.state)
    text, thinking = (row.text, row.thinking) if begun is None else (begun.text, begun.thinking)
    entry = journaling.resume(row, run, text=text, thinking=thinking)
    try:
        first: Chunk = {"model": row.model, "message": {"content": text, "thinking": thinking}}
        if begun is not None and begun.logprobs:
            first["logprobs"] = list(begun.logprobs)
        yield first
        ways = _ways(
            engines, row, entry, begun, router, may_repeat=may_repeat, priority=priority, timeout_s=timeout_s
        )
        for way in ways:
            try:
                async with aclosing(way()) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except AnswerDivergedError:
                if way is ways[-1]:
                    raise
    except Exception:
        if not entry.has_end:  # it did not come to a request
            entry.finish(row.status, row.error)
        raise
    finally:
        if not entry.has_end:
            entry.finish(CANCELLED)


def _ways(
    engines: Engines,
    row: JournaledAnswer,
    entry: JournalEntry,
    begun: Answer | None,
    router: object,
    *,
    may_repeat: bool,
    priority: int,
    timeout_s: float,
) -> list[Callable[[], AsyncGenerator[Chunk, None]]]:
    """How an answer may continue, the best way first; the next one is for an engine that begins it differently."""
    body = dict(row.request or {})
    backend = body.get("backend")

    def from_tokens() -> AsyncGenerator[Chunk, None]:
        assert begun is not None
        check = partial(bare_request, backend, None, priority, timeout_s)
        return engines.chunks(row.model, check, router=router, interrupted=begun, entry=entry)

    def asked(following: NextRequest) -> AsyncGenerator[Chunk, None]:
        entry.go_on_as_text()
        check = partial(_request_of, following.body, priority, timeout_s)
        return _shown(engines.chunks(row.model, check, router=router), following, entry, row)

    if not _asks_something(body):
        if begun is None:
            raise ConfigError(
                f"the journal has only the text of this answer of {short_name(row.model)}, so it cannot be "
                "continued; ask again"
            )
        return [from_tokens]
    if begun is not None:
        return [from_tokens, lambda: asked(begun_again(body))]
    received = Received(text=row.text, thinking=row.thinking, texts=row.texts)
    following = next_request(body, received, may_repeat=may_repeat)
    last = [] if following.begins_again else [lambda: asked(begun_again(body))]
    return [lambda: asked(following), *last]


async def _shown(
    answered: AsyncGenerator[Chunk, None], following: NextRequest, entry: JournalEntry, row: JournaledAnswer
) -> AsyncGenerator[Chunk, None]:
    """The chunks of a request that continues an answer, as they continue it; they are journaled here."""
    try:
        async with aclosing(answered) as chunks:
            async for chunk in chunks:
                shown = following.form.apply(chunk, short_name(row.model))
                if ROUTING in shown:
                    shown = {**shown, ROUTING: {**shown[ROUTING], "answer_id": entry.id}}
                if shown.get("done") and following.tokens_before:
                    shown = with_tokens_before(shown, following.tokens_before)
                if shown.get("done") and following.begins_again:
                    shown = {**shown, NOTE: ASKED_AGAIN_NOTE}
                entry.add(shown)
                if shown.get("done"):
                    entry.finish(DONE)
                yield shown
    except Exception as error:
        if isinstance(error, AnswerInterruptedError):  # its state has only the rest of the answer
            error.answer_id, error.state = entry.id, None
        entry.finish(INTERRUPTED, str(error))
        raise


def bare_request(backend: str | None, schema: object, priority: int, timeout_s: float) -> ChatRequest:
    """The request for the rest of an answer that has its messages and options itself. It is no new answer of the
    journal: that would have the rest only."""
    return ChatRequest(
        messages=[],
        options={},
        priority=checked_priority(priority),
        timeout_s=checked_timeout_s(timeout_s),
        backend=checked_backend(backend),
        schema=schema,
        journal=False,
    )


def _request_of(body: Mapping[str, Any], priority: int, timeout_s: float) -> ChatRequest:
    """The request that the journal has, checked as any other; what it brings is journaled with the rest."""
    options = {**body["options"], "journal": False}
    common: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "backend": body.get("backend")}
    prompt = body.get("prompt")
    if prompt is None:
        return ChatRequest.checked(body["messages"], schema=None, options=options, **common)
    suffix, images = prompt.get("suffix"), prompt.get("images")
    return ChatRequest.of_prompt(prompt.get("text"), suffix=suffix, images=images, options=options, **common)


def _asks_something(body: dict[str, Any]) -> bool:
    """Whether the journal has the question of an answer, or only its text."""
    prompt = body.setdefault("prompt", None)
    messages = body.get("messages")
    has_question = isinstance(messages, list) and bool(messages or prompt)
    return has_question and isinstance(body.get("options"), dict) and isinstance(prompt, dict | None)


def _begun(state: Mapping[str, Any] | None) -> Answer | None:
    if state is None or state.get("kind") == TEXT:
        return None
    try:
        begun = Answer.from_state(state)
    except ConfigError:  # damaged, or of another version
        return None
    # The text of a required call is held back until the call is complete, so nobody has seen its beginning.
    return None if begun.options.get("tool_choice") == "required" else begun
