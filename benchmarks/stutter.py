"""Lets a process run for a share of the time only, by stopping and continuing it; `clusters.stuttering` starts it.

    python benchmarks/stutter.py PID SHARE PERIOD_SECONDS

The quota of a control group is exact over many milliseconds only: the kernel notices at its timer tick, every 4 ms
on most systems, that it is used up, so 3 ms of work for a token either take 3 ms or 12. Here a millisecond of work
always takes as long, as on a slow processor. Who starts this has to continue the process after the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time


def main() -> None:
    pid, share, period_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    with contextlib.suppress(OSError, AttributeError):  # where that is allowed: to be on time on a busy machine
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    print("ready", flush=True)
    due = time.perf_counter()
    with contextlib.suppress(ProcessLookupError):
        while True:
            due += share * period_s
            sleep_until(due)
            os.kill(pid, signal.SIGSTOP)
            due += (1 - share) * period_s
            sleep_until(due)
            os.kill(pid, signal.SIGCONT)
            due = max(due, time.perf_counter() - period_s)


def sleep_until(due: float) -> None:
    time.sleep(max(0.0, due - time.perf_counter()))


if __name__ == "__main__":
    main()
