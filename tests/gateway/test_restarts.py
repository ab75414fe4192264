"""Answers that begin again on another server, as clients see them that cannot take text back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import RequestCancelledError
from sollol_nb.gateway.answers import without_restarts


def chunk(content: str = "", *, tokens: int = 0, thinking: str = "", **more: Any) -> Chunk:
    logprobs = [{"token": content, "logprob": -0.5}] * tokens
    message = {"role": "assistant", "content": content, "thinking": thinking}
    return {"message": message, "logprobs": logprobs, **more}  # type: ignore[typeddict-item]


def received(*chunks: Chunk) -> list[Chunk]:
    async def answer() -> AsyncGenerator[Chunk, None]:
        for each in chunks:
            yield each

    async def receive() -> list[Chunk]:
        return [each async for each in without_restarts(answer())]

    return asyncio.run(receive())


def test_what_was_sent_is_left_out_of_the_new_answer() -> None:
    chunks = received(
        chunk(thinking="Hm. "),
        chunk("A wor", tokens=2),
        chunk(thinking="Hm", _restarted=True),
        chunk(thinking=". "),
        chunk("A", tokens=1),
        chunk(" worker", tokens=2),
        chunk(" A", tokens=1, _restarted=True, thinking="Hm. ")
        | {"message": {"thinking": "Hm. ", "content": "A"}},
        chunk(" worker computes.", tokens=4, done=True),
    )
    assert "".join(each["message"].get("content", "") for each in chunks) == "A worker computes."
    assert "".join(each["message"].get("thinking", "") for each in chunks) == "Hm. "
    assert sum(len(each["logprobs"]) for each in chunks) == 5
    assert not any("_restarted" in each for each in chunks)


@pytest.mark.parametrize(
    "again",
    [
        [chunk("The worker", _restarted=True)],
        [chunk("A wor", _restarted=True), chunk(done=True)],
    ],
)
def test_a_new_answer_that_differs_is_an_error(again: list[Chunk]) -> None:
    with pytest.raises(RequestCancelledError, match="a different answer"):
        received(chunk("A worker"), *again)


def test_tools_are_not_called_twice() -> None:
    called = chunk()
    called["message"]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    with pytest.raises(RequestCancelledError, match="sent tool calls"):
        received(called, chunk("A", _restarted=True))
