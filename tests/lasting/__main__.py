"""`python -m tests.lasting NAME --n N`: runs the trials of a module of this folder, and prints its counts.

Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import tests.lasting
from tests.support import own_folders
from tests.support.engines import eventually, with_variable


def main() -> int:
    """Run the trials; the exit code."""
    # Modules of tests and of shared parts have no trials.
    names = [
        module.name
        for module in pkgutil.iter_modules(tests.lasting.__path__)
        if not module.name.startswith(("_", "test_", "conftest", "goals"))
    ]
    parser = argparse.ArgumentParser(prog="python -m tests.lasting", description="Count what outlives a process.")
    parser.add_argument("name", nargs="?", choices=names, help="what to count; without it, all names are printed")
    parser.add_argument("--n", type=int, help="number of trials (default: that of the goal)")
    parser.add_argument("--seed", type=int, default=1, help="of what is chosen at random (default: 1)")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(*names)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that engines are ended too
    module = importlib.import_module(f"tests.lasting.{arguments.name}")
    with tempfile.TemporaryDirectory(prefix=f"lasting-{arguments.name}-") as folder:
        own_folders.use(own_folders.own_settings(Path(folder)))
        try:
            is_met = count(module, arguments.n or module.N, arguments.seed)
        finally:
            eventually(lambda: not with_variable("SOLLOL_STATE_DIR", f"{folder}/state"), "no process is left")
    return int(not is_met)


def count(module: ModuleType, n: int, seed: int) -> bool:
    """Run the trials of a module, print its goals, and return whether all are met."""
    print(f"{(module.__doc__ or '').splitlines()[0]} {n} trials.", flush=True)
    began = time.monotonic()
    goals = module.run(n, seed, lambda line: print(line, flush=True))
    print(f"\n{n} trials in {time.monotonic() - began:,.0f} s")
    for goal in goals:
        print(goal)
    return all(goal.is_met for goal in goals)


if __name__ == "__main__":
    sys.exit(main())
