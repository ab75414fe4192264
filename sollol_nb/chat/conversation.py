"""A conversation: its messages, how it is written to a file, and how it is shown.

A `Chat` keeps every message and what is known of it. `conversations.ask_in_chat` asks the next question with
all of them and adds question and answer. Turns that no longer fit the model's context are left out of the
request, not out of the chat (see `context_window`). A model's earlier reasoning is kept to be shown, and is not
sent again.

A chat lives in the memory of the process; those of a notebook are kept for its next kernel (see `kept.py`).
`Chat.export` writes it to a file, `Chat.load` reads it back. `conversation_view.py` says how it is shown.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sollol_nb.chat import conversation_view
from sollol_nb.chat.chunk import DROPPED
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.context_window import turn_starts
from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.tool_steps import call_text, messages_of
from sollol_nb.errors import ChatBusyError, ConfigError
from sollol_nb.text.safe_markdown import printable
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted

FILE_FORMAT = "sollol_nb chat"
FILE_VERSION = 1
CALL_CHARS = 300

_NAME = re.compile(r"\w[\w.-]{0,63}")
_ENDED_EARLY = {"length": "stopped at max_tokens", "cancelled": "stopped", "error": "interrupted"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a chat, and what is known of it.

    Attributes:
        message: in Ollama's shape: `role`, `content`, perhaps `thinking`, `images`, `tool_calls`.
        at: when it was added.
        model: which model answered; "" for messages that are not answers.
        done_reason: why the answer ended: `stop`, `length`, `tool_calls`, `cancelled` or `error`.
        note: which turns were dropped from the request for this answer; "" if none was.
        prompt_tokens: tokens of all messages that were sent for this answer.
        answer_tokens: tokens of the answer, reasoning included.
    """

    message: Mapping[str, Any]
    at: datetime
    model: str = ""
    done_reason: str = ""
    note: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def role(self) -> str:
        """`system`, `user`, `assistant` or `tool`."""
        return str(self.message["role"])

    @property
    def speaker(self) -> str:
        """The role, and of an answer in brackets its model and whether it ended early."""
        about = ", ".join(filter(None, (short_name(self.model), _ENDED_EARLY.get(self.done_reason, ""))))
        return f"{self.role} ({about})" if about else self.role

    @property
    def text(self) -> str:
        """The content as text, with a mark for each image and each call of a tool."""
        content = self.message.get("content") or ""
        parts = [content] if isinstance(content, str) else [str(part.get("text") or "[media]") for part in content]
        calls = [call["function"] for call in self.message.get("tool_calls") or ()]
        parts += [f"[calls {call_text(call['name'], call.get('arguments') or {}, CALL_CHARS)}]" for call in calls]
        parts += ["[image]"] * len(self.message.get("images") or ())
        return "\n".join(filter(None, parts))

    def as_markdown(self) -> str:
        """As a notebook shows it."""
        if self.role == "assistant":
            ended, thinking = _ENDED_EARLY.get(self.done_reason, ""), str(self.message.get("thinking") or "")
            return conversation_view.answer_markdown(short_name(self.model), ended, self.text, thinking)
        if self.role == "user":
            return conversation_view.question_markdown(self.text)
        tool = self.message.get("tool_name") or "a tool"
        label = f"result of {tool}" if self.role == "tool" else f"{self.role} message"
        return conversation_view.folded_message(label, self.text)

    def as_dict(self) -> dict[str, Any]:
        """As it is written to a file: the message, and of the rest what is known."""
        known = {name: getattr(self, name) for name in _KNOWN if getattr(self, name) not in ("", None)}
        return {"at": self.at.isoformat(), **known, "message": dict(self.message)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The message that `as_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        message = check_messages([data["message"]])[0]
        known = {name: data[name] for name in _KNOWN if name in data}
        return cls(message=message, at=datetime.fromisoformat(data["at"]), **known)

    @classmethod
    def from_answer(cls, answer: Completion) -> Self | None:
        """An answer as a chat keeps it; None if it has no text and calls no tool.

        A call of a tool that was cut within its arguments becomes text: no model takes it as a call.
        """
        message = {name: value for name, value in answer["message"].items() if value}
        calls = message.pop("tool_calls", [])
        cut = [call["function"] for call in calls if isinstance(call["function"].get("arguments"), str)]
        if cut:
            texts = [f"{function['name']} {function['arguments']}" for function in cut]
            message["content"] = "\n".join(filter(None, [message.get("content", ""), *texts]))
        if len(calls) > len(cut):
            message["tool_calls"] = [call for call in calls if call["function"] not in cut]
        if not message.get("content") and not message.get("tool_calls"):
            return None
        return cls(
            message={"content": "", **message},
            at=datetime.now(UTC),
            model=str(answer.get("model") or ""),
            done_reason=answer.finish_reason,
            note=str(answer.get(DROPPED) or ""),
            prompt_tokens=answer.get("prompt_eval_count"),
            answer_tokens=answer.get("eval_count"),
        )


_KNOWN = ("model", "done_reason", "note", "prompt_tokens", "answer_tokens")


class Chat:
    """One conversation.

    Args:
        name: letters, digits, `_`, `.` and `-`, beginning with a letter, digit or `_`; at most 64 characters.
        system: the system message, sent before all others.

    Raises:
        ConfigError: the name cannot be used.

    Attributes:
        system: may be changed at any time; "" for none.
        on_change: called with the chat after its messages have changed, in whatever thread; None for nothing.
    """

    def __init__(self, name: str, *, system: str = "") -> None:
        self.name = checked_name(name)
        self.system = system
        self.on_change: Callable[[Chat], object] | None = None
        self._history: list[ChatMessage] = []
        self._busy = threading.Lock()

    @property
    def history(self) -> tuple[ChatMessage, ...]:
        """All messages but the system message, oldest first."""
        return tuple(self._history)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What is sent before the next question: all messages, the system message first, without reasoning."""
        return [
            {name: value for name, value in message.items() if name != "thinking"}
            for message in self.to_messages()
        ]

    @property
    def model(self) -> str:
        """The model that answered last; "" before the first answer."""
        return next((entry.model for entry in reversed(self._history) if entry.model), "")

    @property
    def texts(self) -> list[str]:
        """What either side wrote, in order, without marks: reasoning too, but not the system message."""
        found = []
        for entry in self._history:
            content = entry.message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
            found += [entry.message.get("thinking"), *parts]
        return [text for text in found if isinstance(text, str) and text.strip()]

    @property
    def turn_count(self) -> int:
        """How many questions were asked."""
        return len(turn_starts([entry.message for entry in self._history]))

    @property
    def notes(self) -> list[tuple[datetime, str]]:
        """When turns were dropped from a request, and which."""
        return [(entry.at, entry.note) for entry in self._history if entry.note]

    @property
    def last_time(self) -> str:
        """When the last message was added, in local time; "" without any."""
        return f"{self._history[-1].at.astimezone():%Y-%m-%d %H:%M}" if self._history else ""

    @property
    def title(self) -> str:
        """One line: name, turns, model, time of the last message."""
        turns = counted(self.turn_count, "turn")
        return ", ".join(
            filter(None, (f"conversation {self.name}: {turns}", short_name(self.model), self.last_time))
        )

    def add(self, question: Mapping[str, Any], answer: Completion) -> bool:
        """Add a question and its answer, even one that ended early, and between them the functions that were
        called and their results. An answer without text that calls no tool is not added, nor is its question;
        returns whether they were.
        """
        entry = ChatMessage.from_answer(answer)
        if entry is not None:
            between = [
                ChatMessage(message=message, at=entry.at, model=entry.model if "tool_calls" in message else "")
                for message in messages_of(answer.steps)
            ]
            self._history += [ChatMessage(message=dict(question), at=entry.at), *between, entry]
            self._changed()
        return entry is not None

    def amend(self, answer: Completion) -> None:
        """Replace the last answer, which was interrupted or stopped, by the whole one (as `router.resume` returns
        it).

        Raises:
            ConfigError: the last answer was not interrupted, or this one has no text.
            ChatBusyError: the chat is answering another question.
        """
        with self.answering():
            if not self._history or self._history[-1].done_reason not in ("error", "cancelled"):
                raise ConfigError(
                    f"the last answer of conversation {self.name} was not interrupted; there is nothing to amend"
                )
            whole = ChatMessage.from_answer(Completion({DROPPED: self._history[-1].note, **answer}))
            if whole is None:
                raise ConfigError(f"the answer has no text; conversation {self.name} keeps the interrupted one")
            self._history[-1] = whole
            self._changed()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Hold the chat for one answer.

        Raises:
            ChatBusyError: another answer is being written.
        """
        if not self._busy.acquire(blocking=False):
            raise ChatBusyError(
                f"conversation {self.name} is still answering another question; wait for it, or stop it"
            )
        try:
            yield
        finally:
            self._busy.release()

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self._history.clear()
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self)

    # --- to and from plain data -----------------------------------------------------------------

    def to_messages(self) -> list[dict[str, Any]]:
        """All messages in Ollama's shape, the system message first, with the reasoning of the answers."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(dict(entry.message) for entry in self._history)]

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]], *, name: str = "chat") -> Self:
        """A chat that continues these messages; a system message that comes first becomes its own.

        Raises:
            ConfigError: they are not messages (see `messages.check_messages`).
        """
        checked = check_messages(messages)
        chat = cls(name)
        if checked[0]["role"] == "system":
            chat.system = str(checked.pop(0)["content"])
        now = datetime.now(UTC)
        chat._history = [ChatMessage(message=message, at=now) for message in checked]
        return chat

    def as_dict(self) -> dict[str, Any]:
        """The chat as plain data, for JSON."""
        return {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "name": self.name,
            "system": self.system,
            "said": [entry.as_dict() for entry in self.history],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str | None = None) -> Self:
        """The chat that `as_dict` wrote, perhaps with another name.

        Raises:
            KeyError, TypeError, ValueError, ConfigError: the data is something else.
        """
        chat = cls(data["name"] if name is None else name, system=str(data["system"]))
        chat._history = [ChatMessage.from_dict(entry) for entry in data["said"]]
        return chat

    def export(self, path: str | Path) -> Path:
        """Write the chat to a JSON file, replacing an existing one; returns its path.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = Path(path).expanduser()
        try:
            path.write_text(json.dumps(self.as_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write conversation {self.name} to {path}: {error.strerror or error}"
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None) -> Self:
        """Read a chat that `export` wrote.

        Args:
            name: another name for it.

        Raises:
            ConfigError: the file cannot be read, or is not an exported chat.
        """
        path, name = Path(path).expanduser(), None if name is None else checked_name(name)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); give a file that Chat.export wrote") from error
        if not isinstance(data, dict) or data.get("format") != FILE_FORMAT:
            raise ConfigError(
                f"{path} is not an exported conversation; give a file that Chat.export wrote, or use "
                "Chat.from_messages"
            )
        if data.get("version") != FILE_VERSION:
            raise ConfigError(
                f"{path} has version {data.get('version')}, but this sollol_nb reads version {FILE_VERSION}; "
                "upgrade sollol_nb"
            )
        try:
            return cls.from_dict(data, name=name)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); export the conversation again") from error

    # --- shown ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        turns = counted(self.turn_count, "turn")
        return f"<Chat {self.name}: {', '.join(filter(None, (turns, short_name(self.model))))}>"

    def __str__(self) -> str:
        """The chat as text; of long messages only the beginning."""
        lines = [self.title]
        if self.system:
            lines.append(f"system: {conversation_view.beginning(self.system)}")
        for entry in self._history:
            lines += [f"[{entry.note}]"] if entry.note else []
            lines.append(f"{entry.speaker}: {conversation_view.beginning(entry.text)}")
        return "\n".join(lines)

    def _as_markdown(self) -> str:
        known = [counted(self.turn_count, "turn"), short_name(self.model), self.last_time]
        parts = [conversation_view.title_markdown(self.name, known)]
        if self.system:
            parts.append(conversation_view.folded_message("system message", self.system))
        for entry in self._history:
            if entry.note:
                parts.append(conversation_view.note_markdown(entry.note))
            parts.append(entry.as_markdown())
        return "\n\n".join(parts)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": printable(str(self)), "text/markdown": self._as_markdown()}


def checked_name(name: str) -> str:
    """The name of a chat. Raises ConfigError if it cannot be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a conversation; use at most 64 letters, digits, _, . and -, "
            "beginning with a letter, digit or _"
        )
    return name
