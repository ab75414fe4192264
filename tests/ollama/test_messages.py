"""Messages in OpenAI's shapes, as Ollama takes them."""

from __future__ import annotations

from typing import Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.ollama.messages import ollama_messages
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.ollama_server import OllamaServer

DATA_URL = "data:image/png;base64,aGk="


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "hi"}, {"content": "hi"}),
        ({"content": None}, {"content": ""}),
        ({"content": []}, {"content": ""}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "a\nb"}),
        ({"content": ["a", {"type": "input_text", "text": "b"}]}, {"content": "a\nb"}),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": DATA_URL}}]},
            {"content": "a", "images": ["aGk="]},
        ),
        ({"content": [{"type": "image_url", "image_url": DATA_URL}]}, {"content": "", "images": ["aGk="]}),
        ({"content": "a", "images": [DATA_URL, "aGk="]}, {"content": "a", "images": ["aGk=", "aGk="]}),
        ({"content": "a", "reasoning_content": "hm"}, {"content": "a", "thinking": "hm"}),
        ({"content": "a", "anything": 5}, {"content": "a", "anything": 5}),
    ],
)
def test_content_becomes_text_and_images(message: dict[str, Any], expected: dict[str, Any]) -> None:
    given = {"role": "user", **message}
    before = repr(given)
    assert ollama_messages([given]) == [{"role": "user", **expected}]
    assert repr(given) == before


def test_a_tool_call_has_its_arguments_as_an_object_and_its_answer_the_name_of_the_tool() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    empty = {"id": "c2", "function": {"name": "now", "arguments": ""}}
    mine = {"function": {"name": "f", "arguments": {"a": 1}}}
    asked, first, second = ollama_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call, empty, mine]},
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
            {"role": "tool", "tool_call_id": "unknown", "content": "6"},
        ]
    )
    assert [call["function"]["arguments"] for call in asked["tool_calls"]] == [{"zone": "UTC"}, {}, {"a": 1}]
    assert first == {"role": "tool", "tool_call_id": "c1", "content": "5", "tool_name": "clock"}
    assert "tool_name" not in second


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "a part of type 'input_audio'"),
        ({"content": [7]}, "a part of type 'int'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}, "base64 text only"),
        ({"content": [{"type": "image_url"}]}, "an image of type NoneType"),
        ({"content": "x", "images": ["data:image/png,hi"]}, "without base64"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "f are not JSON"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "f are not a JSON object",
        ),
        (
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "f are not a JSON object",
        ),
        ({"content": "", "tool_calls": ["f"]}, "a tool call that is not"),
        ({"content": "", "tool_calls": 5}, "tool_calls that are not a list"),
        ({"content": "x", "images": "aGk="}, "images that are not a list"),
        ({"content": [{"type": "text", "text": "x"}], "images": 5}, "images that are not a list"),
        ({"content": "x", "images": [b"hi"]}, "an image of type bytes"),
    ],
)
def test_what_ollama_cannot_take_is_refused_before_anything_is_sent(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"messages\\[1\\].*{reason}"):
        ollama_messages([{"role": "user", "content": "x"}, {"role": "assistant", **message}])


@pytest.mark.ollama
def test_a_real_ollama_answers_openai_shapes_as_its_own(ollama: OllamaServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    openai: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "sollol_nb?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]},
    ]
    own: list[dict[str, Any]] = [
        {"role": "user", "content": "What is\nsollol_nb?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "f", "content": "5"},
    ]
    with HybridRouter(OllamaPool(ollama.base_url), auto_discover_rpc=False) as router:
        answers = [
            router.route_request("llama3.2", messages, backend="ollama", temperature=0, max_tokens=8)
            for messages in (openai, own)
        ]
    assert answers[0].text == answers[1].text
    assert answers[0]["prompt_eval_count"] == answers[1]["prompt_eval_count"]
