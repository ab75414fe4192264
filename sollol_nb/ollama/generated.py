"""Continuations of raw prompts by Ollama, as chunks in the shape of a chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, cast

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.raw_prompt import RawPrompt
from sollol_nb.ollama.pool import OllamaPool

_OF_GENERATIONS = ("response", "thinking", "context")


async def generated(
    pool: OllamaPool, model: str, prompt: RawPrompt, options: Mapping[str, Any]
) -> AsyncGenerator[Chunk, None]:
    """The chunks of the answer. Errors are those of `OllamaPool.chat`.

    Args:
        options: those of `OllamaPool.generate`.
    """
    # With a suffix, Ollama's template for gaps is used. think=False: it would take thoughts out of the text.
    given: dict[str, Any] = {"suffix": prompt.suffix} if prompt.suffix else {"raw": True}
    if prompt.images:
        given["images"] = list(prompt.images)
    async with aclosing(pool.stream_generate(model, prompt.text, think=False, **given, **options)) as chunks:
        async for chunk in chunks:
            yield as_chat(chunk)


def as_chat(chunk: Mapping[str, Any]) -> Chunk:
    """A chunk of `/api/generate` in the shape of `/api/chat`."""
    message = {"role": "assistant", "content": chunk.get("response") or ""}
    if chunk.get("thinking"):
        message["thinking"] = chunk["thinking"]
    rest = {name: value for name, value in chunk.items() if name not in _OF_GENERATIONS}
    return cast(Chunk, {**rest, "message": message})
