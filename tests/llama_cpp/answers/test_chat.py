"""Thoughts and tool calls: what llama-server's chat parser does, compared with answers without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.option_checks import check_options
from sollol_nb.errors import AnswerDivergedError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.chat import ChatAnswer
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.llama_server import (
    ACCENTS,
    GREEDY,
    SHORT,
    THINKING,
    TOOL,
    Run,
    Server,
    cut_after,
    llama_server,
    new_answer,
    through_json,
    uncut,
    whole,
)


@pytest.fixture(scope="module")
def run_thinking(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("thinking")
    (folder / "template.jinja").write_text(THINKING)
    with llama_server(engine, folder, "--chat-template-file", str(folder / "template.jinja")) as run:
        yield run


# --- thoughts ---------------------------------------------------------------------------------

FORCED = [
    "<think>\nA thought, 東京.\n</think>\n\nThe answer <b>is</b> 42 < 43.",
    "<think>short</think>answer",
    "<think>\nonly a thought",
    "no thought <think>at all</think>",
    "<thinking is hard>",
    "<think>\n\n</think>\n\nanswer",
]


@pytest.mark.engine
@pytest.mark.parametrize("think", [None, True, False])
@pytest.mark.parametrize("text", FORCED)
def test_thoughts_are_parted_as_llama_server_does(run_thinking: Run, text: str, think: bool | None) -> None:
    async def test(server: Server) -> None:
        options = {**GREEDY, "think": think, "max_tokens": 100}
        forced = {"grammar": f"root ::= {json.dumps(text, ensure_ascii=False)}"}
        raw = new_answer(SHORT, options, THINKING)
        assert isinstance(raw, RawAnswer)
        events, got = await uncut(server, raw, forced)
        chat = ChatAnswer("demo", check_messages(SHORT), check_options(options))
        _, expected = await uncut(server, chat, forced)
        if think is not False:  # then llama-server does not parse thoughts
            assert (got["thinking"].strip(), got["content"]) == (
                expected["thinking"].strip(),
                expected["content"],
            )
        assert (got["prompt_eval_count"], got["eval_count"]) == (
            expected["prompt_eval_count"],
            expected["eval_count"],
        )
        for cut in range(0, len(events), 3):
            answer, chunks = await cut_after(server, new_answer(SHORT, options, THINKING), events[:cut])
            request = await answer.request(server.client.post)
            assert request is not None
            prompt = request[1]["prompt"]
            given = len(prompt) - got["prompt_eval_count"] if isinstance(prompt, list) else 0
            # What another engine would send if it had the grammar too, which only this test has.
            for event in events:
                if event["tokens_predicted"] > given or event["stop"]:
                    chunk = answer.translate({**event, "tokens_predicted": event["tokens_predicted"] - given})
                    chunks += [chunk] if chunk is not None else []
            assert whole([*chunks, answer.final()]) == got

    run_thinking(test)


@pytest.mark.engine
def test_think_reaches_the_template(run_thinking: Run) -> None:
    async def test(server: Server) -> None:
        prompts = {}
        for think in (None, True, False):
            request = await new_answer(SHORT, {"think": think}, THINKING).request(server.client.post)
            assert request is not None
            prompts[think] = request[1]["prompt"]
        assert prompts[None] == prompts[True] == f"<|im_start|>user\n{SHORT}<|im_end|>\n<|im_start|>assistant\n"
        assert prompts[False] == prompts[True] + "<think>\n\n</think>\n\n"

    run_thinking(test)


# --- the chat endpoint ------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [GREEDY, {**GREEDY, "max_tokens": 7}, {"temperature": 0.9, "seed": 4}, {**GREEDY, "stop": "memory and"}],
)
@pytest.mark.parametrize("question", [SHORT, ACCENTS])
def test_both_kinds_write_the_same(run: Run, question: str, options: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        _, raw = await uncut(server, new_answer(question, options))
        _, chat = await uncut(server, ChatAnswer("demo", check_messages(question), options))
        assert raw == chat

    run(test)


@pytest.mark.engine
def test_drawn_seed_lets_a_sampled_chat_be_repeated(run: Run) -> None:
    async def test(server: Server) -> None:
        wild = {"temperature": 5.0, "min_p": 0.0, "top_p": 1.0}
        answer = new_answer(ACCENTS, {**wild, "tools": [TOOL], "max_tokens": 30})
        unasked = answer.state()
        events, expected = await uncut(server, answer)
        for cut in (3, 9, len(events) // 2, len(events) - 3):
            again, chunks = await cut_after(server, Answer.from_state(unasked), events[:cut])
            assert whole(chunks + await server.finish(again)) == expected
        _, different = await uncut(server, new_answer(ACCENTS, {**wild, "tools": [TOOL], "max_tokens": 30}))
        assert different != expected

    run(test)


@pytest.mark.engine
@pytest.mark.parametrize(("kept", "more"), [(20, "cat"), (None, " And more.")])
def test_chat_that_is_not_repeated_cannot_continue(run: Run, kept: int | None, more: str) -> None:
    async def test(server: Server) -> None:
        _, repeated = await uncut(server, new_answer(SHORT, {**GREEDY, "tools": [TOOL]}))
        shown = repeated["content"][:kept] + more
        answer = new_answer(SHORT, {**GREEDY, "tools": [TOOL]})
        await answer.request(server.client.post)
        answer.translate({"choices": [{"delta": {"content": shown}}]})
        with pytest.raises(
            AnswerDivergedError, match="begins the answer differently, so it cannot be continued"
        ) as error:
            await server.finish(answer)
        assert "\n" not in str(error.value)

    run(test)


def test_tool_calls_come_with_the_last_chunk_and_only_once() -> None:
    async def nothing(path: str, body: Mapping[str, Any]) -> Any:
        raise AssertionError(path)

    def call(name: str | None, arguments: str) -> dict[str, Any]:
        calls = [{"index": 0, "id": "call_7", "function": {"name": name, "arguments": arguments}}]
        return {"choices": [{"delta": {"tool_calls": calls}}]}

    answer = new_answer(SHORT, {"tools": [TOOL]})
    asyncio.run(answer.request(nothing))
    assert answer.translate({"choices": [{"delta": {"content": "Let me see."}}]}) is not None
    assert answer.translate(call("now", '{"zone": "U')) is None
    asyncio.run(answer.request(nothing))
    events = [{"choices": [{"delta": {"content": "Let me see."}}]}, call("now", '{"zone": "U'), call(None, 'TC"}')]
    assert [answer.translate(event) for event in events] == [None, None, None]
    answer.translate({"prompt_progress": {"total": 9, "processed": 9}, "choices": [{"delta": {"content": None}}]})
    answer.translate({"choices": [{"delta": {}, "finish_reason": "tool_calls"}], "timings": {"predicted_n": 6}})

    final = answer.final()

    assert (final["prompt_eval_count"], final["eval_count"]) == (9, 6)  # no usage was received
    assert final["message"]["tool_calls"] == [
        {"id": "call_7", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    ]
    assert final["done_reason"] == "tool_calls"
    assert answer.is_complete
    assert answer.text == "Let me see."


PARSER_FAILED = "The model produced output that does not match the expected peg-native format"


def said(content: str = "", thinking: str = "") -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content, "reasoning_content": thinking}}]}


def raw(content: str, count: int) -> dict[str, Any]:
    return {"content": content, "tokens": [count], "tokens_predicted": count}


async def rendered(path: str, body: Mapping[str, Any]) -> Any:
    return {"prompt": "a prompt", "tokens": [{"id": 1, "piece": "x"}], "content": ""}


@pytest.mark.parametrize(
    ("sent", "unparsed", "chunks", "starts_over"),
    [
        ([], ["Hel", "lo"], ["Hel", "lo"], False),
        ([said("Hel")], ["H", "ello", " you"], ["lo", " you"], False),  # the same text: only the rest is new
        ([said("", "Hm.")], ["<|think|>", "Hm.", "Hello"], ["<|think|>", "Hm.", "Hello"], True),
        ([said("Hello there")], ["Hello"], ["Hello"], True),  # shorter than what was shown
    ],
)
def test_answer_that_cannot_be_parsed_is_shown_once_as_its_text(
    sent: list[dict[str, Any]], unparsed: list[str], chunks: list[str], starts_over: bool
) -> None:
    answer: Answer = ChatAnswer("demo", check_messages(SHORT), {}, markup=["<|think|>"])
    asyncio.run(answer.request(rendered))
    for event in sent:
        answer.translate(event)
    assert answer.recover(PARSER_FAILED)
    answer = through_json(answer)
    request = asyncio.run(answer.request(rendered))
    assert request is not None
    assert (request[0], request[1]["preserved_tokens"]) == ("/completion", ["<|think|>"])

    shown = [answer.translate(raw(text, at + 1)) for at, text in enumerate(unparsed)]
    answer.translate({"stop": True, "stop_type": "eos", "tokens_predicted": len(unparsed)})
    shown.append(answer.final())

    texts = [chunk["message"]["content"] for chunk in shown if chunk is not None]
    assert [text for text in texts if text] == chunks
    assert any(chunk.get("_restarted") for chunk in shown if chunk is not None) is starts_over
    assert answer.text == "".join(unparsed)
    assert "could not parse" in shown[-1]["_note"]
    assert not answer.recover("another reason")


@pytest.mark.parametrize(
    "reason",
    [
        PARSER_FAILED,
        "Unexpected empty grammar stack after accepting piece: > (62)",
        "Invalid diff: tool call mismatch!",
        "Invalid diff: now finding less tool calls!\n  Previous (2):\n",
    ],
)
def test_all_failures_of_the_parser_keep_the_text(reason: str) -> None:
    assert ChatAnswer("demo", check_messages(SHORT), {}).recover(reason)


def test_images_and_other_failures_are_not_asked_again() -> None:
    image = [{"role": "user", "content": "What is this?", "images": ["aGk="]}]

    assert not ChatAnswer("demo", image, {}).recover(PARSER_FAILED)
    assert not ChatAnswer("demo", check_messages(SHORT), {}).recover("the context is full")
