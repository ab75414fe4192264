"""What Anthropic's bodies say, and the events of an answer as the official client reads them. No engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import pytest

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.option_checks import check_options
from sollol_nb.gateway.anthropic_api import MessageWriter
from sollol_nb.gateway.anthropic_messages import Conversation
from sollol_nb.gateway.anthropic_models import page
from sollol_nb.gateway.anthropic_parts import checked_fields, options_of
from sollol_nb.gateway.failures import ApiError

HELLO = {"role": "user", "content": "Hello!"}
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": [HELLO]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Weather of a city.", "input_schema": SCHEMA}
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


def translated(**fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and options of a body, which the router's own checks accept."""
    checked = checked_fields({**BODY, **fields})
    conversation = Conversation(checked)
    messages, options = conversation.messages, options_of(checked, conversation.tools)
    check_messages(messages)
    check_options(options)
    return messages, options


def test_conversation_with_tools_and_images_is_translated() -> None:
    messages, options = translated(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f2e3;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        tools=[{**TOOL, "cache_control": {"type": "ephemeral"}}, {**TOOL, "type": "custom", "name": "time"}],
        messages=[
            {"role": "user", "content": [PIXEL, {"type": "text", "text": "Weather here?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "It is Oslo.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no network"}, PIXEL],
                    },
                    {"type": "text", "text": "Try again."},
                ],
            },
            {"role": "user", "content": "Please."},
        ],
    )
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather here?", "images": ["aGk="]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "thinking": "It is Oslo.",
            "tool_calls": [{"id": "toolu_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "Error: no network", "tool_name": "weather", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "Try again.\nPlease.", "images": ["aGk="]},
    ]
    function = {"name": "weather", "description": "Weather of a city.", "parameters": SCHEMA}
    assert options["tools"][0] == {"type": "function", "function": function}
    assert options["tools"][1]["function"]["name"] == "time"


def test_system_messages_after_the_beginning_are_text_of_the_user() -> None:
    """Chat templates refuse them elsewhere, and Claude Code sends them."""
    messages, _ = translated(
        system="Be brief.",
        messages=[
            {"role": "system", "content": "Be kind."},
            HELLO,
            {"role": "system", "content": "It is noon.", "clear_at": "next_user_message"},
            {"role": "system", "content": "You are in Oslo."},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "And now?"},
            {"role": "system", "content": "It is one.", "clear_at": "next_user_message"},
            {"role": "system", "output_config": {"effort": "low"}},
        ],
    )
    assert messages == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Hello!\n<system-reminder>\nYou are in Oslo.\n</system-reminder>"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "And now?\n<system-reminder>\nIt is one.\n</system-reminder>"},
    ]


def test_tools_are_offered_from_when_a_message_names_them() -> None:
    def offered(*messages: dict[str, Any]) -> list[str]:
        tools = [TOOL, *({**TOOL, "name": name, "defer_loading": True} for name in ("time", "news"))]
        _, options = translated(tools=tools, messages=[HELLO, *messages])
        return [tool["function"]["name"] for tool in options.get("tools", ())]

    def change(kind: str, **tool: Any) -> dict[str, Any]:
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    found = {"type": "tool_reference", "tool_name": "time"}
    searched = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [found]}]},
    ]
    assert offered() == ["weather"]
    assert offered(*searched) == ["weather", "time"]
    assert offered(change("tool_addition", type="tool_reference", name="news")) == ["weather", "news"]
    assert offered(change("tool_removal", type="tool_reference", name="weather")) == []
    defined = change("tool_addition", type="tool_definition", definition={**TOOL, "name": "mail"})
    assert offered(defined) == ["weather", "mail"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": 100, "think": False}),
        (
            {"stop_sequences": ["END"], "temperature": 0, "top_k": 5},
            {"stop": ["END"], "temperature": 0, "top_k": 5},
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"parallel_tool_calls": False},
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"think": True}),
        ({"thinking": {"type": "enabled"}, "output_config": {"effort": "max"}}, {"think": "high"}),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"format": SCHEMA}),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"format": SCHEMA}),
        (
            {
                "metadata": {"user_id": "u"},
                "service_tier": "auto",
                "context_management": {"edits": []},
                "speed": None,
            },
            {"max_tokens": 100},
        ),
    ],
)
def test_options_are_translated(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    _, options = translated(**fields)
    assert {name: options.get(name) for name in expected} == expected


def test_adaptive_thinking_is_left_to_the_model() -> None:
    _, options = translated(thinking={"type": "adaptive"}, output_config={"effort": "high"})
    assert "think" not in options


def one_block(**block: Any) -> list[Any]:
    return [{"role": "user", "content": [block]}]


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": "Hello!"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [HELLO, {"role": "assistant", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": one_block(type="text", text=5)}, "messages[0].content[0].text"),
        ({"messages": one_block(type="document", source={})}, "messages[0].content[0]"),
        ({"messages": one_block(type="tool_use", id="1", name="f", input={})}, "messages[0].content[0]"),
        ({"messages": one_block(type="image", source={"type": "url"})}, "messages[0].content[0].source"),
        (
            {"messages": one_block(type="image", source={"type": "base64", "media_type": "image/bmp"})},
            "messages[0].content[0].source.media_type",
        ),
        (
            {"messages": one_block(type="image", source={**PIXEL["source"], "data": "?"})},  # type: ignore[dict-item]
            "messages[0].content[0].source",
        ),
        ({"messages": one_block(type="tool_result", tool_use_id="1")}, "messages[0].content[0].tool_use_id"),
        (
            {
                "messages": [
                    HELLO,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "1", "name": "f", "input": "{}"}],
                    },
                ]
            },
            "messages[1].content[0].input",
        ),
        (
            {"messages": [HELLO, {"role": "system", "content": "x", "clear_at": "now"}]},
            "messages[1].clear_at",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "mcp"}}]}]},
            "messages[0].content[0].tool",
        ),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"system": 5}, "system"),
        ({"system": [PIXEL]}, "system[0]"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{"input_schema": {}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{**TOOL, "description": 5}]}, "tools[0].description"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
            "tool_choice.disable_parallel_tool_use",
        ),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": ["low"]}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ApiError) as refused:
        translated(**fields)
    assert (refused.value.status, refused.value.parameter) == (400, parameter)
    assert parameter in refused.value.message
    assert "\n" not in refused.value.message


