"""OpenAI's Responses API (https://platform.openai.com/docs/api-reference/responses), without stored responses.

An answer has items: reasoning, a message, or the call of a function. Events announce, fill and close each of them,
and the last event has the whole response again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.gateway.answers import AnswerWriter, event, json_bytes
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, model_of
from sollol_nb.gateway.failures import ApiError, Kind
from sollol_nb.gateway.gateway import answer, prompt_tokens
from sollol_nb.gateway.openai_parts import error_shape, usage_of, wire_call
from sollol_nb.gateway.responses_parts import checked_fields, messages_of, options_of, wants_summary
from sollol_nb.runtime.amounts import shown

_REPEATED = (
    *("instructions", "max_output_tokens", "metadata", "reasoning", "temperature", "text", "tool_choice", "tools"),
    *("top_p", "truncation", "user"),
)
"""The fields of a request that its response has, too."""
_DEFAULTS: Mapping[str, Any] = {
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
}
_EMPTY_TEXT = b'""}\n\n'
_CODES: Mapping[Kind, str] = {
    "busy": "rate_limit_exceeded",
    "context_length": "context_length_exceeded",
    "invalid": "invalid_prompt",
}


class ResponseWriter(AnswerWriter):
    """The events of a `response`, or a whole one.

    Args:
        body: of the request, checked.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": body["model"],
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "usage": None,
            **{name: body.get(name) for name in _REPEATED},
        }
        self._response |= {
            name: default if body.get(name) is None else body[name] for name, default in _DEFAULTS.items()
        }
        self._has_summary = wants_summary(body)
        self._events = 0
        self._open: _TextItem | None = None
        self._head = b""

    def chunk(self, chunk: Chunk) -> bytes:
        events = [self._begin()]
        message = chunk.get("message") or {}
        if thinking := message.get("thinking"):
            events.append(self._text("reasoning", thinking))
        if text := message.get("content"):
            events.append(self._text("message", text))
        for call in message.get("tool_calls") or ():
            events.append(self._call(call))
        if chunk.get("done"):
            events.append(self._end(chunk))
        return b"".join(events)

    def waiting(self) -> bytes:
        return self._begin() or super().waiting()

    def failed(self, error: ApiError) -> bytes:
        code = _CODES.get(error.kind, "server_error")
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=self._response)

    def whole(self, completion: Completion) -> Any:
        self.chunk({**completion, "done": True})  # type: ignore[typeddict-item]
        return self._response

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)

    def _event(self, kind: str, **data: Any) -> bytes:
        self._events += 1
        return event({"type": kind, "sequence_number": self._events - 1, **data}, kind)

    def _begin(self) -> bytes:
        if self._events:
            return b""
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self._response) for kind in kinds)

    def _text(self, kind: str, text: str) -> bytes:
        item, opened = self._open, b""
        if item is None or item.kind != kind:
            opened = self._close()
            item = self._open = _TextItem(kind, as_summary=self._has_summary)
            opened += self._item_event("added", item.shape("in_progress"))
            opened += self._event(f"response.{item.part_event}.added", **self._place(item), part=item.part())
            kind = f"response.{item.text_event}.delta"
            delta = event({"type": kind, **self._place(item), **item.more, "delta": ""}, kind)
            self._head = delta.removesuffix(_EMPTY_TEXT)  # only the text and the number change from now on
        item.pieces.append(text)
        self._events += 1
        return opened + self._head + json_bytes(text) + b',"sequence_number":%d}\n\n' % (self._events - 1)

    def _close(self, status: str = "completed") -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        events = [
            self._event(f"response.{item.text_event}.done", **self._place(item), text=item.text, **item.more),
            self._event(f"response.{item.part_event}.done", **self._place(item), part=item.part()),
            self._item_done(item.shape(status)),
        ]
        return b"".join(events)

    def _call(self, call: Mapping[str, Any]) -> bytes:
        wire = wire_call(call)
        arguments = wire["function"]["arguments"]
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "completed",
            "call_id": wire["id"],
            "name": wire["function"]["name"],
            "arguments": arguments,
        }
        closed = self._close()
        place = {"item_id": item["id"], "output_index": len(self._response["output"])}
        events = [
            self._item_event("added", {**item, "status": "in_progress", "arguments": ""}),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, arguments=arguments),
            self._item_done(item),
        ]
        return closed + b"".join(events)

    def _item_event(self, what: str, item: Mapping[str, Any]) -> bytes:
        return self._event(f"response.output_item.{what}", output_index=len(self._response["output"]), item=item)

    def _item_done(self, item: dict[str, Any]) -> bytes:
        done = self._item_event("done", item)
        self._response["output"].append(item)
        return done

    def _place(self, item: _TextItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._response["output"]), item.index_name: 0}

    def _end(self, last: Mapping[str, Any]) -> bytes:
        status = "incomplete" if last.get("done_reason") == "length" else "completed"
        closed = self._close(status)
        usage = usage_of(last)
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }
        return closed + self._event(f"response.{status}", response=self._response)


class _TextItem:
    """An item that has text: a message, or reasoning, whose text is a summary where the client wants one.

    Attributes:
        kind: `message` or `reasoning`.
        part_event, text_event: what the names of its events have.
        index_name: of its only part.
        more: what else its events of text have.
        pieces: of its text, so far.
    """

    def __init__(self, kind: str, *, as_summary: bool) -> None:
        self.kind = kind
        self.id = f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}"
        self.pieces: list[str] = []
        self._is_summary = kind == "reasoning" and as_summary
        self.part_event = "reasoning_summary_part" if self._is_summary else "content_part"
        self.index_name = "summary_index" if self._is_summary else "content_index"
        self.more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        if kind == "message":
            self.text_event = "output_text"
        else:
            self.text_event = "reasoning_summary_text" if self._is_summary else "reasoning_text"

    @property
    def text(self) -> str:
        """All of its text so far."""
        return "".join(self.pieces)

    def part(self) -> dict[str, Any]:
        """The part that has the text."""
        if self.kind == "message":
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._is_summary else "reasoning_text", "text": self.text}

    def shape(self, status: str) -> dict[str, Any]:
        """The item as JSON data; it has no parts while it has no text."""
        parts = [self.part()] if self.text else []
        shape: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "message":
            return {**shape, "role": "assistant", "content": parts}
        return {**shape, "summary": parts} if self._is_summary else {**shape, "summary": [], "content": parts}


def _call(request: Request, body: dict[str, Any], fields: Mapping[str, Any]) -> ChatCall:
    call = ChatCall(
        model=model_of(request, body),
        messages=messages_of(fields),
        options=options_of(fields),
        stream=fields.get("stream", False),
    )
    return apply_headers(request, call, body)


async def _create(request: Request) -> ASGIApp:
    body = await read_json(request)
    call = _call(request, body, checked_fields(body))
    return answer(request, call, ResponseWriter(body), api="openai")


async def _count_tokens(request: Request) -> Response:
    body = await read_json(request)
    call = _call(request, body, checked_fields(body, only_counts=True))
    tokens = await prompt_tokens(request, call)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})


async def _stored(request: Request) -> Response:
    path = shown(request.scope["path"])
    raise ApiError(
        404, "not_found", f"{path}: this gateway keeps no responses; send the whole conversation as input"
    )


ROUTES: list[BaseRoute] = [
    Route("/v1/responses", _create, methods=["POST"]),
    Route("/v1/responses/input_tokens", _count_tokens, methods=["POST"]),
    Route("/v1/responses/{path:path}", _stored, methods=["GET", "POST", "DELETE"]),
]
