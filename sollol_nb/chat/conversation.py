"""Chats: conversations that go on from one question to the next.

A `Chat` holds what was said and what is known of it; `ask_in_chat` asks the next question with all of it, and adds
question and answer. What no longer fits the model's context is left out of the request, oldest turns first, and
that is told (see `context_window`); the chat itself keeps everything. A model's earlier reasoning is kept to be
looked at, and not sent again.

Chats live in the memory of the process. `Chat.export` writes one to a file, `Chat.load` reads it again.

    chat = Chat("trip", system="Be brief.")
    for chunk in iterate_blocking(ask_in_chat(router.stream_async, chat, "demo", "What is a worker?")):
        print(chunk["message"]["content"], end="")
"""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sollol_nb.chat import conversation_view as chat_view
from sollol_nb.chat.chunk import DROPPED, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.context_window import DROP_OLDEST, turn_starts
from sollol_nb.chat.messages import check_messages
from sollol_nb.errors import ChatBusyError, ConfigError, RequestCancelledError

FILE_FORMAT = "sollol_nb chat"
FILE_VERSION = 1
_NAME = re.compile(r"\w[\w.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a chat, and what is known of it.

    Attributes:
        message: in Ollama's shape: `role`, `content`, perhaps `thinking`, `images`, `tool_calls`.
        at: when.
        model: which model answered; "" for the others.
        done_reason: why the answer ended: `stop`, `length`, `tool_calls`, `cancelled` or `error`.
        note: what was dropped to ask for this answer; "" if nothing was.
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

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a file: the message, and of the rest what is known."""
        known = {name: getattr(self, name) for name in _KNOWN if getattr(self, name) not in ("", None)}
        return {"at": self.at.isoformat(), **known, "message": dict(self.message)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError where it is none."""
        message = check_messages([data["message"]])[0]
        return cls(
            message, datetime.fromisoformat(data["at"]), **{name: data[name] for name in _KNOWN if name in data}
        )


_KNOWN = ("model", "done_reason", "note", "prompt_tokens", "answer_tokens")


class Chat:
    """One conversation.

    Args:
        name: begins with a letter, digit or `_`; goes on with these, `.` and `-`; 64 characters at the most.
        system: the system message, sent before all others.

    Raises:
        ConfigError: the name cannot be used.

    Attributes:
        system: may be changed at any time; "" for none.
    """

    def __init__(self, name: str, *, system: str = "") -> None:
        self.name = _checked_name(name)
        self.system = system
        self._said: list[Said] = []
        self._busy = threading.Lock()

    @property
    def said(self) -> tuple[Said, ...]:
        """Everything that was said, the system message apart."""
        return tuple(self._said)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What goes before the next question: all messages, the system message first, without reasoning."""
        return [
            {name: value for name, value in message.items() if name != "thinking"}
            for message in self.to_messages()
        ]

    @property
    def model(self) -> str:
        """The model that answered last; "" before the first answer."""
        return next((one.model for one in reversed(self._said) if one.model), "")

    @property
    def turn_count(self) -> int:
        """How many questions were asked."""
        return len(turn_starts([one.message for one in self._said]))

    @property
    def notes(self) -> list[tuple[datetime, str]]:
        """When messages were left out of a request, and which."""
        return [(one.at, one.note) for one in self._said if one.note]

    @property
    def is_answering(self) -> bool:
        """Whether an answer is under way."""
        return self._busy.locked()

    def add(self, question: Mapping[str, Any], answer: Completion) -> bool:
        """Add a question and its answer, also one that was cut short. Neither is kept if the answer has no text
        (and calls no tool); returns whether they were.
        """
        said = _said(answer)
        if said is not None:
            self._said += [Said(dict(question), said.at), said]
        return said is not None

    def amend(self, answer: Completion) -> None:
        """Put the whole answer (as `router.resume` gives it) in the place of the last one, which broke off.

        Raises:
            ConfigError: the last answer did not break off, or this one has no text.
            ChatBusyError: the chat is answering another question.
        """
        with self.answering():
            if not self._said or self._said[-1].done_reason != "error":
                raise ConfigError(
                    f"the last answer of chat {self.name} did not break off; there is nothing to amend"
                )
            whole = _said(Completion({DROPPED: self._said[-1].note, **answer}))
            if whole is None:
                raise ConfigError(f"the answer has no text; chat {self.name} keeps the one that broke off")
            self._said[-1] = whole

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Hold the chat for one answer.

        Raises:
            ChatBusyError: another one is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise ChatBusyError(f"chat {self.name} is still answering; wait for that answer, or stop it")
        try:
            yield
        finally:
            self._busy.release()

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self._said.clear()

    # --- to and from plain data -----------------------------------------------------------------

    def to_messages(self) -> list[dict[str, Any]]:
        """All messages in Ollama's shape, the system message first, with the reasoning that came with answers."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(dict(one.message) for one in self._said)]

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]], *, name: str = "chat") -> Self:
        """A chat that goes on from these messages; a system message that comes first becomes its own.

        Raises:
            ConfigError: they are no messages (see `llama_chat.check_messages`).
        """
        checked = check_messages(messages)
        chat = cls(name)
        if checked[0]["role"] == "system":
            chat.system = str(checked.pop(0)["content"])
        now = datetime.now(UTC)
        chat._said = [Said(message, now) for message in checked]
        return chat

    def export(self, path: str | Path) -> Path:
        """Write the chat to a JSON file, over one that is there; returns its path.

        Raises:
            ConfigError: the file cannot be written.
        """
        data = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "name": self.name,
            "system": self.system,
            "said": [one.as_dict() for one in self._said],
        }
        path = Path(path).expanduser()
        try:
            path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the chat cannot be written to {path}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None) -> Self:
        """Read a chat that `export` wrote.

        Args:
            name: another name for it.

        Raises:
            ConfigError: the file cannot be read, or holds no chat.
        """
        path, name = Path(path).expanduser(), None if name is None else _checked_name(name)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); give a file that Chat.export wrote") from error
        if not isinstance(data, dict) or data.get("format") != FILE_FORMAT:
            raise ConfigError(f"{path} holds no chat; give a file that Chat.export wrote, or use from_messages")
        if data.get("version") != FILE_VERSION:
            raise ConfigError(
                f"{path} has version {data.get('version')}, this sollol_nb reads {FILE_VERSION}; upgrade it"
            )
        try:
            chat = cls(data["name"] if name is None else name, system=str(data["system"]))
            chat._said = [Said.from_dict(one) for one in data["said"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); export the chat again") from error
        return chat

    # --- shown ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        turns = "1 turn" if self.turn_count == 1 else f"{self.turn_count} turns"
        return f"<Chat {self.name}: {', '.join(filter(None, (turns, self.model)))}>"

    def __str__(self) -> str:
        return chat_view.as_text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": chat_view.as_text(self), "text/html": chat_view.as_html(self)}


class ChatBook(Mapping[str, Chat]):
    """The chats of one process, by name."""

    def __init__(self) -> None:
        self._chats: dict[str, Chat] = {}

    def __getitem__(self, name: str) -> Chat:
        return self._chats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chats)

    def __len__(self) -> int:
        return len(self._chats)

    def open(self, name: str) -> Chat:
        """The chat of this name, a new one where there is none.

        Raises:
            ConfigError: the name cannot be used.
        """
        return self._chats.setdefault(_checked_name(name), Chat(name))

    def find(self, name: str) -> Chat:
        """The chat of this name.

        Raises:
            ConfigError: there is none; the message says which there are.
        """
        if name in self._chats:
            return self._chats[name]
        near = difflib.get_close_matches(name, self._chats, 1)
        there = ", ".join(sorted(self._chats)) or "none yet"
        hint = f"did you mean {near[0]}?" if near else f"there are: {there}"
        raise ConfigError(f"no chat is called {name!r}; {hint}")

    def add(self, chat: Chat, *, replace: bool = False) -> None:
        """Take in a chat under its own name.

        Raises:
            ConfigError: there is one of that name, and it is not to be replaced.
        """
        if not replace and self._chats.get(chat.name, chat) is not chat:
            raise ConfigError(f"there is a chat {chat.name} already; give another name, or remove that one first")
        self._chats[chat.name] = chat

    def remove(self, name: str) -> Chat:
        """Forget a chat; returns it. Raises ConfigError if there is none of this name."""
        return self._chats.pop(self.find(name).name)

    def __repr__(self) -> str:
        return f"<ChatBook: {', '.join(map(repr, self._chats.values())) or 'empty'}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        chats = list(self._chats.values())
        return {"text/plain": chat_view.list_as_text(chats), "text/html": chat_view.list_as_html(chats)}


