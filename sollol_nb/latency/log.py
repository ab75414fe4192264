"""The latency log: one row per request, kept in SQLite, read as a pandas frame.

The file lives in the state folder and outlives the kernel. It is in WAL mode, and each operation opens its own
connection, so several threads and kernels may write at once. The only room that knows SQL.

Two tables hold the same rows. `requests` is the log, one SQL row per request. `blocks` has each full run of
`BLOCK_ROWS` of them once more, as columns (see `latency_columns`), for reading many quickly. Blocks are derived:
triggers drop the block of a row that is deleted or changed, and rows without a block are read from `requests`.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError
from sollol_nb.latency.filter import Moment, RowFilter
from sollol_nb.latency.schema import COLUMNS, SCHEMA_VERSION, LatencyRow
from sollol_nb.runtime.amounts import is_positive, is_whole_number
from sollol_nb.settings import config
from sollol_nb.settings.table import DEFAULT_KEEP_ROWS

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.latency.frames import Block

__all__ = ["SCHEMA_VERSION", "LatencyLog", "LatencyRow"]

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 10.0
TIDY_EVERY_ROWS = 512
"""How often a writer packs and prunes; it also does with its first row."""
PRUNED_AT_ONCE = 10_000
"""So many rows at most, so that no request waits long for it."""

_NAMES = ", ".join(one.name for one in COLUMNS)
_INSERT = f"INSERT INTO requests ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608 - constants


def _added_in(version: int) -> tuple[str, ...]:
    new = [one for one in COLUMNS if one.since == version]
    return tuple(f"ALTER TABLE requests ADD COLUMN {one.name} {one.sql_type}" for one in new)


def _drop_block_after(change: str) -> str:
    return (
        f"CREATE TRIGGER drop_block_after_{change} AFTER {change} ON requests BEGIN "  # noqa: S608 - constants
        "DELETE FROM blocks WHERE first_id <= OLD.id AND last_id = "
        "(SELECT min(last_id) FROM blocks WHERE last_id >= OLD.id); END"
    )


# Statements that make version N + 1 of the file from version N; a new file gets them all.
_FIRST_COLUMNS = ", ".join(f"{one.name} {one.sql_type}" for one in COLUMNS if one.since == 1)
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"CREATE TABLE IF NOT EXISTS requests (id INTEGER PRIMARY KEY, {_FIRST_COLUMNS})",
        "CREATE INDEX IF NOT EXISTS requests_started_at ON requests (started_at)",
    ),
    _added_in(2),
    (
        *_added_in(3),
        "CREATE TABLE blocks (last_id INTEGER PRIMARY KEY, first_id INTEGER NOT NULL, earliest_s REAL NOT NULL, "
        "latest_s REAL NOT NULL, header TEXT NOT NULL, data BLOB NOT NULL)",
        _drop_block_after("DELETE"),
        _drop_block_after("UPDATE"),
    ),
)
assert len(_MIGRATIONS) == SCHEMA_VERSION


class LatencyLog:
    """One row per request in one SQLite file.

    Rows that are older than `keep_days`, or not among the newest `keep_rows`, are pruned now and then by whoever
    writes; the file may hold some hundreds more. It does not shrink, its space is used again.

    Args:
        path: the file; by default `latency.sqlite` in the state folder.
        keep_days: how long rows are kept; by default for ever.
        keep_rows: how many rows are kept; None is all.

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
        self.path = Path(path) if path is not None else config.state_dir() / "latency.sqlite"
        self.keep_days = keep_days
        self.keep_rows = keep_rows
        self._is_tidied = False

    def __repr__(self) -> str:
        return f"LatencyLog({str(self.path)!r})"

    def record(self, *rows: LatencyRow) -> None:
        """Append rows; waits for other writers, at most 10 s.

        Raises:
            sqlite3.Error: the file cannot be written.
        """
        values = [[_storable(value) for value in astuple(row)] for row in rows]
        with self._connection() as connection:
            connection.executemany(_INSERT, values)
            newest = connection.execute("SELECT max(id) FROM requests").fetchone()[0] or 0
        if not self._is_tidied or newest % TIDY_EVERY_ROWS < len(rows):
            self._is_tidied = True
            try:
                self._tidy()
            except sqlite3.Error as error:  # the rows are written, and the next writer tries again
                logger.warning("the latency log %s was not pruned: %s", self.path, error)

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
            model: only this model's rows.
            since: only rows started at or after this: a datetime (naive ones are local), a `timedelta` before
                now, or text such as `"1h"`, `"2 days"` or `"2026-03-01 12:00"`.
            until: only rows started before this.
            last: only the newest N rows of these.
            backend: only rows of this backend.
            status: only rows that ended so: `ok`, `error`, `timeout` or `cancelled`.

        Raises:
            ConfigError: an argument cannot be used.
            sqlite3.Error: the file cannot be read.
        """
        wanted = RowFilter.of(
            time.time(), model=model, backend=backend, status=status, since=since, until=until, last=last
        )
        from sollol_nb.latency.frames import BLOCK_ROWS, frame_of

        with self._connection() as connection:
            if wanted.last is None or wanted.last > BLOCK_ROWS:
                with contextlib.suppress(sqlite3.OperationalError):  # locked or read-only: then without
                    while _pack(connection):  # what older versions have written; once
                        pass
            connection.execute("BEGIN")  # all that follows sees one state of the file
            newest_first: list[Block] = []
            still = wanted.last
            for block in _blocks(connection, wanted):
                newest_first.append(block if still is None else block.newest(still))
                if still is not None:
                    still -= len(newest_first[-1])
                    if not still:
                        break
        return frame_of(newest_first[::-1])

    def export(self, path: str | Path, **filters: Any) -> Path:
        """Write the log to a `.csv` or `.parquet` file; the file appears when it is whole.

        Args:
            path: the file; its suffix tells the format. Parquet needs the extra `sollol_nb[parquet]`.
            **filters: those of `frame`.

        Returns:
            The file's path.

        Raises:
            ConfigError: the suffix is unknown, pyarrow is not installed, or a filter cannot be used.
            OSError: the file cannot be written.
        """
        from sollol_nb.latency.export import check_format, write_frame

        check_format(Path(path))
        return write_frame(self.frame(**filters), Path(path))

    def _tidy(self) -> None:
        """Pack one block, if there are rows for one, and prune some of what need not be kept."""
        with self._connection() as connection:
            _pack(connection)
            oldest, newest = connection.execute("SELECT min(id), max(id) FROM requests").fetchone()
            if oldest is None:
                return
            too_old_s = time.time() - self.keep_days * 86400 if self.keep_days is not None else float("-inf")
            too_many = newest - self.keep_rows if self.keep_rows is not None else oldest - 1
            connection.execute(
                "DELETE FROM requests WHERE id < ? AND (id <= ? OR started_at < ?)",
                (oldest + PRUNED_AT_ONCE, too_many, too_old_s),
            )

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version < SCHEMA_VERSION:
                _bring_up_to_date(connection)
            connection.execute("PRAGMA synchronous = NORMAL")  # safe with WAL; a row need not survive power loss
            with connection:
                yield connection
        finally:
            connection.close()


def _storable(value: Any) -> Any:
    """The value; a text that is no Unicode (a lone half of a surrogate pair) as near as UTF-8 can have it."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _blocks(connection: sqlite3.Connection, wanted: RowFilter) -> Iterator[Block]:
    """All rows that are wanted, newest block first; rows without a block are read one by one."""
    from sollol_nb.latency.frames import Block

    listed = connection.execute(
        "SELECT last_id, first_id, earliest_s, latest_s FROM blocks ORDER BY last_id DESC"
    ).fetchall()
    above: int | None = None  # the first id of what was read last
    for last_id, first_id, earliest_s, latest_s in listed:
        if above is None or last_id + 1 < above:
            yield from _unpacked_rows(connection, wanted, last_id, above)
        above = first_id
        if (wanted.since_s is not None and latest_s < wanted.since_s) or (
            wanted.until_s is not None and earliest_s >= wanted.until_s
        ):
            continue
        header, data = connection.execute(
            "SELECT header, data FROM blocks WHERE last_id = ?", (last_id,)
        ).fetchone()
        block = Block.unpacked(header, data)
        if block is None:
            yield from _unpacked_rows(connection, wanted, first_id - 1, last_id + 1)
        else:
            yield block.where(wanted)
    yield from _unpacked_rows(connection, wanted, None, above)


