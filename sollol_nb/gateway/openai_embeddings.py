"""OpenAI's embeddings, from the models in Ollama."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.option_checks import CHAT_OPTIONS, Values
from sollol_nb.gateway.answers import AnswerWriter
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import EmbedCall, apply_headers, model_of
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.gateway import answer
from sollol_nb.gateway.openai_parts import PRIORITY, TEXT, TEXT_OR_LIST, YES_OR_NO, Fields, error_shape, usage_of
from sollol_nb.runtime.amounts import is_whole_number, shown

FIELDS = Fields(
    known={
        "model": TEXT,
        "input": TEXT_OR_LIST,
        "encoding_format": Values("float or base64", lambda value: value in ("float", "base64")),
        "dimensions": Values("a whole number of 1 or more", lambda value: is_whole_number(value) and value >= 1),
        "truncate": YES_OR_NO,
        "keep_alive": CHAT_OPTIONS["keep_alive"],
        "priority": PRIORITY,
    },
    required=("model", "input"),
)


class EmbeddingWriter(AnswerWriter):
    """A list of embeddings.

    Args:
        model: as the client names it.
        is_base64: whether a vector is written as the base64 text of its 32-bit floats, which OpenAI's own client
            requests, instead of as a list of numbers.
    """

    def __init__(self, model: str, *, is_base64: bool) -> None:
        self._model = model
        self._is_base64 = is_base64

    def whole(self, completion: Completion) -> Any:
        usage = usage_of(completion)
        data = [
            {"object": "embedding", "index": position, "embedding": self._written(vector)}
            for position, vector in enumerate(completion["embeddings"])
        ]
        return {
            "object": "list",
            "data": data,
            "model": self._model,
            "usage": {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]},
        }

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)

    def _written(self, vector: Sequence[float]) -> Any:
        return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if self._is_base64 else vector


async def _embed(request: Request) -> ASGIApp:
    body = await read_json(request)
    fields = FIELDS.checked(body)
    options: dict[str, Any] = {"truncate": fields.get("truncate", False)}  # Ollama would cut silently
    options |= {name: fields[name] for name in ("dimensions", "keep_alive") if name in fields}
    call = EmbedCall(
        model=model_of(request, body),
        inputs=_inputs(fields["input"]),
        options=options,
    )
    writer = EmbeddingWriter(call.model, is_base64=fields.get("encoding_format") == "base64")
    return answer(request, apply_headers(request, call, body), writer, api="openai")


def _inputs(given: Any) -> str | list[str]:
    """The texts of an input. Raises ApiError if it is not texts."""
    texts = [given] if isinstance(given, str) else given
    if not texts or not all(isinstance(text, str) for text in texts):
        raise invalid(
            f"input={shown(given)} must be a text, or a list of texts; lists of tokens are not supported", "input"
        )
    if not all(texts):
        raise invalid("input has an empty text; leave it out", "input")
    return given  # type: ignore[no-any-return]


ROUTES: list[BaseRoute] = [Route("/v1/embeddings", _embed, methods=["POST"])]
