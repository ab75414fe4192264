"""The latency log: what is written is read back, whoever writes at the same time, and kept as long as wanted."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sollol_nb.errors import ConfigError, StorageError
from sollol_nb.latency.filter import seconds_of
from sollol_nb.latency.frames import ROWS_AT_ONCE
from sollol_nb.latency.log import PRUNED_AT_ONCE, LatencyLog
from sollol_nb.latency.schema import COLUMNS, SCHEMA_VERSION, LatencyRow, schema_table
from sollol_nb.runtime import sqlite_file
from sollol_nb.settings import config
from tests.support.latency_rows import FULL, HOURLY, NOON, REFUSED

HANG_GUARD_S = 120.0


@pytest.fixture
def log(tmp_path: Path) -> LatencyLog:
    return LatencyLog(tmp_path / "latency.sqlite")


def test_rows_come_back_as_written_oldest_first(log: LatencyLog) -> None:
    log.record(FULL)
    log.record(REFUSED)

    frame = log.frame()

    assert list(frame.columns) == list(LatencyRow.__slots__)
    for position, row in enumerate((FULL, REFUSED)):
        read = frame.iloc[position].to_dict()
        assert read.pop("started_at") == pd.Timestamp(row.started_at, unit="s", tz="UTC")
        assert {name: None if pd.isna(value) else value for name, value in read.items()} == {
            name: getattr(row, name) for name in LatencyRow.__slots__ if name != "started_at"
        }


@pytest.mark.parametrize("rows", [[], [REFUSED], [FULL, REFUSED]], ids=["empty", "without numbers", "all"])
def test_columns_have_their_types_whatever_the_rows_hold(log: LatencyLog, rows: list[LatencyRow]) -> None:
    for row in rows:
        log.record(row)

    types = log.frame().dtypes

    assert types.to_dict() == {column.name: pd.api.types.pandas_dtype(column.dtype) for column in COLUMNS} | {
        column.name: pd.StringDtype("python") for column in COLUMNS if column.dtype == "string"
    }


def test_text_that_is_not_valid_unicode_is_escaped(log: LatencyLog) -> None:
    log.record(replace(FULL, model="a\ud800b"))

    assert log.frame()["model"].tolist() == ["a\\ud800b"]


def test_the_page_of_the_schema_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "notebooks" / "latency_schema.md"

    assert schema_table() in page.read_text(encoding="utf-8")
    assert f"version {SCHEMA_VERSION}" in page.read_text(encoding="utf-8")


# --- which rows -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["alone", "after many others"])
def hourly(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatencyLog:
    """Six rows, the newest."""
    log = LatencyLog(tmp_path_factory.mktemp("hourly") / "log")
    old = replace(FULL, model="before", backend="", status="timeout", started_at=0.0)
    log.record(*[old] * (0 if request.param == "alone" else ROWS_AT_ONCE - 3), *HOURLY)
    return log


@pytest.mark.parametrize(
    ("wanted", "hours"),
    [
        ({"since": NOON}, [0, 1, 2, 3, 4, 5]),
        ({"model": "m1"}, [1, 3, 5]),
        ({"model": "unknown"}, []),
        ({"last": 2}, [4, 5]),
        ({"last": 6}, [0, 1, 2, 3, 4, 5]),
        ({"since": NOON, "last": 100_000}, [0, 1, 2, 3, 4, 5]),
        ({"since": NOON + timedelta(hours=4)}, [4, 5]),
        ({"since": (NOON + timedelta(hours=4)).astimezone().replace(tzinfo=None)}, [4, 5]),
        ({"since": (NOON + timedelta(hours=4)).isoformat()}, [4, 5]),
        ({"since": NOON, "until": NOON + timedelta(hours=2)}, [0, 1]),
        ({"since": NOON + timedelta(hours=1), "model": "m1", "last": 2}, [3, 5]),
        ({"since": NOON + timedelta(days=1)}, []),
        ({"since": "1h"}, []),
        ({"backend": "ollama-pool"}, [0, 1, 2]),
        ({"status": "error"}, [5]),
        ({"backend": "llama.cpp-local", "status": "ok", "model": "m0"}, [4]),
        ({"model": "m0", "last": 2}, [2, 4]),
    ],
    ids=str,
)
def test_filters_narrow_the_frame(hourly: LatencyLog, wanted: dict[str, Any], hours: list[int]) -> None:
    frame = hourly.frame(**wanted)

    assert frame["total_ms"].tolist() == hours
    assert frame.equals(hourly.frame().tail(6).iloc[hours].reset_index(drop=True))


@pytest.mark.parametrize(
    ("moment", "seconds_before"),
    [
        ("90s", 90),
        ("1h", 3600),
        ("1h 30min", 5400),
        ("2 days", 172_800),
        ("1 Week", 604_800),
        ("0.5d", 43_200),
        (timedelta(minutes=2), 120),
    ],
)
def test_a_span_is_counted_back_from_now(moment: str | timedelta, seconds_before: float) -> None:
    assert seconds_of(moment, 1e9) == 1e9 - seconds_before


@pytest.mark.parametrize("moment", ["", "1", "soon", "1 parsec", "1h soon", "-1h", 3600, None, "2026-13-01"])
def test_what_cannot_be_read_as_a_time_is_named(moment: Any) -> None:
    with pytest.raises(ConfigError, match="as a time; use '1h'"):
        seconds_of(moment, 1e9)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"status": "canceled"}, "did you mean 'cancelled'"),
        ({"status": "good"}, "known statuses: ok, error, timeout, cancelled"),
        ({"model": 7}, "model=7 is not a name"),
    ],
)
def test_filters_that_cannot_be_used_are_named(log: LatencyLog, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        log.frame(**wanted)


@pytest.mark.parametrize("last", [0, -1, 2.5, "3", True, 2**70])
def test_last_must_be_a_positive_whole_number(log: LatencyLog, last: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number above 0"):
        log.frame(last=last)  # type: ignore[arg-type]


def test_log_is_in_the_state_folder_by_default() -> None:
    assert LatencyLog().path == config.state_dir() / "latency.sqlite"
    assert repr(LatencyLog("a.sqlite")) == "LatencyLog('a.sqlite')"


def test_log_is_read_again_by_another_object(tmp_path: Path) -> None:
    LatencyLog(tmp_path / "log").record(FULL)

    assert len(LatencyLog(str(tmp_path / "log")).frame()) == 1


# --- files of other versions ------------------------------------------------------------------

VERSION_1 = """
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    started_at REAL NOT NULL, model TEXT NOT NULL, backend TEXT NOT NULL, layout TEXT NOT NULL,
    place TEXT NOT NULL, queue_ms REAL, load_ms REAL, ttft_ms REAL, total_ms REAL NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, tokens_per_s REAL, router_overhead_ms REAL,
    failovers INTEGER NOT NULL, status TEXT NOT NULL, error TEXT NOT NULL
);
CREATE INDEX requests_started_at ON requests (started_at);
PRAGMA user_version = 1;
"""
INSERT_1 = """
INSERT INTO requests (
    started_at, model, backend, layout, place, queue_ms, load_ms, ttft_ms, total_ms, prompt_tokens,
    completion_tokens, tokens_per_s, router_overhead_ms, failovers, status, error
) VALUES (1000.5, 'old', 'ollama-pool', '', 'http://a', 0.5, NULL, 80.25, ?, 12, NULL, 41.5, NULL, 1, 'ok', '')
"""


def insert_as_version_1(path: Path, rows: int) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=HANG_GUARD_S)) as connection, connection:
        connection.executemany(INSERT_1, [(float(number),) for number in range(rows)])


def write_version_1(path: Path) -> None:
    """A log with three rows, as the first version of this package wrote it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(VERSION_1)
    insert_as_version_1(path, 3)


