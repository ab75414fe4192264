"""Requests and answers between Ollama's shape and llama-server's."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.answers.protocol import (
    ChunkTranslator,
    ThinkSplitter,
    parse_event,
    progress_of,
    request_body,
)

HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


# --- the request's body -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"num_predict": 5}, {"max_tokens": 5}),
        ({"options": {"num_predict": 5}}, {"max_tokens": 5}),
        ({"options": {"num_predict": 100}, "max_tokens": 5}, {"max_tokens": 5}),
        ({"options": {"temperature": 1, "seed": 2}, "temperature": 0}, {"temperature": 0, "seed": 2}),
        ({"options": {"num_ctx": 100, "num_gpu": 1}}, {}),
        ({"options": {"temperature": None}}, {}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"format": "json"}, {"response_format": {"type": "json_object"}}),
        (
            {"format": SCHEMA},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        ),
        ({"format": ""}, {}),
        ({"tools": ({"type": "function"},)}, {"tools": [{"type": "function"}]}),
        ({"tools": []}, {}),
        ({"think": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"keep_alive": "5m"}, {}),
        ({"top_k": 1, "top_p": 0.5, "min_p": 0.1}, {"top_k": 1, "top_p": 0.5, "min_p": 0.1}),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, {"repeat_penalty": 1.1, "repeat_last_n": 64}),
    ],
)  # fmt: skip
def test_options_become_those_of_llama_server(options: dict[str, Any], body: dict[str, Any]) -> None:
    expected = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, **body}

    assert request_body(HELLO, options) == expected


def test_unknown_format_is_an_error() -> None:
    with pytest.raises(ConfigError, match="format='xml' must be \"json\" or a JSON schema"):
        request_body(HELLO, {"format": "xml"})


@pytest.mark.parametrize(
    ("image", "url"),
    [
        ("aGk=", "data:image/png;base64,aGk="),
        ("data:image/jpeg;base64,aGk=", "data:image/jpeg;base64,aGk="),
        ("https://example.org/a.png", "https://example.org/a.png"),
    ],
)
def test_images_become_parts_of_the_content(image: str, url: str) -> None:
    message = {"role": "user", "content": "What is this?", "images": [image]}

    (sent,) = request_body([message], {})["messages"]

    assert sent == {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What is this?"},
        ],
    }
    assert message["images"] == [image]


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_earlier_thoughts_are_sent_under_the_name_that_templates_read(name: str) -> None:
    message = {"role": "assistant", "content": "Yes.", name: "Hm."}

    (sent,) = request_body([message], {})["messages"]

    assert sent == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_tool_calls_become_json_text(arguments: object) -> None:
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": arguments}}],
    }

    (sent,) = request_body([message], {})["messages"]

    assert sent["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ]


def test_tool_call_keeps_its_id_and_may_have_no_arguments() -> None:
    calls = [{"id": "x1", "function": {"name": "now"}}]

    (sent,) = request_body([{"role": "assistant", "tool_calls": calls}], {})["messages"]

    assert sent["tool_calls"][0]["id"] == "x1"
    assert sent["tool_calls"][0]["function"]["arguments"] == "{}"


# --- the answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('data: {"choices": []}', {"choices": []}),
        ("data: [DONE]", None),
        ("data: [1]", None),
        ("", None),
        (": a comment", None),
        ("event: x", None),
    ],
)
def test_lines_of_the_event_stream_are_read(line: str, event: object) -> None:
    assert parse_event(line) == event


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def call_piece(index: int, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    return delta(tool_calls=[{"index": index, "function": {"name": name, "arguments": arguments}}])


LAST = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    "timings": {"prompt_n": 6, "prompt_ms": 12.5, "predicted_n": 3, "predicted_ms": 30.25},
}


def translated(*events: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks with text, and the final one."""
    translator = ChunkTranslator("demo")
    chunks = [chunk for event in events if (chunk := translator.translate(event)) is not None]
    return chunks, translator.final()


def test_text_is_translated_to_ollama_chunks_with_counts_and_nanoseconds_at_the_end() -> None:
    chunks, final = translated(
        delta(role="assistant", content=None), delta(content="Hel"), delta(content="lo"), delta("stop"), LAST
    )

    assert [chunk["message"] for chunk in chunks] == [
        {"role": "assistant", "content": "Hel"},
        {"role": "assistant", "content": "lo"},
    ]
    assert all(chunk["model"] == "demo" and chunk["done"] is False for chunk in chunks)
    assert datetime.fromisoformat(chunks[0]["created_at"]).tzinfo is not None
    del final["created_at"]
    assert final == {
        "model": "demo",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 7,
        "eval_count": 3,
        "prompt_eval_duration": 12_500_000,
        "eval_duration": 30_250_000,
    }


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_finish_reason_is_reported(reason: str) -> None:
    assert translated(delta(content="a"), delta(reason))[1]["done_reason"] == reason


