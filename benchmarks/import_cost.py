"""What `%load_ext sollol_nb` costs a notebook: its time, and the memory that it adds to bare IPython.

    python benchmarks/import_cost.py [--rounds 15] [--against FOLDER]

Each round starts a fresh IPython shell, which loads the extension from compiled bytecode. The goal is 0.15 s and
20 MB. Memory is measured once more after 2 s, when the threads that read names for the Tab key have ended; they
import the Ollama backend. `--against` names another copy of this repository, which is measured in turns with this
one. Figures are medians; the CPU time is the steadier one on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psutil

GOAL_S, GOAL_MB = 0.15, 20.0
SETTLED_S = 2.0
LOAD = """
import sys, time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
print("ready", flush=True)
sys.stdin.readline()
began, began_cpu = time.perf_counter(), time.process_time()
shell.run_line_magic("load_ext", "sollol_nb")
print(time.perf_counter() - began, time.process_time() - began_cpu, flush=True)
sys.stdin.readline()
"""


def load_once(copy: Path) -> tuple[float, float, float, float]:
    """One load of the extension in a fresh shell: seconds, seconds of CPU, megabytes, and megabytes later."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        [sys.executable, "-c", LOAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=copy,
        env={**kept, "PYTHONPATH": str(copy)},
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        memory = psutil.Process(shell.pid).memory_info
        shell.stdout.readline()
        before_bytes = memory().rss
        print(file=shell.stdin, flush=True)
        taken_s, cpu_s = map(float, shell.stdout.readline().split())
        added_mb = (memory().rss - before_bytes) / 1e6
        time.sleep(SETTLED_S)
        later_mb = (memory().rss - before_bytes) / 1e6
        print(file=shell.stdin, flush=True)
    return taken_s, cpu_s, added_mb, later_mb


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", type=Path, help="another copy of this repository")
    arguments = parser.parse_args()
    copies = [Path(__file__).parents[1]]
    if arguments.against is not None:
        copies.append(arguments.against.resolve())
    for copy in copies:
        load_once(copy)  # compiles the bytecode
    figures: dict[Path, list[tuple[float, float, float, float]]] = {copy: [] for copy in copies}
    for _ in range(arguments.rounds):
        for copy in copies:
            figures[copy].append(load_once(copy))
    print(f"the goal is {GOAL_S:g} s and {GOAL_MB:g} MB over bare IPython")
    for copy, loads in figures.items():
        taken_s, cpu_s, added_mb, later_mb = (median(column) for column in zip(*loads, strict=True))
        print(f"{copy}: {taken_s:.3f} s ({cpu_s:.3f} s of CPU), {added_mb:.1f} MB, later {later_mb:.1f} MB")


if __name__ == "__main__":
    main()
