"""The guard of a build step: it ends the step's programs if the process that runs the step is killed.

Run by path (`python -I -S build_guard.py PSUTIL_FOLDER STEP`), with the standard library and psutil only, in a
session apart. Its stdin ends when that process does; after `done`, nothing is left to end.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

STEP = "SOLLOL_BUILD_STEP"
"""A variable in the environment of all descendants of a step; its value identifies the step."""
DONE = b"done"
_KILL_ROUNDS = 10  # a process that cannot be killed must not keep us
_GONE_LIMIT_S = 1.0  # after the kill; where nothing reaps orphans, they stay as zombies


def end_all_of(step: str) -> None:
    """Kill what a step left behind: orphans have lost their parent, but not their environment.

    A process that is started during a round is found in the next one.
    """
    import psutil

    def environment(process: psutil.Process) -> dict[str, Any]:
        try:
            return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
        except (psutil.Error, OSError):
            return {}

    for _ in range(_KILL_ROUNDS):
        family = [process for process in psutil.process_iter() if environment(process).get(STEP) == step]
        if not family:
            return
        for member in family:
            with suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(family, timeout=_GONE_LIMIT_S)


def main() -> None:
    psutil_folder, step = sys.argv[1:]
    sys.path.append(psutil_folder)
    received = b""
    while data := os.read(0, 64):
        received += data
    if received != DONE:
        end_all_of(step)


if __name__ == "__main__":
    main()
