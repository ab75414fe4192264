"""Ollama's API (its `docs/api.md`, `api/types.go` and `server/routes.go`): answers and embeddings.

Differences from Ollama: it silently drops text that does not fit a model's context, while here this is an error
unless the request has `"truncate": true`; fields that cannot be followed are refused by name; and the vectors of
`/api/embeddings` have the length 1, as those of `/api/embed`. The answer to a request with the header
`X-Sollol-Routing: 1` also has this package's marks (`_routing`, `_dropped`, `_note`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.request import checked_timeout_s
from sollol_nb.gateway import ollama_models
from sollol_nb.gateway.answers import AnswerWriter, json_bytes
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, EmbedCall, apply_headers, key_of, model_of
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.gateway import answer
from sollol_nb.gateway.ollama_parts import checked_fields, error_shape, model_error
from sollol_nb.gateway.openai_parts import call_arguments, checked_base64
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.runtime.amounts import shown
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.text.short_names import short_name

MARKS_HEADER = "X-Sollol-Routing"
_PIECE = {"model", "created_at", "message", "done"}
_TEXT = {"role", "content"}
"""The keys of a chunk and its message with text only, as most chunks are."""
_DONE_REASONS = {"tool_calls": "stop"}
"""llama.cpp's reasons by Ollama's names."""


class _ChatWriter(AnswerWriter):
    """Lines of `/api/chat`, or its whole answer.

    Args:
        model: as the client names it.
        shows_marks: whether the client wants this package's marks.
    """

    media_type = "application/x-ndjson"
    _before_text = b',"message":{"role":"assistant","content":'
    _after_text = b'},"done":false}\n'

    def __init__(self, model: str, *, shows_marks: bool = False) -> None:
        self._model = model
        self._shows_marks = shows_marks
        # Only what is between these changes from one piece of text to the next.
        self._head = json_bytes({"model": model})[:-1] + b',"created_at":'

    def chunk(self, chunk: Chunk) -> bytes:
        message: Mapping[str, Any] = chunk.get("message") or {}
        if chunk.keys() == _PIECE and message.keys() == _TEXT and not chunk["done"]:
            text = self._before_text + json_bytes(message["content"]) + self._after_text
            return self._head + json_bytes(chunk["created_at"]) + text
        if not (chunk.get("done") and message.get("tool_calls")):
            return self._line(chunk)
        # Ollama's last line has no more of the answer.
        calls: dict[str, Any] = {name: value for name, value in chunk.items() if name in ("model", "created_at")}
        last: dict[str, Any] = {**chunk, "message": {"role": "assistant", "content": ""}}
        return self._line({**calls, "message": message, "done": False}) + self._line(last)

    def waiting(self) -> bytes:
        return self._line({"message": {"role": "assistant", "content": ""}, "done": False})

    def failed(self, error: ApiError) -> bytes:
        return json_bytes(error_shape(model_error(error, self._model))) + b"\n"

    def whole(self, completion: Completion) -> Any:
        return self._wire(completion)

    def refusal(self, error: ApiError) -> Any:
        return error_shape(model_error(error, self._model))

    def _line(self, chunk: Mapping[str, Any]) -> bytes:
        return json_bytes(self._wire(chunk)) + b"\n"

    def _wire(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk, or a whole answer, as Ollama sends it."""
        wire = {
            "model": self._model,
            "created_at": chunk.get("created_at") or _now(),
            **self._message(chunk.get("message") or {}),
            "done": bool(chunk.get("done")),
        }
        for name, value in chunk.items():
            if name not in wire and name != "message" and value is not None:
                if name == "done_reason":
                    value = _DONE_REASONS.get(value, value)
                if self._shows_marks or not name.startswith("_"):
                    wire[name] = value
        return wire

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        own = {"role": "assistant", "content": "", **message}
        if not own.get("thinking"):
            own.pop("thinking", None)
        if calls := own.pop("tool_calls", None):
            own["tool_calls"] = [_tool_call(call, position) for position, call in enumerate(calls)]
        return {"message": own}


