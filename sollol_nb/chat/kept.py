"""Conversations of notebooks, kept in SQLite, so that a restarted kernel finds them again.

The file lies in the state folder; only its owner can read it, and several kernels may write to it at the same time
(see `sqlite_file`). It is bounded: of a conversation that is longer than `LIMIT_BYTES` the oldest messages are not
kept; conversations that were not used for `KEEP_DAYS` days are deleted, and the least recently used of more than
`KEEP_BYTES`. A failure here costs no answer: the conversation continues in memory, and the failure is logged once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sollol_nb.chat.conversation import Chat
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.sqlite_file import SqliteFile
from sollol_nb.settings import config

LIMIT_BYTES = 4 * 1024 * 1024
KEEP_BYTES = 64 * 1024 * 1024
KEEP_DAYS = 180.0
FLUSH_LIMIT_S = 15.0

_CREATE = (
    """CREATE TABLE chats (
        notebook TEXT NOT NULL,
        name TEXT NOT NULL,
        used_at REAL NOT NULL,
        chat TEXT NOT NULL,
        PRIMARY KEY (notebook, name)
    )""",
)
_SELECT = "SELECT name FROM chats WHERE notebook = ? AND name = coalesce(?, name)"
_DELETE = "DELETE FROM chats WHERE notebook = ? AND name = coalesce(?, name)"
"""The conversation of a name; where it is NULL, all of the notebook."""
_FAILURES = (OSError, sqlite3.Error, ConfigError)

logger = logging.getLogger(__name__)


class KeptChats:
    """The kept conversations of one notebook.

    A separate thread writes, so that no answer waits for the disk.

    Args:
        notebook: what identifies the notebook, such as its path.
        path: the file; by default the one in the state folder.
        is_on: whether conversations are to be kept; where not, nothing is read or written, but still deleted.
    """

    def __init__(
        self, notebook: str, path: Path | None = None, *, is_on: Callable[[], bool] = lambda: True
    ) -> None:
        self.notebook = notebook
        self._path = path
        self._is_on = is_on
        self._file: SqliteFile | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sollol_nb chats")
        self._to_save: set[Chat] = set()
        self._has_failed = False
        self._cut: set[str] = set()

    def load(self) -> list[Chat]:
        """All conversations of the notebook, the one used last at the end; damaged ones are left out."""
        chats: list[Chat] = []
        if not self._is_on():
            return chats
        try:
            with self._open().connection() as connection:
                rows = connection.execute(
                    "SELECT name, chat FROM chats WHERE notebook = ? ORDER BY used_at", [self.notebook]
                ).fetchall()
        except _FAILURES as error:
            self._report("read the conversations of earlier kernels", error)
            return []
        for name, text in rows:
            try:
                chats.append(Chat.from_dict(json.loads(text), name=name))
            except (KeyError, TypeError, ValueError, ConfigError) as error:
                logger.warning("the kept conversation %s is damaged (%r); it is left out", name, error)
        return chats

    def save(self, chat: Chat) -> None:
        """Keep a conversation as it is when the writer comes to it, once for all changes until then; returns at
        once."""
        if self._is_on() and chat not in self._to_save:
            self._to_save.add(chat)
            self._writer.submit(self._save, chat)

    def remove(self, name: str) -> None:
        """Delete a conversation; returns when it is deleted.

        Raises:
            ConfigError: it cannot be deleted.
        """
        self._writer.submit(self._remove, name).result()

    def remove_all(self) -> list[str]:
        """Delete all conversations of the notebook; returns their names when they are deleted.

        Raises:
            ConfigError: they cannot be deleted.
        """
        return self._writer.submit(self._remove, None).result()

    def flush(self) -> None:
        """Wait until all is written, at most `FLUSH_LIMIT_S` seconds."""
        with contextlib.suppress(TimeoutError):
            self._writer.submit(lambda: None).result(FLUSH_LIMIT_S)

    def _open(self) -> SqliteFile:
        if self._file is None:
            path = self._path if self._path is not None else config.state_file("chats.sqlite")
            self._file = SqliteFile(path, [_CREATE], erases=True)
        return self._file

    def _save(self, chat: Chat) -> None:
        self._to_save.discard(chat)
        try:
            row = (self.notebook, chat.name, time.time(), self._text(chat))
            with self._open().connection() as connection:
                connection.execute("INSERT OR REPLACE INTO chats VALUES (?, ?, ?, ?)", row)
                _prune(connection)
        except (*_FAILURES, TypeError, ValueError) as error:
            self._report("keep conversations for the next kernel", error)

    def _remove(self, name: str | None) -> list[str]:
        file = self._open()
        if not file.path.exists():
            return []
        try:
            with file.connection() as connection:
                found = connection.execute(_SELECT, [self.notebook, name]).fetchall()
                connection.execute(_DELETE, [self.notebook, name])
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"cannot delete conversations from {file.path}: {error}; try again, or delete that file (it has "
                "the conversations of all notebooks)"
            ) from None
        return [name for (name,) in found]

    def _text(self, chat: Chat) -> str:
        """The conversation as JSON, without so many of its oldest messages that it is not too long."""
        data = chat.as_dict()
        sizes = [len(json.dumps(entry)) for entry in data["said"]]
        first = 0
        while first < len(sizes) and sum(sizes[first:]) > LIMIT_BYTES:
            first += 1
        # A conversation begins with a question.
        while 0 < first < len(sizes) and data["said"][first]["message"].get("role") != "user":
            first += 1
        if first and chat.name not in self._cut:
            self._cut.add(chat.name)
            logger.warning(
                "conversation %s is too long to be kept whole; its oldest messages are not kept", chat.name
            )
        return json.dumps(data | {"said": data["said"][first:]})

    def _report(self, doing: str, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            where = f" ({self._file.path})" if self._file is not None else ""
            logger.warning("cannot %s%s: %s", doing, where, error)


def _prune(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM chats WHERE used_at < ?", [time.time() - KEEP_DAYS * 86_400])
    connection.execute(
        """DELETE FROM chats WHERE rowid IN (
            SELECT rowid FROM (
                SELECT rowid, sum(length(chat)) OVER (ORDER BY used_at DESC, rowid) AS total FROM chats
            ) WHERE total > ?
        )""",
        [KEEP_BYTES],
    )