VERSION_2 = """
ALTER TABLE requests ADD COLUMN partial_text TEXT NOT NULL DEFAULT '';
PRAGMA user_version = 2;
"""
INSERT_2 = INSERT_1.replace("error\n)", "error, partial_text\n)").replace("'ok', '')", "'error', 'lost', 'half')")


def write_version_2(path: Path) -> None:
    """A log that the first version began and the second continued: three rows, then one."""
    write_version_1(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(VERSION_2)
        connection.execute(INSERT_2, (7.0,))


VERSION_3 = """
ALTER TABLE requests ADD COLUMN priority INTEGER;
ALTER TABLE requests ADD COLUMN done_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN predicted_ms_per_token REAL;
ALTER TABLE requests ADD COLUMN failover_details TEXT NOT NULL DEFAULT '';
CREATE TABLE blocks (
    last_id INTEGER PRIMARY KEY, first_id INTEGER NOT NULL, earliest_s REAL NOT NULL, latest_s REAL NOT NULL,
    header TEXT NOT NULL, data BLOB NOT NULL
);
CREATE TRIGGER drop_block_after_DELETE AFTER DELETE ON requests BEGIN
    DELETE FROM blocks WHERE first_id <= OLD.id
    AND last_id = (SELECT min(last_id) FROM blocks WHERE last_id >= OLD.id);
END;
CREATE TRIGGER drop_block_after_UPDATE AFTER UPDATE ON requests BEGIN
    DELETE FROM blocks WHERE first_id <= OLD.id
    AND last_id = (SELECT min(last_id) FROM blocks WHERE last_id >= OLD.id);
END;
INSERT INTO blocks VALUES (3, 1, 1000.5, 1000.5, '{"fields": [], "texts": {}}', x'00');
UPDATE requests SET priority = 5, done_reason = 'stop' WHERE id = 4;
PRAGMA user_version = 3;
"""


def write_version_3(path: Path) -> None:
    """The log of `write_version_2`, which the third version has packed, and given a priority and a reason."""
    write_version_2(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(VERSION_3)


def tables_and_triggers(path: Path) -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return set(connection.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'"))


def version_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_rows_of_version_1_stay_and_new_ones_are_added(log: LatencyLog) -> None:
    write_version_1(log.path)

    before = log.frame()
    log.record(REFUSED)
    insert_as_version_1(log.path, 1)  # by an older version that is still in use
    after = log.frame()

    assert version_of(log.path) == SCHEMA_VERSION
    assert list(before.columns) == list(after.columns) == list(LatencyRow.__slots__)
    assert before.equals(after.iloc[:3])
    assert after["model"].tolist() == ["old", "old", "old", REFUSED.model, "old"]
    assert after["total_ms"].tolist() == [0.0, 1.0, 2.0, 0.5, 0.0]
    assert after["partial_text"].tolist() == ["", "", "", REFUSED.partial_text, ""]
    first = before.iloc[0].to_dict()
    assert first["started_at"] == pd.Timestamp(1000.5, unit="s", tz="UTC")
    assert (first["backend"], first["ttft_ms"], first["prompt_tokens"]) == ("ollama-pool", 80.25, 12)
    assert pd.isna(first["completion_tokens"])
    assert str(before["partial_text"].dtype) == "string"


def test_rows_of_version_2_stay_and_have_what_is_new_empty(log: LatencyLog) -> None:
    write_version_2(log.path)

    log.record(FULL)
    frame = log.frame()

    assert version_of(log.path) == SCHEMA_VERSION
    assert frame["total_ms"].tolist() == [0.0, 1.0, 2.0, 7.0, FULL.total_ms]
    assert frame["partial_text"].tolist() == ["", "", "", "half", ""]
    assert frame["priority"].isna().tolist() == [True] * 4 + [False]
    for name in (
        "predicted_ms_per_token",
        "drafted_tokens",
        "accepted_tokens",
        "cached_tokens",
        "restored_tokens",
    ):
        assert frame[name].isna().tolist() == [True] * 4 + [False], name
    for name in ("done_reason", "failover_details"):
        assert frame[name].tolist() == [""] * 4 + [getattr(FULL, name)], name


def test_rows_of_version_3_stay_and_what_it_packed_is_dropped(log: LatencyLog) -> None:
    write_version_3(log.path)
    assert ("table", "blocks") in tables_and_triggers(log.path)

    before = log.frame()
    log.record(FULL)
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute("DELETE FROM requests WHERE id = 1")

    assert version_of(log.path) == SCHEMA_VERSION
    assert tables_and_triggers(log.path) == {("table", "requests"), ("index", "requests_started_at")}
    assert before["total_ms"].tolist() == [0.0, 1.0, 2.0, 7.0]
    assert before["priority"].fillna(0).tolist() == [0, 0, 0, 5]
    assert before["done_reason"].tolist() == ["", "", "", "stop"]
    assert log.frame()["total_ms"].tolist() == [1.0, 2.0, 7.0, FULL.total_ms]


def test_a_log_of_version_3_that_cannot_be_migrated_keeps_its_rows_until_it_can(
    log: LatencyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_3(log.path)
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(sqlite3.connect(log.path)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            log.frame()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            log.record(FULL)

    log.record(FULL)

    assert version_of(log.path) == SCHEMA_VERSION
    assert log.frame()["total_ms"].tolist() == [0.0, 1.0, 2.0, 7.0, FULL.total_ms]


def test_file_of_a_newer_version_is_used_and_keeps_what_is_newer(log: LatencyLog) -> None:
    log.record(FULL)
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute("ALTER TABLE requests ADD COLUMN joules REAL NOT NULL DEFAULT 7")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 5}")

    log.record(REFUSED)
    frame = log.frame()

    assert frame["model"].tolist() == [FULL.model, REFUSED.model]
    assert list(frame.columns) == list(LatencyRow.__slots__)
    assert version_of(log.path) == SCHEMA_VERSION + 5
    with contextlib.closing(sqlite3.connect(log.path)) as connection:
        assert connection.execute("SELECT joules FROM requests").fetchall() == [(7.0,), (7.0,)]


# --- several writers --------------------------------------------------------------------------


def test_threads_that_write_to_a_new_log_at_once_lose_nothing(log: LatencyLog) -> None:
    start = threading.Barrier(16)

    def write(thread: int) -> None:
        start.wait(HANG_GUARD_S)
        for number in range(10):
            log.record(replace(FULL, model=f"m{thread}", total_ms=float(number)))
            log.frame(last=1)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))

    counted = log.frame().groupby("model")["total_ms"].apply(sorted)
    assert counted.to_dict() == {f"m{thread}": [float(n) for n in range(10)] for thread in range(16)}


WRITES = """
import sys
from sollol_nb.latency.log import LatencyLog
from sollol_nb.latency.schema import LatencyRow

log = LatencyLog(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    log.record(
        LatencyRow(
            started_at=0.0, model=sys.argv[2], backend="", layout="", place="", queue_ms=None, load_ms=None,
            ttft_ms=None, total_ms=number, prompt_tokens=None, completion_tokens=None, tokens_per_s=None,
            router_overhead_ms=None, failovers=0, status="ok", error="",
        )
    )
"""


OLD_FILES = {"no file": None, "version 1": write_version_1, "version 3": write_version_3}


@pytest.mark.parametrize("before", OLD_FILES)
@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_write_to_a_log_at_once_lose_nothing(log: LatencyLog, before: str, attempt: int) -> None:
    if (write := OLD_FILES[before]) is not None:
        write(log.path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITES, str(log.path), f"m{writer}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        for writer in range(6)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=HANG_GUARD_S)
            assert writer.returncode == 0, errors
    finally:
        for writer in writers:
            writer.kill()

    frame = log.frame()
    counted = frame[frame["model"] != "old"].groupby("model")["total_ms"].apply(sorted)
    assert counted.to_dict() == {f"m{writer}": [float(n) for n in range(50)] for writer in range(6)}
    assert (frame["model"] == "old").sum() == {"no file": 0, "version 1": 3, "version 3": 4}[before]
    assert version_of(log.path) == SCHEMA_VERSION


# --- changed elsewhere, and retention -----------------------------------------------------------


def test_rows_changed_or_deleted_with_another_tool_are_read_so(log: LatencyLog) -> None:
    log.record(*(replace(FULL, total_ms=float(number)) for number in range(10)))
    assert len(log.frame()) == 10
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute("DELETE FROM requests WHERE id = 5")
        connection.execute("UPDATE requests SET model = 'renamed' WHERE id = 7")

    frame = log.frame()

    assert frame["total_ms"].tolist() == [0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert frame.index[frame["model"] == "renamed"].tolist() == [5]


def test_a_log_emptied_with_another_tool_is_empty_and_takes_rows_again(log: LatencyLog) -> None:
    log.record(FULL, FULL)
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute("DELETE FROM requests")

    assert log.frame().empty
    log.record(REFUSED)
    assert log.frame()["model"].tolist() == [REFUSED.model]


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")
def test_only_its_owner_can_read_a_log(log: LatencyLog) -> None:
    log.record(FULL)

    with contextlib.closing(sqlite3.connect(log.path)) as connection:
        connection.execute("SELECT * FROM requests").fetchall()
        modes = {path.name: path.stat().st_mode & 0o777 for path in log.path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("kept", [1, 100, PRUNED_AT_ONCE + 7])
def test_the_newest_rows_are_kept_and_the_others_pruned(tmp_path: Path, kept: int) -> None:
    count = 2 * PRUNED_AT_ONCE - 2
    LatencyLog(tmp_path / "log").record(*(replace(FULL, total_ms=float(number)) for number in range(count)))
    log = LatencyLog(tmp_path / "log", keep_rows=kept)

    for _ in range(2):  # each new writer prunes; these are too many for one
        LatencyLog(log.path, keep_rows=kept).record(replace(FULL, total_ms=-1.0))

    last = [float(number) for number in range(count)] + [-1.0, -1.0]
    assert log.frame()["total_ms"].tolist() == last[-kept:]


def test_rows_older_than_wanted_are_pruned(tmp_path: Path) -> None:
    now_s = time.time()
    for age_days in (30.0, 2.5, 1.5, 0.5):
        LatencyLog(tmp_path / "log").record(replace(FULL, started_at=now_s - age_days * 86400, total_ms=age_days))

    LatencyLog(tmp_path / "log", keep_days=2).record(replace(FULL, started_at=now_s, total_ms=0.0))

    assert LatencyLog(tmp_path / "log").frame()["total_ms"].tolist() == [1.5, 0.5, 0.0]


def test_a_writer_prunes_now_and_then(tmp_path: Path) -> None:
    log = LatencyLog(tmp_path / "log", keep_rows=10)
    counts = []
    for first in range(0, 600, 100):
        log.record(*(replace(FULL, total_ms=float(number)) for number in range(first, first + 100)))
        counts.append(len(log.frame()))

    assert counts == [10, 110, 210, 310, 410, 10]
    assert log.frame()["total_ms"].tolist() == [float(number) for number in range(590, 600)]


def test_a_log_that_cannot_be_pruned_still_takes_rows(
    log: LatencyLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def locked(_: LatencyLog) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(LatencyLog, "_prune", locked)
    log.record(FULL)

    assert len(log.frame()) == 1
    assert "was not pruned: database is locked" in caplog.text


@pytest.mark.parametrize(
    "wanted",
    [{"keep_days": 0}, {"keep_days": -1}, {"keep_days": "7"}, {"keep_rows": 0}, {"keep_rows": 1.5}],
    ids=str,
)
def test_what_is_kept_must_be_more_than_nothing(wanted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wanted))):
        LatencyLog("log", **wanted)


@pytest.mark.parametrize("content", [b"garbage" * 500, b"SQLite format 3\0" + bytes(60)], ids=["text", "cut"])
def test_a_damaged_log_is_named_with_what_to_do(log: LatencyLog, tmp_path: Path, content: bytes) -> None:
    log.path.write_bytes(content)

    for read in (log.frame, lambda: log.export(tmp_path / "log.csv")):
        with pytest.raises(StorageError, match=r"cannot read the latency log .*latency.sqlite.*move it away"):
            read()


def test_a_file_of_another_program_is_named_with_what_to_do(log: LatencyLog) -> None:
    with contextlib.closing(sqlite3.connect(log.path)) as connection:
        connection.execute("CREATE TABLE requests (other)")
    with pytest.raises(StorageError, match=r"latency.sqlite: no such column.*move it away"):
        log.frame()


def test_an_export_that_cannot_be_written_is_named_with_what_to_do(log: LatencyLog, tmp_path: Path) -> None:
    log.record(FULL)

    with pytest.raises(StorageError, match=r"cannot write .*log.csv: .*; give a path in a folder of yours"):
        log.export(tmp_path / "absent" / "log.csv")


# --- models that were requested by path --------------------------------------------------------


def test_models_that_were_requested_by_path_have_short_names(log: LatencyLog) -> None:
    paths = ["/a/m.gguf", "/b/m.gguf", "/a/50%_off.gguf", "llama3.2"]
    log.record(*(replace(FULL, model=path) for path in paths))
    frame = log.frame()
    assert frame["model"].tolist() == ["a/m", "b/m", "50%_off", "llama3.2"]
    assert frame["model"].dtype == log.frame(model="llama3.2")["model"].dtype
    assert frame.attrs["model_paths"] == {"a/m": "/a/m.gguf", "b/m": "/b/m.gguf", "50%_off": "/a/50%_off.gguf"}
    found = {name: len(log.frame(model=name)) for name in ("m", "a/m", "/a/m.gguf", "50%_off", "off", "llama3.2")}
    assert found == {"m": 2, "a/m": 1, "/a/m.gguf": 1, "50%_off": 1, "off": 0, "llama3.2": 1}
