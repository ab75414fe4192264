"""OpenAI's API (https://platform.openai.com/docs/api-reference): chat completions.

Thoughts are `reasoning_content`, as in llama-server and vLLM. Fields of llama.cpp that OpenAI's API does not have
(`top_k`, `min_p`, `enable_thinking` of `chat_template_kwargs`, ...) are accepted too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import DROPPED, NOTE, ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.option_checks import CHAT_OPTIONS, SAMPLING_OPTIONS, Values
from sollol_nb.gateway.answers import AnswerWriter, comment, event, json_bytes
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, model_of
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.gateway import answer
from sollol_nb.gateway.openai_parts import (
    A_LIST,
    AN_OBJECT,
    EFFORT,
    EFFORTS,
    ENGINE_OPTIONS,
    METADATA,
    PRIORITY,
    TEXT,
    TEXT_OR_OBJECT,
    YES_OR_NO,
    Fields,
    answer_format,
    check_names,
    content_of,
    error_shape,
    function_tool,
    maximum_tokens,
    only,
    tool_choice,
    usage_of,
    wire_call,
    without_empty,
)
from sollol_nb.runtime.amounts import is_whole_number, shown

PASSED_FIELDS: Mapping[str, Values] = {
    **{
        name: SAMPLING_OPTIONS[name]
        for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
    },
    "stop": Values(
        "a text, or a list of texts, none of them empty",
        lambda value: value == [] or SAMPLING_OPTIONS["stop"].is_valid(value),
    ),
    "logit_bias": CHAT_OPTIONS["logit_bias"],
    **ENGINE_OPTIONS,
}
"""The fields that are options of the router by the same name."""
ANSWER_FIELDS: Mapping[str, Values] = {
    "model": TEXT,
    "stream": YES_OR_NO,
    "stream_options": AN_OBJECT,
    "max_tokens": SAMPLING_OPTIONS["max_tokens"],
    "n": only(1, "a request gets one answer; send a second request for a second answer"),
    "priority": PRIORITY,
    **PASSED_FIELDS,
}
FIELDS = Fields(
    known={
        **ANSWER_FIELDS,
        "messages": Values("a list of messages, not empty", lambda value: isinstance(value, list) and bool(value)),
        "max_completion_tokens": SAMPLING_OPTIONS["max_tokens"],
        "tools": A_LIST,
        "tool_choice": TEXT_OR_OBJECT,
        "parallel_tool_calls": YES_OR_NO,
        "response_format": AN_OBJECT,
        "logprobs": YES_OR_NO,
        "top_logprobs": Values("0 to 20", lambda value: is_whole_number(value) and 0 <= value <= 20),
        "reasoning_effort": EFFORT,
        "chat_template_kwargs": AN_OBJECT,
        "modalities": only(["text"], "answers are text"),
        "verbosity": only("medium", "ask for short or long answers in a message"),
    },
    refused={
        "audio": "answers are text",
        "functions": "give tools",
        "function_call": "give tool_choice",
        "web_search_options": "the gateway has no web search; give a tool that searches",
    },
    ignored=METADATA | {"prediction", "store"},
    required=("model", "messages"),
)
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
_FINISH_REASONS = {"length": "length", "tool_calls": "tool_calls"}


class CompletionWriter(AnswerWriter):
    """Shared by the events and the whole answers of OpenAI's two completion APIs.

    Args:
        model: as the client names it.
        has_usage: whether an event with the usage follows the answer.
    """

    id_prefix = "chatcmpl"
    event_kind = "chat.completion.chunk"
    whole_kind = "chat.completion"

    def __init__(self, model: str, *, has_usage: bool = False) -> None:
        self._model = model
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._has_usage = has_usage
        self._failovers = 0
        # Only what is between these two changes from one event to the next.
        head = json_bytes(self._base(self.event_kind))[:-1]
        self._head = b"data: " + head + b',"choices":[{"index":0,'
        self._tail = b"}]" + (b',"usage":null' if has_usage else b"") + b"}\n\n"

    def failed(self, error: ApiError) -> bytes:
        return event(error_shape(error))

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, part: Any, *, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {**part, "logprobs": logprobs, "finish_reason": reason}
        return self._head + json_bytes(choice)[1:-1] + self._tail

    def _news(self, chunk: Chunk) -> bytes:
        """The failovers since the last chunk, as comments for people who read the stream."""
        failovers = chunk[ROUTING].get("failovers") or []
        news, self._failovers = failovers[self._failovers :], len(failovers)
        return b"".join(comment(failover["what"]) for failover in news)

    def _end(self, chunk: Chunk, part: Any, *, has_calls: bool = False) -> bytes:
        notes = (chunk.get(name) for name in (DROPPED, NOTE))
        sent = b"".join(comment(str(note)) for note in notes if note)
        sent += self._event(part, reason=finish_reason(chunk, has_calls=has_calls))
        if self._has_usage:
            sent += event({**self._base(self.event_kind), "choices": [], "usage": usage_of(chunk)})
        return sent + b"data: [DONE]\n\n"

    def _whole(self, completion: Completion, part: Any, logprobs: Any, *, has_calls: bool = False) -> Any:
        reason = finish_reason(completion, has_calls=has_calls)
        choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": reason}
        return {**self._base(self.whole_kind), "choices": [choice], "usage": usage_of(completion)}


class ChatWriter(CompletionWriter):
    """`chat.completion.chunk` events, or a `chat.completion`. Arguments are those of `CompletionWriter`."""

    def __init__(self, model: str, *, has_usage: bool = False) -> None:
        super().__init__(model, has_usage=has_usage)
        self._has_begun = False
        self._calls = 0
        self._content_head = self._head + b'"delta":{"content":'
        self._content_tail = b'},"logprobs":null,"finish_reason":null' + self._tail

    def chunk(self, chunk: Chunk) -> bytes:
        message: Mapping[str, Any] = chunk.get("message") or {}
        sent = b""
        if not self._has_begun:
            self._has_begun = True
            sent = self._event({"delta": {"role": "assistant", "content": ""}})
        if ROUTING in chunk:
            sent += self._news(chunk)
        if thoughts := message.get("thinking"):
            sent += self._event({"delta": {"reasoning_content": thoughts}})
        text, logprobs = message.get("content"), chunk.get("logprobs")
        if logprobs:
            sent += self._event({"delta": {"content": text or ""}}, logprobs=_logprobs(logprobs))
        elif text:
            sent += self._content_head + json_bytes(text) + self._content_tail
        if calls := message.get("tool_calls"):
            first, self._calls = self._calls, self._calls + len(calls)
            indexed = [{"index": at, **wire_call(call)} for at, call in enumerate(calls, first)]
            sent += self._event({"delta": {"tool_calls": indexed}})
        return sent + self._end(chunk, {"delta": {}}, has_calls=self._calls > 0) if chunk.get("done") else sent

    def whole(self, completion: Completion) -> Any:
        calls = completion["message"].get("tool_calls") or ()
        content = completion.text if completion.text or not calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if completion.thinking:
            message["reasoning_content"] = completion.thinking
        if calls:
            message["tool_calls"] = [wire_call(call) for call in calls]
        logprobs = _logprobs(completion.get("logprobs"))
        return self._whole(completion, {"message": message}, logprobs, has_calls=bool(calls))


def finish_reason(last: Mapping[str, Any], *, has_calls: bool) -> str:
    """Why an answer ended, in OpenAI's terms. Ollama's reason is "stop" also for tool calls. The last call of an
    answer that ended at its limit may be incomplete."""
    reason = _FINISH_REASONS.get(last.get("done_reason", ""), "stop")
    return "tool_calls" if has_calls and reason != "length" else reason


def _logprobs(tokens: Any) -> Any:
    """The tokens as `logprobs` has them; OpenAI's clients expect the fields that an engine may leave out."""
    known: dict[str, Any] = {"bytes": None, "top_logprobs": []}
    return {"content": [known | token for token in tokens], "refusal": None} if tokens else None