class _GenerateWriter(_ChatWriter):
    """Lines of `/api/generate`, or its whole answer."""

    _before_text = b',"response":'
    _after_text = b',"done":false}\n'

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        thinking = message.get("thinking")
        return {"response": message.get("content") or "", **({"thinking": thinking} if thinking else {})}


class _EmbedWriter(_ChatWriter):
    """The answer of `/api/embed`."""

    def whole(self, completion: Completion) -> Any:
        whole = self._wire(completion)
        names = ("total_duration", "load_duration", "prompt_eval_count", ROUTING)
        found = {name: whole[name] for name in names if name in whole}
        return {"model": self._model, "embeddings": completion.get("embeddings", []), **found}


class _EmbeddingsWriter(_EmbedWriter):
    """The answer of `/api/embeddings`."""

    def whole(self, completion: Completion) -> Any:
        return {"embedding": next(iter(completion.get("embeddings", [])), [])}


@dataclass(slots=True, kw_only=True)
class _LoadCall(ChatCall):
    """The model is loaded, or unloaded; the answer is empty.

    Attributes:
        keep_alive: as in the request; None changes nothing.
        unloads: whether it is unloaded.
    """

    keep_alive: float | str | None = None
    unloads: bool = False

    @property
    def operation(self) -> str:
        """The kind of request; OpenTelemetry's conventions have no name for it."""
        return "load_model"

    async def chunks(self, router: HybridRouter) -> AsyncGenerator[Chunk, None]:
        limit_s = None if self.timeout_s is None else checked_timeout_s(self.timeout_s)
        try:
            async with asyncio.timeout(limit_s) as limit:
                if self.unloads:
                    await router.unload(self.model)
                else:
                    route = await router.route(self.model, backend=self.backend)
                    await router.preload(route, keep_alive=self.keep_alive)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"{short_name(self.model)} was not loaded within {limit_s:g} s; it may be soon, so ask again"
            raise ApiError(504, "timeout", message) from None
        yield {"done": True, "done_reason": "unload" if self.unloads else "load"}


async def _chat(request: Request) -> ASGIApp:
    body = checked_fields("chat", await read_json(request))
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(body.get("messages", ()))]
    writer = _ChatWriter(model_of(request, body), shows_marks=_wants_marks(request))
    if not messages:
        return _load(request, body, writer)
    options = _options(body) | {"tools": body.get("tools") or None}
    if body.get("truncate"):
        options["overflow"] = "drop_oldest"
    call = ChatCall(
        model=model_of(request, body), messages=messages, options=options, stream=body.get("stream", True)
    )
    return answer(request, apply_headers(request, call, body), writer, api="ollama")


async def _generate(request: Request) -> ASGIApp:
    body = checked_fields("generate", await read_json(request))
    writer = _GenerateWriter(model_of(request, body), shows_marks=_wants_marks(request))
    prompt, system = body.get("prompt", ""), body.get("system", "")
    if not prompt:
        return _load(request, body, writer)
    user = _message({"role": "user", "content": prompt, "images": body.get("images")}, "the prompt")
    call = ChatCall(model=model_of(request, body), options=_options(body), stream=body.get("stream", True))
    if body.get("raw") or body.get("suffix"):
        _check_raw(body)
        call.is_generate, call.prompt = True, prompt
        call.extra = {"suffix": body.get("suffix"), "images": user.get("images")}
    else:
        call.messages = [*([{"role": "system", "content": system}] if system else []), user]
    return answer(request, apply_headers(request, call, body), writer, api="ollama")


def _check_raw(body: Mapping[str, Any]) -> None:
    """Refuse what has no meaning without a chat, or would be dropped by Ollama. Raises ApiError."""
    what = "suffix" if body.get("suffix") else "raw"
    if body.get("system"):
        raise invalid(
            f"system cannot be used with {what}; write it into the prompt, or leave {what} out", "system"
        )
    if body.get("raw") and body.get("suffix"):
        raise invalid("suffix cannot be used with raw: only the model's template knows where it belongs", "suffix")


