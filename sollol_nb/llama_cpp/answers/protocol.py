"""Between Ollama's chat shape and llama-server's: requests one way, events and refusals the other. Sends nothing.

Requests and answers have Ollama's shape everywhere in this package (`options`, `num_predict`, `images`, `format`,
`message`, `eval_count`); llama-server speaks OpenAI's at `/v1/chat/completions` and its own at `/completion`.
`kinds.answer_for` decides which of the two an answer uses. Sources: Ollama's `docs/api.md`, llama.cpp's
`tools/server/README.md`, and `tools/server/server-context.cpp` for the wording of refusals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from sollol_nb.chat.chunk import Chunk, ChunkMessage
from sollol_nb.chat.context_window import overflow_error
from sollol_nb.chat.option_checks import SAMPLING_OPTIONS, answer_schema
from sollol_nb.chat.tool_choice import new_call_id
from sollol_nb.errors import ContextOverflowError, RequestRejectedError
from sollol_nb.text.short_names import short_name

THINK_LEVEL_VARIABLE = "reasoning_effort"
"""The variable of chat templates that know levels of thinking."""
_UNTIL_CONTEXT_IS_FULL = -2  # Ollama's num_predict
_PROMPT_TOO_LONG = re.compile(r"\((\d+) tokens\) .*context size \((\d+)")
_TEMPLATE_FAILED = re.compile(r"While executing .*Error: (.+)", re.DOTALL)
# "Invalid diff" is of common/chat.cpp: the parser takes back what it had found in the text before.
_PARSER_FAILED = re.compile(r"does not match the expected .* format|empty grammar stack|^Invalid diff: ")
# The engine's debug log, at which it must start, takes the whole answer as JSON, which broken UTF-8 cannot be. By
# then all tokens have been sent; only the event with the reason of the end is missing.
_NOT_ENCODED = re.compile(r"json\.exception\.type_error\.316")
# Requests that run at the same time share one pool of context; when it is full, all of them end. With drafts the
# engine fails shortly before, when it splits a batch to find a place for it (llama.cpp issue 24840).
_POOL_USED_UP = re.compile(
    r"context size has been exceeded|batch index \d+ is not inside the current sub-batch", re.IGNORECASE
)


def request_body(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body for `/v1/chat/completions`, streaming, from an Ollama-shaped request (already checked)."""
    body: dict[str, Any] = {
        "messages": [_openai_message(message) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_settings(options),
    }
    schema = answer_schema(options)
    if schema is not None and options["format"] == "json":
        body["response_format"] = {"type": "json_object"}
    elif schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if options.get("tools"):
        body["tools"] = list(options["tools"])
        if "parallel_tool_calls" in options:
            body["parallel_tool_calls"] = options["parallel_tool_calls"]
    if "think" in options:
        think = options["think"]
        body["chat_template_kwargs"] = {"enable_thinking": think is not False}
        if isinstance(think, str):
            body["chat_template_kwargs"][THINK_LEVEL_VARIABLE] = think
    if continues_message(messages):
        # The answer continues this message and does not repeat it, as with Ollama.
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def prompt_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """The body for `/apply-template`: what shapes the prompt of a request for `/v1/chat/completions`."""
    shaping = ("messages", "tools", "chat_template_kwargs", "response_format")
    continuing = ("continue_final_message", "add_generation_prompt")
    return {name: request[name] for name in shaping + continuing if name in request}


def sampling_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options by llama-server's names; those in `options["options"]` give way to the outer ones."""
    settings: dict[str, Any] = {}
    for given in (options.get("options") or {}, options):
        for name in SAMPLING_OPTIONS:
            if given.get(name) is not None:
                settings["max_tokens" if name == "num_predict" else name] = given[name]
    if settings.get("max_tokens") == _UNTIL_CONTEXT_IS_FULL:
        settings["max_tokens"] = -1  # the same here: the context is never shifted
    if options.get("logit_bias"):
        settings["logit_bias"] = options["logit_bias"]
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    return settings


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    ours = dict(message)
    for theirs, name in (
        ("thinking", "reasoning_content"),
        ("reasoning", "reasoning_content"),
        ("tool_name", "name"),
    ):
        value = ours.pop(theirs, None)
        if value and not ours.get(name):
            ours[name] = value
    images = ours.pop("images", None)
    if images:
        content = ours.get("content") or ""
        ours["content"] = [  # Ollama puts images before the text, too
            *({"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images),
            *(content if isinstance(content, list) else [{"type": "text", "text": content}]),
        ]
    if ours.get("tool_calls"):  # Ollama's arguments are an object, OpenAI's a JSON text
        ours["tool_calls"] = [
            {
                "id": call.get("id") or f"call_{position}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": _as_json_text(call["function"].get("arguments", {})),
                },
            }
            for position, call in enumerate(ours["tool_calls"])
        ]
    return ours


def continues_message(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answer continues the last message: the assistant's."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def has_media(message: Mapping[str, Any]) -> bool:
    """Whether a message has images or sound."""
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return bool(message.get("images")) or any(part.get("type") != "text" for part in parts)


def _data_url(image: str) -> str:
    return image if image.startswith(("data:", "http:", "https:")) else f"data:image/png;base64,{image}"


def _as_json_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def parse_event(line: str) -> dict[str, Any] | None:
    """One line of llama-server's event stream, decoded; None for lines without an event."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event = json.loads(line[6:])
    return event if isinstance(event, dict) else None


def progress_of(event: Mapping[str, Any]) -> tuple[int, int] | None:
    """(prompt tokens processed, prompt tokens in all) if the event reports progress of the prompt; else None.

    With `return_progress`, llama-server sends such an event when a slot takes the request, and after each batch of
    the prompt.
    """
    progress = event.get("prompt_progress")
    return (int(progress["processed"]), int(progress["total"])) if progress else None


def refusal(model: str, reason: str, context_tokens: int) -> RequestRejectedError:
    """The error for a reason that the engine gives; its wording is that of `server-context.cpp` (send_error).

    Args:
        context_tokens: the engine's limit for one request, prompt and answer.
    """
    too_long = _PROMPT_TOO_LONG.search(reason)
    if too_long is not None:
        return overflow_error(model, int(too_long[1]), int(too_long[2]))
    by_template = _TEMPLATE_FAILED.search(reason)
    if by_template is not None:
        return RequestRejectedError(f"{model}: its chat template does not take these messages: {by_template[1]}")
    if _POOL_USED_UP.search(reason):
        return ContextOverflowError(
            f"{short_name(model)}: requests that ran at the same time filled the {context_tokens:,} tokens of "
            "context that they share, so all of them ended; ask again, or give the router a larger "
            "context_tokens= or slots=1",
            context_tokens=context_tokens,
        )
    return RequestRejectedError(f"{short_name(model)} refused the request: {reason}")


def is_parser_failure(reason: str) -> bool:
    """Whether the engine's own parser, or its grammar for tool calls, failed on the text that the model wrote."""
    return bool(_PARSER_FAILED.search(reason))


def is_encoding_failure(reason: str) -> bool:
    """Whether the engine could not write its last event, since the model wrote broken UTF-8."""
    return bool(_NOT_ENCODED.search(reason))


def chat_chunk(model: str, content: str, thinking: str = "", *, done: bool = False) -> Chunk:
    """One chunk of a streamed answer in Ollama's shape."""
    message: ChunkMessage = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    return {
        "model": model,
        "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "message": message,
        "done": done,
    }


class ChunkTranslator:
    """Turns the events of `/v1/chat/completions` into Ollama chunks, one answer per translator."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._finish_reason = "stop"
        self._usage: dict[str, Any] = {}
        self._timings: dict[str, Any] = {}
        self._tool_calls: dict[int, dict[str, str]] = {}

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        """The Ollama chunk of an event, or None when it has no text."""
        self._usage = event.get("usage") or self._usage
        self._timings = event.get("timings") or self._timings
        for choice in event.get("choices", ()):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                entry = self._tool_calls.setdefault(call.get("index", 0), {"id": "", "name": "", "arguments": ""})
                entry["id"] = entry["id"] or call.get("id") or ""
                function = call.get("function") or {}
                entry["name"] += function.get("name") or ""
                entry["arguments"] += function.get("arguments") or ""
            content, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
            if content or thinking:
                return chat_chunk(self._model, content, thinking)
        return None

    def final(self) -> Chunk:
        """The last chunk: `done`, the reason, token counts, durations in nanoseconds, tool calls if any."""
        chunk = chat_chunk(self._model, "", done=True)
        if self._tool_calls:
            chunk["message"]["tool_calls"] = [
                {
                    "id": call["id"] or new_call_id(),
                    "function": {"name": call["name"], "arguments": _parsed_arguments(call["arguments"])},
                }
                for call in self._tool_calls.values()
            ]
        chunk["done_reason"] = self._finish_reason
        prompt_tokens = self._usage.get("prompt_tokens", self._timings.get("prompt_n"))
        completion_tokens = self._usage.get("completion_tokens", self._timings.get("predicted_n"))
        chunk["prompt_eval_count"] = prompt_tokens
        chunk["eval_count"] = completion_tokens
        chunk["prompt_eval_duration"] = int(self._timings.get("prompt_ms", 0) * 1e6)
        chunk["eval_duration"] = int(self._timings.get("predicted_ms", 0) * 1e6)
        return chunk


def _parsed_arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


OPENING_TAG, CLOSING_TAG = "<think>", "</think>"


class _Phase(Enum):
    BEGUN = auto()
    """Only whitespace, or a part of the opening tag, was received."""
    OPENED = auto()
    """The opening tag was just received."""
    THINKING = auto()
    CLOSED = auto()
    """The closing tag was just received."""
    ANSWERING = auto()


class ThinkSplitter:
    """Splits streamed text of the form `<think>thoughts</think>answer`.

    Only thoughts at the beginning count; later tags belong to the answer. Whitespace after a tag is dropped.
    Text that may turn out to be a tag is held back until that is decided.

    Args:
        inside: the prompt already ended with the opening tag.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._phase = _Phase.OPENED if inside else _Phase.BEGUN
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Take the next text; returns the thinking and the answer among the text that is decided now."""
        self._held += text
        thinking = ""
        if self._phase is _Phase.BEGUN:
            begin = self._held.lstrip()
            if begin.startswith(OPENING_TAG):
                self._phase, self._held = _Phase.OPENED, begin.removeprefix(OPENING_TAG)
            elif not OPENING_TAG.startswith(begin):
                self._phase = _Phase.ANSWERING
        if self._phase is _Phase.OPENED:
            self._held = self._held.lstrip()
            self._phase = _Phase.THINKING if self._held else self._phase
        if self._phase is _Phase.THINKING:
            thinking, closing, rest = self._held.partition(CLOSING_TAG)
            if closing:
                self._phase, self._held = _Phase.CLOSED, rest
            else:
                held = _length_of_part(self._held, CLOSING_TAG)
                thinking, self._held = thinking[: len(thinking) - held], thinking[len(thinking) - held :]
        if self._phase is _Phase.CLOSED:
            self._held = self._held.lstrip()
            self._phase = _Phase.ANSWERING if self._held else self._phase
        if self._phase is not _Phase.ANSWERING:
            return thinking, ""
        answer, self._held = self._held, ""
        return thinking, answer

    def flush(self) -> tuple[str, str]:
        """The text that was held back, as thinking and answer, when the stream has ended."""
        held, self._held = self._held, ""
        return (held, "") if self._phase is _Phase.THINKING else ("", held)


def _length_of_part(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    return next(length for length in range(min(len(text), len(tag) - 1), -1, -1) if text.endswith(tag[:length]))
