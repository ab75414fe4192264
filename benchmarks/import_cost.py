"""What `%load_ext sollol_nb` costs a notebook: its time, and the memory that it adds to bare IPython.

    python benchmarks/import_cost.py [--rounds 9] [--against FOLDER]

Each round starts a fresh IPython shell, which loads the extension from compiled bytecode. The goal is 0.15 s and
20 MB. Memory is measured once more after 2 s, when the threads that read names for the Tab key have ended; they
import the Ollama backend. `--against` names another copy of this repository, which is measured in turns with this
one. Figures are medians; the CPU time is the steadier one on a busy machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psutil
from common import REPOSITORY, Report, in_turns, isolated, parser_of, run

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


def main() -> Report:
    """Measure this copy, and another one if it is named."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--against", type=Path, help="another copy of this repository")
    arguments = parser.parse_args()
    copies = {"this": REPOSITORY}
    if arguments.against is not None:
        copies["the other"] = arguments.against.resolve()
    loads: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in copies}
    with isolated():
        for copy in copies.values():
            load_once(copy)  # compiles the bytecode
        for name in in_turns(list(copies), arguments.rounds):
            loads[name].append(load_once(copies[name]))
    report = Report()
    table = report.table("`%load_ext sollol_nb`, medians", "copy", "s", "s of CPU", "MB", "MB after 2 s")
    for name, found in loads.items():
        figures = tuple(median(column) for column in zip(*found, strict=True))
        table.add(name, *figures)
        if name == "this":
            report.goal(f"loading takes at most {GOAL_S:g} s", figures[0], figures[0] <= GOAL_S)
            report.goal(f"loading adds at most {GOAL_MB:g} MB to IPython", figures[2], figures[2] <= GOAL_MB)
    return report


if __name__ == "__main__":
    sys.exit(run(main))
