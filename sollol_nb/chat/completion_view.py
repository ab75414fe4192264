"""How a completion looks: Markdown with the reasoning folded and a footer that opens, JSON, code, HTML or text.

What a model writes is not trusted: see `safe_markdown`. An answer that is meant to be a page (`html`) goes into a
frame that may run and fetch nothing.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.text.safe_markdown import code_in, fenced, open_fence, safe_markdown
from sollol_nb.text.tables import counted
from sollol_nb.text.units import format_bytes

if TYPE_CHECKING:
    from sollol_nb.chat.completion import Completion

FORMATS = ("markdown", "text", "json", "html", "code")
LIVE_CHARS = 6000
"""While it streams, a long answer is shown by its end: all of it, ten times a second, would stall the page."""

_THINK, _END_OF_THINK = "<think>", "</think>"
# --- text ---------------------------------------------------------------------------------------


def parted(text: str, thinking: str) -> tuple[str, str]:
    """Answer and reasoning, also where an engine left both in the text: `<think>reasoning</think>answer`."""
    begin = text.lstrip()
    if thinking or not begin.startswith(_THINK):
        return text, thinking
    thinking, _, answer = begin.removeprefix(_THINK).partition(_END_OF_THINK)
    return answer.lstrip(), thinking.strip()


def tail(text: str, limit_chars: int = LIVE_CHARS) -> str:
    """The end of a long Markdown text, from the beginning of a line, with an open code block opened again."""
    if len(text) <= limit_chars:
        return text
    at = text.find("\n", len(text) - limit_chars) + 1 or len(text) - limit_chars
    fence = open_fence(text[:at])
    notice = f"*… {at:,} characters above; the end of the answer shows all*\n\n"
    return notice + (f"{fence}\n" if fence else "") + text[at:]


# --- an answer that has ended -------------------------------------------------------------------


def mime_bundle(completion: Completion) -> dict[str, str]:
    """All forms of a completion; a frontend takes the richest that it knows."""
    plain = {"text/plain": str(completion)}
    if completion.shown_as == "text":
        return plain
    text, thinking = parted(completion.text, completion.thinking)
    ending = f"\n\n{folded_footer(completion)}"
    body = {"json": _json_block, "code": _code_block, "html": _html_block}.get(completion.shown_as)
    if body is not None:
        markdown = body(text) + ending
        if completion.shown_as == "html":
            return {**plain, "text/markdown": markdown, "text/html": _page(text, completion)}
        return {**plain, "text/markdown": markdown}
    return {**plain, "text/markdown": safe_markdown(text) + folded_thinking(thinking) + ending}


def _json_block(text: str) -> str:
    with suppress(ValueError):  # then it is shown as it came
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return fenced(text, "json")


def _code_block(text: str) -> str:
    language, code = code_in(text)
    return fenced(code, language)


def _html_block(text: str) -> str:
    return fenced(_html_in(text), "html")


def _html_in(text: str) -> str:
    language, code = code_in(text)
    return code if language.lower() in ("html", "svg", "xml") else text


_PAGE_STYLE = "width: 100%; height: 400px; border: 1px solid #8888; background: white; resize: vertical;"


_FETCH_NOTHING = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:\">"
)


def _page(text: str, completion: Completion) -> str:
    source, title = html.escape(_html_in(text)), html.escape(str(completion.get("model")))
    page = html.escape(_FETCH_NOTHING) + source
    return (
        f'<iframe sandbox="" srcdoc="{page}" title="answer of {title}" '
        f'style="{_PAGE_STYLE}"></iframe>'
        f"<details><summary>source</summary><pre>{source}</pre></details>"
        f"<small>{html.escape(footer(completion))}</small>"
    )


def folded_thinking(thinking: str) -> str:
    """The reasoning as a fold after the answer; "" without any."""
    if not thinking:
        return ""
    words = counted(len(thinking.split()), "word")
    return f"\n\n<details><summary>reasoning ({words})</summary>\n\n{safe_markdown(thinking)}\n\n</details>"


def folded_footer(completion: Completion) -> str:
    """The footer; it opens, and tells why the request went where it did, and what took how long."""
    line = f"<small>{html.escape(footer(completion), quote=False)}</small>"
    details = "\n".join(f"- {_escaped(one)}" for one in why(completion))
    return f"<details><summary>{line}</summary>\n\n{details}\n\n</details>" if details else line


def _escaped(text: str) -> str:
    """Words as Markdown shows them unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def shown_name(model: str) -> str:
    """A model's name as people read it: of a file without its folders."""
    return Path(model).name if model.endswith(".gguf") else model


