"""Every field of OpenAI's APIs is followed, or refused by name before anything is loaded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.gateway.access import AccessRules
from sollol_nb.gateway.keys import Key, Keys, add_key
from sollol_nb.gateway.openai_api import ChatWriter, CompletionWriter
from sollol_nb.gateway.openai_completions import TextWriter
from tests.support.engines import run
from tests.support.gateway import gateway_without_engines

HELLO = [{"role": "user", "content": "Hello!"}]
CHAT: dict[str, Any] = {"model": "nowhere", "messages": HELLO}
COMPLETION: dict[str, Any] = {"model": "nowhere", "prompt": "Once upon"}
EMBEDDING: dict[str, Any] = {"model": "nowhere", "input": "Once upon"}
FUNCTION = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"city": "Rome"}'}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def said(message: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [message]}


def part(content: Any) -> dict[str, Any]:
    return said({"role": "user", "content": [content]})


# The fields, and a part of the error message, which names them as the client does.
WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"model": 7}, "model"),
    ({"model": " "}, "model"),
    ({"messages": "Hello!"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [7]}, "messages[0]"),
    (said({"content": "Hello!"}), "messages[0]"),
    (said({"role": "judge", "content": "Hello!"}), "messages[0]"),
    (said({"role": "user"}), "messages[0]"),
    (said({"role": "user", "content": 7}), "messages[0].content"),
    (said({"role": "user", "content": "Hello!", "name": 7}), "messages[0]"),
    (said({"role": "function", "name": "now", "content": "noon"}), "function_call"),
    (said({"role": "assistant", "content": None, "function_call": {"name": "now"}}), "function_call"),
    (said({"role": "assistant", "tool_calls": [7]}), "tool_calls"),
    (
        said({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}),
        "arguments",
    ),
    (part("Hello!"), "messages[0].content[0]"),
    (part({"type": "text", "text": 7}), "messages[0].content[0]"),
    (part({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "input_audio"),
    (part({"type": "file", "file": {"file_id": "f"}}), "file"),
    (part({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret.png"}}), "has an image URL"),
    (part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "has an image URL"),
    (part({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}}), "not base64"),
    (part({"type": "image_url"}), "image_url"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": "small"}, "min_p"),
    ({"seed": "x"}, "seed"),
    ({"stop": 7}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"presence_penalty": []}, "presence_penalty"),
    ({"frequency_penalty": True}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**12}, "from 1 to 2147483647"),
    ({"max_completion_tokens": "many"}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "not both"),
    ({"n": 2}, "n=2 must be 1"),
    ({"n": True}, "n=True must be 1"),
    ({"logit_bias": {"hello": 100}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": FUNCTION}, "tools"),
    ({"tools": [7]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "web_search"),
    ({"tools": [{"type": "function", "function": {"name": 7}}]}, "tools[0].function"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "description": 7}}]},
        "tools[0].function.description",
    ),
    ({"tools": [FUNCTION], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [FUNCTION], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "grammar"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": 7}}, "response_format"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"reasoning_effort": {}}, "reasoning_effort"),
    ({"chat_template_kwargs": {"language": "x"}}, "chat_template_kwargs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"functions": [{"name": "f"}]}, "give tools"),
    ({"function_call": "auto"}, "give tool_choice"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"verbosity": "low"}, "verbosity"),
    ({"keep_alive": "soon"}, "keep_alive"),
    ({"recovery": "slow"}, "recovery"),
    ({"priority": "huge"}, "priority"),
    ({"priority": []}, "priority"),
    ({"temprature": 1}, "did you mean temperature"),
    ({"x" * 100_000: 1}, "unknown field"),
]
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": [1, 2, 3]}, "lists of tokens"),
    ({"prompt": [[1, 2, 3]]}, "lists of tokens"),
    ({"prompt": ["a", "b"]}, "prompt has 2 texts"),
    ({"suffix": 7}, "suffix"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"n": 2}, "n=2 must be 1"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"stream": 1}, "stream"),
    ({"messages": HELLO}, "messages"),
]
GOOD_COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": ["Once"], "best_of": 1, "n": 1, "echo": False, "suffix": "", "logprobs": 2, "user": "me"},
    {"max_tokens": 5, "logit_bias": {"5": -100}, "seed": 3, "stop": ["a", "b"]},
]
WRONG_EMBEDDINGS: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 7}, "input"),
    ({"input": ["a", ""]}, "empty text"),
    ({"input": [1, 2, 3]}, "lists of tokens"),
    ({"input": [[1, 2, 3]]}, "lists of tokens"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"encoding_format": []}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": "few"}, "dimensions"),
    ({"truncate": "no"}, "truncate"),
    ({"keep_alive": []}, "keep_alive"),
    ({"temperature": 1}, "temperature"),
]
GOOD_EMBEDDINGS: list[dict[str, Any]] = [
    {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 64, "user": "me", "keep_alive": "5m"},
    {"truncate": True, "priority": 8, "encoding_format": "float"},
]
GOOD_CHATS: list[dict[str, Any]] = [
    {"n": 1, "logit_bias": {}, "stop": [], "tools": [], "temperature": None, "modalities": ["text"]},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "me"},
    {"reasoning_effort": "none", "top_k": 40, "min_p": 0.1, "keep_alive": "5m", "priority": "high"},
    {"tools": [FUNCTION], "tool_choice": "none", "parallel_tool_calls": True},
    {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": True}},
    {"response_format": {"type": "text"}, "max_completion_tokens": 5, "max_tokens": 5},
    part(PICTURE),
    part({"type": "text", "text": "Hello!"}),
    {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "When?"}]},
            {
                **{"role": "assistant", "content": None, "refusal": None, "audio": None, "annotations": []},
                **{"function_call": None, "tool_calls": [CALL]},
            },
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Noon."}]},
        ],
        "tools": [FUNCTION],
    },
]


def errors_of(path: str, bodies: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """The status and the error of the gateway's response to each body."""

    async def post() -> list[tuple[int, Any]]:
        async with gateway_without_engines() as client:
            responses = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
        return [(response.status_code, response.json()["error"]) for response in responses]

    return run(post())


