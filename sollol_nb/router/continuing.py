"""How an answer whose tokens are not known continues: only its question and its text so far are.

- Plain text is continued: the question is sent again, with the text so far as the beginning of the answer.
- With exact recovery the question is sent again with the same seed, and must give the known text again.
- Otherwise (thoughts, tool calls, a format) the answer begins again, and its reader discards the earlier part
  (`_restarted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.chat.chunk import RESTARTED, Chunk
from sollol_nb.llama_cpp.answers.base import SentText, diverged_error
from sollol_nb.llama_cpp.answers.logprobs import spelling


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What is known of an answer.

    Attributes:
        text, thinking: received so far.
        texts: chunks with text: about as many as tokens.
        has_tool_calls: whether it calls tools.
    """

    text: str = ""
    thinking: str = ""
    texts: int = 0
    has_tool_calls: bool = False

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking or self.has_tool_calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRequest:
    """The request that continues an answer.

    Attributes:
        body: as the first one, changed where that is due.
        form: the changes to the chunks of its answer.
        recovery: `exact` or `fast`; "" where the answer begins (again).
        tokens_before: tokens that the engine does not count.
        begins_again: whether what was received is void.
    """

    body: dict[str, Any]
    form: AsItComes = field(default_factory=lambda: AsItComes())
    recovery: str = ""
    tokens_before: int = 0
    begins_again: bool = False


def next_request(body: Mapping[str, Any], received: Received, *, may_repeat: bool) -> NextRequest:
    """The request that continues an answer.

    Args:
        body: the first request, as plain data: `messages`, `prompt` and `options`.
        may_repeat: whether, with exact recovery, the engine gives the known text again.
    """
    options, messages, prompt = body["options"], body["messages"], body["prompt"]
    if not received:
        return NextRequest(body=dict(body))
    if may_repeat and is_exact(options) and not received.has_tool_calls:
        return NextRequest(body=dict(body), form=Repeated(received.text, received.thinking), recovery="exact")
    suffix = prompt is not None and prompt["suffix"]
    is_plain = not (received.thinking or received.has_tool_calls or suffix)
    if not is_plain or options.get("format") or options.get("tools"):
        return begun_again(body)
    changed: dict[str, Any] = {**body, "options": less(options, received.texts)}
    if prompt is not None:
        changed["prompt"] = {**prompt, "text": prompt["text"] + received.text}
    else:
        begun: dict[str, Any] = {"role": "assistant", "content": ""}
        if messages[-1]["role"] == "assistant":  # the answer continues a message that its reader has begun
            *messages, begun = messages
        changed["messages"] = [*messages, {**begun, "content": f"{begun.get('content') or ''}{received.text}"}]
    return NextRequest(body=changed, recovery="fast", tokens_before=received.texts)


def begun_again(body: Mapping[str, Any]) -> NextRequest:
    """The same request, whose answer replaces what was received."""
    return NextRequest(body=dict(body), form=Restarted(), begins_again=True)


def is_exact(options: Mapping[str, Any]) -> bool:
    """Whether an answer must be the same after a loss."""
    return options.get("recovery") == "exact" or bool(options.get("deterministic"))


class AsItComes:
    """Passes the chunks of one answer of the gateway unchanged."""

    def apply(self, chunk: Chunk, name: str) -> Chunk:
        """The chunk for the reader of the answer of the model with this name."""
        return chunk


class Restarted(AsItComes):
    """The first chunk says that the text before it is void."""

    def __init__(self) -> None:
        self._has_begun = False

    def apply(self, chunk: Chunk, name: str) -> Chunk:
        if self._has_begun:
            return chunk
        self._has_begun = True
        return {**chunk, RESTARTED: True}


class Repeated(AsItComes):
    """Leaves out the text that the reader has; the new text must be the same.

    Raises:
        AnswerDivergedError: from `apply`: it is not.
    """

    def __init__(self, content: str, thinking: str) -> None:
        self._content, self._thinking = SentText(content), SentText(thinking)

    def apply(self, chunk: Chunk, name: str) -> Chunk:
        message: dict[str, Any] = dict(chunk.get("message") or {})
        for part, sent in (("content", self._content), ("thinking", self._thinking)):
            if chunk.get(RESTARTED):
                sent.position = 0
            text = message.get(part) or ""
            if not sent.agrees_with(text) or (chunk.get("done") and sent.position + len(text) < len(sent.text)):
                raise diverged_error(name)
            if text:
                message[part] = sent.add(text)
        rest = {key: value for key, value in chunk.items() if key != RESTARTED}
        if rest.get("logprobs"):
            new = (message.get("thinking") or "") + (message.get("content") or "")
            rest["logprobs"] = spelling(chunk["logprobs"], new)
        return {**rest, "message": message}  # type: ignore[typeddict-item]


def less(options: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The options with a smaller maximum length; at least one token is left."""
    left = dict(options)
    for name in ("max_tokens", "num_predict"):
        if isinstance(left.get(name), int) and left[name] > 0:
            left[name] = max(1, left[name] - tokens)
    if isinstance(left.get("options"), Mapping):
        left["options"] = less(left["options"], tokens)
    return left


def with_tokens_before(chunk: Chunk, tokens: int) -> Chunk:
    """The last chunk of an answer that was continued, with all its tokens, at the pace of the last ones."""
    count, duration = chunk.get("eval_count") or 0, chunk.get("eval_duration") or 0
    scaled = duration * (count + tokens) // count if count else duration
    return {**chunk, "eval_count": count + tokens, "eval_duration": scaled}
