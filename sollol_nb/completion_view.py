"""How a completion looks: Markdown with the reasoning folded and a footer that opens, JSON, code, HTML or text.

What a model writes is not trusted. Frontends run scripts in the Markdown of a cell that its user has executed, so
HTML in an answer is shown as text, outside of code where it is text anyway, and no image is fetched from an
address that a model made up; an answer that is meant to be a page (`html`) goes into a frame that may run nothing.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.markdown_tables import counted
from sollol_nb.units import format_bytes

if TYPE_CHECKING:
    from sollol_nb.completion import Completion

FORMATS = ("markdown", "text", "json", "html", "code")
LIVE_CHARS = 6000
"""While it streams, a long answer is shown by its end: all of it, ten times a second, would stall the page."""

_THINK, _END_OF_THINK = "<think>", "</think>"
_FENCE = re.compile(r"^ {0,3}(?P<marks>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)
_LANGUAGE = re.compile(r"[\w+#.-]*")
# What begins a tag, or a character by number or in a scheme; an image, which is fetched unasked; a link's
# definition that has a title, which may go on over blank lines; an address that is a script; and what JupyterLab
# puts where a formula was. It puts formulas back unchecked, into addresses too, where a quote ends the attribute.
_DANGER = (
    r"<(?=[a-z/!?])|&(?=#|(?:tab|newline|colon);)|!(?=\[)|\](?=:\s*(?:<[^\n>]*>|\S+)\s+[\"'(])|@(?=\\*@)"
    r"|(?:javascript|vbscript)(?=[\s\\]*:)|data(?=[\s\\]*:\s*(?:text|application|image/svg))"
)
_ADDRESS = re.compile(r"\][(:]|://|www\.", re.IGNORECASE)
_IN_CODE = re.compile(_DANGER, re.IGNORECASE)
# Code spans on one line, tags that are harmless and common in tables, links; then dangers.
_SPAN_OR_DANGER = re.compile(
    r"(?<![\\`])(?P<ticks>`+)(?!`)(?P<code>[^\n]+?)(?<!`)(?P=ticks)(?!`)"
    r"|</?(?:br|sub|sup) ?/?>"
    r"|<(?:https?|mailto):[^\s<>\"]+>"
    rf"|(?P<danger>{_DANGER})|(?P<quote>\")",
    re.IGNORECASE,
)
# nbconvert lets a formula go on over blank lines and fences. These cannot: one line, or one that begins a line.
_FORMULA = re.compile(
    r"(?<![\\$])\$\$[^$\n]*[^$\n\\]\$\$(?!\$)|^\$\$[^$]*[^$\\]\$\$(?!\$)|(?P<open>\$(?=\$)|\\(?=begin|\\\[))",
    re.MULTILINE | re.IGNORECASE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# --- text ---------------------------------------------------------------------------------------


def parts_of(text: str) -> Iterator[tuple[bool, str]]:
    """(is it fenced code, text) of the parts of a Markdown text, in order; fences belong to the code."""
    begin = at = 0
    opening: re.Match[str] | None = None
    while (fence := _FENCE.search(text, at)) is not None:
        at = fence.end()
        if opening is None:
            if "`" in fence["info"] and fence["marks"][0] == "`":
                continue  # a code span
            yield False, text[begin : fence.start()]
            begin, opening = fence.start(), fence
        elif fence["marks"].startswith(opening["marks"]) and not fence["info"].strip():
            yield True, text[begin:at]
            begin, opening = at, None
    yield opening is not None, text[begin:]


def open_fence(text: str) -> str:
    """The line that opened a code block which the text does not close; "" if all are closed."""
    is_code, last = list(parts_of(text))[-1]
    fence = _FENCE.match(last) if is_code else None
    return fence[0].strip() if fence else ""


def safe_markdown(text: str) -> str:
    """The text with its HTML shown as text, and an open code block closed.

    Frontends do not agree on where code begins and ends. So code blocks with tags in them are written anew where
    none can take them for anything else, and code spans with tags as what they look like, free of any syntax.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = list(parts_of(text))
    may_have_formulas = "$" in text or "\\" in text
    risky = any(is_code and _is_risky(part, may_have_formulas) for is_code, part in parts)
    write = _block_apart if risky else _block_as_it_is
    safe = ""
    for is_code, part in parts:
        if is_code:
            safe = write(safe, part)
        else:
            text_part = _disarmed(part, may_have_formulas)
            safe += _with_closed_formulas(text_part) if risky else text_part
    return safe


