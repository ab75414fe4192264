"""Tokens per second over one worker: reached directly, over SSH, and joined by a link; all on loopback.

    python benchmarks/links.py [MODEL] [--rounds 5]

The three run in turns with the same number of threads, without drafts; each ratio is to the direct way. It also
measures the time from a host with nothing installed to the first token. The default model is SmolLM2. A way that
is more than three times slower is a failure: something delays small packets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from statistics import median

from common import Report, isolated, measured, paired_ratio, parser_of, run, smollm2_path, wait_until

from notebooks.ssh_hosts import LoopbackHosts
from sollol_nb.llama_cpp.processes.machine import usable_cores
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
SLOWEST = 1 / 3


def main() -> Report:
    """Measure in turns."""
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", help="default: SmolLM2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = arguments.model or str(smollm2_path())
    report = Report()
    with isolated():
        os.environ["SOLLOL_SPECULATION"] = "off"  # drafts would be copied from the answer before
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
            next(iter(over_ssh.stream(model, QUESTION, backend="sharded")))
            first_s = time.perf_counter() - started
            worker = joined(by_link)
            ways = {"direct": direct, "ssh": over_ssh, "join link": by_link}
            speeds = measured(
                {name: partial(tokens_per_s, router, model) for name, router in ways.items()}, arguments.rounds
            )
            by_link.revoke()
            worker.communicate(timeout=30)
        hosts.close()
    table = report.table("Medians", "way", "tokens/s", "of direct")
    for name, values in speeds.items():
        ratio = paired_ratio(values, speeds["direct"])
        table.add(name, median(values), ratio)
        if ratio < SLOWEST:
            report.failed = f"{name} is more than three times slower than the direct way"
    report.table("SSH", "from a host with nothing installed to the first token, s").add(first_s)
    return report


def tokens_per_s(router: HybridRouter, model: str) -> float:
    """Of one answer."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=64, backend="sharded")
    return float(answer["eval_count"] / answer["eval_duration"] * 1e9)


def joined(router: HybridRouter) -> subprocess.Popen[str]:
    """A worker that joins the router."""
    invitation = router.invite(host="127.0.0.1")
    command = [sys.executable, "-m", "sollol_nb", "worker", "--join", "-", "--threads", str(usable_cores())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert worker.stdin is not None
    worker.stdin.write(f"{invitation.link}\n")
    worker.stdin.flush()
    wait_until(lambda: bool(router.invitations().joined), "a joining worker", worker)
    return worker


if __name__ == "__main__":
    sys.exit(run(main))
