"""The latency log: one row per request, kept in SQLite, read as a pandas frame.

The file lives in the state folder and outlives the kernel. It is in WAL mode, and each operation opens its own
connection, so several threads and kernels may write at once. The only room that knows SQL.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb import config
from sollol_nb.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 10.0
MAX_ROWS = 2**63 - 1  # of SQLite's integers


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """What is recorded of one request. Times in milliseconds; None where it does not apply.

    Attributes:
        started_at: seconds since the epoch, when the router got the request.
        model: the name that was asked for.
        backend: `ollama-pool`, `llama.cpp-distributed`, `llama.cpp-local`, or "" when none was reached.
        layout: units per worker in order, such as `5/4/4`; "" where nothing is sharded.
        place: URL of the coordinator or node.
        queue_ms: waited at the place's gate.
        load_ms: waited for the place to become ready (starting a coordinator, loading the model).
        ttft_ms: from the request to the first token.
        total_ms: from the request to the last token.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        tokens_per_s: generation speed as the engine measured it.
        router_overhead_ms: part of `ttft_ms` spent in the router itself (profile, route, plan, bookkeeping).
        failovers: how often the request went on elsewhere.
        status: `ok`, `error`, `timeout` or `cancelled`.
        error: the error's line, or "".
        partial_text: what had been written of an answer that did not end well, or "".
    """

    started_at: float
    model: str
    backend: str
    layout: str
    place: str
    queue_ms: float | None
    load_ms: float | None
    ttft_ms: float | None
    total_ms: float
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens_per_s: float | None
    router_overhead_ms: float | None
    failovers: int
    status: str
    error: str
    partial_text: str = ""


_ADDED_IN = ("partial_text",)
"""Columns that came after version 1, one version each."""

# column: (SQLite type, pandas dtype). `started_at` becomes a UTC timestamp.
_COLUMNS: dict[str, tuple[str, str]] = {
    "started_at": ("REAL NOT NULL", "float64"),
    "model": ("TEXT NOT NULL", "string"),
    "backend": ("TEXT NOT NULL", "string"),
    "layout": ("TEXT NOT NULL", "string"),
    "place": ("TEXT NOT NULL", "string"),
    "queue_ms": ("REAL", "float64"),
    "load_ms": ("REAL", "float64"),
    "ttft_ms": ("REAL", "float64"),
    "total_ms": ("REAL NOT NULL", "float64"),
    "prompt_tokens": ("INTEGER", "Int64"),
    "completion_tokens": ("INTEGER", "Int64"),
    "tokens_per_s": ("REAL", "float64"),
    "router_overhead_ms": ("REAL", "float64"),
    "failovers": ("INTEGER NOT NULL", "Int64"),
    "status": ("TEXT NOT NULL", "string"),
    "error": ("TEXT NOT NULL", "string"),
    "partial_text": ("TEXT NOT NULL DEFAULT ''", "string"),
}
assert list(_COLUMNS) == [one.name for one in fields(LatencyRow)]

# Statements that make version N + 1 of the file from version N; a new file gets them all.
_CREATE = f"""
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY,
    {", ".join(f"{name} {sql_type}" for name, (sql_type, _) in _COLUMNS.items() if name not in _ADDED_IN)}
);
CREATE INDEX IF NOT EXISTS requests_started_at ON requests (started_at);
"""
_MIGRATIONS = (
    _CREATE,
    *(f"ALTER TABLE requests ADD COLUMN {name} {_COLUMNS[name][0]};" for name in _ADDED_IN),
)
assert len(_MIGRATIONS) == SCHEMA_VERSION
_NAMES = ", ".join(_COLUMNS)
_INSERT = f"INSERT INTO requests ({_NAMES}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - constants


class LatencyLog:
    """One row per request in one SQLite file.

    Args:
        path: the file; by default `latency.sqlite` in the state folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else config.state_dir() / "latency.sqlite"

    def __repr__(self) -> str:
        return f"LatencyLog({str(self.path)!r})"

    def record(self, row: LatencyRow) -> None:
        """Append one row; waits for other writers, at most 10 s."""
        with self._connection() as connection:
            connection.execute(_INSERT, astuple(row))

    def frame(
        self, *, model: str | None = None, since: datetime | None = None, last: int | None = None
    ) -> pd.DataFrame:
        """The log as a frame, oldest row first; columns as in `LatencyRow`, `started_at` as UTC
        timestamps in milliseconds.

        Args:
            model: only this model's rows.
            since: only rows started at or after this time (naive times are local).
            last: only the newest N rows of these.

        Raises:
            ConfigError: `last` is not a positive whole number.
        """
        import pandas as pd

        if last is not None and (type(last) is not int or not 0 < last <= MAX_ROWS):
            raise ConfigError(f"last={last!r} is not a positive number of rows; write last=20")
        wanted: list[tuple[str, object]] = []
        if model is not None:
            wanted.append(("model = ?", model))
        if since is not None:
            wanted.append(("started_at >= ?", since.timestamp()))
        where = "WHERE " + " AND ".join(clause for clause, _ in wanted) if wanted else ""
        values = [value for _, value in wanted]
        limit = "LIMIT ?" if last is not None else ""
        if last is not None:
            values.append(last)
        query = f"SELECT {_NAMES} FROM requests {where} ORDER BY id DESC {limit}"  # noqa: S608 - constants
        with self._connection() as connection:
            rows = connection.execute(query, values).fetchall()
        frame = pd.DataFrame.from_records(rows[::-1], columns=list(_COLUMNS))
        frame = frame.astype({name: dtype for name, (_, dtype) in _COLUMNS.items()})
        milliseconds = (frame["started_at"] * 1000).round().astype("int64")
        frame["started_at"] = pd.to_datetime(milliseconds, unit="ms", utc=True).astype("datetime64[ms, UTC]")
        return frame

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


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Create the table, or add what newer versions of it have.

    A file that a newer version of this package has written keeps its further columns.
    """
    # SQLite does not wait for its lock while the journal mode changes, and several writers may be the first.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]  # another may have been quicker
            for statement in "".join(_MIGRATIONS[version:]).split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(version, SCHEMA_VERSION)}")
            connection.commit()
            return
        except sqlite3.OperationalError as error:
            connection.rollback()
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
