"""What the latency log costs: writing a row, and reading the newest rows, or a million, as a frame.

    python benchmarks/latency_log.py [--rows 1000000] [--rounds 5]

A log in a temporary folder gets the rows through `record`. Then `frame()` is timed beside `pandas.read_sql` of the
same rows, in turns, and with filters. Times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import pandas as pd

from sollol_nb.latency.log import LatencyLog
from sollol_nb.latency.schema import LatencyRow

WRITTEN_AT_ONCE = 5000
NEWEST = 10_000


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


def seconds(*works: Callable[[], object], rounds: int) -> list[float]:
    """The median time of each of these calls, in seconds; they take turns."""
    times_s: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken_s in zip(works, times_s, strict=True):
            began = time.perf_counter()
            work()
            taken_s.append(time.perf_counter() - began)
    return [median(taken_s) for taken_s in times_s]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        log = LatencyLog(Path(folder) / "latency.sqlite", keep_rows=None)
        began = time.perf_counter()
        for first in range(0, arguments.rows, WRITTEN_AT_ONCE):
            log.record(*map(realistic_row, range(first, min(first + WRITTEN_AT_ONCE, arguments.rows))))
        took_s, size_mb = time.perf_counter() - began, log.path.stat().st_size / 1e6
        print(f"wrote {arguments.rows:,} rows in {took_s:.0f} s: {size_mb:.0f} MB")

        with contextlib.closing(sqlite3.connect(log.path)) as connection:
            newest = f"SELECT * FROM (SELECT * FROM requests ORDER BY id DESC LIMIT {NEWEST}) ORDER BY id"
            for what, frame, query in (
                (f"the newest {NEWEST:,}", lambda: log.frame(last=NEWEST), newest),
                ("all rows", log.frame, "SELECT * FROM requests"),
            ):
                ours_s, pandas_s = seconds(
                    frame, lambda query=query: pd.read_sql(query, connection), rounds=arguments.rounds
                )
                print(
                    f"{what:<24} frame() {ours_s:6.3f} s   pandas.read_sql {pandas_s:6.3f} s   "
                    f"ratio {ours_s / pandas_s:.2f}"
                )
        day_ago = pd.Timestamp(1.7e9 + arguments.rows * 0.6 - 86_400, unit="s", tz="UTC").to_pydatetime()
        for what, filtered in (
            ("last=20", lambda: log.frame(last=20)),
            ("model=... (a fifth)", lambda: log.frame(model="mistral")),
            ("since=... (the last day)", lambda: log.frame(since=day_ago)),
        ):
            (taken_s,) = seconds(filtered, rounds=arguments.rounds)
            print(f"{what:<24} frame() {taken_s:6.3f} s")

        times_ms = []
        for number in range(3000):
            began = time.perf_counter()
            log.record(realistic_row(number))
            times_ms.append((time.perf_counter() - began) * 1000)
        print(
            f"record(), one row: median {median(times_ms):.2f} ms, p99 {quantiles(times_ms, n=100)[98]:.2f} ms, "
            f"worst (with pruning) {max(times_ms):.1f} ms"
        )


if __name__ == "__main__":
    main()