async def _chat(request: Request) -> ASGIApp:
    body = await read_json(request)
    fields = FIELDS.checked(body)
    has_usage = includes_usage(fields)
    call = ChatCall(
        model=model_of(request, body),
        messages=[_message(given, f"messages[{at}]") for at, given in enumerate(fields["messages"])],
        options=without_empty(_options(fields)),
        stream=fields.get("stream", False),
    )
    writer = ChatWriter(call.model, has_usage=has_usage)
    return answer(request, apply_headers(request, call, body), writer, api="openai")


def includes_usage(fields: Mapping[str, Any]) -> bool:
    """Whether the client wants an event with the usage. Raises ApiError if its `stream_options` are not known."""
    options = fields.get("stream_options", {})
    check_names(options, ("include_usage", "include_obfuscation"), "stream_options")
    wanted = options.get("include_usage")
    if not isinstance(wanted, bool | None):
        raise invalid(f"stream_options.include_usage={shown(wanted)} must be true or false", "stream_options")
    return bool(wanted)


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message in Ollama's shape; the router checks the rest. Fields of answers (`annotations`, ...) are dropped,
    since clients send messages back as they received them."""
    if not isinstance(given, dict):
        raise invalid(f'{where} must be an object with "role" and "content", not {shown(given)}', where)
    if given.get("function_call") or given.get("role") == "function":
        raise invalid(f"{where} has a function_call, which is not supported; give tool_calls", where)
    text, images = content_of(given.get("content"), where)
    if given.get("content") is None and given.get("tool_calls") is None and given.get("role") != "assistant":
        raise invalid(f'{where} needs "content"', f"{where}.content")
    message: dict[str, Any] = {"role": given.get("role"), "content": text or given.get("refusal") or ""}
    message |= {name: given[name] for name in _MESSAGE_TEXTS if given.get(name) is not None}
    if images:
        message["images"] = images
    if given.get("tool_calls") is not None:
        message["tool_calls"] = given["tool_calls"]
    return message


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The router's options for the fields of a body."""
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    passed = (*PASSED_FIELDS, "parallel_tool_calls", "logprobs", "top_logprobs")
    return {
        **{name: fields[name] for name in passed if name in fields},
        "max_tokens": maximum_tokens(fields, "max_completion_tokens", "max_tokens"),
        "tools": [_tool(tool, f"tools[{at}]") for at, tool in enumerate(fields.get("tools", ()))],
        "tool_choice": _tool_choice(fields.get("tool_choice")),
        "format": _format(fields.get("response_format")),
        "think": _think(fields),
    }