def footer(completion: Completion) -> str:
    """One line: model, place, time to first token, speed, and what was unusual."""
    routing = completion.routing
    parts = [shown_name(str(completion.get("model", ""))), str(routing.get("backend", ""))]
    if routing.get("layout"):
        parts.append(f"layers {routing['layout']}")
    if routing.get("load_ms"):
        parts.append(f"loaded in {routing['load_ms'] / 1000:.1f} s")
    if routing.get("ttft_ms") is not None:
        parts.append(f"first token {routing['ttft_ms']:.0f} ms")
    if routing.get("tokens_per_s"):
        parts.append(f"{routing['tokens_per_s']:.0f} tokens/s")
    if completion.get("eval_count") is not None:
        parts.append(f"{completion['eval_count']} tokens")
    unusual = {"length": "cut at max_tokens", "cancelled": "stopped", "error": "broken off"}
    if completion.get("_context_full"):
        unusual["length"] = f"cut, its context of {completion['_context_full']:,} tokens is full"
    parts.append(unusual.get(completion.finish_reason, ""))
    parts += [_failover_words(one) for one in routing.get("failovers") or () if one.get("continued")]
    parts += [str(routing.get("dropped") or completion.get("_dropped") or ""), str(routing.get("note") or "")]
    return " · ".join(part for part in parts if part)


def why(completion: Completion) -> list[str]:
    """Why this route, over which workers, and where the time went: one line each."""
    routing = completion.routing
    if not routing:
        return []
    lines = [f"why: {routing['reason']}"] if routing.get("reason") else []
    place = routing.get("coordinator_url") or routing.get("node_url")
    if place:
        lines.append(f"at {place}")
    for shard in (routing.get("plan") or {}).get("shards", ()):
        lines.append(
            f"layers {shard['layers']} on {shard['endpoint']}: {format_bytes(shard['weight_bytes'])} weights, "
            f"{format_bytes(shard['kv_bytes'])} KV cache"
        )
    lines += [f"differs from the plan: {one}" for one in routing.get("placement_differences") or ()]
    named = (
        ("queue", "queue_ms"),
        ("load", "load_ms"),
        ("first token", "ttft_ms"),
        ("all", "duration_ms"),
        ("router's own part", "router_overhead_ms"),
    )
    times = [f"{name} {routing[key]:,.1f} ms" for name, key in named if routing.get(key) is not None]
    if times:
        lines.append(", ".join(times))
    counts = [
        f"{completion[key]:,} {words}"
        for key, words in (("prompt_eval_count", "prompt tokens"), ("eval_count", "tokens written"))
        if completion.get(key) is not None
    ]
    if counts:
        lines.append(", ".join(counts))
    lines += [str(one["what"]) for one in routing.get("failovers") or () if one.get("what")]
    return lines


def _failover_words(failover: Mapping[str, Any]) -> str:
    """A place that was lost in mid-answer, as a quiet remark."""
    lost = ", ".join(failover.get("lost_workers") or ()) or "its coordinator"
    cost_ms = failover.get("cost_ms")
    after = f" after {cost_ms / 1000:.1f} s" if cost_ms else ""
    return f"lost {lost} at token {failover.get('tokens_before', 0)}, continued{after}"


# --- an answer under way ------------------------------------------------------------------------


def live_markdown(text: str, thinking: str, status: str) -> str:
    """An answer while it is written: its end, or the end of the reasoning, and what is going on."""
    text, thinking = parted(text, thinking)
    parts = []
    if text:
        parts.append(safe_markdown(tail(text)))
    elif thinking:
        quoted = safe_markdown(tail(thinking, LIVE_CHARS // 4)).replace("\n", "\n> ")
        parts.append(f"*reasoning …*\n\n> {quoted}")
    if status:  # a model is being loaded, or a lost one replaced
        parts.append(f"*{_escaped(status)} …*")
    return "\n\n".join(parts)
