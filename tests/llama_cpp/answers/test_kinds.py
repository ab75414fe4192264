"""Answers cut off in the middle and continued: on a real llama-server, compared with answers that were not cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import pytest

from sollol_nb.errors import ConfigError, HttpStatusError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.chat import ChatAnswer
from sollol_nb.llama_cpp.answers.kinds import answer_for, needs_chat_parser
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from tests.support.llama_server import (
    ACCENTS,
    GREEDY,
    LONG,
    PLAIN,
    SCHEMA,
    SHORT,
    THINKING,
    TOOL,
    Run,
    Server,
    cut_after,
    new_answer,
    through_json,
    uncut,
    whole,
)

# --- which kind -------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello!"}]
CONTINUED = [*HELLO, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize(
    ("messages", "options", "template", "chat"),
    [
        (HELLO, {}, PLAIN, False),
        (HELLO, {}, "", False),
        (HELLO, {"tools": []}, PLAIN, False),
        (HELLO, {"tools": [TOOL]}, PLAIN, True),
        ([{"role": "user", "content": "What is this?", "images": ["aGk="]}], {}, PLAIN, True),
        ([{"role": "user", "content": "Hello!", "images": []}], {}, PLAIN, False),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}], {}, PLAIN, False),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, PLAIN, True),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, *HELLO], {}, PLAIN, False),
        (HELLO, {}, THINKING, False),
        (HELLO, {"think": False}, THINKING, False),
        (HELLO, {"format": "json"}, PLAIN, False),
        (HELLO, {"format": "json"}, THINKING, True),
        (HELLO, {"format": ""}, THINKING, False),
        (CONTINUED, {"format": "json"}, THINKING, False),
        (CONTINUED, {"format": "json", "tools": [TOOL]}, THINKING, True),
        (CONTINUED, {}, "[THINK]{{ thoughts }}[/THINK]", True),
        (HELLO, {}, "<|start|>assistant<|channel|>final<|message|>", True),
        (HELLO, {}, "[THINK]{{ thoughts }}[/THINK]", True),
        (HELLO, {}, "<seed:think>{{ thoughts }}</seed:think>", True),
        (HELLO, {}, "<|START_THINKING|>{{ thoughts }}<|END_THINKING|>", True),
        (HELLO, {}, "<|channel>thought\n", True),
        (HELLO, {}, "◁think▷", True),
        (HELLO, {}, "<think>{{ thoughts }}</think><response></response>", True),
        (HELLO, {}, "<think>{{ thoughts }}</think>\n[BEGIN FINAL RESPONSE]\n", True),
        (HELLO, {}, ">>>all\n{{ message.content }}", True),
        (HELLO, {}, "{{ message['reasoning_content'] }} {% if enable_thinking %}", False),
        (HELLO, {}, "{% if a < b and thinking > c %}<tool_response>", False),
    ],
)
def test_only_requests_that_need_the_chat_parser_use_it(
    messages: list[dict[str, Any]], options: dict[str, Any], template: str, chat: bool
) -> None:
    assert needs_chat_parser(messages, options, template) is chat
    answer = answer_for("demo", messages, options, chat_template=template)
    assert isinstance(answer, ChatAnswer if chat else RawAnswer)


# --- cut and continued, at temperature 0 ------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    ("question", "options", "every"),
    [
        (LONG, {}, 97),
        (SHORT, {}, 1),
        (ACCENTS, {}, 1),
        (SHORT, {"max_tokens": 1}, 1),
        (SHORT, {"num_predict": 9}, 1),
        (ACCENTS, {"options": {"num_predict": 4, "temperature": 1}}, 1),  # ends within a character
        (SHORT, {"stop": "memory and"}, 1),  # held back over three tokens
        (SHORT, {"stop": ["mall"]}, 1),  # ends within a token
        (SHORT, {"stop": ["its processes", "xyz"]}, 1),  # begins, but is not completed
        (ACCENTS, {"stop": ["京"]}, 1),
        (SHORT, {"format": SCHEMA}, 1),
        (ACCENTS, {"format": "json"}, 1),
        (SHORT, {"format": {"type": "string", "enum": ["a <|im_end|> é🚀 b"]}}, 1),  # spells an end token
        (SHORT, {"repeat_penalty": 1.3, "presence_penalty": 0.5, "max_tokens": 30}, 3),
        (SHORT, {"tools": [TOOL]}, 4),
    ],
)  # fmt: skip
def test_answer_cut_anywhere_is_the_same(run: Run, question: str, options: dict[str, Any], every: int) -> None:
    async def test(server: Server) -> None:
        events, expected = await uncut(server, new_answer(question, {**options, **GREEDY}))
        assert expected["content"]
        for cut in range(0, len(events), every):
            answer, chunks = await cut_after(server, new_answer(question, {**options, **GREEDY}), events[:cut])
            so_far = answer.text
            chunks += await server.finish(answer)
            assert whole(chunks) == expected, f"cut after {cut} of {len(events)} events, at {so_far[-20:]!r}"
            assert (answer.text, answer.thinking) == (expected["content"], expected["thinking"])

    run(test)


@pytest.mark.engine
@pytest.mark.parametrize("options", [{}, {"stop": ["<"]}, {"format": SCHEMA}, {"tools": [TOOL]}])
def test_answer_may_be_cut_again_and_again(run: Run, options: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        _, expected = await uncut(server, new_answer(ACCENTS, {**options, **GREEDY}))
        answer, chunks, cuts = new_answer(ACCENTS, {**options, **GREEDY}), [], 0
        while (request := await answer.request(server.client.post)) is not None:
            count = 0
            async with aclosing(server.events(request)) as events:
                async for event in events:
                    chunk = answer.translate(event)
                    chunks += [chunk] if chunk is not None else []
                    count += chunk is not None
                    if count == 7 + cuts:
                        cuts += 1
                        answer = through_json(answer)
                        break
        assert whole([*chunks, answer.final()]) == expected
        assert cuts > 1

    run(test)


@pytest.mark.engine
def test_durations_are_those_of_all_engines(run: Run) -> None:
    async def test(server: Server) -> None:
        events, _ = await uncut(server, new_answer(SHORT, GREEDY))
        answer, _ = await cut_after(server, new_answer(SHORT, GREEDY), events[:-1])
        before = events[-2]["timings"]["predicted_ms"]
        final = (await server.finish(answer))[-1]
        assert final["eval_duration"] > before * 1e6
        assert final["prompt_eval_duration"] > events[-2]["timings"]["prompt_ms"] * 1e6

    run(test)


@pytest.mark.engine
def test_nothing_is_requested_when_all_tokens_are_received(run: Run) -> None:
    async def test(server: Server) -> None:
        options = {**GREEDY, "max_tokens": 5}
        events, expected = await uncut(server, new_answer(SHORT, options))
        answer, chunks = await cut_after(server, new_answer(SHORT, options), events[:-1])
        assert await answer.request(server.client.post) is None
        assert whole([*chunks, answer.final()]) == expected
        assert expected["done_reason"] == "length"

    run(test)


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    "options", [{"seed": 7}, {"seed": 7, "stop": ["e"]}, {"seed": 7, "format": SCHEMA, "max_tokens": 80}]
)
def test_sampled_answer_keeps_its_beginning_and_continues_the_same_way_each_time(
    run: Run, options: dict[str, Any]
) -> None:
    async def test(server: Server) -> None:
        options_ = {**options, "temperature": 3.0, "min_p": 0.0}
        events, expected = await uncut(server, new_answer(ACCENTS, options_))
        _, again = await uncut(server, new_answer(ACCENTS, options_))
        assert again == expected
        for cut in range(2, len(events) - 1, 5):
            ends = []
            for _ in range(2):
                answer, chunks = await cut_after(server, new_answer(ACCENTS, options_), events[:cut])
                begin = answer.text
                ends.append(whole(chunks + await server.finish(answer)))
                assert ends[-1]["content"].startswith(begin)
            assert ends[0] == ends[1]
            if "format" in options and ends[0]["done_reason"] == "stop":
                assert set(json.loads(ends[0]["content"])) == {"name", "n", "ok"}

    run(test)


def test_answer_without_a_seed_draws_one() -> None:
    seeds = {new_answer(SHORT, {}).seed for _ in range(4)} | {new_answer(SHORT, {"seed": -1}).seed}

    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


# --- a server's refusals, and what is kept ------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("options", [{"repeat_last_n": -1}, {"format": {"type": "nonsense"}}])
def test_a_refusal_of_the_server_is_reported(run: Run, options: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        with pytest.raises(HttpStatusError) as error:
            await server.finish(new_answer(SHORT, options))
        assert error.value.status == 400

    run(test)


@pytest.mark.engine
@pytest.mark.parametrize("options", [{}, {"tools": [TOOL]}])
def test_what_is_left_of_the_prompt_is_known(run: Run, options: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        long = " ".join(f"{number}, a word that nobody {sorted(options)} said before." for number in range(40))
        answer = new_answer(long, {**options, **GREEDY, "max_tokens": 3})
        assert 0 < answer.waiting_prompt_tokens < len(long)
        request = await answer.request(server.client.post)
        assert request is not None
        waiting = []
        async for event in server.events(request):
            answer.translate(event)
            waiting.append(answer.waiting_prompt_tokens)
        prompt_tokens = answer.final()["prompt_eval_count"]
        assert 400 < waiting[0] <= prompt_tokens
        assert waiting == sorted(waiting, reverse=True)
        assert waiting[-1] == 0

    run(test)


@pytest.mark.engine
def test_complete_answer_stays_complete(run: Run) -> None:
    async def test(server: Server) -> None:
        answer = new_answer(SHORT, GREEDY)
        _, expected = await uncut(server, answer)
        kept = through_json(answer)
        assert await kept.request(server.client.post) is None
        assert (kept.text, kept.token_count) == (expected["content"], expected["eval_count"])
        assert kept.final()["eval_duration"] == answer.final()["eval_duration"] > 0

    run(test)


@pytest.mark.parametrize("options", [{"keep_alive": "5m"}, {"keep_alive": -1, "tools": [TOOL]}])
def test_keep_alive_is_not_sent_to_the_engine(options: dict[str, Any]) -> None:
    async def render(path: str, body: Mapping[str, Any]) -> Any:
        assert "keep_alive" not in body
        return {"prompt": "Hello"}

    request = asyncio.run(new_answer(SHORT, options).request(render))

    assert request is not None
    assert "keep_alive" not in request[1]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"kind": "raw"},
        {"kind": "new"},
        {"kind": ["raw"]},
        {**new_answer("a", {}).state(), "pieces": 5},
        {**new_answer("a", {}).state(), "spent_ms": None},
        {**new_answer("a", {}).state(), "seed": "x"},
    ],
)
def test_data_that_is_not_the_state_of_an_answer_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not the state of an answer"):
        Answer.from_state(state)
