"""How an answer is shown: Markdown with its reasoning folded and a footer that opens, JSON, code, HTML or text.

The functions take an answer as a mapping (Ollama's shape with `_routing`; see `completion.Completion`). What a
model writes is not trusted: see `safe_markdown`. An answer shown as a page (`html`) goes into a frame that can run
and fetch nothing; the frame takes the height of its content.

The class names in an answer are for the script that adds copy buttons (`notebook/answers/copying.py`).
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from sollol_nb.chat.chunk import CONTEXT_FULL, DROPPED, NOTE, ROUTING, STEPS
from sollol_nb.chat.tool_steps import folded_steps, lines_of, steps_in_html
from sollol_nb.text.safe_markdown import DOLLAR_AS_TEXT, code_in, fenced, open_fence, printable, safe_markdown
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted, format_bytes, format_ms

Answer: TypeAlias = Mapping[str, Any]

SHOWN_CACHED_TOKENS = 256
"""Of a prompt, so many tokens must have come from the slot for the footer to say so: processing fewer is quick."""

LIVE_CHARS = 6000
"""Of a longer answer only the end is shown while it streams: all of it, ten times a second, would stall the
page."""

CODE_CLASS = "sollol-code"
"""Marks Markdown whose code blocks get copy buttons."""
ANSWER_CLASS = "sollol-answer"
"""Marks the end of an answer, which gets a copy button as well."""

_THINK, _END_OF_THINK = "<think>", "</think>"

# --- text ---------------------------------------------------------------------------------------


def split_thinking(text: str, thinking: str) -> tuple[str, str]:
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
    notice = f"*… {at:,} characters above, shown when the answer is complete*\n\n"
    return notice + (f"{fence}\n" if fence else "") + text[at:]


# --- a complete answer --------------------------------------------------------------------------


def plain_text(answer: Answer) -> str:
    """The calls before the answer, its text and its footer."""
    return f"{lines_of(answer.get(STEPS, ()))}{_text_of(answer)}\n\n[{footer(answer)}]"


def mime_bundle(answer: Answer, shown_as: str) -> dict[str, str]:
    """All forms of an answer, by MIME type; a frontend takes the richest that it knows.

    Args:
        shown_as: one of `settings.table.FORMATS`.
    """
    bundle = {"text/plain": printable(plain_text(answer))}
    if shown_as == "text":
        return bundle
    text, thinking = split_thinking(_text_of(answer), str(answer.get("message", {}).get("thinking", "")))
    as_block = {"json": _json_block, "code": _code_block, "html": _html_block}.get(shown_as)
    body = safe_markdown(text) + folded_thinking(thinking) if as_block is None else as_block(text)
    parts = [folded_steps(answer.get(STEPS, ())), body, folded_footer(answer)]
    bundle["text/markdown"] = "\n\n".join(filter(None, parts))
    if shown_as == "html":
        bundle["text/html"] = _page(text, answer)
    return bundle


def _text_of(answer: Answer) -> str:
    return str(answer.get("message", {}).get("content", ""))


def _json_block(text: str) -> str:
    with suppress(ValueError):  # text that is not JSON is shown unchanged
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


_PAGE_STYLE = (
    "width: 100%; height: 400px; border: 1px solid #8888; border-radius: 4px; box-sizing: border-box; "
    "background: white; resize: vertical;"
)
_LEAST_PX, _MOST_PX = 60, 720
# A page can give any property of its document another meaning. What comes of it is a number within these bounds.
# Then the frame gives up the notebook's origin: what a click on a link opens in it has none.
_TAKE_HEIGHT = (
    "const page = this.contentDocument; if (page) { let height; this.style.height = '0'; "
    "try { height = Number(page.documentElement.scrollHeight) + 2; } catch {} "
    f"this.style.height = Math.min(Math.max(height || 400, {_LEAST_PX}), {_MOST_PX}) + 'px'; "
    "this.sandbox = ''; }"
)
_FETCH_NOTHING = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:; base-uri 'none'; form-action 'none'\">"
    '<meta http-equiv="x-dns-prefetch-control" content="off">'
)
# The policy does not stop a link from looking up the name of a host, or from connecting to it, which gives
# the host what is in its name. A page in the page could have such links.
_CONNECTS = re.compile(r"<(?=link|iframe)", re.IGNORECASE)


def _page(text: str, answer: Answer) -> str:
    """The answer as a page in a frame. The notebook can read the frame's height, since both have the same origin;
    so the frame must never get `allow-scripts`."""
    source, title = html.escape(_html_in(text)), html.escape(short_name(str(answer.get("model"))))
    page = html.escape(_FETCH_NOTHING + _CONNECTS.sub("<x-", _html_in(text)))
    lines = "".join(f"<li><small>{html.escape(line)}</small></li>" for line in details(answer))
    return (
        f"{steps_in_html(answer.get(STEPS, ()))}"
        f'<iframe sandbox="allow-same-origin" srcdoc="{page}" title="answer of {title}" '
        f'style="{_PAGE_STYLE}" onload="{_TAKE_HEIGHT}"></iframe>'
        f"<details><summary><small>source</small></summary><pre>{source}</pre></details>"
        f"{_fold(answer, f'<ul>{lines}</ul>' if lines else '')}"
    )


def folded_thinking(thinking: str) -> str:
    """The reasoning as a fold after the answer; "" without any."""
    if not thinking:
        return ""
    length = counted(len(thinking.split()), "word")
    summary = f"<summary><small>reasoning ({length})</small></summary>"
    return f"\n\n<details>{summary}\n\n{safe_markdown(thinking)}\n\n</details>"


def folded_footer(answer: Answer) -> str:
    """The footer as a fold; inside are the details (see `details`)."""
    lines = "\n".join(f"- <small>{escaped(line)}</small>" for line in details(answer))
    return _fold(answer, f"\n\n{lines}\n\n" if lines else "")


def _fold(answer: Answer, inside: str) -> str:
    line = html.escape(footer(answer), quote=False)
    mark = f'class="{ANSWER_CLASS} {ANSWER_CLASS}-{answer_key(_text_of(answer))}"'
    if not inside:
        return f"<small {mark}>{line}</small>"
    return f"<details {mark}><summary><small>{line}</small></summary>{inside}</details>"


def answer_key(text: str) -> str:
    """What stands for an answer's text in the page."""
    return f"{zlib.crc32(text.encode(errors='replace')):08x}-{len(text)}"


