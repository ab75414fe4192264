"""Predicted times of tokens against measured ones, after a calibration of three loopback workers.

    python benchmarks/calibration.py [MODEL.gguf] [--rounds 5]

Three clusters: equal workers; one worker held to a third of a processor core; one behind a proxy that delays what
is sent there by 2 ms. Layers are split evenly over all three, and over the first two, which are undisturbed. Times
are predicted before the first token.

A prediction serves to choose between layouts, so besides the ratio of the predicted time to the measured one, the
table has this ratio relative to that of the equal workers.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from statistics import median

from clusters import delayed, running_worker, slowed
from common import Report, isolated, parser_of, run

from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Write a long story about a lighthouse."
MAX_TOKENS = 24
SHARE = 1 / 3
ROUND_TRIP_S = 0.002
Row = tuple[str, int, float, float]


def main() -> Report:
    """Measure the three clusters."""
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo:sharded", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[Row] = []
    with isolated(), ExitStack() as stack:
        first, second, third = (stack.enter_context(running_worker()) for _ in range(3))
        pair = [first.endpoint, second.endpoint]
        rows += of_cluster("equal", arguments.model, [*pair, third.endpoint], arguments.rounds)
        with slowed(third, SHARE):
            rows += of_cluster(
                f"{SHARE:.0%} of a core", arguments.model, [*pair, third.endpoint], arguments.rounds
            )
        with delayed(third.endpoint, ROUND_TRIP_S) as endpoint:
            name = f"{ROUND_TRIP_S * 1000:g} ms away"
            rows += of_cluster(name, arguments.model, [*pair, endpoint], arguments.rounds)
    report = Report()
    table = report.table(
        "Time of a token; relative: the ratio divided by that of the equal workers",
        *("third worker", "workers", "predicted, ms", "measured, ms", "ratio", "relative"),
    )
    usual = median(predicted / measured for cluster, _, predicted, measured in rows if cluster == "equal")
    for cluster, count, predicted, measured in rows:
        table.add(cluster, count, predicted, measured, predicted / measured, predicted / measured / usual)
    return report


def of_cluster(cluster: str, model: str, endpoints: list[str], rounds: int) -> list[Row]:
    """Calibrate these workers; then predict and measure layouts over all three, and over the first two."""
    rows = []
    with HybridRouter(rpc_backends=endpoints, auto_discover_rpc=False) as router:
        router.calibrate()
    for count in (3, 2):
        layout = {"rpc_backends": endpoints[:count], "num_rpc_backends": count, "layer_strategy": "even"}
        layout |= {"speculation": "off"}  # predictions are for tokens that are computed one after the other
        # A new router has measured no token of the model.
        with HybridRouter(auto_discover_rpc=False, distributed_threshold_params=1e-6, **layout) as router:
            router.preload(model)
            coordinator = router.coordinator
            assert coordinator is not None
            assert coordinator.plan is not None
            predicted_ms = coordinator.plan.predicted_token_ms
            assert predicted_ms is not None
            times = [token_ms(router, model) for _ in range(rounds)]
            rows.append((cluster, count, predicted_ms, median(times)))
    return rows


def token_ms(router: HybridRouter, model: str) -> float:
    """Milliseconds for each token of one answer, as the engine measured them."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=MAX_TOKENS)
    return 1000 / float(answer.routing["tokens_per_s"])


if __name__ == "__main__":
    sys.exit(run(main))