async def ask_in_chat(
    stream: Callable[..., AsyncGenerator[Chunk, None]],
    chat: Chat,
    model: str,
    prompt: str | Mapping[str, Any],
    **options: Any,
) -> AsyncGenerator[Chunk, None]:
    """Ask the next question of a chat; yields chunks as `HybridRouter.stream` does.

    Where turns were dropped to fit the context, the first chunk and the last have `_dropped`: what, in words; the
    last one's `_routing` has the same as `dropped`. Question and answer are in the chat when the last chunk comes,
    and when the answer was cancelled or broke off, with the text so far; without any, the question is not kept.

    Args:
        stream: the router's `stream`, or the blocking router's `stream_async`.
        prompt: the user's message as text, or a message as a dict (with `images`, or a tool's result).
        options: those of `HybridRouter.stream`. `overflow="error"` refuses what does not fit, instead.

    Raises:
        ChatBusyError: the chat is still answering another question.
        ContextOverflowError: the question alone does not fit the context.
        SollolError: as for `HybridRouter.stream`.
    """
    question = check_messages(prompt if isinstance(prompt, str) else [prompt])[0]
    options["overflow"] = options.get("overflow") or DROP_OLDEST
    chunks: list[Chunk] = []
    with chat.answering():
        try:
            async with aclosing(stream(model, [*chat.messages, question], **options)) as answer:
                async for chunk in answer:
                    if chunk.get("done"):
                        chat.add(question, Completion.from_chunks([*chunks, chunk]))
                    chunks.append(chunk)
                    yield chunk
        except BaseException as error:
            if chunks and not chunks[-1].get("done"):
                failed = isinstance(error, Exception) and not isinstance(error, RequestCancelledError)
                told = [chunk[DROPPED] for chunk in chunks if DROPPED in chunk]
                partial = Completion.from_chunks(chunks) | ({DROPPED: told[-1]} if told else {})
                chat.add(question, Completion(partial, done_reason="error" if failed else "cancelled"))
            raise


def _said(answer: Completion) -> Said | None:
    """An answer as a chat keeps it; None if it has no text and calls no tool."""
    message = {name: value for name, value in answer["message"].items() if value}
    if not message.get("content") and not message.get("tool_calls"):
        return None
    return Said(
        {"content": "", **message},
        datetime.now(UTC),
        model=str(answer.get("model") or ""),
        done_reason=answer.finish_reason,
        note=str(answer.get(DROPPED) or ""),
        prompt_tokens=answer.get("prompt_eval_count"),
        answer_tokens=answer.get("eval_count"),
    )


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a chat; use letters, digits, _, . and -, the first a letter, digit or _"
        )
    return name
