"""What it costs to watch a cluster: processor time, patches and bytes, with a hundred workers.

    python benchmarks/cluster_state.py [--workers 100] [--local 30] [--seconds 20]

`--local` of the workers are real ones on this machine, the others are addresses where nothing listens; each is
probed in its turn, as for a widget on the screen. Then a real worker is killed, and the time is measured until a
watcher knows. The state folder is temporary.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--local", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOLLOL_STATE_DIR"] = folder
        with HybridRouter(auto_discover_rpc=False, rpc_backends=silent_addresses(arguments)) as router:
            router.start_workers(arguments.local)
            measure(router, arguments.seconds)


def silent_addresses(arguments: argparse.Namespace) -> list[str]:
    """Addresses of this machine where nothing listens."""
    found = []
    for _ in range(arguments.workers - arguments.local):
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            found.append(f"127.0.0.1:{trial.getsockname()[1]}")
    return list(dict.fromkeys(found))


def measure(router: HybridRouter, seconds: float) -> None:
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
    print(f"{len(router.worker_endpoints)} workers: {used_s / took_s:.2%} of a core")
    if sizes_bytes:
        mean_bytes = sum(sizes_bytes) / len(sizes_bytes)
        print(f"{len(sizes_bytes) / took_s:.2f} patches/s of {mean_bytes:.0f} bytes (largest {max(sizes_bytes)})")
    print(f"the whole state: {len(json.dumps(whole))} bytes")
    entry = registry.entries(registry.WORKER)[0]
    lost[0] = entry.name
    began_s = time.perf_counter()
    psutil.Process(entry.pid).kill()
    if down.wait(10.0):
        print(f"a killed worker is reported after {(time.perf_counter() - began_s) * 1000:.0f} ms")
    run_blocking(state.unwatch(listener))


if __name__ == "__main__":
    main()