def assert_refused(path: str, good: dict[str, Any], wrong: list[tuple[dict[str, Any], str]]) -> None:
    """Each wrong field is refused, and the message names it."""
    errors = errors_of(path, [good | changed for changed, _ in wrong])
    for (changed, named), (status, error) in zip(wrong, errors, strict=True):
        message = error["message"]
        assert (status, error["type"]) == (400, "invalid_request_error"), (str(changed)[:200], message)
        assert named in message, (str(changed)[:200], message)
        assert message.isprintable(), message
        assert len(message) < 400, message


def test_each_wrong_field_of_a_chat_is_named() -> None:
    assert_refused("/v1/chat/completions", CHAT, WRONG_CHATS)


def assert_taken(path: str, good: dict[str, Any], taken: list[dict[str, Any]]) -> None:
    """Each of these fields is taken, so that only the model is missing."""
    for body, (status, error) in zip(taken, errors_of(path, [good | fields for fields in taken]), strict=True):
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model"), (body, error)


def test_what_a_chat_may_have_is_not_refused() -> None:
    assert_taken("/v1/chat/completions", CHAT, GOOD_CHATS)


def test_each_wrong_field_of_a_completion_is_named() -> None:
    assert_refused("/v1/completions", COMPLETION, WRONG_COMPLETIONS)


def test_what_a_completion_may_have_is_not_refused() -> None:
    assert_taken("/v1/completions", COMPLETION, GOOD_COMPLETIONS)


def test_each_wrong_field_of_embeddings_is_named() -> None:
    assert_refused("/v1/embeddings", EMBEDDING, WRONG_EMBEDDINGS)


def test_what_embeddings_may_have_is_not_refused() -> None:
    assert_taken("/v1/embeddings", EMBEDDING, GOOD_EMBEDDINGS)


def test_a_path_that_does_not_exist_is_not_taken_for_a_model() -> None:
    ((status, error),) = errors_of("/v1/nothing", [CHAT])
    assert (status, error["code"]) == (404, None)


def test_counting_with_an_unknown_model_is_not_an_internal_error() -> None:
    ((status, error),) = errors_of("/v1/responses/input_tokens", [{"model": "nowhere", "input": "Hello!"}])
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_the_client_raises_its_own_errors_for_keys_and_limits(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = add_key(Key(name="ada", requests_per_minute=1), file)

    async def ask() -> None:
        async with gateway_without_engines(AccessRules(requires_key=True), Keys(file)) as http:
            options: Any = {"base_url": "http://127.0.0.1:11440/v1", "http_client": http, "max_retries": 0}
            with pytest.raises(openai.AuthenticationError) as refused:
                await openai.AsyncOpenAI(api_key="wrong", **options).models.list()
            assert refused.value.code == "invalid_api_key"
            client = openai.AsyncOpenAI(api_key=key, **options)
            asked: Any = {"model": "nowhere", "messages": HELLO}
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(**asked)
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(**asked)
            assert limited.value.code == "rate_limit_exceeded"
            assert int(limited.value.response.headers["Retry-After"]) > 0

    run(ask())


# --- the form of answers --------------------------------------------------------------------------


def events_of(writer: CompletionWriter, chunks: list[Chunk]) -> list[Any]:
    """The events of an answer, parsed; comments and `[DONE]` as text."""
    sent = b"".join(map(writer.chunk, chunks)).decode()
    assert sent.endswith("\n\n")
    blocks = sent.removesuffix("\n\n").split("\n\n")
    return [json.loads(block[6:]) if block.startswith("data: {") else block for block in blocks]


def chunk(content: str = "", **more: Any) -> Chunk:
    done = {"done": True, "prompt_eval_count": 7, "eval_count": 3} if "done_reason" in more else {"done": False}
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return {"message": message, **done, **more}  # type: ignore[typeddict-item]


def deltas(events: list[Any]) -> list[Any]:
    return [event["choices"][0]["delta"] for event in events if isinstance(event, dict) and event["choices"]]


def test_the_events_of_an_answer_are_those_of_openai() -> None:
    writer = ChatWriter("llama3", has_usage=True)
    events = events_of(
        writer, [chunk("Hello"), chunk(' "you"\n'), chunk(done_reason="length", _routing={"cached_tokens": 6})]
    )
    assert deltas(events) == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": ' "you"\n'},
        {},
    ]
    first, *_, end, usage, done = events
    same = {"id": first["id"], "object": "chat.completion.chunk", "created": first["created"], "model": "llama3"}
    assert end == {
        **same,
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
        "usage": None,
    }
    assert usage == {
        **same,
        "choices": [],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 6},
        },
    }
    assert done == "data: [DONE]"
    assert all(event["usage"] is None and event["id"] == first["id"] for event in events[:-2])


