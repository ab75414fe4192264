"""The latency log: what is written is read back, whoever writes at the same time."""

from __future__ import annotations

import os
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
from sollol_nb.latency import LatencyLog, LatencyRow

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
    for name in ("model", "backend", "layout", "place", "status", "error"):
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


@pytest.mark.parametrize("attempt", range(4))
def test_processes_that_write_to_a_new_log_at_once_lose_nothing(log: LatencyLog, attempt: int) -> None:
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

    counted = log.frame().groupby("model")["total_ms"].apply(sorted)
    assert counted.to_dict() == {f"m{writer}": [float(n) for n in range(50)] for writer in range(6)}
