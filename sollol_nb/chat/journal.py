"""The journal of answers: every answer is kept while it streams, so that it outlives its tab and its kernel.

One SQLite file in the state folder, which only its owner can read, and which several kernels use at the same time
(see `sqlite_file`). A row is one answer: its text so far, and what is needed to continue it. The conversation
before it, which may be long, is written once and lies in a table of its own. The row of an answer that streams
names its process and its run; where that process is gone, the answer is interrupted. A kernel that continues an
answer claims its row, so that no second one does.

The journal is bounded: answers older than `KEEP_DAYS` days go, and the least recent of more than `KEEP_BYTES`, but
never one that streams. What is needed to continue an answer is not kept if it is too long; see `journal_state.py`.

`journaling.py` writes to it, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import getpid
from pathlib import Path
from typing import Any

from sollol_nb.chat.journal_state import read_parts
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.process_identity import is_same_process, own_start
from sollol_nb.runtime.sqlite_file import SqliteFile
from sollol_nb.settings import config

FILE_NAME = "answers.sqlite"
KEEP_DAYS = 30.0
KEEP_BYTES = 64 * 1024 * 1024
MOST_LISTED = 50
ID_CHARS = 16
SILENT_S = 120.0
"""How long the process of an answer on another machine may report nothing; whether it runs cannot be seen."""

RUNNING, DONE, INTERRUPTED, CANCELLED, FAILED = "running", "done", "interrupted", "cancelled", "failed"
CONTINUABLE = (INTERRUPTED, CANCELLED, FAILED)
"""Statuses of answers that have an end missing."""
PROCESS_ENDED = "the process that it streamed into has ended"

_CREATE = (
    """CREATE TABLE answers (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        conversation TEXT NOT NULL,
        model TEXT NOT NULL,
        question TEXT NOT NULL,
        started_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        status TEXT NOT NULL,
        error TEXT NOT NULL,
        text TEXT NOT NULL,
        thinking TEXT NOT NULL,
        state TEXT,
        run TEXT NOT NULL,
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        pid_started REAL NOT NULL
    )""",
    "CREATE INDEX answers_by_time ON answers (started_at)",
    "CREATE TABLE requests (id TEXT PRIMARY KEY, request TEXT NOT NULL)",
)
_NAMES = (
    "id",
    "owner",
    "conversation",
    "model",
    "question",
    "started_at",
    "updated_at",
    "status",
    "error",
    "text",
    "thinking",
)
_NEWEST = """
    SELECT id, owner, conversation, model, question, started_at, updated_at, status, error, text, thinking, host,
        pid
    FROM answers WHERE owner = coalesce(?, owner) ORDER BY started_at DESC, rowid DESC LIMIT ?
"""
_GET = """
    SELECT id, owner, conversation, model, question, started_at, updated_at, status, error, text, thinking, host,
        pid, state, request
    FROM answers LEFT JOIN requests USING (id) WHERE id = ?
"""
_CLAIM = "UPDATE answers SET status = ?, run = ?, updated_at = ?, host = ?, pid = ?, pid_started = ? WHERE id = ?"
_INSERT = """
    INSERT INTO answers (
        id, owner, conversation, model, question, started_at, updated_at, status, error, text, thinking,
        state, run, host, pid, pid_started
    ) VALUES (
        :id, :owner, :conversation, :model, :question, :started_at, :updated_at, :status, :error, :text, :thinking,
        :state, :run, :host, :pid, :pid_started
    )
"""
_UPDATE = """
    UPDATE answers SET status = :status, error = :error, text = :text, thinking = :thinking, state = :state,
        updated_at = :updated_at
    WHERE id = :id AND run = :run
