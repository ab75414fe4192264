"""Answers of batches, kept in SQLite, so that no row is asked twice.

An answer is found by a key: the SHA-256 of the model, its file (or Ollama's digest of it), the messages and the
options, the schema included. Any difference, also another file under the same name, makes it another question.
Only answers that ended well are kept, sampled ones as well: a batch that continues should not change its earlier
answers, so at a temperature above 0 the same row gets the same answer until `fresh=True` is given.

The file lies in the state folder, and several kernels may write to it at the same time (see `sqlite_file`). Each
batch that runs to its end deletes the answers that were not used for `KEEP_DAYS` days, and the least recently used
ones of more than `KEEP_ROWS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sollol_nb.chat.chunk import ROUTING
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.request import JOURNAL_OPTIONS
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.sqlite_file import SqliteFile
from sollol_nb.settings import config

KEEP_DAYS = 30.0
KEEP_ROWS = 200_000

_CHANGE_NO_ANSWER = {"keep_alive", *JOURNAL_OPTIONS}
_DAY_S = 86_400.0
_KEYS_AT_ONCE = 500  # older SQLite allows 999 variables in a statement
_LARGE_ROUTING = ("plan", "placement_differences")
_CREATE = (
    """CREATE TABLE answers (
        key TEXT PRIMARY KEY,
        model TEXT NOT NULL,
        used_at REAL NOT NULL,
        completion TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX answers_used_at ON answers (used_at)",
)


def answer_key(
    model: str, identity: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> str:
    """The key of a question.

    Args:
        identity: what distinguishes the model from another one of the same name.
        options: those that change no answer do not count.

    Raises:
        ConfigError: messages or options cannot be written as JSON.
    """
    # The order of a schema's properties counts: it is their order in the answer.
    counted = {name: options[name] for name in sorted(options) if name not in _CHANGE_NO_ANSWER}
    try:
        text = json.dumps([model, dict(identity), [dict(message) for message in messages], counted])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the messages or options of a batch must be writable as JSON: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


class BatchStore:
    """Answers by their keys, in one SQLite file.

    Args:
        path: the file; by default `batches.sqlite` in the state folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else config.state_file("batches.sqlite")
        self._file = SqliteFile(self.path, [_CREATE])

    def __repr__(self) -> str:
        return f"BatchStore({str(self.path)!r})"

    def __len__(self) -> int:
        """How many answers are kept."""
        with self._file.connection() as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def put(self, answers: Mapping[str, Completion]) -> None:
        """Keep answers, by their keys; waits for other writers, at most 10 s."""
        rows = [_row(key, completion) for key, completion in answers.items()]
        with self._file.connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    def get(self, keys: Iterable[str]) -> dict[str, Completion]:
        """The kept answers to these; they count as used now, if the file can be written."""
        wanted = list(keys)
        found: dict[str, Completion] = {}
        with self._file.connection() as connection:
            for start in range(0, len(wanted), _KEYS_AT_ONCE):
                some = wanted[start : start + _KEYS_AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key, completion FROM answers WHERE key IN ({marks})",  # noqa: S608 - marks only
                    some,
                )
                for key, text in rows:
                    with contextlib.suppress(ValueError):  # a damaged file
                        found[key] = Completion(json.loads(text))
            with contextlib.suppress(sqlite3.OperationalError):  # locked for long
                connection.executemany(
                    "UPDATE answers SET used_at = ? WHERE key = ?", [(time.time(), key) for key in found]
                )
        return found

    def prune(self, *, keep_days: float = KEEP_DAYS, keep_rows: int = KEEP_ROWS) -> int:
        """Delete answers not used for `keep_days` days, and the least recently used of more than `keep_rows`.

        Returns:
            How many were deleted.
        """
        with self._file.connection() as connection:
            old = connection.execute("DELETE FROM answers WHERE used_at < ?", [time.time() - keep_days * _DAY_S])
            many = connection.execute(
                """DELETE FROM answers WHERE key IN (
                    SELECT key FROM answers ORDER BY used_at DESC LIMIT -1 OFFSET ?
                )""",
                [keep_rows],
            )
            return old.rowcount + many.rowcount

    def clear(self, model: str | None = None) -> int:
        """Delete all answers, or those of one model, and shrink the file. Returns how many were deleted."""
        with self._file.connection() as connection:
            if model is None:
                count = connection.execute("DELETE FROM answers").rowcount
            else:
                count = connection.execute("DELETE FROM answers WHERE model = ?", [model]).rowcount
        with self._file.connection() as connection:
            connection.isolation_level = None  # VACUUM runs in no transaction
            connection.execute("VACUUM")
        return count


def _row(key: str, completion: Completion) -> tuple[str, str, float, str]:
    routing = {name: value for name, value in completion.routing.items() if name not in _LARGE_ROUTING}
    return key, str(completion.get("model", "")), time.time(), json.dumps({**completion, ROUTING: routing})
