"""OpenAI's API (https://platform.openai.com/docs/api-reference): chat completions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.gateway.answers import AnswerWriter, event
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, model_of
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import answer
from sollol_nb.gateway.openai_parts import error_shape


class _ChatWriter(AnswerWriter):
    """`chat.completion.chunk` events, or a `chat.completion`."""

    def __init__(self, model: str) -> None:
        self._base: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, chunk: Chunk) -> bytes:
        delta = {"content": chunk["message"].get("content", "")}
        done = chunk.get("done_reason") if chunk.get("done") else None
        choice = {"index": 0, "delta": delta, "finish_reason": done}
        sent = event({**self._base, "object": "chat.completion.chunk", "choices": [choice]})
        return sent + b"data: [DONE]\n\n" if chunk.get("done") else sent

    def failed(self, error: ApiError) -> bytes:
        return event(error_shape(error))

    def whole(self, completion: Completion) -> Any:
        message = {"role": "assistant", "content": completion.text}
        choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason}
        return {**self._base, "object": "chat.completion", "choices": [choice]}

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)


async def _chat(request: Request) -> ASGIApp:
    body = await read_json(request)
    call = ChatCall(
        model=model_of(request, body),
        messages=body.get("messages", []),
        options={"temperature": body.get("temperature"), "max_tokens": body.get("max_tokens")},
        stream=bool(body.get("stream")),
    )
    return answer(request, apply_headers(request, call, body), _ChatWriter(call.model), api="openai")


ROUTES: list[BaseRoute] = [Route("/v1/chat/completions", _chat, methods=["POST"])]
