"""Answers to the turns that fit: on a real llama-server with little context, compared with answers to these."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from sollol_nb.errors import ContextOverflowError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.fitting import FittingAnswer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.llama_cpp.answers.protocol import request_body
from sollol_nb.llama_cpp.answers.tokens import prompt_tokens
from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.llama_server import (
    GREEDY,
    PLAIN,
    SHORT,
    TOOL,
    Run,
    Server,
    cut_after,
    llama_server,
    through_json,
    uncut,
    whole,
)

pytestmark = pytest.mark.engine

CONTEXT_TOKENS = 256
OPTIONS = {**GREEDY, "max_tokens": 40}
SYSTEM = {"role": "system", "content": "You answer questions about sharding."}


def question(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def turns(count: int) -> list[dict[str, Any]]:
    pair = [question("What is a coordinator?"), {"role": "assistant", "content": "It runs the model. " * 3}]
    return [SYSTEM, *pair * count, question(SHORT)]


def fitting(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] = OPTIONS) -> FittingAnswer:
    return FittingAnswer("demo", messages, options, chat_template=PLAIN, context_tokens=CONTEXT_TOKENS)


async def turns_that_fit(server: Server, count: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages with the most of these turns that still leave `max_tokens` free, found by trying each."""
    while await prompt_tokens(server.client.post, request_body(turns(count), options)) > CONTEXT_TOKENS - 40:
        count -= 1
    return turns(count)


@pytest.fixture(scope="module")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with llama_server(engine, tmp_path_factory.mktemp("small"), "-c", str(CONTEXT_TOKENS)) as run:
        yield run


@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "tools": [TOOL]}], ids=["raw", "chat"])
def test_it_answers_the_turns_that_fit_and_reports_what_it_dropped(run: Run, options: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        kept = await turns_that_fit(server, 20, options)
        assert len(kept) > 2
        expected = await server.finish(answer_for("demo", kept, options, chat_template=PLAIN))
        chunks = await server.finish(fitting(turns(20), options))
        assert whole(chunks) == whole(expected)
        dropped = chunks[0]["_dropped"]
        assert dropped.startswith(f"dropped the {20 - (len(kept) - 2) // 2} oldest turns (")
        assert [chunk.get("_dropped") for chunk in chunks] == [dropped, *[None] * (len(chunks) - 2), dropped]

    run(test)


def test_it_says_nothing_where_all_fits(run: Run) -> None:
    async def test(server: Server) -> None:
        expected = await server.finish(answer_for("demo", turns(1), OPTIONS, chat_template=PLAIN))
        chunks = await server.finish(fitting(turns(1)))
        assert whole(chunks) == whole(expected)
        assert not any("_dropped" in chunk for chunk in chunks)

    run(test)


def test_the_engines_count_is_the_one_of_its_answers(run: Run) -> None:
    async def test(server: Server) -> None:
        chunks = await server.finish(answer_for("demo", turns(2), OPTIONS, chat_template=PLAIN))
        counted = await prompt_tokens(server.client.post, request_body(turns(2), OPTIONS))
        assert counted == chunks[-1]["prompt_eval_count"]

    run(test)


def test_a_last_turn_that_does_not_fit_is_refused_before_any_request(run: Run) -> None:
    async def test(server: Server) -> None:
        with pytest.raises(ContextOverflowError, match="too many for its context of 256"):
            await fitting([*turns(2)[:-1], question("word " * 400)]).request(server.client.post)

    run(test)


def test_cut_anywhere_it_continues_with_the_turns_it_began_with(run: Run) -> None:
    async def test(server: Server) -> None:
        events, expected = await uncut(server, fitting(turns(20)))
        for cut in (1, 2, len(events) // 2, len(events) - 1):
            answer, chunks = await cut_after(server, fitting(turns(20)), events[:cut])
            resumed = await server.finish(answer)
            assert whole([*chunks, *resumed]) == expected
            assert resumed[0]["_dropped"] == resumed[-1]["_dropped"] == chunks[0]["_dropped"]

    run(test)


def test_cut_before_its_first_request_it_still_fits(run: Run) -> None:
    async def test(server: Server) -> None:
        restored: Answer = through_json(fitting(turns(20)))
        chunks = await server.finish(restored)
        assert chunks[0]["_dropped"]
        assert whole(chunks) == whole(await server.finish(fitting(turns(20))))

    run(test)


def test_a_seed_drawn_for_it_is_the_seed_it_uses() -> None:
    async def body(answer: FittingAnswer) -> dict[str, Any]:
        async def post(path: str, _: Mapping[str, Any]) -> Any:
            return {"prompt": "x"} if path == "/apply-template" else {"tokens": [1]}

        request = await answer.request(post)
        assert request is not None
        return request[1]

    answer = fitting(turns(2), {"max_tokens": 5})
    assert asyncio.run(body(answer))["seed"] == answer.seed