def _is_risky(block: str, may_have_formulas: bool) -> bool:
    """Whether a code block could do something, were it not taken for code."""
    language = block.partition("\n")[0].strip().lstrip("`~").strip()
    quotes_in_addresses = may_have_formulas and '"' in block and _ADDRESS.search(block)
    return bool(_IN_CODE.search(block) or quotes_in_addresses) or not _LANGUAGE.fullmatch(language)


def _block_apart(before: str, block: str) -> str:
    """The text before and a code block that is out of all lists and quotes."""
    language, code = code_in(block)
    code = re.sub(rf"^ {{1,{_indent(block)}}}", "", code, flags=re.MULTILINE) if _indent(block) else code
    return f"{before}\n\n{fenced(code, language)}\n\n".lstrip("\n")


def _block_as_it_is(before: str, block: str) -> str:
    # The blank line ends a formula that was begun before.
    between = "" if not before or before.endswith("\n\n") else "\n"
    fence = open_fence(block)
    return f"{before}{between}{block}" + (f"\n{' ' * _indent(block)}{_marks(fence)}" if fence else "")


def _indent(block: str) -> int:
    return len(block) - len(block.lstrip(" "))


def _disarmed(text: str, may_have_formulas: bool) -> str:
    """What is not fenced code, with its HTML shown as text."""

    def disarmed(match: re.Match[str]) -> str:
        if (code := match["code"]) is not None:
            is_risky = _IN_CODE.search(code) or (may_have_formulas and '"' in code)
            return f"<code>{_by_number(code)}</code>" if is_risky else match[0]
        if match["quote"]:
            return "&quot;" if may_have_formulas else match[0]
        if not match["danger"]:
            return match[0]
        if match[0].isalpha():
            return f"{match[0]}\u200b"  # no scheme has such a space in it
        return {"<": "&lt;", "&": "&amp;"}.get(match[0], f"&#{ord(match[0])};")

    return _SPAN_OR_DANGER.sub(disarmed, text)


def _with_closed_formulas(text: str) -> str:
    """The text, with what could begin a formula that ends in a later part as what it looks like."""
    return _FORMULA.sub(lambda match: f"&#{ord(match[0])};" if match["open"] else match[0], text)


def _by_number(text: str) -> str:
    """The text with each character that could mean something as its number."""
    return "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in text)


def printable(text: str) -> str:
    """The text without characters that steer a terminal."""
    return _CONTROL.sub("", text)


def _marks(fence: str) -> str:
    return fence[: len(fence) - len(fence.lstrip(fence[0]))]


def parted(text: str, thinking: str) -> tuple[str, str]:
    """Answer and reasoning, also where an engine left both in the text: `<think>reasoning</think>answer`."""
    begin = text.lstrip()
    if thinking or not begin.startswith(_THINK):
        return text, thinking
    thinking, _, answer = begin.removeprefix(_THINK).partition(_END_OF_THINK)
    return answer.lstrip(), thinking.strip()


def code_in(text: str) -> tuple[str, str]:
    """Language and text of the first fenced code block; `("", text)` without one."""
    for is_code, part in parts_of(text):
        if is_code:
            first, _, rest = part.partition("\n")
            lines = rest.splitlines()
            if lines and _FENCE.fullmatch(lines[-1]) and not lines[-1].strip(" `~"):
                lines.pop()
            return first.strip().lstrip("`~").strip(), "\n".join(lines)
    return "", text


def fenced(text: str, language: str = "") -> str:
    """A text as a fenced code block, whatever fences it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    word = _LANGUAGE.match(language)
    return f"{marks}{word[0] if word else ''}\n{text}\n{marks}"


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


def _page(text: str, completion: Completion) -> str:
    source = html.escape(_html_in(text))
    return (
        f'<iframe sandbox="" srcdoc="{source}" title="answer of {html.escape(str(completion.get("model")))}" '
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
