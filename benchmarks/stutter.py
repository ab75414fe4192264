"""Lets a process run for a share of the time only, by stopping and continuing it, for `clusters.py`.

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
    stop_share = (1 - share) / share  # of the time for which it ran
    credit_s = 0.0  # for which it was stopped too long
    with contextlib.suppress(ProcessLookupError):
        while True:
            ran_s = slept(share * period_s)
            os.kill(pid, signal.SIGSTOP)
            wanted_s = ran_s * stop_share - credit_s
            credit_s = min(slept(wanted_s) - wanted_s, period_s)
            os.kill(pid, signal.SIGCONT)


def slept(seconds: float) -> float:
    """Sleep; returns for how long it really was."""
    began = time.perf_counter()
    time.sleep(max(0.0, seconds))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
