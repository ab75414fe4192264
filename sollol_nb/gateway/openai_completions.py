"""OpenAI's older API: completions, which continue a text without a chat template.

Code editors use it to fill gaps (`suffix`), and programs that write the prompt with its special tokens themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.option_checks import Values
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, apply_headers, model_of
from sollol_nb.gateway.failures import invalid
from sollol_nb.gateway.gateway import answer
from sollol_nb.gateway.openai_api import ANSWER_FIELDS, PASSED_FIELDS, CompletionWriter, includes_usage
from sollol_nb.gateway.openai_parts import TEXT, TEXT_OR_LIST, Fields, only, without_empty
from sollol_nb.runtime.amounts import is_whole_number, shown

FIELDS = Fields(
    known={
        **ANSWER_FIELDS,
        "prompt": TEXT_OR_LIST,
        "suffix": TEXT,
        "logprobs": Values("0 to 20", lambda value: is_whole_number(value) and 0 <= value <= 20),
        "best_of": only(1, "a request gets one answer"),
        "echo": only(False, "the answer cannot repeat the prompt; add the prompt in the client"),
    },
    required=("model", "prompt"),
)


class TextWriter(CompletionWriter):
    """`text_completion` events, or a `text_completion`. Arguments are those of `CompletionWriter`."""

    id_prefix = "cmpl"
    event_kind = whole_kind = "text_completion"

    def __init__(self, model: str, *, has_usage: bool = False) -> None:
        super().__init__(model, has_usage=has_usage)
        self._length = 0

    def chunk(self, chunk: Chunk) -> bytes:
        sent = self._news(chunk) if ROUTING in chunk else b""
        text = (chunk.get("message") or {}).get("content") or ""
        logprobs = chunk.get("logprobs") or ()
        if text or logprobs:
            sent += self._event({"text": text}, logprobs=_logprobs(logprobs, self._length))
            self._length += len(text)
        return sent + self._end(chunk, {"text": ""}) if chunk.get("done") else sent

    def whole(self, completion: Completion) -> Any:
        return self._whole(completion, {"text": completion.text}, _logprobs(completion.get("logprobs") or (), 0))


def _logprobs(tokens: Sequence[Mapping[str, Any]], offset: int) -> Any:
    """The tokens in the shape of this API, with their offsets in the answer; None if there are none."""
    texts = [token["token"] for token in tokens]
    if not texts:
        return None
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    alternatives = [
        {likely["token"]: likely["logprob"] for likely in token.get("top_logprobs") or ()} for token in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": alternatives if any(alternatives) else None,
        "text_offset": offsets,
    }


async def _complete(request: Request) -> ASGIApp:
    body = await read_json(request)
    fields = FIELDS.checked(body)
    options = {name: fields[name] for name in (*PASSED_FIELDS, "max_tokens") if name in fields}
    if "logprobs" in fields:
        options |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    call = ChatCall(
        model=model_of(request, body),
        is_generate=True,
        prompt=_prompt(fields["prompt"]),
        extra={"suffix": fields["suffix"]} if fields.get("suffix") else {},
        options=without_empty(options),
        stream=fields.get("stream", False),
    )
    writer = TextWriter(call.model, has_usage=includes_usage(fields))
    return answer(request, apply_headers(request, call, body), writer, api="openai")


def _prompt(given: Any) -> str:
    """The text of a prompt. Raises ApiError if it is not one text."""
    texts = [given] if isinstance(given, str) else given
    if len(texts) == 1 and isinstance(texts[0], str):
        if not texts[0]:
            raise invalid("prompt is empty; give a text to continue", "prompt")
        return str(texts[0])
    if texts and all(isinstance(text, str) for text in texts):
        raise invalid(f"prompt has {len(texts)} texts; send a request for each", "prompt")
    raise invalid(f"prompt={shown(given)} must be a text; lists of tokens are not supported", "prompt")


ROUTES: list[BaseRoute] = [Route("/v1/completions", _complete, methods=["POST"])]
