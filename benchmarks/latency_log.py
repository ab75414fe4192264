"""What the latency log costs: writing a row, and reading the newest rows, or all of them, as a frame.

    python benchmarks/latency_log.py [--rows 200000] [--rounds 3]

A log in a temporary folder gets the rows through `record`. Then `frame()` is timed beside `pandas.read_sql` of the
same rows, in turns, and with filters. Times are medians.
"""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pandas as pd
from common import Report, isolated, measured, paired_ratio, parser_of, percentile, run, seconds_of

from sollol_nb.latency.log import LatencyLog
from sollol_nb.latency.schema import LatencyRow

WRITTEN_AT_ONCE = 5000
NEWEST = 10_000
RECORDED_ALONE = 3000


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


def main() -> Report:
    """Write the rows, then read them."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    random.seed(1)
    report = Report()
    with isolated() as folder:
        log = LatencyLog(folder / "latency.sqlite", keep_rows=None)
        began = time.perf_counter()
        for first in range(0, arguments.rows, WRITTEN_AT_ONCE):
            log.record(*map(realistic_row, range(first, min(first + WRITTEN_AT_ONCE, arguments.rows))))
        size_mb, took_s = log.path.stat().st_size / 1e6, time.perf_counter() - began
        report.notes.append(f"The log has {arguments.rows:,} rows, written in {took_s:.0f} s: {size_mb:.0f} MB.")

        reading = report.table("Reading, medians", "rows", "frame(), s", "pandas.read_sql, s", "ratio")
        with contextlib.closing(sqlite3.connect(log.path)) as connection:
            newest = f"SELECT * FROM (SELECT * FROM requests ORDER BY id DESC LIMIT {NEWEST}) ORDER BY id"
            read_sql: Callable[[str], object] = partial(pd.read_sql, con=connection)
            for what, frame, query in (
                (f"the newest {NEWEST:,}", partial(log.frame, last=NEWEST), newest),
                (f"all {arguments.rows:,}", log.frame, "SELECT * FROM requests"),
            ):
                ways = {
                    "ours": partial(seconds_of, frame),
                    "pandas": partial(seconds_of, partial(read_sql, query)),
                }
                found = measured(ways, arguments.rounds, warm_up=0)
                ours_s, pandas_s = median(found["ours"]), median(found["pandas"])
                reading.add(what, ours_s, pandas_s, paired_ratio(found["ours"], found["pandas"]))
        day_ago = pd.Timestamp(1.7e9 + arguments.rows * 0.6 - 86_400, unit="s", tz="UTC").to_pydatetime()
        for what, filtered in (
            ("`last=20`", partial(log.frame, last=20)),
            ("`model=...` (a fifth)", partial(log.frame, model="mistral")),
            ("`since=...` (the last day)", partial(log.frame, since=day_ago)),
        ):
            reading.add(what, median(seconds_of(filtered) for _ in range(arguments.rounds)), "", "")

        times_ms = [
            seconds_of(partial(log.record, realistic_row(number))) * 1000 for number in range(RECORDED_ALONE)
        ]
        writing = report.table("`record()`, one row", "p50, ms", "p99, ms", "worst (with pruning), ms")
        writing.add(median(times_ms), percentile(times_ms, 99), max(times_ms))
    return report


if __name__ == "__main__":
    sys.exit(run(main))
