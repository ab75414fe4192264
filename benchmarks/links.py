"""Tokens per second over one worker: reached directly, over SSH, and joined by a link; all on loopback.

    python benchmarks/links.py [MODEL] [--rounds 5]

The three run in turns with the same number of threads; each ratio is to the direct way. It also measures the time
from a host with nothing installed to the first token. Exit code 1 if a way is more than three times slower: then
something delays small packets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from notebooks.ssh_hosts import LoopbackHosts
from sollol_nb.llama_cpp.processes.machine import usable_cores
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
SLOWEST = 1 / 3


def tokens_per_s(router: HybridRouter, model: str) -> float:
    """Of one answer."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=200, backend="sharded")
    return float(answer["eval_count"] / answer["eval_duration"] * 1e9)


def joined(router: HybridRouter) -> subprocess.Popen[str]:
    """A worker that joins the router."""
    invitation = router.invite(host="127.0.0.1")
    command = [sys.executable, "-m", "sollol_nb", "worker", "--join", "-", "--threads", str(usable_cores())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert worker.stdin is not None
    worker.stdin.write(f"{invitation.link}\n")
    worker.stdin.flush()
    while not router.invitations().joined:
        time.sleep(0.1)
    return worker


def main() -> int:
    """Measure in turns; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOLLOL_STATE_DIR"] = folder
        hosts = LoopbackHosts("host")
        os.environ["SOLLOL_SSH"] = hosts.ssh
        started = time.perf_counter()
        with (
            HybridRouter(rpc_backends=["ssh://host"], keep_alive=5, coordinator_port=27800) as over_ssh,
            HybridRouter(rpc_backends=["invitations"], keep_alive=5, coordinator_port=27810) as by_link,
            HybridRouter(
                auto_setup_rpc=True, num_rpc_backends=1, keep_alive=5, rpc_port=27850, coordinator_port=27820
            ) as direct,
        ):
            next(iter(over_ssh.stream(arguments.model, QUESTION, backend="sharded")))
            print(f"from a host with nothing installed to the first token: {time.perf_counter() - started:.1f} s")
            worker = joined(by_link)
            ways = {"direct": direct, "ssh": over_ssh, "join link": by_link}
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds + 1):  # the first one loads the model
                for name, router in ways.items():
                    found[name].append(tokens_per_s(router, arguments.model))
            by_link.revoke()
            worker.communicate(timeout=30)
        hosts.close()
    ratios = {}
    for name, values in found.items():
        pairs = zip(values[1:], found["direct"][1:], strict=True)
        ratios[name] = median(value / base for value, base in pairs)
        print(f"{name:<10} {median(values[1:]):7.1f} tokens/s  {ratios[name]:.2f} of direct")
    return 1 if min(ratios.values()) < SLOWEST else 0


if __name__ == "__main__":
    sys.exit(main())
