"""The latency log: one row per request, kept in SQLite, read as a pandas frame.

The file lies in the state folder and outlives the kernel; several threads and kernels may write to it at the same
time (see `sqlite_file`).
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import sqlite3
import time
import uuid
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError, StorageError
from sollol_nb.latency.filter import Moment, RowFilter
from sollol_nb.latency.schema import COLUMNS, SCHEMA_VERSION, LatencyRow
from sollol_nb.latency.writer import EXIT_LIMIT_S, writer
from sollol_nb.runtime.amounts import is_positive, is_whole_number
from sollol_nb.runtime.sqlite_file import SqliteFile
from sollol_nb.settings import config
from sollol_nb.settings.table import DEFAULT_KEEP_ROWS

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

PRUNE_EVERY_ROWS = 512
"""How often a writer prunes; it also prunes with its first row."""
PRUNED_AT_ONCE = 10_000
"""A limit, so that no request waits long for the pruning."""

_LIKE_SIGNS = re.compile("[%_!]")
_NAMES = ", ".join(column.name for column in COLUMNS)
_INSERT = f"INSERT INTO requests ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608 - constants


def _columns_since(version: int) -> list[str]:
    return [f"{column.name} {column.sql_type}" for column in COLUMNS if column.since == version]


def _added_in(version: int) -> list[str]:
    return [f"ALTER TABLE requests ADD COLUMN {column}" for column in _columns_since(version)]


_MIGRATIONS = (
    [
        f"CREATE TABLE IF NOT EXISTS requests (id INTEGER PRIMARY KEY, {', '.join(_columns_since(1))})",
        "CREATE INDEX IF NOT EXISTS requests_started_at ON requests (started_at)",
    ],
    _added_in(2),
    _added_in(3),
    [  # version 3 also kept packed copies of the rows
        "DROP TRIGGER IF EXISTS drop_block_after_DELETE",
        "DROP TRIGGER IF EXISTS drop_block_after_UPDATE",
        "DROP TABLE IF EXISTS blocks",
    ],
    _added_in(5),
    _added_in(6),
)
assert len(_MIGRATIONS) == SCHEMA_VERSION


class LatencyLog:
    """One row per request in one SQLite file.

    Each writer prunes now and then: rows older than `keep_days`, and all but the newest `keep_rows`, of which the
    file may hold some hundreds more. The file does not shrink; new rows use the free space.

    Args:
        path: the file; by default `latency.sqlite` in the state folder.
        keep_days: how long rows are kept; None keeps them for ever.
        keep_rows: how many rows are kept; None keeps all.

    Raises:
        ConfigError: `keep_days` or `keep_rows` is not more than 0.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        keep_days: float | None = None,
        keep_rows: int | None = DEFAULT_KEEP_ROWS,
    ) -> None:
        if keep_days is not None and not is_positive(keep_days):
            raise ConfigError(f"keep_days={keep_days!r} must be more than 0; None keeps rows for ever")
        if keep_rows is not None and not (is_whole_number(keep_rows) and keep_rows > 0):
            raise ConfigError(f"keep_rows={keep_rows!r} must be a whole number above 0; None keeps all rows")
        self.path = Path(path) if path is not None else config.state_file("latency.sqlite")
        self.keep_days = keep_days
        self.keep_rows = keep_rows
        self._file = SqliteFile(self.path, _MIGRATIONS, usable_from=max(column.since for column in COLUMNS))
        self._has_pruned = False

    @property
    def identity(self) -> str:
        """The same for all processes that write this file, and for no others."""
        text = f"{uuid.getnode()}\0{platform.node()}\0{self.path.resolve()}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def __repr__(self) -> str:
        return f"LatencyLog({str(self.path)!r})"

    def record(self, *rows: LatencyRow) -> None:
        """Append rows; waits for other writers, at most 10 s.

        Raises:
            sqlite3.Error: the file cannot be written.
        """
        values = [[_storable(value) for value in astuple(row)] for row in rows]
        with self._file.connection() as connection:
            connection.executemany(_INSERT, values)
            newest = connection.execute("SELECT max(id) FROM requests").fetchone()[0] or 0
        if not self._has_pruned or newest % PRUNE_EVERY_ROWS < len(rows):
            self._has_pruned = True
            try:
                self._prune()
            except sqlite3.Error as error:  # the rows are written, and the next writer tries again
                logger.warning("the latency log %s was not pruned: %s", self.path, error)

    def record_later(self, row: LatencyRow) -> None:
        """Append a row in the background; a row that cannot be written costs a warning. Readers in this process
        wait for it."""
        writer().write(self, row)

    def flush(self) -> None:
        """Wait until the rows of `record_later` are written, at most 2 s."""
        writer().wait_written(EXIT_LIMIT_S)

    def frame(
        self,
        *,
        model: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        last: int | None = None,
        backend: str | None = None,
        status: str | None = None,
    ) -> pd.DataFrame:
        """The log as a frame, oldest row first; columns, dtypes and units are those of `COLUMNS`.

        Args:
            model: only this model's rows: its name, or of a file also the path or the short name.
            since: only rows started at or after this: a datetime (naive ones are local), a `timedelta` before
                now, or text such as `"1h"`, `"2 days"` or `"2026-03-01 12:00"`.
            until: only rows started before this.
            last: only the newest N rows of these.
            backend: only rows of this backend.
            status: only rows with this status: `ok`, `error`, `timeout` or `cancelled`.

        Raises:
            ConfigError: an argument cannot be used.
            StorageError: the file cannot be read.
        """
        from sollol_nb.latency.frames import frame_of

        wanted = RowFilter.of(
            time.time(), model=model, backend=backend, status=status, since=since, until=until, last=last
        )
        writer().wait_written()
        try:
            with self._file.connection() as connection:
                return frame_of(connection.execute(*_query(wanted)))
        except sqlite3.Error as error:
            # Of the derived kinds, only a table or column that is missing.
            damaged = type(error) is sqlite3.DatabaseError or str(error).startswith("no such ")
            advice = "; it is damaged: move it away, and the next request begins a new one" if damaged else ""
            raise StorageError(f"cannot read the latency log {self.path}: {error}{advice}") from error

    def export(self, path: str | Path, **filters: Any) -> Path:
        """Write the log to a `.csv` or `.parquet` file; the file appears when it is whole.

        Args:
            path: the file; its suffix is the format. Parquet needs pyarrow (`pip install pyarrow`).
            **filters: those of `frame`.

        Returns:
            The file's path.

        Raises:
            ConfigError: the suffix is unknown, pyarrow is not installed, or a filter cannot be used.
            StorageError: the log cannot be read, or the file cannot be written.
        """
        from sollol_nb.latency.frames import check_format, write_frame

        check_format(Path(path))
        frame = self.frame(**filters)
        try:
            return write_frame(frame, Path(path))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"cannot write {path}: {reason}; give a path in a folder of yours") from error

    def _prune(self) -> None:
        """Delete some of the rows that need not be kept."""
        with self._file.connection() as connection:
            oldest, newest = connection.execute("SELECT min(id), max(id) FROM requests").fetchone()
            if oldest is None:
                return
            too_old_s = time.time() - self.keep_days * 86400 if self.keep_days is not None else float("-inf")
            too_many = newest - self.keep_rows if self.keep_rows is not None else oldest - 1
            connection.execute(
                "DELETE FROM requests WHERE id < ? AND (id <= ? OR started_at < ?)",
                (oldest + PRUNED_AT_ONCE, too_many, too_old_s),
            )


