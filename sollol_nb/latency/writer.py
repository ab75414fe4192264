"""Writes the rows of latency logs in the background, so that no answer waits for a file that is locked or slow.

Rows are collected for a moment, and written together: so the work falls between requests, not on the end of an
answer. Whoever reads a log in this process waits for the rows that are still on their way (`wait_written`). The
thread ends when it has been idle, or all is written that somebody waits for. It is a daemon, so that it cannot
keep the interpreter from ending; at exit it gets a moment to finish.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from sollol_nb.runtime.sqlite_file import BUSY_TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path

    from sollol_nb.latency.schema import LatencyRow

logger = logging.getLogger(__name__)

COLLECT_S = 0.1
IDLE_S = 5.0
EXIT_LIMIT_S = 2.0
READ_LIMIT_S = BUSY_TIMEOUT_S + 1.0


class Log(Protocol):
    """What rows are written to."""

    path: Path

    def record(self, *rows: LatencyRow) -> None:
        """Append rows; any error is reported."""


class RowWriter:
    """Rows on their way to their logs, in the order in which they were given."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rows: deque[tuple[Log, LatencyRow]] = deque()
        self._thread: threading.Thread | None = None
        self._waiting = 0  # those that wait until all is written

    def write(self, log: Log, row: LatencyRow) -> None:
        """Have a row written to a log; returns immediately. A row that cannot be written costs a warning."""
        with self._changed:
            self._rows.append((log, row))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="sollol_nb latency rows", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # too many threads; the next row tries again
                    logger.warning("latency rows are not written to %s yet: %s", log.path, error)
                else:
                    self._thread = thread
            elif len(self._rows) == 1:  # it waits for a first row
                self._changed.notify_all()

    def wait_written(self, limit_s: float = READ_LIMIT_S) -> None:
        """Wait until all rows given so far are written or given up, at most so long."""
        with self._changed:
            self._wait_written(limit_s)

    def pause(self) -> None:
        """Write what is left, for at most 2 s, and then nothing until `resume`."""
        self._changed.acquire()
        self._wait_written(EXIT_LIMIT_S)

    def resume(self) -> None:
        """Allow writing again after `pause`, in the same thread."""
        self._changed.release()

    def _wait_written(self, limit_s: float) -> None:
        self._waiting += 1
        try:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None, limit_s)
        finally:
            self._waiting -= 1

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._waiting, IDLE_S)
                if not self._rows:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._changed.wait_for(lambda: self._waiting, COLLECT_S)
                log = self._rows[0][0]
                rows = [row for owner, row in self._rows if owner is log]  # one transaction, however many wait
                self._rows = deque((owner, row) for owner, row in self._rows if owner is not log)
            try:
                log.record(*rows)
            except Exception as error:  # an answer is worth more than its row
                what = "1 latency row was" if len(rows) == 1 else f"{len(rows)} latency rows were"
                logger.warning("%s not written to %s: %s", what, log.path, error)


_writer = RowWriter()


def writer() -> RowWriter:
    """The writer of this process."""
    return _writer


def _begin_again() -> None:
    global _writer
    _writer = RowWriter()  # a forked child has no copy of the thread


if hasattr(os, "register_at_fork"):  # SQLite does not survive a fork in the middle of a write
    os.register_at_fork(
        before=lambda: _writer.pause(), after_in_parent=lambda: _writer.resume(), after_in_child=_begin_again
    )
atexit.register(lambda: _writer.wait_written(EXIT_LIMIT_S))