def test_without_stream_options_no_event_has_a_usage() -> None:
    events = events_of(ChatWriter("m"), [chunk("a"), chunk(done_reason="stop")])
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, "stop"]
    assert not any("usage" in event for event in events[:-1])


def test_thoughts_and_tool_calls_have_their_own_deltas() -> None:
    calls = [
        {"id": "call_a", "function": {"name": "now", "arguments": {"city": "Rome"}}},
        {"function": {"name": "then", "arguments": {}}},
    ]
    events = events_of(
        ChatWriter("m"),
        [chunk(message={"thinking": "Hm."}), chunk(message={"tool_calls": calls}, done_reason="stop")],
    )
    _, thought, called, end = deltas(events)
    assert thought == {"reasoning_content": "Hm."}
    first, second = called["tool_calls"]
    assert first == {
        **{"index": 0, "id": "call_a", "type": "function"},
        "function": {"name": "now", "arguments": '{"city": "Rome"}'},
    }
    assert (second["index"], second["function"]) == (1, {"name": "then", "arguments": "{}"})
    assert second["id"].startswith("call_")
    assert end == {}
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_failover_shows_as_a_comment_and_once() -> None:
    lost: Any = {"failovers": [{"what": "worker 2 was\nlost"}]}
    chunks = [chunk("a", _routing={"failovers": []}), chunk("b", _routing=lost)]
    events = events_of(ChatWriter("m"), [*chunks, chunk(done_reason="stop", _routing=lost, _note="cut")])
    assert [event for event in events if isinstance(event, str)] == [
        ": sollol: worker 2 was lost",
        ": sollol: cut",
        "data: [DONE]",
    ]


def test_tokens_of_a_completion_have_their_places_in_the_text() -> None:
    likely: Any = [{"token": "Hel", "logprob": -0.1}, {"token": "Hey", "logprob": -3.0}]
    tokens: Any = [{**likely[0], "top_logprobs": likely}, {"token": "lo", "logprob": -0.2}]
    writer = TextWriter("m", has_usage=True)
    chunks = [chunk("Hel", logprobs=tokens[:1]), chunk("lo", logprobs=tokens[1:]), chunk(done_reason="length")]
    *events, end, usage, done = events_of(writer, chunks)
    assert [event["choices"][0]["text"] for event in events] == ["Hel", "lo"]
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [3]]
    assert (end["object"], end["choices"][0]["text"]) == ("text_completion", "")
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["total_tokens"] == 10
    assert done == "data: [DONE]"
    whole = writer.whole(Completion.from_chunks(chunks))
    assert whole["choices"][0]["text"] == "Hello"
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-0.1, -0.2],
        "top_logprobs": [{"Hel": -0.1, "Hey": -3.0}, {}],
        "text_offset": [0, 3],
    }


def test_the_whole_answer_has_the_same_parts() -> None:
    calls = [{"id": "call_a", "function": {"name": "now", "arguments": {}}}]
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    writer = ChatWriter("m")
    text = writer.whole(Completion.from_chunks([chunk("a"), chunk("b", logprobs=[token], done_reason="length")]))
    assert text["object"] == "chat.completion"
    assert text["usage"]["total_tokens"] == 10
    assert text["choices"][0]["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    assert text["choices"][0]["logprobs"]["content"] == [token]
    assert text["choices"][0]["finish_reason"] == "length"
    called = writer.whole(Completion.from_chunks([chunk(message={"tool_calls": calls}, done_reason="stop")]))
    assert called["choices"][0]["message"]["content"] is None
    assert called["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert called["choices"][0]["finish_reason"] == "tool_calls"
