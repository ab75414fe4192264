"""Requests to Ollama as plain data: bodies, answers merged from chunks, and requests that continue a partial
answer.

Protocol: https://github.com/ollama/ollama/blob/main/docs/api.md. Everything a caller gives is passed on; only
two things move: Ollama's options go into `options`, and `max_tokens` becomes `num_predict`.

By default Ollama silently drops the beginning of a prompt, and the oldest part of the answer, where they do not
fit its context. `KEEPS_ALL` makes it refuse such a prompt and end such an answer instead (its `server/prompt.go`
and `runner/`). Ollama versions before October 2025 do not know these fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.option_checks import OLLAMA_OPTIONS, SAMPLING_OPTIONS

# Runner and sampling options of Ollama (api/types.go: Options), with those of older versions.
OPTION_NAMES = frozenset(SAMPLING_OPTIONS | OLLAMA_OPTIONS) - {"max_tokens"}

KEEPS_ALL = {"truncate": False, "shift": False}

_TOO_LONG = re.compile(r"(?:exceeds|longer than) (?:the )?(?:\S+ )?(?:maximum )?context (?:length|size)")
_TOKENS = re.compile(r"\((\d{1,12}) tokens\)")

# To estimate the tokens of a prompt: what a chat template adds to a message, in characters, and an image, in
# tokens (the number that Ollama's server/prompt.go uses).
_TEMPLATE_CHARACTERS = 24
_IMAGE_TOKENS = 768
_MOST_CHARACTERS_PER_TOKEN = 8


def request_body(
    model: str,
    *,
    max_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The body of a request. A keyword that names an option goes into `options` and overrides one there; any
    other goes into the body unchanged; None leaves a field out."""
    chosen = dict(options or {})
    body: dict[str, Any] = {"model": model}
    for name, value in fields.items():
        if value is None:
            continue
        if name in OPTION_NAMES:
            chosen[name] = value
        else:
            body[name] = value
    if max_tokens is not None:
        chosen["num_predict"] = max_tokens
    if isinstance(chosen.get("stop"), str):
        chosen["stop"] = [chosen["stop"]]
    if chosen:
        body["options"] = chosen
    return body


class AnswerSoFar:
    """The part received so far of a streamed answer of `/api/chat` or `/api/generate`."""

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[Any]] = {}  # of texts and lists, joined when they are read
        self.tokens = 0
        self._last_piece = ""
        self._repetitions = 0

    def add(self, chunk: Mapping[str, Any]) -> bool:
        """Add one chunk; whether it carried any of the answer."""
        for name, value in chunk.items():
            if name == "message" and isinstance(value, Mapping):
                for part, piece in value.items():
                    self._add("message", part, piece)
            else:
                self._add("", name, value)
        message = chunk.get("message")
        parts = message if isinstance(message, Mapping) else chunk
        has_content = any(parts.get(part) for part in ("content", "response", "thinking", "tool_calls"))
        self.tokens += has_content
        piece = str(parts.get("content") or parts.get("response") or parts.get("thinking") or "").strip()
        self._repetitions = self._repetitions + 1 if has_content and piece == self._last_piece else 0
        self._last_piece = piece
        return has_content

    @property
    def repeats_itself(self) -> bool:
        """Whether it ends with many equal pieces. After 30 of them Ollama ends an answer, without a last chunk."""
        return self._repetitions >= _MANY_REPETITIONS

    def _add(self, owner: str, name: str, value: Any) -> None:
        is_text = name in _TEXTS[owner] and isinstance(value, str)
        if is_text or (name in ("tool_calls", "logprobs") and isinstance(value, list)):
            pieces = self._pieces.setdefault((owner, name), [])
            pieces.extend([value] if is_text else value)
        elif owner:
            self._whole.setdefault(owner, {})[name] = value
        else:
            self._whole[name] = value

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message so far (chat)."""
        return dict(self.merged().get("message", {}))

    @property
    def text(self) -> str:
        """The text so far (generate)."""
        return "".join(self._pieces.get(("", "response"), ()))

    @property
    def has_thinking(self) -> bool:
        """Whether the model's thinking arrived in a separate field (generate)."""
        return any(self._pieces.get(("", "thinking"), ()))

    def merged(self) -> dict[str, Any]:
        """One answer as Ollama gives it without streaming: the last chunk, with all of the text."""
        whole = dict(self._whole)
        if "message" in whole:
            whole["message"] = dict(whole["message"])
        for (owner, name), pieces in self._pieces.items():
            joined = [*pieces] if name in ("tool_calls", "logprobs") else "".join(pieces)
            if owner:
                whole.setdefault(owner, {})[name] = joined
            else:
                whole[name] = joined
        return whole