# --- answers --------------------------------------------------------------------------------------


def chunk(done_reason: str = "", **message: Any) -> Chunk:
    """A chunk; the last one if it has a reason."""
    last = {"done": True, "done_reason": done_reason, "prompt_eval_count": 7, "eval_count": 5}
    return {"message": message, **(last if done_reason else {"done": False})}  # type: ignore[typeddict-item]


def read_by_client(content: bytes) -> anthropic.Anthropic:
    """The official client, with a server that answers every request with these events."""
    response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    http = anthropic.DefaultHttpxClient(transport=httpx2.MockTransport(lambda _: response))
    return anthropic.Anthropic(api_key="none", base_url="http://gateway", http_client=http, max_retries=0)


def streamed(chunks: Sequence[Chunk], **fields: Any) -> tuple[list[str], Any]:
    """The types of the events, and the message that the client joins from them."""
    writer = MessageWriter({**BODY, **fields})
    content = writer.waiting() + b"".join(map(writer.chunk, chunks))
    with read_by_client(content).messages.stream(model="demo", max_tokens=9, messages=[]) as stream:
        return [event.type for event in stream], stream.get_final_message()


def test_thinking_text_and_tools_become_blocks_in_their_order() -> None:
    calls = [
        {"id": "call_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "time", "arguments": "{broken"}},
    ]
    chunks = [
        chunk(thinking="Let me"),
        chunk(thinking=" think."),
        chunk(content="I will"),
        chunk(content=" look."),
        chunk("tool_calls", tool_calls=calls),
    ]
    types, message = streamed(chunks)
    assert [kind for kind in types if kind.startswith(("message", "content"))] == [
        "message_start",
        *("content_block_start", *["content_block_delta"] * 3, "content_block_stop"),
        *("content_block_start", *["content_block_delta"] * 2, "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop") * 2,
        "message_delta",
        "message_stop",
    ]
    thinking, text, first, second = message.content
    assert (thinking.thinking, bool(thinking.signature)) == ("Let me think.", True)
    assert text.text == "I will look."
    assert (first.id, first.name, first.input) == ("call_1", "weather", {"city": "Oslo"})
    assert (second.name, second.input) == ("time", {"arguments": "{broken"})
    assert second.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 5)

    whole = MessageWriter(BODY).whole(Completion.from_chunks(chunks))
    assert without_ids(whole) == without_ids(json.loads(message.to_json(exclude_unset=True)))


def test_tokens_that_were_not_processed_again_are_counted_apart() -> None:
    last: Chunk = {**chunk("stop"), "_routing": {"cached_tokens": 5}}
    _, message = streamed([chunk(content="a"), last])
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (2, 5)
    whole = MessageWriter(BODY).whole(Completion.from_chunks([chunk(content="a"), last]))
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (2, 5)


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "content": blocks, "id": ""}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (chunk("stop"), "end_turn"),
        (chunk("length"), "max_tokens"),
        ({**chunk("length"), "_context_full": 4096}, "model_context_window_exceeded"),
        ({**chunk("stop"), "_stopped_by": "END"}, "stop_sequence"),
    ],
)
def test_reason_of_the_end_is_named(last: Chunk, expected: str) -> None:
    _, message = streamed([chunk(content="Hi"), last])
    assert (message.stop_reason, message.stop_sequence) == (expected, last.get("_stopped_by"))
    assert MessageWriter(BODY).whole(Completion.from_chunks([last]))["stop_reason"] == expected


def test_thinking_can_be_hidden() -> None:
    _, message = streamed(
        [chunk(thinking="secret"), chunk("stop", content="Hi")], thinking={"type": "enabled", "display": "omitted"}
    )
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == ""


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "1.0", "\u0661", "", "00001" + "9" * 5000])
def test_a_page_of_models_has_1_to_1000(limit: str) -> None:
    with pytest.raises(ApiError, match="must be 1 to 1000"):
        page([], {"limit": limit})


def test_an_edit_of_the_context_is_not_claimed() -> None:
    whole = MessageWriter({**BODY, "context_management": {}}).whole(Completion.from_chunks([chunk("stop")]))
    assert whole["context_management"] == {"applied_edits": []}


def test_an_error_within_an_answer_is_raised_by_the_client() -> None:
    writer = MessageWriter(BODY)
    content = writer.chunk(chunk(content="Hi")) + writer.failed(
        ApiError(503, "unavailable", "the worker was lost")
    )
    with (
        read_by_client(content).messages.stream(model="demo", max_tokens=9, messages=[]) as stream,
        pytest.raises(anthropic.APIStatusError, match="the worker was lost") as raised,
    ):
        stream.until_done()
    assert raised.value.type == "overloaded_error"


def test_a_prompt_that_is_too_long_is_reported_as_clients_recognize_it() -> None:
    refusal = MessageWriter(BODY).refusal(ApiError(400, "context_length", "demo: 5,000 tokens"))
    assert refusal == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long: demo: 5,000 tokens"},
    }
