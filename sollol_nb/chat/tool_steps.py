"""The calls of Python functions in an answer: as messages for the model, and as lines for people. Pure."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from sollol_nb.chat.chunk import Step
from sollol_nb.text.readable import readable
from sollol_nb.text.safe_markdown import DOLLAR_AS_TEXT, fenced, printable, safe_markdown
from sollol_nb.text.tables import counted, format_ms, shortened

MAX_RESULT_CHARS = 8000
MAX_ERROR_CHARS = 1000
DECLINED = "the user declined this call"
LINE_CHARS = 80
SHOWN_CHARS = 10_000
"""Of arguments; results are shorter."""
MOST_UNFOLDED = 6
_CUT = re.compile(r"\[cut: ([\w ,;…]+)\]")
"""The last line of `readable` where it cut something. A text may end like it, so no other characters are taken."""


def result_text(value: object) -> tuple[str, str]:
    """The result of a function as a model reads it, within bounds, and what was cut, as one line.

    Where something was cut, the last line of the text is the notice of it.
    """
    text = readable(value, limit_chars=MAX_RESULT_CHARS)
    if len(text) > MAX_RESULT_CHARS:
        text = f"{text[:MAX_RESULT_CHARS]}\n[cut: {MAX_RESULT_CHARS:,} of {len(text):,} characters shown]"
    cut = _CUT.fullmatch(text.rpartition("\n")[2])
    return text, f"the model got a part of the result: {cut[1]}" if cut else ""


def error_text(error: BaseException) -> str:
    """An error of a function as a model reads it."""
    try:
        text = str(error)
    except Exception:  # the user's own code can raise anything
        text = "(its text cannot be read)"
    return shortened(f"{type(error).__name__}: {text}", MAX_ERROR_CHARS)


def messages_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The messages between question and answer: each answer of the model with its calls, and the results."""
    messages: list[dict[str, Any]] = []
    for _, together in groupby(steps, key=lambda step: step["round"]):
        calls = list(together)
        asked: dict[str, Any] = {"role": "assistant", "content": calls[0]["text"]}
        if calls[0]["thinking"]:
            asked["thinking"] = calls[0]["thinking"]
        asked["tool_calls"] = [
            {
                "id": step["id"],
                "function": {
                    "name": step["call"],
                    "arguments": step["arguments"] if isinstance(step["arguments"], Mapping) else {},
                },
            }
            for step in calls
        ]
        messages.append(asked)
        messages += [
            {
                "role": "tool",
                "tool_name": step["call"],
                "tool_call_id": step["id"],
                "content": f"Error: {step['error']}" if step["error"] else step["result"],
            }
            for step in calls
        ]
    return messages


def call_text(name: str, arguments: Any, limit_chars: int) -> str:
    """A call as one line, such as `convert(amount=3, to="EUR")`; of long ones how much is left out."""
    if isinstance(arguments, Mapping):
        inner = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    else:
        inner = str(arguments)
    text = printable(f"{shortened(name, 80)}({inner})").replace("\n", " ")
    left = len(text) - limit_chars
    return text if left <= 0 else f"{text[:limit_chars]} … ({left:,} more characters)"


def line_of(step: Step, limit_chars: int = LINE_CHARS) -> str:
    """A step as one line: the call, and its result or error, shortened."""
    call = call_text(step["call"], step["arguments"], limit_chars)
    if step["error"]:
        return f"{call} failed: {_beginning(step['error'], limit_chars)}"
    return f"{call} = {_beginning(step['result'], limit_chars)}"


def lines_of(steps: Sequence[Step]) -> str:
    """Steps as text, each one line and what to know about it; "" without any."""
    return "".join(f"[{line_of(step)}{f' ({note})' if (note := step['note']) else ''}]\n" for step in steps)


def folded_steps(steps: Sequence[Step], *, limit_chars: int = SHOWN_CHARS) -> str:
    """Steps as Markdown, each a fold with the arguments and the result; many of them in one more fold.

    Args:
        limit_chars: of arguments and results, each of which is cut with a note.
    """
    folds = "\n\n".join(_fold(step, limit_chars) for step in steps)
    if len(steps) <= MOST_UNFOLDED:
        return folds
    return f"<details><summary><small>{_in_html(summary(steps))}</small></summary>\n\n{folds}\n\n</details>"


def steps_in_html(steps: Sequence[Step]) -> str:
    """Steps as HTML: one fold with a line for each; "" without any."""
    if not steps:
        return ""
    lines = html.escape(lines_of(steps))
    return f"<details><summary><small>{html.escape(summary(steps))}</small></summary><pre>{lines}</pre></details>"


def _fold(step: Step, limit_chars: int) -> str:
    line = f"{line_of(step)} · {format_ms(step['seconds'] * 1000)}"
    parts = [safe_markdown(step["text"].strip())] if step["text"].strip() else []
    arguments = step["arguments"]
    if arguments:
        is_text = isinstance(arguments, str)
        text = arguments if is_text else json.dumps(arguments, indent=2, ensure_ascii=False)
        parts.append(fenced(_bounded(text, limit_chars), "" if is_text else "json"))
    parts.append(fenced(_bounded(step["error"] or step["result"], limit_chars)))
    parts += [f"*{_in_html(step['note'])}*"] if step["note"] else []
    body = "\n\n".join(parts)
    return f"<details><summary><small>{_in_html(line)}</small></summary>\n\n{body}\n\n</details>"


def _in_html(line: str) -> str:
    """A line as HTML in Markdown, where a dollar would begin a formula."""
    return html.escape(line, quote=False).replace("$", DOLLAR_AS_TEXT)


def _bounded(text: str, limit_chars: int) -> str:
    left = len(text) - limit_chars
    return text if left <= 0 else f"{text[:limit_chars]}\n… ({left:,} more characters)"


def _beginning(text: str, limit_chars: int) -> str:
    """The first line of a text, shortened; it ends with … where there is more."""
    first, _, rest = printable(text.strip()).partition("\n")
    return shortened(f"{first} …" if rest else first, limit_chars)


def summary(steps: Sequence[Step]) -> str:
    """All steps as one line: how many calls, of what, how long."""
    names = ", ".join(dict.fromkeys(printable(shortened(step["call"], 60)) for step in steps))
    failed = sum(bool(step["error"]) for step in steps)
    parts = [f"{counted(len(steps), 'call')}: {shortened(names, 200)}", f"{failed} failed" if failed else ""]
    return " · ".join(filter(None, [*parts, format_ms(sum(step["seconds"] for step in steps) * 1000)]))
