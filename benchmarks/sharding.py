"""What sharding costs: the speed of the demo model on one llama-server, and over 1, 2 and 3 loopback workers.

    python benchmarks/sharding.py [--rounds 15]

All four answer the same question, in turns, without drafts, which would be copied from earlier answers. The model
is tiny, so what a layer costs is small and what a hop costs is not: for a large model the ratios are closer to 1.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from statistics import median

from common import Report, isolated, measured, paired_ratio, parser_of, run

from sollol_nb.sync_wrapper import HybridRouter
from sollol_nb.text.tables import counted

QUESTION = "Tell me everything about sharding."
MAX_TOKENS = 128
LOCAL = "local llama-server"


def main() -> Report:
    """Measure the four in turns."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    report = Report()
    with isolated(), ExitStack() as stack:
        ways = {LOCAL: partial(tokens_per_s, stack.enter_context(HybridRouter(speculation="off")), "demo")}
        for count in (1, 2, 3):
            router = HybridRouter(
                num_rpc_backends=count, auto_setup_rpc=True, auto_discover_rpc=False, speculation="off"
            )
            ways[counted(count, "worker")] = partial(tokens_per_s, stack.enter_context(router), "demo:sharded")
        speeds = measured(ways, rounds)
    table = report.table("Medians", "layout", "tokens/s", "ratio to local")
    for name, values in speeds.items():
        table.add(name, median(values), paired_ratio(values, speeds[LOCAL]))
    return report


def tokens_per_s(router: HybridRouter, model: str) -> float:
    """Of one answer, as the engine measured it."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=MAX_TOKENS)
    return float(answer.routing["tokens_per_s"])


if __name__ == "__main__":
    sys.exit(run(main))