async def _embed(request: Request) -> ASGIApp:
    body = checked_fields("embed", await read_json(request))
    given = body.get("input", [])
    inputs = [given] if isinstance(given, str) and given else given or []
    if not all(isinstance(text, str) for text in inputs):
        raise invalid("input must be a text or a list of texts", "input")
    return _embedded(request, body, inputs, _EmbedWriter)


async def _embeddings(request: Request) -> ASGIApp:
    body = checked_fields("embeddings", await read_json(request))
    inputs = [body["prompt"]] if body.get("prompt") else []
    return _embedded(request, body, inputs, _EmbeddingsWriter)


def _embedded(request: Request, body: dict[str, Any], inputs: list[str], writer: type[_EmbedWriter]) -> ASGIApp:
    """The response with the embeddings of some texts. Without texts the model is only loaded."""
    model = model_of(request, body)
    if not inputs:
        return _load(request, body, writer(model))
    options: dict[str, Any] = {"truncate": body.get("truncate", False)}
    options |= {name: body[name] for name in ("keep_alive", "options") if name in body}
    options["dimensions"] = body.get("dimensions") or None  # Ollama's 0 is that of the model
    call = EmbedCall(model=model, inputs=inputs, options=options)
    return answer(request, apply_headers(request, call, body), writer(model), api="ollama")


def _load(request: Request, body: Mapping[str, Any], writer: AnswerWriter) -> ASGIApp:
    """The response to a request without a prompt: it loads the model, or unloads it where `keep_alive` is 0."""
    keep_alive = body.get("keep_alive")
    unloads = keep_alive is not None and keep_alive_seconds(keep_alive) == 0
    if unloads and not key_of(request).may_control:
        raise ApiError(403, "forbidden", "this key may not unload models; use a key made with --control")
    call = _LoadCall(model=model_of(request, dict(body)), keep_alive=keep_alive, unloads=unloads)
    return answer(request, apply_headers(request, call, dict(body)), writer, api="ollama")


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request, by the names of `Router.stream`."""
    passed = ("options", "keep_alive", "think", "logprobs", "top_logprobs")
    options = {name: body[name] for name in passed if name in body}
    return options | {"format": body.get("format") or None}


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message, with the content that Ollama takes for granted; the router checks the rest.

    Raises:
        ApiError: its content is not text, or an image is not base64 text; the engine would open an address.
    """
    if not isinstance(given, dict):
        raise invalid(f'{where} must be an object with "role" and "content", not {shown(given)}', where)
    message = {name: value for name, value in given.items() if value is not None}
    message.setdefault("content", "")
    if not isinstance(message["content"], str):
        raise invalid(f'{where} needs "content" as text; give images in "images"', where)
    if isinstance(message.get("role"), str):
        message["role"] = message["role"].lower()
    images = message.get("images", [])
    if not isinstance(images, list):
        raise invalid(f'{where} has "images" that are not a list of base64 texts', where)
    message["images"] = [checked_base64(image, where) for image in images]
    if not images:
        del message["images"]
    return message


def _tool_call(call: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A call with the fields that Ollama adds."""
    function = {"index": position, **call["function"], "arguments": call_arguments(call)}
    return {"id": f"call_{secrets.token_hex(4)}", **call, "function": function}


def _wants_marks(request: Request) -> bool:
    return request.headers.get(MARKS_HEADER, "").lower() in ("1", "true")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


ROUTES: list[BaseRoute] = [
    Route("/api/chat", _chat, methods=["POST"]),
    Route("/api/generate", _generate, methods=["POST"]),
    Route("/api/embed", _embed, methods=["POST"]),
    Route("/api/embeddings", _embeddings, methods=["POST"]),
    *ollama_models.ROUTES,
]
