"""SQLite files: created and migrated by whoever is first, and left whole by whoever fails."""

from __future__ import annotations

import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sollol_nb.runtime import sqlite_file
from sollol_nb.runtime.sqlite_file import SqliteFile
from tests.support.engines import HANG_GUARD_S
from tests.support.sqlite_builds import use_sqlite_that_does_not_erase

FIRST = ["CREATE TABLE things (name TEXT)", "INSERT INTO things VALUES ('first')"]
SECOND = ["ALTER TABLE things ADD COLUMN size INTEGER DEFAULT 7"]


def things(file: SqliteFile) -> list[tuple[object, ...]]:
    with file.connection() as connection:
        return connection.execute("SELECT * FROM things").fetchall()


def version(file: SqliteFile) -> int:
    with file.connection() as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.sqlite"


def test_a_new_file_gets_all_versions_and_an_old_one_the_newer_ones(path: Path) -> None:
    old, new = SqliteFile(path, [FIRST]), SqliteFile(path, [FIRST, SECOND])

    assert (things(old), version(old)) == ([("first",)], 1)
    assert (things(new), version(new)) == ([("first", 7)], 2)
    assert (things(old), version(old)) == ([("first", 7)], 2)  # it is used as it is


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    things(SqliteFile(path, [FIRST]))

    with pytest.raises(sqlite3.OperationalError):
        things(SqliteFile(path, [FIRST, [*SECOND, "ALTER TABLE nosuch ADD COLUMN size"]]))

    assert things(SqliteFile(path, [FIRST])) == [("first",)]


def test_an_operation_that_fails_is_rolled_back(path: Path) -> None:
    file = SqliteFile(path, [FIRST])

    def fail() -> None:
        with file.connection() as connection:
            connection.execute("INSERT INTO things VALUES ('second')")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert things(file) == [("first",)]


def test_many_that_create_a_file_at_once_create_it_once(path: Path) -> None:
    start = threading.Barrier(16)

    def create(_: int) -> list[tuple[object, ...]]:
        start.wait(HANG_GUARD_S)
        return things(SqliteFile(path, [FIRST, SECOND]))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(create, range(16))) == [[("first", 7)]] * 16


def test_a_file_that_stays_locked_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    old = SqliteFile(path, [FIRST])
    with old.connection() as connection:
        connection.execute("INSERT INTO things VALUES ('second')")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            things(SqliteFile(path, [FIRST, SECOND]))


def test_a_file_that_cannot_be_migrated_is_used_as_it_is_if_its_version_allows_it(path: Path) -> None:
    failing = [FIRST, SECOND, ["DROP TABLE nosuch"]]
    things(SqliteFile(path, [FIRST]))
    with pytest.raises(sqlite3.OperationalError, match="nosuch"):
        things(SqliteFile(path, failing, usable_from=2))
    things(SqliteFile(path, [FIRST, SECOND]))
    with pytest.raises(sqlite3.OperationalError, match="nosuch"):
        things(SqliteFile(path, failing))

    file = SqliteFile(path, failing, usable_from=2)

    assert (things(file), version(file)) == ([("first", 7)], 2)


def test_a_file_in_no_folder_is_an_error_of_sqlite(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        things(SqliteFile(path.parent / "nosuch" / "file", [FIRST]))


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")
def test_only_its_owner_can_read_a_file_and_those_beside_it(path: Path) -> None:
    with SqliteFile(path, [FIRST]).connection() as connection:
        connection.execute("SELECT * FROM things").fetchall()
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}

    assert len(modes) == 3  # with its -wal and -shm
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("erases", [True, False])
def test_what_is_replaced_or_deleted_leaves_nothing_where_that_is_wanted(
    path: Path, monkeypatch: pytest.MonkeyPatch, erases: bool
) -> None:
    use_sqlite_that_does_not_erase(monkeypatch)
    file = SqliteFile(path, [FIRST], erases=erases)
    for statement in (
        "INSERT INTO things VALUES ('secret of a request')",
        "UPDATE things SET name = 'its answer' WHERE name LIKE 'secret%'",
        "INSERT INTO things VALUES ('another secret')",
        "DELETE FROM things WHERE name LIKE '%secret'",
    ):
        with file.connection() as connection:
            connection.execute(statement)
    with file.connection() as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    assert (b"secret" in path.read_bytes()) is not erases
