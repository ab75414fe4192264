"""Chats at Ollama whose oldest turns are dropped where they do not fit its context; see `chat/context_window.py`.

Ollama has no way to count tokens, so they are estimated by the tokens per character of the model's last prompt.
Ollama decides: what it refuses as too long is sent again with at least one turn less. Before a model's first
answer, and after a much shorter prompt, there is no basis for an estimate, and everything is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from sollol_nb.chat.chunk import DROPPED, ROUTING, Chunk
from sollol_nb.chat.context_window import FittedMessages, Message, fit, turn_starts
from sollol_nb.errors import ContextOverflowError
from sollol_nb.ollama.pool_request import PoolRequest
from sollol_nb.ollama.requests import AnswerSoFar, count_characters, estimated_tokens
from sollol_nb.ollama.serving import Serving


async def answer_dropping_turns(serving: Serving, request: PoolRequest) -> AsyncGenerator[Chunk, None]:
    """The chunks of a chat's answer; where turns were dropped, `_dropped` of the first and the last says which.

    Raises:
        ContextOverflowError: the last turn alone does not fit.
        SollolError: those of `OllamaPool.chat`.
    """
    body, key = request.body, request.name.key
    messages: Sequence[Message] = body["messages"]
    context_tokens = await _context_tokens(serving, request)
    tokens_per_character = serving.tokens_per_character(key, count_characters(messages))
    at_least = 0
    while True:
        fitted = FittedMessages(tuple(messages))
        if context_tokens is not None and tokens_per_character is not None:
            fitted = await _fitted(request, messages, context_tokens, tokens_per_character, at_least)
        request.body = {**body, "messages": list(fitted.messages)}
        is_reported = not fitted.description
        try:
            async with aclosing(serving.answer(request)) as chunks:
                async for chunk in chunks:
                    if not is_reported or (fitted.description and chunk.get("done")):
                        chunk, is_reported = {**chunk, DROPPED: fitted.description}, True
                    yield chunk
            return
        except ContextOverflowError as error:
            at_least = fitted.dropped_count + 1
            context_tokens = error.context_tokens or context_tokens  # with keep_alive=0 it is unloaded by now
            if context_tokens is None or at_least >= len(turn_starts(messages)):
                raise
            # What was refused had more tokens than the context.
            sent = count_characters(fitted.messages)
            refused_tokens = error.prompt_tokens or context_tokens + 1
            tokens_per_character = max(tokens_per_character or 0.0, refused_tokens / sent)


async def _fitted(
    request: PoolRequest,
    messages: Sequence[Message],
    context_tokens: int,
    tokens_per_character: float,
    at_least: int,
) -> FittedMessages:
    async def count_tokens(kept: Sequence[Message]) -> int:
        return estimated_tokens(kept, tokens_per_character)

    return await fit(
        messages,
        count_tokens,
        model=str(request.name),
        context_tokens=context_tokens,
        max_tokens=request.option("num_predict"),
        at_least=at_least,
        is_estimate=True,
    )


async def _context_tokens(serving: Serving, request: PoolRequest) -> int | None:
    """The model's context for this request; if no node has the model loaded yet, one loads it."""
    num_ctx = request.option("num_ctx")
    if isinstance(num_ctx, int) and num_ctx > 0:
        return num_ctx
    context_tokens = await serving.context_tokens(request.name.key)
    if context_tokens is None:
        # A chat without messages only loads the model (Ollama's docs/api.md).
        body = {name: value for name, value in request.body.items() if name in ("model", "options")}
        loading = replace(request, body={**body, "messages": []}, so_far=AnswerSoFar(), ttft_ms=None)
        async with aclosing(serving.answer(loading)) as chunks:
            async for chunk in chunks:
                if chunk.get("done"):
                    routing = chunk[ROUTING]
                    request.load_ms += routing["total_ms"] - loading.queue_ms
        request.queue_ms = loading.queue_ms
        context_tokens = await serving.context_tokens(request.name.key)
    return context_tokens
