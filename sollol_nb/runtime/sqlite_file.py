"""SQLite files that several threads and kernels use at the same time.

A file is in WAL mode and readable only by its owner, since it holds texts of prompts and answers. Each operation
opens its own connection.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

BUSY_TIMEOUT_S = 10.0


class SqliteFile:
    """One SQLite file, created or brought up to date when it is first used.

    Args:
        path: the file; its folder exists.
        migrations: for each version of the file (SQLite's `user_version`), from 1 on, the statements that make it
            from the version before. A file of a newer version is used as it is.
        usable_from: the oldest version that can be used as it is too, if the file cannot be migrated (it is
            read-only, say); None is only the newest.
        erases: whether nothing stays in the file of what is deleted or replaced.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[Sequence[str]],
        *,
        usable_from: int | None = None,
        erases: bool = False,
    ) -> None:
        self.path = path
        self._migrations = migrations
        self._usable_from = len(migrations) if usable_from is None else usable_from
        self._erases = erases

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation: committed at the end, rolled back after an error, then closed.

        Waits for other writers, at most 10 s.

        Raises:
            sqlite3.Error: the file cannot be used.
        """
        with contextlib.suppress(OSError):  # it exists; for other problems SQLite reports an error
            # SQLite gives the files that it creates beside this one the same mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
        try:
            version = _version(connection)
            if version < len(self._migrations):
                try:
                    self._migrate(connection)
                except sqlite3.Error:
                    if version < self._usable_from:
                        raise
                    connection.rollback()
            connection.execute("PRAGMA synchronous = NORMAL")  # safe with WAL; only a power loss may cost a row
            if self._erases:  # with each write, not only where a user deletes: an update leaves parts behind, too
                connection.execute("PRAGMA secure_delete = ON")
            with connection:
                yield connection
        finally:
            connection.close()

    def _migrate(self, connection: sqlite3.Connection) -> None:
        # SQLite does not wait for its lock while the journal mode changes, and several writers may be the first.
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("BEGIN IMMEDIATE")
                version = _version(connection)  # another writer may have been quicker
                for statements in self._migrations[version:]:
                    for statement in statements:
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {max(version, len(self._migrations))}")
                connection.commit()
                return
            except sqlite3.OperationalError as error:
                connection.rollback()
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
