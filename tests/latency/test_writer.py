"""Rows that are written in the background: no answer waits for them, and none that can be written is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sollol_nb.latency.log import LatencyLog
from sollol_nb.latency.schema import LatencyRow
from sollol_nb.latency.writer import RowWriter
from tests.support.engines import HANG_GUARD_S, posix_only
from tests.support.latency_rows import REFUSED


class HeldLog(LatencyLog):
    """A log that writes only after `released` is set, and lists how many rows it was given at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.released = threading.Event(), threading.Event()
        self.given: list[int] = []

    def record(self, *rows: LatencyRow) -> None:
        self.given.append(len(rows))
        self.begun.set()
        assert self.released.wait(HANG_GUARD_S)
        super().record(*rows)


def test_readers_see_a_row_that_was_given_before(tmp_path: Path) -> None:
    log = LatencyLog(tmp_path / "log")
    for count in range(1, 4):
        log.record_later(REFUSED)
        assert len(log.frame()) == len(LatencyLog(log.path).frame()) == count


def test_rows_that_wait_for_a_slow_file_are_written_together(tmp_path: Path) -> None:
    log, writer = HeldLog(tmp_path / "log"), RowWriter()
    writer.write(log, REFUSED)
    assert log.begun.wait(HANG_GUARD_S)
    for _ in range(5):
        writer.write(log, REFUSED)
    writer.wait_written(0.0)  # gives up immediately
    log.released.set()
    writer.wait_written(HANG_GUARD_S)
    assert log.given == [1, 5]
    assert len(log.frame()) == 6


def test_a_row_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = LatencyLog(tmp_path / "log")
    log.path.mkdir()
    log.record_later(REFUSED)
    log.flush()
    assert f"1 latency row was not written to {log.path}" in caplog.text
    log.path.rmdir()
    log.record_later(REFUSED)
    assert len(log.frame()) == 1


def test_a_row_that_no_thread_can_write_is_written_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log, writer = LatencyLog(tmp_path / "log"), RowWriter()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        writer.write(log, REFUSED)
    assert f"latency rows are not written to {log.path} yet: can't start new thread" in caplog.text
    writer.write(log, REFUSED)
    writer.wait_written(HANG_GUARD_S)
    assert len(log.frame()) == 2


def test_the_last_row_of_a_script_is_written(tmp_path: Path) -> None:
    code = f"""
from sollol_nb.latency.log import LatencyLog
from tests.support.latency_rows import REFUSED
LatencyLog({str(tmp_path / "log")!r}).record_later(REFUSED)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_GUARD_S)
    assert len(LatencyLog(tmp_path / "log").frame()) == 1


@posix_only
def test_a_forked_child_writes_to_the_log_of_its_parent(tmp_path: Path) -> None:
    code = f"""
import os
from sollol_nb.latency.log import LatencyLog
from tests.support.latency_rows import REFUSED
log = LatencyLog({str(tmp_path / "log")!r})
for _ in range(20):
    log.record_later(REFUSED)
    child = os.fork()
    if child == 0:
        log.record_later(REFUSED)
        log.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=HANG_GUARD_S)
    assert len(LatencyLog(tmp_path / "log").frame()) == 40