def _query(wanted: RowFilter) -> tuple[str, list[Any]]:
    """The query for the wanted rows, oldest first, and the values of its parameters."""
    conditions: list[str] = []
    values: list[Any] = []
    for name, text in wanted.equal:
        # A model that was requested by the path of its file is also found by its short name.
        conditions.append("(model = ? OR model LIKE ? ESCAPE '!')" if name == "model" else f"{name} = ?")
        escaped = _LIKE_SIGNS.sub(r"!\g<0>", text)
        values += [text, f"%/{escaped}.gguf"] if name == "model" else [text]
    for condition, moment_s in (("started_at >= ?", wanted.since_s), ("started_at < ?", wanted.until_s)):
        if moment_s is not None:
            conditions.append(condition)
            values.append(moment_s)
    rows = "requests" + (" WHERE " + " AND ".join(conditions) if conditions else "")
    if wanted.last is not None:
        rows, values = f"(SELECT * FROM {rows} ORDER BY id DESC LIMIT ?)", [*values, wanted.last]  # noqa: S608
    return f"SELECT {_NAMES} FROM {rows} ORDER BY id", values  # noqa: S608 - names and conditions are ours


def _storable(value: Any) -> Any:
    """The value; in a text, halves of surrogate pairs are escaped, since UTF-8 cannot have them."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