_MANY_REPETITIONS = 25  # fewer than Ollama's 30: not every token is a chunk
_TEXTS = {"message": ("content", "thinking"), "": ("response", "thinking")}


def chat_continuation(body: Mapping[str, Any], so_far: AnswerSoFar) -> dict[str, Any]:
    """The chat request that continues an interrupted answer: the answer so far is its last message.

    Ollama joins two messages of one role with an empty line between them, so a last assistant message of the
    caller and the answer so far become one message.
    """
    messages = [dict(message) for message in body["messages"]]
    partial = {"role": "assistant", "content": "", **so_far.message}
    if messages and messages[-1].get("role") == "assistant":
        prefill = messages.pop()
        partial = {**prefill, **partial, "content": f"{prefill.get('content', '')}{partial['content']}"}
    return _with_tokens_left({**body, "messages": [*messages, partial]}, so_far)


def generate_continuation(body: Mapping[str, Any], prompt: str, so_far: AnswerSoFar) -> dict[str, Any]:
    """The generate request that continues an interrupted answer: raw, the rendered prompt and the text so far."""
    moved = ("prompt", "system", "template", "context", "suffix", "raw", "think")
    rest = {name: value for name, value in body.items() if name not in moved}
    return _with_tokens_left({**rest, "raw": True, "prompt": prompt + so_far.text}, so_far)


def can_continue(path: str, body: Mapping[str, Any], so_far: AnswerSoFar) -> bool:
    """Whether a partial answer can be continued. Not with `format`, whose grammar always starts at the beginning,
    nor after separate thinking in generate, which a raw prompt cannot express."""
    return not body.get("format") and not (path == "/api/generate" and so_far.has_thinking)


def estimated_tokens(messages: Sequence[Mapping[str, Any]], tokens_per_character: float) -> int:
    """An estimate of the prompt's tokens from its characters, images included."""
    images = sum(len(message.get("images") or ()) for message in messages)
    return int(count_characters(messages) * tokens_per_character) + images * _IMAGE_TOKENS + 1


def count_characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of the prompt, with an estimate of those that a chat template adds."""
    return sum(len(str(message.get("content") or "")) + _TEMPLATE_CHARACTERS for message in messages)


@dataclass(frozen=True, slots=True)
class TooLong:
    """A prompt that does not fit: its tokens and those of the context, where Ollama reports them."""

    prompt_tokens: int | None = None
    context_tokens: int | None = None


def too_long(reason: str) -> TooLong | None:
    """What Ollama reports if it refuses a request because its prompt does not fit; None if it has another reason.

    Until version 0.30 its runners say it (`errorInputTooLong`), since then llama-server does, with the numbers, or
    `llm/llama_server.go`.
    """
    if not _TOO_LONG.search(reason):
        return None
    tokens = [int(number) for number in _TOKENS.findall(reason)]
    return TooLong(*tokens) if len(tokens) == 2 else TooLong()


def describe_truncation(messages: Sequence[Mapping[str, Any]], prompt_tokens: object) -> str:
    """A message where Ollama read too few tokens for all of the prompt's text; "" otherwise."""
    text = sum(len(str(message.get("content") or "")) for message in messages)
    if not isinstance(prompt_tokens, int) or text <= prompt_tokens * _MOST_CHARACTERS_PER_TOKEN:
        return ""
    return (
        f"Ollama read only {prompt_tokens:,} tokens of a prompt of {text:,} characters and did not report what it "
        "dropped; a newer Ollama reports it, and a larger num_ctx keeps more"
    )


def _with_tokens_left(body: dict[str, Any], so_far: AnswerSoFar) -> dict[str, Any]:
    limit = body.get("options", {}).get("num_predict", -1)
    if isinstance(limit, int) and limit > 0:
        body["options"] = {**body["options"], "num_predict": max(1, limit - so_far.tokens)}
    return body
