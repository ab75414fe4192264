"""Requests to Ollama and partial answers as plain data."""

from __future__ import annotations

from typing import Any

import pytest

from sollol_nb.ollama.requests import (
    AnswerSoFar,
    TooLong,
    can_continue,
    chat_continuation,
    count_characters,
    describe_truncation,
    estimated_tokens,
    generate_continuation,
    request_body,
    too_long,
)


@pytest.mark.parametrize(
    ("given", "body"),
    [
        ({}, {}),
        ({"temperature": 0, "seed": 7}, {"options": {"temperature": 0, "seed": 7}}),
        ({"max_tokens": 5}, {"options": {"num_predict": 5}}),
        ({"options": {"top_k": 3, "seed": 1}, "seed": 2}, {"options": {"top_k": 3, "seed": 2}}),
        ({"stop": "."}, {"options": {"stop": ["."]}}),
        ({"stop": [".", "!"]}, {"options": {"stop": [".", "!"]}}),
        (
            {"format": {"type": "object"}, "keep_alive": 0, "think": False, "tools": []},
            {"format": {"type": "object"}, "keep_alive": 0, "think": False, "tools": []},
        ),
        ({"something_new": [1], "options": {"brand_new": 2}}, {"something_new": [1], "options": {"brand_new": 2}}),
        ({"temperature": None, "format": None, "max_tokens": None, "options": None}, {}),
    ],
)
def test_options_and_fields_reach_the_body(given: dict[str, Any], body: dict[str, Any]) -> None:
    assert request_body("m", **given) == {"model": "m", **body}


def so_far(*chunks: dict[str, Any]) -> AnswerSoFar:
    answer = AnswerSoFar()
    for chunk in chunks:
        answer.add(chunk)
    return answer


def chat_chunk(content: str, **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content, **more}, "done": False}


def test_chunks_are_merged_into_one_answer() -> None:
    call = {"function": {"name": "clock", "arguments": {}}}
    answer = so_far(
        {**chat_chunk("", thinking="Hm"), "model": "m", "logprobs": [1]},
        {**chat_chunk("One", thinking="m."), "logprobs": [2]},
        chat_chunk(" two", tool_calls=[call]),
        {**chat_chunk("", tool_calls=[call]), "done": True, "done_reason": "stop", "eval_count": 4},
    )
    message = {"role": "assistant", "content": "One two", "thinking": "Hmm.", "tool_calls": [call, call]}
    assert answer.merged() == {
        "model": "m",
        "message": message,
        "logprobs": [1, 2],
        "done": True,
        "done_reason": "stop",
        "eval_count": 4,
    }
    assert answer.tokens == 4


def test_a_partial_chat_continues_from_the_assistants_message() -> None:
    user = {"role": "user", "content": "Count."}
    body = {"model": "m", "messages": [user], "options": {"num_predict": 10, "seed": 1}}
    assert chat_continuation(body, so_far(chat_chunk("One"), chat_chunk(" two"))) == {
        "model": "m",
        "messages": [user, {"role": "assistant", "content": "One two"}],
        "options": {"num_predict": 8, "seed": 1},
    }
    assert body["messages"] == [user]


def test_a_prefilled_assistant_message_and_the_answer_become_one_message() -> None:
    body = {"model": "m", "messages": [{"role": "assistant", "content": "Sure: ", "thinking": "t"}]}
    continued = chat_continuation(body, so_far(chat_chunk("one")))
    assert continued["messages"] == [{"role": "assistant", "content": "Sure: one", "thinking": "t"}]


def test_a_partial_generation_continues_as_raw_text() -> None:
    body = {"model": "m", "prompt": "Count.", "system": "s", "think": False, "options": {"num_predict": 1}, "x": 1}
    continued = generate_continuation(
        body, "<user>Count.<assistant>", so_far({"response": "One"}, {"response": " two"})
    )
    assert continued == {
        "model": "m",
        "prompt": "<user>Count.<assistant>One two",
        "raw": True,
        "options": {"num_predict": 1},
        "x": 1,
    }


@pytest.mark.parametrize(
    ("path", "body", "chunk", "expected"),
    [
        ("/api/chat", {}, chat_chunk("One"), True),
        ("/api/chat", {}, chat_chunk("", thinking="Hm"), True),
        ("/api/chat", {"format": "json"}, chat_chunk("{"), False),
        ("/api/generate", {}, {"response": "One"}, True),
        ("/api/generate", {}, {"response": "", "thinking": "Hm"}, False),
    ],
)
def test_which_partial_answers_can_be_continued(
    path: str, body: dict[str, Any], chunk: dict[str, Any], expected: bool
) -> None:
    assert can_continue(path, body, so_far(chunk)) is expected


# --- prompts that are too long ------------------------------------------------------------------


def test_tokens_are_estimated_from_an_earlier_prompt() -> None:
    earlier = [{"role": "user", "content": "a" * 976}]
    tokens_per_character = 250 / count_characters(earlier)
    assert estimated_tokens(earlier, tokens_per_character) == 251
    assert estimated_tokens([*earlier, *earlier], tokens_per_character) == 501
    with_images = [{**earlier[0], "images": ["aGk=", "aGk="]}]
    assert estimated_tokens(with_images, tokens_per_character) == 251 + 2 * 768


@pytest.mark.parametrize(
    ("text", "prompt_tokens", "is_described"),
    [
        ("a" * 400, 100, False),
        ("a" * 800, 100, False),
        ("a" * 801, 100, True),
        ("a" * 801, None, False),
        ("", 0, False),
    ],
)
def test_a_truncated_prompt_is_described(text: str, prompt_tokens: int | None, is_described: bool) -> None:
    assert bool(describe_truncation([{"role": "user", "content": text}], prompt_tokens)) is is_described


@pytest.mark.parametrize(
    ("reason", "recognised"),
    [
        ("Ollama at http://a: the input length exceeds the context length", TooLong()),
        (
            "request (910 tokens) exceeds the available context size (512 tokens), try increasing it",
            TooLong(prompt_tokens=910, context_tokens=512),
        ),
        ("the prompt is longer than the context length currently available to the model; shorten", TooLong()),
        ("input length (9 tokens) exceeds the model's maximum context length (8 tokens)", TooLong(9, 8)),
        ("input exceeds maximum context length and cannot be truncated further", TooLong()),
        ("Ollama at http://a: model requires more system memory", None),
        ("the context length of 5 is not a number", None),
    ],
)
def test_the_refusal_of_a_long_prompt_is_recognised(reason: str, recognised: TooLong | None) -> None:
    assert too_long(reason) == recognised