"""
_TOO_MUCH = """
    SELECT id FROM (
        SELECT id, status, sum(
            length(text) + length(thinking) + coalesce(length(state), 0) + coalesce(length(request), 0)
        ) OVER (ORDER BY updated_at DESC, answers.rowid) AS total
        FROM answers LEFT JOIN requests USING (id)
    ) WHERE total > ? AND status != ?
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledAnswer:
    """One answer of the journal.

    Attributes:
        id: unique, 16 hex digits; `_routing` has it as `answer_id`.
        owner: which notebook or script asked: the notebook's path, or the script's name.
        conversation: the name of the conversation that it belongs to; "" without one.
        model: as the request names it.
        question: its beginning, as one line.
        started_at, updated_at: `time.time()`.
        status: `running`, `done`, `interrupted`, `cancelled` or `failed`.
        error: why it ended early; "" for others.
        text, thinking: what has been received.
        pid: the process that it streams into, or did.
        is_own: it streams into this process, or did.
        request, state: what is needed to continue it, as `journaling.py` gave them; None in lists, and where it
            was too long to be kept.
    """

    id: str
    owner: str
    conversation: str
    model: str
    question: str
    started_at: float
    updated_at: float
    status: str
    error: str
    text: str
    thinking: str
    pid: int
    is_own: bool
    request: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it streams now."""
        return self.status == RUNNING

    @property
    def is_continuable(self) -> bool:
        """Whether its end is missing."""
        return self.status in CONTINUABLE

    @property
    def texts(self) -> int:
        """How many chunks with text were received, where its tokens are not known; else 0."""
        texts = (self.state or {}).get("texts")
        return texts if isinstance(texts, int) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is to be written of one answer.

    Attributes:
        id, run: of the answer, and of the process that writes.
        first: what its row begins with (owner, conversation, model, question, started_at); None where it exists.
        status, error, text, thinking: as in `JournaledAnswer`.
        request: as JSON, where it is new; None leaves it as it is.
        state: as JSON; None without one.
    """

    id: str
    run: str
    status: str
    error: str
    text: str
    thinking: str
    first: Mapping[str, Any] | None = None
    request: str | None = None
    state: str | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether nobody misses it: it ended early, and has no text."""
        return self.status in (CANCELLED, FAILED) and not (self.text or self.thinking)


class Journal:
    """The journal in a file.

    Args:
        path: the file; by default the one in the state folder, looked up at each use.

    Methods raise ConfigError where the file cannot be used; `write` and `touch` also sqlite3.Error.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: SqliteFile | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._opened().path

    def newest(self, owner: str | None = None, *, limit: int = MOST_LISTED) -> list[JournaledAnswer]:
        """The newest answers, newest first, without what is needed to continue them.

        Args:
            owner: only those of this notebook or script.
        """
        with self._used("read") as connection:
            _settle(connection)
            rows = connection.execute(_NEWEST, [owner, limit]).fetchall()
        return [_answer(row) for row in rows]

    def get(self, answer_id: str) -> JournaledAnswer | None:
        """One answer, with what is needed to continue it; None if there is none of this id."""
        with self._used("read") as connection:
            _settle(connection)
            return _get(connection, answer_id)

    def claim(self, answer_id: str) -> tuple[JournaledAnswer, str] | None:
        """Take over an answer whose end is missing: it streams into this process from now on.

        Returns:
            The answer as it was, and the run to write with; None if another process (or this one) has it, if it is
            done, or if there is none of this id.
        """
        run = new_id()
        with self._used("continue an answer of") as connection:
            connection.execute("BEGIN IMMEDIATE")  # from here on no other process changes it
            _settle(connection)
            found = _get(connection, answer_id)
            if found is None or not found.is_continuable:
                return None
            values = [RUNNING, run, time.time(), *_process(), answer_id]
            connection.execute(_CLAIM, values)
        return found, run

    def forget(self, *ids: str, owner: str | None = None) -> list[str]:
        """Delete answers for good, but none that streams; returns the ids of those that were deleted.

        Args:
            ids: which; without any, all.
            owner: only those of this notebook or script.
        """
        if not self.path.exists():
            return []
        with self._used("delete answers from") as connection:
            connection.execute("BEGIN IMMEDIATE")  # from here on nobody claims one of them
            _settle(connection)
            rows = connection.execute(
                "SELECT id FROM answers WHERE status != ? AND owner = coalesce(?, owner)", [RUNNING, owner]
            ).fetchall()
            found = [row[0] for row in rows if not ids or row[0] in ids]
            _delete(connection, found)
        return found

    def write(self, progress: Sequence[Progress]) -> None:
        """Write what is new of several answers together.

        A row that another process has claimed stays as it is, and one that was deleted stays deleted. An answer
        that ended early without any text is deleted, unless it was interrupted.
        """
        with self._opened().connection() as connection:
            for each in progress:
                if each.first is not None:
                    _insert(connection, each)
                else:
                    _update(connection, each)
            if any(each.first is not None for each in progress):
                _prune(connection)

    def touch(self, runs: Iterable[str]) -> None:
        """Say that these runs are alive."""
        with self._opened().connection() as connection:
            now = time.time()
            connection.executemany("UPDATE answers SET updated_at = ? WHERE run = ?", [(now, run) for run in runs])

    @contextlib.contextmanager
    def _used(self, doing: str) -> Iterator[sqlite3.Connection]:
        file = self._opened()
        try:
            with file.connection() as connection:
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"cannot {doing} the journal {file.path}: {error}; try again, or delete that file (it has the "
                "answers of all notebooks)"
            ) from error

    def _opened(self) -> SqliteFile:
        path = self._path if self._path is not None else config.state_file(FILE_NAME)
        if self._file is None or self._file.path != path:
            self._file = SqliteFile(path, [_CREATE], erases=True)
        return self._file


