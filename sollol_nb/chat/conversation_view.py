"""How a conversation is shown: as Markdown that runs and fetches nothing.

Questions are shaded and stand to the right, answers look as in their cells, the rest is folded. A frontend that
drops inline styles (GitHub) shows the same texts one below the other.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from sollol_nb.chat.completion_view import CODE_CLASS, escaped, folded_thinking
from sollol_nb.text.safe_markdown import DOLLAR_AS_TEXT, parts_of, printable, safe_markdown

LONG_CHARS = 700
"""Longer messages that are no answers are folded, and shown as text only up to here."""
SUMMARY_CHARS = 120

_QUESTION_STYLE = (
    "margin: 1em 0 1em 12%; padding: .3em 1em .6em; border-radius: 10px; "
    "background-color: rgba(128, 128, 128, .15);"
)


def title_markdown(name: str, about: Sequence[str]) -> str:
    """The first line: the conversation's name, and in small letters what is known of it."""
    known = "".join(f" · {escaped(printable(text))}" for text in about if text)
    return f'**conversation {escaped(name)}**<small class="{CODE_CLASS}">{known}</small>'


def question_markdown(text: str) -> str:
    """What the user wrote, with its lines as they are."""
    return f'<div style="{_QUESTION_STYLE}">\n\n<small>**user**</small>\n\n{_lines_as_they_are(text)}\n\n</div>'


def answer_markdown(model: str, ended: str, text: str, thinking: str) -> str:
    """An answer as in its cell, after a line with its model and whether it ended early."""
    about = f" · {escaped(ended)}" if ended else ""
    speaker = f"<small>**{escaped(printable(model or 'assistant'))}**{about}</small>"
    return f"{speaker}\n\n{safe_markdown(text)}{folded_thinking(thinking)}"


def folded_message(label: str, text: str) -> str:
    """A message of the system or of a tool, folded."""
    summary = f"<summary><small>{html.escape(label)} ({len(text):,} characters)</small></summary>"
    return f"<details>{summary}\n\n{_lines_as_they_are(text)}\n\n</details>"


def note_markdown(note: str) -> str:
    """Which turns were dropped before an answer."""
    return f"<small>*{escaped(note)}*</small>"


def beginning(text: str) -> str:
    """A text; of a long one the beginning, and how much is missing."""
    left = len(text) - LONG_CHARS
    return text if left <= 0 else f"{text[:LONG_CHARS]} … ({left:,} more characters)"


def _lines_as_they_are(text: str) -> str:
    with_breaks = "".join(part if is_code else _with_hard_breaks(part) for is_code, part in parts_of(text))
    body = safe_markdown(with_breaks)
    if len(text) <= LONG_CHARS:
        return body
    summary = html.escape(" ".join(printable(text[:SUMMARY_CHARS]).split())).replace("$", DOLLAR_AS_TEXT)
    return f"<details><summary>{summary} … ({len(text):,} characters)</summary>\n\n{body}\n\n</details>"


def _with_hard_breaks(text: str) -> str:
    return re.sub(r"(?<=\S)[ \t]*\n(?=[ \t]*\S)", "  \n", text)
