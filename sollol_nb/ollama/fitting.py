"""Chats at Ollama whose oldest turns are dropped where they do not fit its context; see `context_window`.

Ollama has no way to count tokens, so they are estimated by the tokens per character of the model's last prompt.
It has the last word: what it refuses as too long is asked again with at least one turn less. Before a model's
first answer, and after a much shorter prompt, there is nothing to estimate by, and everything is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from sollol_nb.chat.chunk import DROPPED, ROUTING, Chunk
from sollol_nb.chat.context_window import Fitted, Message, fit, turn_starts
from sollol_nb.errors import ContextOverflowError
from sollol_nb.ollama.requests import AnswerSoFar, characters, estimated_tokens
from sollol_nb.ollama.serving import Journey, Serving


async def answer_what_fits(serving: Serving, journey: Journey) -> AsyncGenerator[Chunk, None]:
    """The chunks of a chat's answer; where turns were dropped, the first and the last have `_dropped`: what.

    Raises:
        ContextOverflowError: the last turn alone does not fit.
        SollolError: those of `OllamaPool.chat`.
    """
    body, key = journey.body, journey.name.key
    messages: Sequence[Message] = body["messages"]
    context_tokens = await _context_tokens(serving, journey)
    tokens_per_character = serving.tokens_per_character(key, characters(messages))
    at_least = 0
    while True:
        fitted = Fitted(tuple(messages))
        if context_tokens is not None and tokens_per_character is not None:
            fitted = await _fitted(journey, messages, context_tokens, tokens_per_character, at_least)
        journey.body = {**body, "messages": list(fitted.messages)}
        is_told = not fitted.words
        try:
            async with aclosing(serving.answer(journey)) as chunks:
                async for chunk in chunks:
                    if not is_told or (fitted.words and chunk.get("done")):
                        chunk, is_told = {**chunk, DROPPED: fitted.words}, True
                    yield chunk
            return
        except ContextOverflowError as error:
            at_least = fitted.dropped_count + 1
            context_tokens = error.context_tokens or context_tokens  # with keep_alive=0 it is unloaded by now
            if context_tokens is None or at_least >= len(turn_starts(messages)):
                raise
            # What was refused had more tokens than the context, at the least.
            sent = characters(fitted.messages)
            tokens_per_character = max(tokens_per_character or 0.0, (context_tokens + 1) / sent)


async def _fitted(
    journey: Journey,
    messages: Sequence[Message],
    context_tokens: int,
    tokens_per_character: float,
    at_least: int,
) -> Fitted:
    async def count_tokens(some: Sequence[Message]) -> int:
        return estimated_tokens(some, tokens_per_character)

    return await fit(
        messages,
        count_tokens,
        model=str(journey.name),
        context_tokens=context_tokens,
        max_tokens=journey.option("num_predict"),
        at_least=at_least,
        is_estimate=True,
    )


async def _context_tokens(serving: Serving, journey: Journey) -> int | None:
    """What the model holds for this request; it is loaded for that, if no node has it loaded yet."""
    asked_for = journey.option("num_ctx")
    if isinstance(asked_for, int) and asked_for > 0:
        return asked_for
    context_tokens = await serving.context_tokens(journey.name.key)
    if context_tokens is None:
        # A chat without messages only loads the model (Ollama's docs/api.md).
        kept = {name: value for name, value in journey.body.items() if name in ("model", "options")}
        loading = replace(journey, body={**kept, "messages": []}, so_far=AnswerSoFar(), ttft_ms=None)
        async with aclosing(serving.answer(loading)) as chunks:
            async for chunk in chunks:
                if chunk.get("done"):
                    routing = chunk[ROUTING]
                    journey.load_ms += routing["total_ms"] - loading.queue_ms
        journey.queue_ms = loading.queue_ms
        context_tokens = await serving.context_tokens(journey.name.key)
    return context_tokens
