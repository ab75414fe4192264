"""The latency log: what is written is read back, whoever writes at the same time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from sollol_nb import config
from sollol_nb.errors import ConfigError
from sollol_nb.latency import SCHEMA_VERSION, LatencyLog, LatencyRow

HANG_GUARD_S = 120.0
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

FULL = LatencyRow(
    started_at=NOON.timestamp(),
    model="llama3.1:70b",
    backend="llama.cpp-distributed",
    layout="5/4/4",
    place="http://127.0.0.1:18080",
    queue_ms=1.5,
    load_ms=4000.25,
    ttft_ms=80.5,
    total_ms=900.125,
    prompt_tokens=12,
    completion_tokens=34,
    tokens_per_s=41.5,
    router_overhead_ms=0.75,
    failovers=1,
    status="ok",
    error="",
)
REFUSED = LatencyRow(
    started_at=(NOON + timedelta(hours=1)).timestamp(),
    model="caf\u00e9 '; DROP TABLE requests; --",
    backend="",
    layout="",
    place="",
    queue_ms=None,
    load_ms=None,
    ttft_ms=None,
    total_ms=0.5,
    prompt_tokens=None,
    completion_tokens=None,
    tokens_per_s=None,
    router_overhead_ms=None,
    failovers=0,
    status="error",
    error="no place has it\n\u2028",
    partial_text="half an ans\0\n",
)


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

    assert isinstance(types["started_at"], pd.DatetimeTZDtype)
    for name in ("queue_ms", "load_ms", "ttft_ms", "total_ms", "tokens_per_s", "router_overhead_ms"):
        assert types[name] == "float64", name
    for name in ("prompt_tokens", "completion_tokens", "failovers"):
        assert types[name] == "Int64", name
    for name in ("model", "backend", "layout", "place", "status", "error", "partial_text"):
        assert types[name] == "string", name


def written_hourly(log: LatencyLog) -> None:
    for hour in range(6):
        at = (NOON + timedelta(hours=hour)).timestamp()
        log.record(replace(FULL, started_at=at, model=f"m{hour % 2}", total_ms=float(hour)))


@pytest.mark.parametrize(
    ("wanted", "hours"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"model": "m1"}, [1, 3, 5]),
        ({"model": "unknown"}, []),
        ({"last": 2}, [4, 5]),
        ({"last": 100}, [0, 1, 2, 3, 4, 5]),
        ({"since": NOON + timedelta(hours=4)}, [4, 5]),
        ({"since": (NOON + timedelta(hours=4)).astimezone().replace(tzinfo=None)}, [4, 5]),
        ({"since": NOON + timedelta(hours=1), "model": "m1", "last": 2}, [3, 5]),
        ({"since": NOON + timedelta(days=1)}, []),
    ],
)
def test_filters_narrow_the_frame(log: LatencyLog, wanted: dict[str, object], hours: list[int]) -> None:
    written_hourly(log)

    assert log.frame(**wanted)["total_ms"].tolist() == hours  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [0, -1, 2.5, "3", True, 2**70])
def test_last_must_be_a_positive_whole_number(log: LatencyLog, last: object) -> None:
    with pytest.raises(ConfigError, match="not a positive number of rows"):
        log.frame(last=last)  # type: ignore[arg-type]


def test_log_outlives_the_object_and_stands_in_the_state_folder_by_default() -> None:
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
from sollol_nb.latency import LatencyLog, LatencyRow

log = LatencyLog(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    log.record(
        LatencyRow(0.0, sys.argv[2], "", "", "", None, None, None, number, None, None, None, None, 0, "ok", "")
    )
"""


@pytest.mark.parametrize("before", ["no file", "version 1"])
@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_write_to_a_log_at_once_lose_nothing(log: LatencyLog, before: str, attempt: int) -> None:
    if before == "version 1":
        write_version_1(log.path)
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
        for one in writers:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in writers:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        for one in writers:
            _, words = one.communicate(timeout=HANG_GUARD_S)
            assert one.returncode == 0, words
    finally:
        for one in writers:
            one.kill()

    frame = log.frame()
    counted = frame[frame["model"] != "old"].groupby("model")["total_ms"].apply(sorted)
    assert counted.to_dict() == {f"m{writer}": [float(n) for n in range(50)] for writer in range(6)}
    assert (frame["model"] == "old").sum() == (3 if before == "version 1" else 0)
    assert version_of(log.path) == SCHEMA_VERSION
