"""Anthropic's API (https://docs.anthropic.com/en/api/messages): messages, and the number of their tokens.

Tokens of a prompt are known only once it was processed, so a stream's first event has none, and the last has all.
Thinking has a signature only because clients require one: nothing is signed, and no signature is checked.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import CONTEXT_FULL, STOPPED_BY, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.gateway.answers import AnswerWriter, event, json_bytes
from sollol_nb.gateway.anthropic_messages import Conversation
from sollol_nb.gateway.anthropic_parts import checked_fields, options_of
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, model_of
from sollol_nb.gateway.failures import ApiError, Kind
from sollol_nb.gateway.gateway import answer, prompt_tokens
from sollol_nb.gateway.openai_parts import cached_tokens_of, call_arguments

_SIGNATURE = "unsigned"
_ERROR_TYPES: Mapping[Kind, str] = {
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
    "unavailable": "overloaded_error",
    "timeout": "timeout_error",
    "internal": "api_error",
}
_TEXT_END = b"}}\n\n"
_EMPTY_TEXT = b'""' + _TEXT_END
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def error_shape(error: ApiError) -> Any:
    """An error as Anthropic's API writes it."""
    message = error.message
    if error.kind == "context_length":
        message = f"prompt is too long: {message}"  # how clients recognize that they must shorten it
    kind = _ERROR_TYPES.get(error.kind, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessageWriter(AnswerWriter):
    """The events of a `message`, or a whole one.

    A message has blocks: thinking, text, or the use of a tool. A block ends where one of another kind begins.

    Args:
        fields: of the request, checked.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model: str = fields["model"]
        self._shows_thinking = fields.get("thinking", {}).get("display") != "omitted"
        self._edits: dict[str, Any] = {}
        if "context_management" in fields:
            self._edits["context_management"] = {"applied_edits": []}
        self._has_begun = False
        self._blocks = 0
        self._open = ""
        self._head = b""
        self._has_called = False

    def chunk(self, chunk: Chunk) -> bytes:
        events = [self._begin()]
        message = chunk.get("message") or {}
        if thinking := message.get("thinking"):
            events.append(self._opened("thinking"))
            if self._shows_thinking:
                events.append(self._piece(thinking))
        if text := message.get("content"):
            events += self._opened("text"), self._piece(text)
        for call in message.get("tool_calls") or ():
            events.append(self._tool_use(_tool_use(call)))
        if chunk.get("done"):
            events += self._closed(), self._end(chunk)
        return b"".join(events)

    def waiting(self) -> bytes:
        return self._begin() + event({"type": "ping"}, "ping")

    def failed(self, error: ApiError) -> bytes:
        return event(error_shape(error), "error")

    def whole(self, completion: Completion) -> Any:
        calls = completion["message"].get("tool_calls") or ()
        content: list[dict[str, Any]] = []
        if completion.thinking:
            thinking = completion.thinking if self._shows_thinking else ""
            content.append({"type": "thinking", "thinking": thinking, "signature": _SIGNATURE})
        if completion.text:
            content.append(_empty_block("text") | {"text": completion.text})
        content += map(_tool_use, calls)
        self._has_called = bool(calls)
        return {**self._message(content), **self._stop(completion), "usage": _usage(completion), **self._edits}

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        unknown = {"stop_reason": None, "stop_sequence": None, "usage": _usage({})}
        return event({"type": "message_start", "message": {**self._message([]), **unknown}}, "message_start")

    def _opened(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        closed = self._closed()
        self._open = kind
        # Only the text changes from one event to the next.
        self._head = self._delta({"type": f"{kind}_delta", kind: ""}).removesuffix(_EMPTY_TEXT)
        return closed + self._start(_empty_block(kind))

    def _piece(self, text: str) -> bytes:
        return self._head + json_bytes(text) + _TEXT_END

    def _closed(self) -> bytes:
        if not self._open:
            return b""
        signed = self._open == "thinking"
        signature = self._delta({"type": "signature_delta", "signature": _SIGNATURE}) if signed else b""
        self._open = ""
        self._blocks += 1
        return signature + event({"type": "content_block_stop", "index": self._blocks - 1}, "content_block_stop")

    def _tool_use(self, block: dict[str, Any]) -> bytes:
        self._has_called = True
        arguments = json.dumps(block["input"], ensure_ascii=False)
        opened = self._closed() + self._start({**block, "input": {}})
        self._open = "tool_use"
        return opened + self._delta({"type": "input_json_delta", "partial_json": arguments}) + self._closed()

    def _start(self, block: dict[str, Any]) -> bytes:
        data = {"type": "content_block_start", "index": self._blocks, "content_block": block}
        return event(data, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._blocks, "delta": delta}
        return event(data, "content_block_delta")

    def _end(self, chunk: Mapping[str, Any]) -> bytes:
        delta = {"type": "message_delta", "delta": self._stop(chunk), "usage": _usage(chunk), **self._edits}
        return event(delta, "message_delta") + event({"type": "message_stop"}, "message_stop")

    def _stop(self, last: Mapping[str, Any]) -> dict[str, Any]:
        reason, stopped_by = _STOP_REASONS.get(last.get("done_reason", ""), "end_turn"), last.get(STOPPED_BY)
        if reason == "max_tokens":  # the last tool call may be incomplete
            reason = "model_context_window_exceeded" if last.get(CONTEXT_FULL) else reason
        elif self._has_called:
            reason = "tool_use"
        elif stopped_by:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stopped_by, "stop_details": None}


def _empty_block(kind: str) -> dict[str, Any]:
    if kind == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    call_id = call.get("id") or f"toolu_{uuid.uuid4().hex}"
    return {"type": "tool_use", "id": call_id, "name": call["function"]["name"], "input": call_arguments(call)}


def _usage(last: Mapping[str, Any]) -> dict[str, int]:
    cached = cached_tokens_of(last)
    return {
        # In this API the prompt is the sum of the three.
        "input_tokens": max(0, (last.get("prompt_eval_count") or 0) - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": last.get("eval_count") or 0,
    }


def _call(request: Request, body: dict[str, Any], fields: Mapping[str, Any]) -> ChatCall:
    conversation = Conversation(fields)
    call = ChatCall(
        model=model_of(request, body),
        messages=conversation.messages,
        options=options_of(fields, conversation.tools),
        stream=fields.get("stream", False),
    )
    return apply_headers(request, call, body)


async def _messages(request: Request) -> ASGIApp:
    body = await read_json(request)
    fields = checked_fields(body)
    return answer(request, _call(request, body, fields), MessageWriter(fields), api="anthropic")


async def _count_tokens(request: Request) -> Response:
    body = await read_json(request)
    call = _call(request, body, checked_fields(body, needs_max_tokens=False))
    return JSONResponse({"input_tokens": await prompt_tokens(request, call)})


ROUTES: list[BaseRoute] = [
    Route("/v1/messages", _messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", _count_tokens, methods=["POST"]),
]