def new_id() -> str:
    """An id for an answer or a run."""
    return secrets.token_hex(ID_CHARS // 2)


def _process() -> tuple[str, int, float]:
    return platform.node(), getpid(), own_start()


def _answer(row: Sequence[Any]) -> JournaledAnswer:
    *shown, host, pid = row
    is_own = host == platform.node() and pid == getpid()
    return JournaledAnswer(**dict(zip(_NAMES, shown, strict=True)), pid=pid, is_own=is_own)


def _get(connection: sqlite3.Connection, answer_id: str) -> JournaledAnswer | None:
    row = connection.execute(_GET, [answer_id]).fetchone()
    if row is None:
        return None
    *shown, state, request = row
    kept, whole = read_parts(request, state)
    return replace(_answer(shown), request=kept, state=whole)


def _settle(connection: sqlite3.Connection) -> None:
    """Note which answers are interrupted, since their process is gone."""
    here = platform.node()
    running = connection.execute(
        "SELECT run, host, pid, pid_started, updated_at FROM answers WHERE status = ?", [RUNNING]
    ).fetchall()
    for run, host, pid, started, updated_at in running:
        is_alive = is_same_process(pid, started) if host == here else time.time() - updated_at < SILENT_S
        if not is_alive:
            connection.execute(
                "UPDATE answers SET status = ?, error = ? WHERE run = ? AND status = ?",
                [INTERRUPTED, PROCESS_ENDED, run, RUNNING],
            )


def _insert(connection: sqlite3.Connection, progress: Progress) -> None:
    if progress.first is None or progress.is_nothing:
        return
    process = dict(zip(("host", "pid", "pid_started"), _process(), strict=True))
    connection.execute(_INSERT, {**progress.first, **process, **_values(progress)})
    _write_request(connection, progress)


def _update(connection: sqlite3.Connection, progress: Progress) -> None:
    if not connection.execute(_UPDATE, _values(progress)).rowcount:
        return
    if progress.is_nothing:
        _delete(connection, [progress.id])
    else:
        _write_request(connection, progress)


def _values(progress: Progress) -> dict[str, Any]:
    names = ("id", "run", "status", "error", "text", "thinking", "state")
    return {"updated_at": time.time(), **{name: getattr(progress, name) for name in names}}


def _write_request(connection: sqlite3.Connection, progress: Progress) -> None:
    if progress.status == DONE:
        connection.execute("DELETE FROM requests WHERE id = ?", [progress.id])
    elif progress.request is not None:
        connection.execute("INSERT OR REPLACE INTO requests VALUES (?, ?)", [progress.id, progress.request])


def _delete(connection: sqlite3.Connection, ids: Iterable[str]) -> None:
    rows = [(answer_id,) for answer_id in ids]
    connection.executemany("DELETE FROM answers WHERE id = ?", rows)
    connection.executemany("DELETE FROM requests WHERE id = ?", rows)


def _prune(connection: sqlite3.Connection) -> None:
    _settle(connection)
    old = connection.execute(
        "SELECT id FROM answers WHERE status != ? AND updated_at < ?", [RUNNING, time.time() - KEEP_DAYS * 86_400]
    ).fetchall()
    too_much = connection.execute(_TOO_MUCH, [KEEP_BYTES, RUNNING]).fetchall()
    _delete(connection, {row[0] for row in [*old, *too_much]})
