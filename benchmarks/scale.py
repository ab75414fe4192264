"""How long it takes to choose among many, and how good the choice of an Ollama node is.

    python benchmarks/scale.py [--rounds 200] [--requests 20000]

Choosing: the route of a model; an Ollama node among 10 to 10,000, from the offers alone and with building them
(what a request pays); a layer plan for a model of 126 layers over calibrated workers, which is made once for each
start. The quality of the choice: `queueing.py` simulates 1,000 nodes under heavy-tailed load.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from statistics import median

from common import Report, parser_of, percentile, run, seconds_of
from queueing import KEY, POLICIES, Cluster, simulated

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.planner import plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import decide_route
from sollol_nb.ollama.choice import choose_node

COUNTS = (10, 100, 1000, 10_000)
WORKER_COUNTS = (3, 16, 64)
PLAN_GOAL_MS = 20.0
NODES, LOADS, SEED = 1000, (0.5, 0.8, 0.95), 1
GB = 10**9


def main() -> Report:
    """Measure and simulate."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    arguments = parser.parse_args()
    report = Report()
    choosing_a_node(report, arguments.rounds)
    planning(report, arguments.rounds)
    table = report.table(
        f"Response times of {NODES:,} simulated nodes, {arguments.requests:,} requests",
        *("load", "policy", "p50, s", "p99, s", "p99 to ours"),
    )
    for load in LOADS:
        found = {
            name: simulated(policy, NODES, load, arguments.requests, SEED) for name, policy in POLICIES.items()
        }
        ours_s = percentile(found["ours"], 99)
        for name, times_s in found.items():
            p99_s = percentile(times_s, 99)
            table.add(f"{load:.0%}", name, percentile(times_s, 50), p99_s, p99_s / ours_s)
    report.notes.append(
        "In the simulation the fastest nodes are eight times as fast as the slowest. Policies that do not know "
        "that overload the slow ones; their times then grow for as long as requests arrive."
    )
    return report


def choosing_a_node(report: Report, rounds: int) -> None:
    """Microseconds for the route and for a node."""
    route = partial(
        decide_route,
        ModelProfile(
            model=KEY,
            parameter_count_b=3.2,
            memory_bytes=None,
            requires_distributed=False,
            source="name",
            reason="its name says 3.2 billion parameters",
        ),
        in_ollama=True,
        ollama_state="",
        model_path=None,
    )
    table = report.table(
        "Choosing the route and an Ollama node",
        *("nodes", "route, us", "node, us (p50)", "node, us (p99)", "offers and node, us (p50)"),
    )
    rng = random.Random(SEED)
    for count in COUNTS:
        nodes = [node.known for node in Cluster([1.0] * count, 100.0).nodes]
        for node in nodes:
            final = {"eval_count": 10, "eval_duration": rng.randrange(10**8, 10**9)}
            node.record_answer(KEY, KEY, final, had_to_load=False)
        offers = [node.offer(KEY, 100.0) for node in nodes]
        chosen_us = times_us(partial(choose_node, offers), rounds)
        whole = lambda nodes=nodes: choose_node([node.offer(KEY, 100.0) for node in nodes])  # noqa: E731
        whole_us = times_us(whole, max(10, rounds // 10))
        table.add(
            *(count, median(times_us(route, rounds)), median(chosen_us), percentile(chosen_us, 99)),
            median(whole_us),
        )
        if count == 1000:
            report.goal("a node of 1,000 is chosen within 50 us", median(chosen_us), median(chosen_us) <= 50)


def planning(report: Report, rounds: int) -> None:
    """Milliseconds for a plan by predicted times."""
    rng = random.Random(SEED)
    layers = 126
    facts = ModelFacts(
        path=Path("model.gguf"),
        architecture="llama",
        parameter_count=405 * GB,
        file_bytes=200 * GB,
        layer_count=layers,
        layer_bytes=(int(1.6 * GB),) * layers,
        output_bytes=2 * GB,
        context_length=8192,
        embedding_length=16384,
        feed_forward_width=53248,
        vocabulary_size=128256,
        layer_kv_bytes_per_token=(4096,) * layers,
    )
    table = report.table(f"A plan for {layers} layers by predicted times", "workers", "p50, ms", "p99, ms")
    for count in WORKER_COUNTS:
        free = [int(rng.uniform(1, 3) * 210 * GB / min(count, 8)) for _ in range(count)]
        workers = [
            WorkerCapacity(f"10.0.0.{number}:50052", bytes_, bytes_, rng.uniform(0.1, 5.0))
            for number, bytes_ in enumerate(free)
        ]
        names = [worker.endpoint for worker in workers]
        speeds = WorkerSpeeds(
            {name: rng.uniform(1, 8) * 1e-9 for name in names}, None, 0.1, dict.fromkeys(names, 0.05)
        )
        plan = partial(plan_layers, facts, workers, strategy="latency_aware", speeds=speeds)
        times_ms = [value / 1000 for value in times_us(plan, max(10, rounds // 10))]
        table.add(count, median(times_ms), percentile(times_ms, 99))
        if count == WORKER_COUNTS[-1]:
            text = f"a plan of {layers} layers over {count} workers takes less than {PLAN_GOAL_MS:g} ms"
            report.goal(text, median(times_ms), median(times_ms) < PLAN_GOAL_MS)


def times_us(work: object, rounds: int) -> list[float]:
    """Of single calls."""
    return [seconds_of(work) * 1e6 for _ in range(rounds)]  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(run(main))