def test_thinking_is_kept_apart_from_the_text() -> None:
    chunks, _ = translated(delta(reasoning_content="Hm."), delta(content="Yes."))

    assert [chunk["message"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "thinking": "Hm."},
        {"role": "assistant", "content": "Yes."},
    ]


def test_tool_calls_in_pieces_are_whole_in_the_final_chunk() -> None:
    chunks, final = translated(
        call_piece(0, "add"),
        call_piece(0, None, '{"a"'),
        call_piece(1, "now", ""),
        call_piece(0, None, ": 1}"),
        delta("tool_calls"),
    )

    assert chunks == []
    add, now = final["message"]["tool_calls"]
    assert add["function"] == {"name": "add", "arguments": {"a": 1}}
    assert now["function"] == {"name": "now", "arguments": {}}
    assert add["id"] != now["id"]  # made here, where the engine gives none


def test_arguments_that_are_not_json_are_kept_as_text() -> None:
    _, final = translated(call_piece(0, "add", '{"a": '))

    (call,) = final["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": '}


@pytest.mark.parametrize("text", ["caf\u00e9", "\U0001f600", "\u2028\u0085", "e\u0301", "\u4f60\u597d", '"\\\n'])
def test_text_of_any_script_survives(text: str) -> None:
    events = [parse_event("data: " + json.dumps(delta(content=piece))) for piece in text]

    chunks, _ = translated(*(event for event in events if event is not None))

    assert "".join(chunk["message"]["content"] for chunk in chunks) == text


def test_counts_fall_back_to_the_timings_and_may_be_missing() -> None:
    _, from_timings = translated({"choices": [], "timings": LAST["timings"]})
    _, nothing = translated()

    assert (from_timings["prompt_eval_count"], from_timings["eval_count"]) == (6, 3)
    assert (nothing["prompt_eval_count"], nothing["eval_count"]) == (None, None)
    assert (nothing["done_reason"], nothing["eval_duration"]) == ("stop", 0)


@pytest.mark.parametrize(
    ("event", "progress"),
    [
        ({"prompt_progress": {"total": 22, "cache": 4, "processed": 20, "time_ms": 3}}, (20, 22)),
        ({"prompt_progress": {"total": 22, "processed": 0}, "content": ""}, (0, 22)),
        ({"content": "a"}, None),
        ({}, None),
    ],
)
def test_progress_of_the_prompt_is_read(event: dict[str, Any], progress: tuple[int, int] | None) -> None:
    assert progress_of(event) == progress


# --- thoughts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "thinking", "answer"),
    [
        ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("\n <think>\n\nHm.\n</think>\n\n Yes. \n", False, "Hm.\n", "Yes. \n"),
        ("Hm.\n</think>\n\nYes.", True, "Hm.\n", "Yes."),
        ("\n\nHm.</think>Yes.", True, "Hm.", "Yes."),
        ("<think>Hm.", True, "<think>Hm.", ""),
        ("<think></think>Yes.", False, "", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("</think>Yes.", True, "", "Yes."),
        ("<think>Hm.", False, "Hm.", ""),
        ("<think>Hm.</think>", False, "Hm.", ""),
        ("<think>Hm.</think>\n", False, "Hm.", ""),
        ("<think>a < b </ c </thin </thinker></think>Yes.", False, "a < b </ c </thin </thinker>", "Yes."),
        ("<think>Hm.</thi", False, "Hm.</thi", ""),
        ("<think>a</think>b<think>c</think>d", False, "a", "b<think>c</think>d"),
        ("<think>a</think></think>b", False, "a", "</think>b"),
        ("Yes.", False, "", "Yes."),
        ("  Yes.", False, "", "  Yes."),
        ("Yes, <think>really</think>.", False, "", "Yes, <think>really</think>."),
        ("<thinking>Yes.", False, "", "<thinking>Yes."),
        ("<thi", False, "", "<thi"),
        ("  <", False, "", "  <"),
        ("\n", False, "", "\n"),
        ("\n", True, "", ""),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thoughts_are_parted_however_the_text_is_cut(
    text: str, inside: bool, thinking: str, answer: str, size: int
) -> None:
    splitter = ThinkSplitter(inside=inside)

    parts = [splitter.feed(text[begin : begin + size]) for begin in range(0, len(text), size)]
    parts.append(splitter.flush())

    assert "".join(part[0] for part in parts) == thinking
    assert "".join(part[1] for part in parts) == answer
    assert splitter.flush() == ("", "")


def test_thoughts_and_answer_are_given_as_soon_as_they_are_decided() -> None:
    splitter = ThinkSplitter()

    pieces = ["<th", "ink>", "Hm", ", <", "b> </", "think", ">", "\n", "Yes", " <", "."]
    assert [splitter.feed(piece) for piece in pieces] == [
        ("", ""), ("", ""), ("Hm", ""), (", ", ""), ("<b> ", ""), ("", ""), ("", ""), ("", ""), ("", "Yes"),
        ("", " <"), ("", "."),
    ]  # fmt: skip