def escaped(text: str) -> str:
    """A line as Markdown that shows it unchanged."""
    line = re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))
    return line.replace("$", DOLLAR_AS_TEXT)


def footer(answer: Answer) -> str:
    """One line: model, backend, time to first token, speed, and what was unusual."""
    routing = answer.get(ROUTING, {})
    parts = [short_name(str(answer.get("model", ""))), str(routing.get("backend", ""))]
    if routing.get("layout"):
        parts.append(f"layers {routing['layout']}")
    if routing.get("loaded_by"):
        parts.append("already loaded")
    elif routing.get("load_ms"):
        parts.append(f"loaded in {routing['load_ms'] / 1000:.1f} s")
    if routing.get("ttft_ms") is not None:
        parts.append(f"first token {format_ms(routing['ttft_ms'])}")
    if routing.get("tokens_per_s"):
        parts.append(f"{routing['tokens_per_s']:.0f} tokens/s")
    if routing.get("restored_tokens") or (routing.get("cached_tokens") or 0) >= SHOWN_CACHED_TOKENS:
        parts.append(_describe_cached(answer))
    if routing.get("accepted_tokens"):  # drafts that brought nothing are in the details only
        parts.append(_describe_drafts(routing))
    if answer.get("eval_count") is not None:
        parts.append(counted(answer["eval_count"], "token"))
    unusual = {"length": "stopped at max_tokens", "cancelled": "stopped", "error": "interrupted"}
    if answer.get(CONTEXT_FULL):
        unusual["length"] = f"stopped: its context of {answer[CONTEXT_FULL]:,} tokens is full"
    parts.append(unusual.get(str(answer.get("done_reason", "")), ""))
    parts += [
        _describe_failover(failover) for failover in routing.get("failovers") or () if failover.get("continued")
    ]
    parts += [str(routing.get("dropped") or answer.get(DROPPED) or ""), str(routing.get("context_note") or "")]
    parts += [str(routing.get("note") or ""), str(answer.get(NOTE) or "")]
    return " · ".join(part for part in parts if part)


