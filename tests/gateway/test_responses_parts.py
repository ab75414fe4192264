"""What bodies of the Responses API say, and the events of an answer as OpenAI's client reads them. No engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.option_checks import check_options
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.responses_api import ResponseWriter
from sollol_nb.gateway.responses_parts import checked_fields, messages_of, options_of

BODY: dict[str, Any] = {"model": "demo", "input": "Hello!"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": "{}"}
PIXEL = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}


def translated(**fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and options of a body, which the router's own checks accept."""
    checked = checked_fields({**BODY, **fields})
    messages, options = messages_of(checked), options_of(checked)
    check_messages(messages)
    check_options(options)
    return messages, options


def test_conversation_that_a_client_sends_back_is_translated() -> None:
    messages, options = translated(
        instructions="Be brief.",
        tools=[TOOL],
        input=[
            {"role": "developer", "content": "No jokes."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}, PIXEL]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            },
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
            },
            {**CALL, "arguments": '{"city": "Oslo"}'},
            {**CALL, "id": "fc_2", "call_id": "call_2"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "call_2", "output": [PIXEL]},
            {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        ],
    )
    assert messages == [
        {"role": "system", "content": "Be brief.\nNo jokes."},
        {"role": "user", "content": "Weather?", "images": ["aGk="]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "thinking": "Hm.",
            "tool_calls": [
                {"id": "call_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
                {"id": "call_2", "function": {"name": "weather", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "sunny", "tool_name": "weather", "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "tool_name": "weather", "tool_call_id": "call_2"},
        {"role": "user", "content": "", "images": ["aGk="]},
    ]
    assert options["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_output_tokens": 9, "temperature": 0, "top_p": 1}, {"max_tokens": 9, "temperature": 0, "top_p": 1}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tool_choice": "required"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"reasoning": {"effort": "none"}}, {"think": False}),
        ({"reasoning": {"effort": "medium", "summary": "auto"}}, {"think": "medium"}),
        ({"text": {"format": {"type": "json_object"}}}, {"format": "json"}),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}, {"format": SCHEMA}),
        ({"truncation": "auto"}, {"overflow": "drop_oldest"}),
        (
            {
                **{"store": True, "background": False, "metadata": {}, "user": "me", "service_tier": "auto"},
                **{"previous_response_id": None, "include": ["reasoning.encrypted_content"]},
            },
            {"think": None, "format": None},
        ),
    ],
)
def test_options_are_translated(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    _, options = translated(**fields)
    assert {name: options.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": 5}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{**PIXEL, "image_url": "http://host/i.png"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [5]}]}, "input[0].summary"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "name": None}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "call_9", "output": "x"}]}, "input[0].call_id"),
        ({"input": [CALL, {"type": "function_call_output", "call_id": "call_1"}]}, "input[1].output"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stream": 1}, "stream"),
        ({"store": "no"}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"include": [5]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{**TOOL, "parameters": 5}]}, "tools[0].parameters"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"stop": "."}}, "text"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning"),
        ({"reasoning": {"summary": 5}}, "reasoning.summary"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ApiError) as refused:
        translated(**fields)
    assert (refused.value.status, refused.value.parameter) == (400, parameter)
    assert parameter in refused.value.message
    assert "\n" not in refused.value.message


# --- answers --------------------------------------------------------------------------------------

CALLS = [
    {"id": "call_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
    {"function": {"name": "time", "arguments": "{broken"}},
]


def chunk(done_reason: str = "", **message: Any) -> Chunk:
    """A chunk; the last one if it has a reason."""
    last = {"done": True, "done_reason": done_reason, "prompt_eval_count": 7, "eval_count": 5}
    return {"message": message, **(last if done_reason else {"done": False})}  # type: ignore[typeddict-item]


def read_by_client(content: bytes) -> openai.OpenAI:
    """The official client, with a server that answers every request with these events."""
    response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    http = openai.DefaultHttpxClient(transport=httpx2.MockTransport(lambda _: response))
    return openai.OpenAI(api_key="none", base_url="http://gateway/v1", http_client=http, max_retries=0)


def streamed(chunks: Sequence[Chunk], **fields: Any) -> list[Any]:
    """The events, as the client reads them; their numbers are checked."""
    writer = ResponseWriter({**BODY, **fields})
    content = writer.waiting() + writer.waiting() + b"".join(map(writer.chunk, chunks))
    events = list(read_by_client(content).responses.create(model="demo", input="Hello!", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


ANSWER = [
    chunk(thinking="Let me"),
    chunk(thinking=" think."),
    chunk(content="I will"),
    chunk(content=" look."),
    chunk("tool_calls", tool_calls=CALLS),
]


def test_tokens_that_were_not_processed_again_are_a_detail_of_the_input() -> None:
    last: Chunk = {**chunk("stop"), "_routing": {"cached_tokens": 5}}
    usage = streamed([chunk(content="a"), last])[-1].response.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (7, 5)


def test_reasoning_text_and_calls_become_items_in_their_order() -> None:
    events = streamed(ANSWER)
    calls = (
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
    )
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *(*calls, *calls, "completed"),
    ]
    response = events[-1].response
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text == "Let me think."
    assert message.content[0].text == response.output_text == "I will look."
    assert (first.call_id, first.name, first.arguments) == ("call_1", "weather", '{"city": "Oslo"}')
    assert second.arguments == "{broken"
    assert response.status == "completed"
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 5, 12)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == response.output

    whole = ResponseWriter(BODY).whole(Completion.from_chunks(ANSWER))
    assert without_ids(whole) == without_ids(json.loads(response.to_json(exclude_unset=True)))


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    return {**response, "output": items, "id": "", "created_at": 0}


def test_clients_stream_helper_reads_the_events() -> None:
    writer = ResponseWriter(BODY)
    content = b"".join(map(writer.chunk, ANSWER))
    with read_by_client(content).responses.stream(model="demo", input="Hello!") as stream:
        assert stream.get_final_response().output_text == "I will look."


def test_thoughts_are_a_summary_where_the_client_wants_one() -> None:
    events = streamed([*ANSWER[:4], chunk("stop")], reasoning={"summary": "auto"})
    assert [event.type.removeprefix("response.") for event in events if "reasoning" in event.type] == [
        "reasoning_summary_part.added",
        *["reasoning_summary_text.delta"] * 2,
        *("reasoning_summary_text.done", "reasoning_summary_part.done"),
    ]
    assert events[-1].response.output[0].summary[0].text == "Let me think."


def test_answer_that_is_cut_is_incomplete() -> None:
    response = streamed([chunk("length", content="I wi")])[-1].response
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"


def test_an_error_within_an_answer_fails_the_response() -> None:
    writer = ResponseWriter(BODY)
    content = writer.chunk(chunk(content="Hi")) + writer.failed(
        ApiError(503, "unavailable", "the worker was lost")
    )
    *_, last = read_by_client(content).responses.create(model="demo", input="Hello!", stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "the worker was lost")


def test_response_repeats_what_was_requested() -> None:
    whole = ResponseWriter({**BODY, "tools": [TOOL], "temperature": 0.5}).whole(
        Completion.from_chunks([chunk("stop")])
    )
    assert (whole["tools"], whole["temperature"], whole["tool_choice"]) == ([TOOL], 0.5, "auto")
    assert whole["store"] is False
    assert ResponseWriter({**BODY, "reasoning": None, "tools": None}).whole(Completion())["tools"] == []
