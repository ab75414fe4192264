"""What it costs to watch a cluster: processor time, patches and bytes, with a hundred workers.

    python benchmarks/cluster_state.py [--workers 100] [--local 30] [--seconds 20]

`--local` of the workers are real ones on this machine, the others are addresses where nothing listens; each is
probed in its turn, as for a widget on the screen. Then a real worker is killed, and the time is measured until a
watcher knows.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil
from common import Report, isolated, parser_of, run

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter


def main() -> Report:
    """Watch such a cluster."""
    parser = parser_of(__doc__)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--local", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    report = Report()
    with (
        isolated(),
        HybridRouter(auto_discover_rpc=False, rpc_backends=silent_addresses(arguments)) as router,
    ):
        router.start_workers(arguments.local)
        measure(router, arguments.seconds, report)
    return report


def silent_addresses(arguments: argparse.Namespace) -> list[str]:
    """Addresses of this machine where nothing listens."""
    found = []
    for _ in range(arguments.workers - arguments.local):
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            found.append(f"127.0.0.1:{trial.getsockname()[1]}")
    return list(dict.fromkeys(found))


def measure(router: HybridRouter, seconds: float, report: Report) -> None:
    table = report.table("Watching, as a widget does", "what", "measured")
    sizes_bytes: list[int] = []
    down, lost = threading.Event(), [""]

    def listener(patch: Mapping[str, Any]) -> None:
        sizes_bytes.append(len(json.dumps(patch)))
        if patch.get("workers", {}).get(lost[0], {}).get("state") == "down":
            down.set()

    state = router.state
    whole = run_blocking(state.watch(listener))
    time.sleep(3.0)  # the first probes bring more changes than later ones
    sizes_bytes.clear()
    began_s, used_s = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    took_s, used_s = time.perf_counter() - began_s, time.process_time() - used_s
    table.add("workers", len(router.worker_endpoints))
    table.add("processor time, of a core", f"{used_s / took_s:.2%}")
    table.add("patches per second", len(sizes_bytes) / took_s)
    table.add("bytes of a patch, mean", round(sum(sizes_bytes) / max(1, len(sizes_bytes))))
    table.add("bytes of the whole state", len(json.dumps(whole)))
    entry = registry.entries(registry.WORKER)[0]
    lost[0] = entry.name
    began_s = time.perf_counter()
    psutil.Process(entry.pid).kill()
    if down.wait(10.0):
        table.add("ms until a killed worker is reported", (time.perf_counter() - began_s) * 1000)
    else:
        report.failed = "a killed worker was not reported within 10 s"
    run_blocking(state.unwatch(listener))


if __name__ == "__main__":
    sys.exit(run(main))
