"""Chats made of short messages."""

from __future__ import annotations

from typing import Any

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat

CALL = {"function": {"name": "now", "arguments": {}}}
Chunks = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def answer(content: str, **more: Any) -> Completion:
    return Completion(message=assistant(content, **more), model="m", done_reason="stop", eval_count=3)


def chat_of(turn_count: int, name: str = "c") -> Chat:
    """A chat in which each answer repeats its question's number."""
    messages = [
        message for at in range(turn_count) for message in (user(f"question {at}"), assistant(f"answer {at}"))
    ]
    return Chat.from_messages([{"role": "system", "content": "Be brief."}, *messages], name=name)
