"""The conversations of a process by name, and the next question in one of them.

With a blocking router:

    chat = Chat("trip", system="Be brief.")
    for chunk in iterate_blocking(ask_in_chat(router.stream_async, chat, "demo", "What is a worker?")):
        print(chunk["message"]["content"], end="")
"""

from __future__ import annotations

import html
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from sollol_nb.chat.chunk import DROPPED, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.context_window import DROP_OLDEST
from sollol_nb.chat.conversation import Chat, checked_name
from sollol_nb.chat.kept import KeptChats
from sollol_nb.chat.messages import check_messages
from sollol_nb.errors import ConfigError, RequestCancelledError
from sollol_nb.text.nearest import nearest
from sollol_nb.text.short_names import short_name


class ChatBook(Mapping[str, Chat]):
    """The chats of one process, by name.

    Args:
        kept: called once, on first use: where they are kept for the next kernel, and what the last one has left;
            None is nowhere.
    """

    def __init__(self, kept: Callable[[], KeptChats | None] = lambda: None) -> None:
        self._get_kept = kept
        self._lock = threading.Lock()
        self._known: dict[str, Chat] | None = None
        self._kept: KeptChats | None = None
        self._restored: set[str] = set()

    @property
    def _chats(self) -> dict[str, Chat]:
        with self._lock:
            if self._known is None:
                self._kept = self._get_kept()
                self._known = {chat.name: chat for chat in (self._kept.load() if self._kept else ())}
                self._restored = {*self._known}
                for chat in self._known.values():
                    self._watch(chat)
            return self._known

    def _watch(self, chat: Chat) -> Chat:
        if self._kept is not None:
            chat.on_change = self._kept.save
        return chat

    def __getitem__(self, name: str) -> Chat:
        return self._chats[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._chats])

    def __len__(self) -> int:
        return len(self._chats)

    def restored(self, name: str) -> Chat | None:
        """The chat of this name if an earlier kernel has left it; None from the second call on."""
        chat = self._chats.get(name)
        if name not in self._restored:
            return None
        self._restored.discard(name)
        return chat

    def open(self, name: str) -> Chat:
        """The chat of this name, or a new one.

        Raises:
            ConfigError: the name cannot be used.
        """
        chats = self._chats
        return chats[name] if name in chats else chats.setdefault(checked_name(name), self._watch(Chat(name)))

    def find(self, name: str) -> Chat:
        """The chat of this name.

        Raises:
            ConfigError: no chat has this name; the message names those that exist.
        """
        if name in self._chats:
            return self._chats[name]
        near = nearest(name, self._chats)
        existing = f"existing: {', '.join(sorted(self._chats))}" if self._chats else "none has been started yet"
        hint = f"did you mean {near}?" if near else existing
        raise ConfigError(f"there is no conversation named {name!r} ({hint})")

    def add(self, chat: Chat, *, replace: bool = False) -> None:
        """Add a chat under its own name.

        Raises:
            ConfigError: another chat has this name and must not be replaced.
        """
        replaced = self._chats.get(chat.name)
        if not replace and replaced not in (None, chat):
            raise ConfigError(
                f"a conversation named {chat.name} exists already; give another name, or remove that one first"
            )
        self._restored.discard(chat.name)
        if replaced is not None:
            replaced.on_change = None
        self._chats[chat.name] = self._watch(chat)
        if self._kept is not None:
            self._kept.save(chat)

    def remove(self, name: str) -> Chat:
        """Forget a chat, also the kept one; returns it.

        Raises:
            ConfigError: no chat has this name, or the kept one cannot be deleted.
        """
        chat = self.find(name)
        self._drop(name)
        if self._kept is not None:
            self._kept.remove(name)
        return chat

    def forget(self) -> list[str]:
        """Forget all chats, also the kept ones that this process has not read; returns their names.

        Raises:
            ConfigError: the kept ones cannot be deleted.
        """
        names = [*self]
        for name in names:
            self._drop(name)
        kept = self._kept.remove_all() if self._kept is not None else []
        return [*dict.fromkeys([*names, *kept])]

    def flush(self) -> None:
        """Wait until all changes are kept."""
        if self._kept is not None:
            self._kept.flush()

    def _drop(self, name: str) -> None:
        self._chats.pop(name).on_change = None  # an answer that is under way must not keep it again
        self._restored.discard(name)

    def __repr__(self) -> str:
        return f"<ChatBook: {', '.join(map(repr, self._chats.values())) or 'empty'}>"

    def __str__(self) -> str:
        """One line for each chat."""
        titles = [chat.title for chat in self._chats.values()]
        return "\n".join(titles) or "no conversations yet; start one with --chat NAME"

    def _as_html(self) -> str:
        if not self._chats:
            return html.escape(str(self))
        rows = "".join(
            f"<tr><td>{html.escape(chat.name)}</td><td>{chat.turn_count}</td><td>{html.escape(short_name(chat.model))}</td>"
            f"<td>{html.escape(chat.last_time)}</td></tr>"
            for chat in self._chats.values()
        )
        header = "<tr><th>conversation</th><th>turns</th><th>model</th><th>last message</th></tr>"
        return f"<table>{header}{rows}</table>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._as_html()}


async def ask_in_chat(
    stream: Callable[..., AsyncGenerator[Chunk, None]],
    chat: Chat,
    model: str,
    prompt: str | Mapping[str, Any],
    **options: Any,
) -> AsyncGenerator[Chunk, None]:
    """Ask the next question of a chat; yields chunks as `HybridRouter.stream` does.

    Where turns were dropped to fit the context, the first chunk and the last describe them in `_dropped`, the last
    one's `_routing` in `dropped` too. Question and answer are in the chat when the last chunk arrives. If the
    answer is cancelled or interrupted, the chat keeps them with the text received so far; without any text it
    keeps neither.

    Args:
        stream: the router's `stream`, or the blocking router's `stream_async`.
        prompt: the user's message as text, or a message as a dict (with `images`, or a tool's result).
        options: those of `HybridRouter.stream`. `overflow="error"` refuses messages that do not fit, instead of
            dropping turns.

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
                notes = [chunk[DROPPED] for chunk in chunks if DROPPED in chunk]
                partial = Completion.from_chunks(chunks) | ({DROPPED: notes[-1]} if notes else {})
                chat.add(question, Completion(partial, done_reason="error" if failed else "cancelled"))
            raise
