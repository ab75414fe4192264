"""What the latency log costs: writing a row, and reading a million of them as a frame.

    python benchmarks/latency_log.py [--rows 1000000] [--rounds 5]

A log in a temporary folder gets the rows through `record`. Then `frame()` is timed: in fresh processes, here, with
filters, and for a log that an older version of this package has written; its first reading goes row by row and
packs it. `pandas.read_sql` of the same rows stands beside it for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pandas as pd

from sollol_nb.latency.log import LatencyLog, LatencyRow

LIMIT_S = 1.0
WRITTEN_AT_ONCE = 5000
FRESH = """
import sys, time
import pandas
from sollol_nb.latency.log import LatencyLog
began = time.perf_counter()
rows = len(LatencyLog(sys.argv[1]).frame())
print(time.perf_counter() - began)
"""


def realistic_row(number: int) -> LatencyRow:
    """A request as a busy week brings it: several models and places, some errors, a few failovers."""
    sharded = random.random() < 0.4
    status = random.choices(("ok", "error", "timeout", "cancelled"), (95, 2, 1, 2))[0]
    tokens, tokens_per_s = random.randrange(1, 900), random.lognormvariate(3.5, 0.5)
    ttft_ms, queue_ms = random.lognormvariate(5, 1), random.expovariate(0.1)
    lost = random.random() < 0.002
    about = {"what": "the worker at 10.0.0.2:50052 was lost", "when": 1.7e9 + number, "cost_ms": random.random()}
    return LatencyRow(
        started_at=1.7e9 + number * 0.6,
        model=random.choice(("llama3.1:70b", "llama3.2", "qwen3:8b", "mistral", "demo:sharded")),
        backend="llama.cpp-distributed" if sharded else "ollama-pool",
        layout=random.choice(("27/27/27", "41/40", "30/30/21")) if sharded else "",
        place=f"http://10.0.0.{random.randrange(1, 9)}:11434",
        queue_ms=queue_ms,
        load_ms=0.0 if random.random() < 0.99 else random.uniform(500, 60_000),
        ttft_ms=ttft_ms + queue_ms,
        total_ms=ttft_ms + queue_ms + tokens / tokens_per_s * 1000,
        prompt_tokens=random.randrange(5, 4000),
        completion_tokens=tokens if status == "ok" else None,
        tokens_per_s=tokens_per_s if status == "ok" else None,
        router_overhead_ms=random.uniform(0.3, 3),
        failovers=int(lost),
        status=status,
        error="" if status == "ok" else f"{status}: request {number} was not done",
        partial_text="" if status == "ok" else f"The answer to question {number} is",
        priority=random.choice((1, 5, 5, 5, 8)),
        done_reason=random.choice(("stop", "length")) if status == "ok" else "",
        predicted_ms_per_token=1000 / tokens_per_s * random.uniform(0.9, 1.1) if sharded else None,
        failover_details=json.dumps([about]) if lost else "",
    )


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Times of single calls, in seconds."""
    times_s = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began)
    return times_s


def show(what: str, times_s: list[float]) -> None:
    """One line of the result."""
    print(f"{what:<52} median {median(times_s):7.3f} s   worst {max(times_s):7.3f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        log = LatencyLog(Path(folder) / "latency.sqlite", keep_rows=None)
        began = time.perf_counter()
        for first in range(0, asked.rows, WRITTEN_AT_ONCE):
            log.record(*map(realistic_row, range(first, min(first + WRITTEN_AT_ONCE, asked.rows))))
        took_s, size_mb = time.perf_counter() - began, log.path.stat().st_size / 1e6
        print(f"made {asked.rows:,} rows in {took_s:.0f} s: {size_mb:.0f} MB")
        print(f"at most {LIMIT_S:g} s are wanted for reading them all")

        fresh_s = [
            float(subprocess.check_output([sys.executable, "-c", FRESH, str(log.path)]))
            for _ in range(asked.rounds)
        ]
        show("frame(), the first in a fresh process", fresh_s)
        show("frame(), again in the same process", seconds(log.frame, asked.rounds))
        show("frame(model=...)", seconds(lambda: log.frame(model="mistral"), asked.rounds))
        show("frame(last=20)", seconds(lambda: log.frame(last=20), asked.rounds))
        with contextlib.closing(sqlite3.connect(log.path)) as connection:
            query = "SELECT * FROM requests"
            show("pandas.read_sql, for comparison", seconds(lambda: pd.read_sql(query, connection), 1))

        times_s = seconds(lambda: log.record(realistic_row(0)), 3000)
        centiles_ms = [one * 1000 for one in quantiles(times_s, n=100)]
        print(
            f"record(), one row: median {centiles_ms[49]:.2f} ms, p99 {centiles_ms[98]:.2f} ms, "
            f"worst (packs a block) {max(times_s) * 1000:.1f} ms"
        )

        with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
            connection.execute("DELETE FROM blocks")  # older versions write none
        show("frame(), the first after an older version's writing", seconds(log.frame, 1))
        show("frame(), the next", seconds(log.frame, asked.rounds))


if __name__ == "__main__":
    main()