def _unpacked_rows(
    connection: sqlite3.Connection, wanted: RowFilter, below: int | None, above: int | None
) -> Iterator[Block]:
    """The wanted rows with ids between these two, as blocks, newest first."""
    from sollol_nb.latency.frames import BLOCK_ROWS, Block

    limits: list[tuple[str, Any]] = [(f"{name} = ?", text) for name, text in wanted.equal]
    for clause, limit in (
        ("id > ?", below),
        ("id < ?", above),
        ("started_at >= ?", wanted.since_s),
        ("started_at < ?", wanted.until_s),
    ):
        if limit is not None:
            limits.append((clause, limit))
    where = "WHERE " + " AND ".join(clause for clause, _ in limits) if limits else ""
    query = f"SELECT {_NAMES} FROM requests {where} ORDER BY id DESC LIMIT ?"  # noqa: S608 - constants
    cursor = connection.execute(
        query, [*(limit for _, limit in limits), -1 if wanted.last is None else wanted.last]
    )
    while rows := cursor.fetchmany(BLOCK_ROWS):
        yield Block.of_rows(rows[::-1])


def _pack(connection: sqlite3.Connection) -> bool:
    """Keep the oldest full run of rows behind the last block as a block too; False where there is none.

    Rows are encoded before the file is locked for writing; the block is only kept if its rows are still the same.
    """
    packed_to = connection.execute("SELECT max(last_id) FROM blocks").fetchone()[0] or 0
    newest = connection.execute("SELECT max(id) FROM requests").fetchone()[0] or 0
    from sollol_nb.latency.frames import BLOCK_ROWS, Block

    if newest - packed_to < BLOCK_ROWS:
        return False
    query = f"SELECT id, {_NAMES} FROM requests WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608 - constants
    rows = connection.execute(query, (packed_to, BLOCK_ROWS)).fetchall()
    if len(rows) < BLOCK_ROWS:
        return False
    block = Block.of_rows([row[1:] for row in rows])
    first_id, last_id = rows[0][0], rows[-1][0]
    started_at = block.values["started_at"]
    kept = connection.execute(
        "INSERT OR IGNORE INTO blocks (last_id, first_id, earliest_s, latest_s, header, data) "
        "SELECT ?, ?, ?, ?, ?, ? WHERE coalesce((SELECT max(last_id) FROM blocks), 0) = ? "
        "AND (SELECT count(*) FROM requests WHERE id BETWEEN ? AND ?) = ?",
        (
            *(last_id, first_id, float(started_at.min()), float(started_at.max()), *block.packed()),
            *(packed_to, first_id, last_id, len(rows)),
        ),
    ).rowcount
    connection.commit()
    return bool(kept)


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Create the tables, or add what newer versions of them have.

    A file that a newer version of this package has written keeps its further columns.
    """
    # SQLite does not wait for its lock while the journal mode changes, and several writers may be the first.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]  # another may have been quicker
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(version, SCHEMA_VERSION)}")
            connection.commit()
            return
        except sqlite3.OperationalError as error:
            connection.rollback()
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