def details(answer: Answer) -> list[str]:
    """Why this route, over which workers, and where the time went: one line each."""
    routing = answer.get(ROUTING, {})
    if not routing:
        return []
    lines = [f"why: {routing['reason']}"] if routing.get("reason") else []
    if routing.get("model_path"):
        lines.append(f"model file: {routing['model_path']}")
    if routing.get("loaded_by"):
        lines.append(f"the model had been loaded by {routing['loaded_by']}")
    url = routing.get("coordinator_url") or routing.get("node_url")
    if url:
        lines.append(f"at {url}")
    for shard in (routing.get("plan") or {}).get("shards", ()):
        worker = shard.get("name") or shard["endpoint"]
        lines.append(
            f"layers {shard['layers']} on {worker}: {format_bytes(shard['weight_bytes'])} weights, "
            f"{format_bytes(shard['kv_bytes'])} KV cache"
        )
    lines += [f"plan: {reason}" for reason in (routing.get("plan") or {}).get("reasons", ())]
    lines += [f"differs from the plan: {difference}" for difference in routing.get("placement_differences") or ()]
    named = (
        ("queue", "queue_ms"),
        ("load", "load_ms"),
        ("first token", "ttft_ms"),
        ("total", "duration_ms"),
        ("router overhead", "router_overhead_ms"),
    )
    times = [f"{name} {format_ms(routing[key])}" for name, key in named if routing.get(key) is not None]
    if times:
        lines.append(", ".join(times))
    counts = [
        f"{counted(answer[key], noun)}{verb}"
        for key, noun, verb in (("prompt_eval_count", "prompt token", ""), ("eval_count", "token", " generated"))
        if answer.get(key) is not None
    ]
    if counts:
        lines.append(", ".join(counts))
    if routing.get("cached_tokens"):
        lines.append(_describe_cached(answer))
    if routing.get("drafted_tokens"):
        lines.append(_describe_drafts(routing))
    failovers = routing.get("failovers") or ()
    lines += [str(failover["what"]) for failover in failovers if failover.get("what")]
    lines += sorted({_RECOVERIES[failover["recovery"]] for failover in failovers if failover.get("recovery")})
    return lines


_RECOVERIES = {
    "fast": 'recovery "fast": no token was lost or repeated, but the text after that token may differ from an '
    "undisturbed answer",
    "exact": 'recovery "exact": the known tokens were generated again and were the same, so the text is that of '
    "an undisturbed answer",
}


def _describe_drafts(routing: Mapping[str, Any]) -> str:
    return f"drafts: {routing.get('accepted_tokens') or 0} of {routing['drafted_tokens']} accepted"


def _describe_cached(answer: Answer) -> str:
    """Which tokens of the prompt were not processed, and where they came from."""
    routing = answer.get(ROUTING, {})
    cached, restored = routing.get("cached_tokens") or 0, routing.get("restored_tokens") or 0
    total = answer.get("prompt_eval_count")
    parts = [counted(total, "token")] if total is not None else []
    parts += [f"{restored:,} from a saved context"] if restored else []
    parts += [f"{cached - restored:,} from its slot"] if cached > restored else []
    return f"prompt: {', '.join(parts)}"


def _describe_failover(failover: Mapping[str, Any]) -> str:
    """Which server was lost during the answer, in a few words."""
    server = "its coordinator" if "lost_workers" in failover else "its Ollama node"
    lost = ", ".join(failover.get("lost_workers") or ()) or server
    cost_ms = failover.get("cost_ms")
    after = f" after {cost_ms / 1000:.1f} s" if cost_ms else ""
    recovery = f" ({failover['recovery']})" if failover.get("recovery") else ""
    return f"lost {lost} at token {failover.get('tokens_before', 0)}, continued{after}{recovery}"


# --- an answer while it streams ------------------------------------------------------------------


def live_markdown(text: str, thinking: str, status: str) -> str:
    """An answer while it streams: its end, or the end of the reasoning, and what happens at the moment."""
    text, thinking = split_thinking(text, thinking)
    parts = []
    if text:
        parts.append(safe_markdown(tail(text)))
    elif thinking:
        quoted = safe_markdown(tail(thinking, LIVE_CHARS // 4)).replace("\n", "\n> ")
        parts.append(f"*reasoning …*\n\n> {quoted}")
    if status:  # a model is being loaded, or a lost coordinator replaced
        parts.append(f"*{escaped(status)} …*")
    return "\n\n".join(parts)
