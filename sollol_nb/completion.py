"""The completion: an answer as an Ollama-shaped dict that also knows how to show itself in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any


class Completion(dict[str, Any]):
    """An answer in the shape of Ollama's `/api/chat`, plus `_routing`.

    Keys: `model`, `created_at`, `message` (`role`, `content`, and where present `thinking`, `tool_calls`),
    `done`, `done_reason`, `prompt_eval_count`, `eval_count` (tokens), `total_duration`, `load_duration`,
    `prompt_eval_duration`, `eval_duration` (nanoseconds), and `_routing`: `backend`, `reason`, `duration_ms`,
    `coordinator_url`, `plan`, `queue_ms`, `load_ms`, `ttft_ms`, `tokens_per_s`, `router_overhead_ms`,
    `failovers`.
    """

    @classmethod
    def from_chunks(cls, chunks: Iterable[Mapping[str, Any]]) -> Completion:
        """Join streamed chunks into the whole answer; the last chunk carries everything but the text.

        A chunk with `_restarted` begins the answer again.
        """
        content: list[str] = []
        thinking: list[str] = []
        tool_calls: list[Any] = []
        last: Mapping[str, Any] = {}
        for chunk in chunks:
            message = chunk.get("message") or {}
            if chunk.get("_restarted"):  # what came before was void
                content, thinking, tool_calls = [], [], []
            content.append(message.get("content") or "")
            thinking.append(message.get("thinking") or "")
            tool_calls.extend(message.get("tool_calls") or ())
            last = chunk
        message = {"role": "assistant", "content": "".join(content)}
        if any(thinking):
            message["thinking"] = "".join(thinking)
        if tool_calls:
            message["tool_calls"] = tool_calls
        return cls({**last, "message": message})

    @property
    def text(self) -> str:
        """The answer's text."""
        return str(self.get("message", {}).get("content", ""))

    @property
    def routing(self) -> dict[str, Any]:
        """Where the request went, why, and what it took (`_routing`)."""
        return dict(self.get("_routing", {}))

    @property
    def finish_reason(self) -> str:
        """`stop`, `length`, `tool_calls` or `cancelled`."""
        return str(self.get("done_reason", ""))

    def footer(self) -> str:
        """One line: model, place, time to first token, speed."""
        routing = self.routing
        parts = [str(self.get("model", "")), str(routing.get("backend", ""))]
        if routing.get("layout"):
            parts.append(f"layers {routing['layout']}")
        if routing.get("load_ms"):
            parts.append(f"loaded in {routing['load_ms'] / 1000:.1f} s")
        if routing.get("ttft_ms") is not None:
            parts.append(f"first token {routing['ttft_ms']:.0f} ms")
        if routing.get("tokens_per_s"):
            parts.append(f"{routing['tokens_per_s']:.0f} tokens/s")
        if self.get("eval_count") is not None:
            parts.append(f"{self['eval_count']} tokens")
        if self.finish_reason in ("length", "cancelled"):
            parts.append({"length": "cut at max_tokens", "cancelled": "cancelled"}[self.finish_reason])
        parts += [_failover_words(one) for one in routing.get("failovers") or () if one.get("continued")]
        if routing.get("note"):
            parts.append(str(routing["note"]))
        return " · ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.text}\n\n[{self.footer()}]"

    def __repr__(self) -> str:
        return f"<Completion of {self.get('model')}: {self.text[:60]!r}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        footer = html.escape(self.footer())
        return {"text/plain": str(self), "text/markdown": f"{self.text}\n\n<sub>{footer}</sub>"}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # else IPython's printer of dicts is asked for the plain text


def _failover_words(failover: Mapping[str, Any]) -> str:
    """A place that was lost in mid-answer, as a quiet remark."""
    lost = ", ".join(failover.get("lost_workers") or ()) or "its coordinator"
    cost_ms = failover.get("cost_ms")
    after = f" after {cost_ms / 1000:.1f} s" if cost_ms else ""
    return f"lost {lost} at token {failover.get('tokens_before', 0)}, continued{after}"