def _tool(given: Any, where: str) -> dict[str, Any]:
    kind = given.get("type", "function") if isinstance(given, dict) else None
    if kind != "function":
        raise invalid(f"{where} has type {shown(kind)}; only functions are supported", where)
    return function_tool(given.get("function"), f"{where}.function")


def _tool_choice(given: Any) -> Any:
    return given if given is None else tool_choice(given.get("function") if isinstance(given, dict) else given)


def _format(given: Any) -> str | dict[str, Any] | None:
    if given is None:
        return None
    kind, description = given.get("type"), given.get("json_schema")
    if kind == "json_object" and given.get("schema") is not None:  # as llama-server takes it
        kind, description = "json_schema", given
    return answer_format(kind, description, "response_format")


def _think(fields: Mapping[str, Any]) -> bool | str | None:
    effort, variables = fields.get("reasoning_effort"), fields.get("chat_template_kwargs", {})
    for name, value in variables.items():
        if name != "enable_thinking" or not isinstance(value, bool):
            raise invalid(
                f"chat_template_kwargs has {shown(name)}: {shown(value)}; only enable_thinking, true or false, is "
                "supported",
                "chat_template_kwargs",
            )
    return variables.get("enable_thinking") if effort is None else EFFORTS[effort]


ROUTES: list[BaseRoute] = [Route("/v1/chat/completions", _chat, methods=["POST"])]
