"""Which process this is, so that a later one with a recycled pid is not taken for it."""

from __future__ import annotations

import functools
import os

_CLOCK_TOLERANCE_S = 2.0  # start times are computed from the clock, which may be adjusted


def is_same_process(pid: int, started: float | None) -> bool:
    """Whether this pid is still the process that was started then, not a later one with a recycled pid.

    Args:
        started: its start time in seconds since the epoch; None if unknown.
    """
    if pid == os.getpid():  # its start is known; computed again, it would move with an adjusted clock
        return started is None or abs(own_start() - started) < _CLOCK_TOLERANCE_S
    import psutil  # on first use: it takes a while

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < _CLOCK_TOLERANCE_S
    except (psutil.NoSuchProcess, ValueError):  # gone, or not a valid pid
        return False
    except psutil.Error:
        return True  # it exists, and the system does not reveal more


def own_start() -> float:
    """When this process was started, in seconds since the epoch."""
    return _start_of(os.getpid())  # another one in a forked child


@functools.cache
def _start_of(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())
