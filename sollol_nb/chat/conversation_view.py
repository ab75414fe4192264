"""How chats look: as text, and as HTML in which long messages are folded. What was said is always escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sollol_nb.chat.conversation import Chat, Said

LONG_CHARS = 700
SUMMARY_CHARS = 120

_CUT_SHORT = {
    "length": "cut at its longest",
    "cancelled": "stopped",
    "error": "broke off",
}


def as_text(chat: Chat) -> str:
    """The chat as text; long messages by their beginning."""
    lines = [_title(chat)]
    if chat.system:
        lines.append(f"system: {_beginning(chat.system)}")
    for one in chat.said:
        lines += [f"[{one.note}]"] if one.note else []
        lines.append(f"{_speaker(one)}: {_beginning(_content(one))}")
    return "\n".join(lines)


def as_html(chat: Chat) -> str:
    """The chat as HTML."""
    parts = [f"<b>{html.escape(_title(chat))}</b>"]
    if chat.system:
        parts.append(_message_html("system", chat.system))
    for one in chat.said:
        if one.note:
            parts.append(f'<div style="opacity:.7;margin:.4em 0"><i>{html.escape(one.note)}</i></div>')
        parts.append(_message_html(_speaker(one), _content(one), str(one.message.get("thinking") or "")))
    return f"<div>{''.join(parts)}</div>"


def list_as_text(chats: Sequence[Chat]) -> str:
    """One line for each chat."""
    return "\n".join(map(_title, chats)) or "no chats yet; --chat NAME begins one"


def list_as_html(chats: Sequence[Chat]) -> str:
    """A table of chats."""
    if not chats:
        return html.escape(list_as_text(chats))
    rows = "".join(
        f"<tr><td>{html.escape(chat.name)}</td><td>{chat.turn_count}</td><td>{html.escape(chat.model)}</td>"
        f"<td>{html.escape(_last_time(chat))}</td></tr>"
        for chat in chats
    )
    return f"<table><tr><th>chat</th><th>turns</th><th>model</th><th>last</th></tr>{rows}</table>"


def _title(chat: Chat) -> str:
    turns = "1 turn" if chat.turn_count == 1 else f"{chat.turn_count} turns"
    return ", ".join(filter(None, (f"chat {chat.name}: {turns}", chat.model, _last_time(chat))))


def _last_time(chat: Chat) -> str:
    return f"{chat.said[-1].at.astimezone():%Y-%m-%d %H:%M}" if chat.said else ""


def _speaker(one: Said) -> str:
    about = ", ".join(filter(None, (one.model, _CUT_SHORT.get(one.done_reason, ""))))
    return f"{one.role} ({about})" if about else one.role


def _content(one: Said) -> str:
    content = one.message.get("content") or ""
    said = [content] if isinstance(content, str) else [str(part.get("text") or "[media]") for part in content]
    said += [f"[calls {call['function']['name']}]" for call in one.message.get("tool_calls") or ()]
    said += ["[image]"] * len(one.message.get("images") or ())
    return "\n".join(filter(None, said))


def _beginning(text: str) -> str:
    left = len(text) - LONG_CHARS
    return text if left <= 0 else f"{text[:LONG_CHARS]} … ({left:,} more characters)"


def _message_html(speaker: str, content: str, thinking: str = "") -> str:
    said = f'<div style="white-space:pre-wrap">{html.escape(content)}</div>'
    if len(content) > LONG_CHARS:
        summary = html.escape(" ".join(content[:SUMMARY_CHARS].split()))
        said = f"<details><summary>{summary} … ({len(content):,} characters)</summary>{said}</details>"
    if thinking:
        thoughts = f'<div style="white-space:pre-wrap;opacity:.7">{html.escape(thinking)}</div>'
        said = f"<details><summary>reasoning</summary>{thoughts}</details>{said}"
    return f'<div style="margin:.4em 0"><b>{html.escape(speaker)}</b>{said}</div>'
