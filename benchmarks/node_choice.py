"""How long the choice of an Ollama node takes: `python benchmarks/node_choice.py`.

Prints one row for each kind of pool: microseconds per choice at the median and the 99th percentile of single
calls, for `choose_node` alone, and for building the offers of live nodes and choosing (what a request pays).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

from sollol_nb.ollama.choice import NodeOffer, Residency, choose_node
from sollol_nb.ollama.nodes import OllamaNode

KEY = "llama3.2:latest"
LIMIT_US = 50.0


def idle(number: int) -> NodeOffer:
    """All equal, so every node stays a candidate."""
    return NodeOffer(f"http://node-{number}", Residency.LOADED, True, 0.0)


def busy(number: int) -> NodeOffer:
    """All loaded, with queues of different lengths."""
    return NodeOffer(f"http://node-{number}", Residency.LOADED, False, random.random() * 10_000)


def mixed(number: int) -> NodeOffer:
    """Some loaded, some on disk, some without the model."""
    return NodeOffer(
        f"http://node-{number}", random.choice(list(Residency)), random.random() < 0.5, random.random() * 10_000
    )


def microseconds(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and 99th percentile of single calls."""
    times_us = []
    for _ in range(rounds):
        began_ns = time.perf_counter_ns()
        work()
        times_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return statistics.median(times_us), statistics.quantiles(times_us, n=100)[98]


def live_nodes(count: int) -> list[OllamaNode]:
    """Nodes that were measured, as the pool holds them."""
    nodes = [
        OllamaNode(f"http://node-{number}", 1, lambda node, *, has_new_state: None) for number in range(count)
    ]
    for node in nodes:
        final = {"eval_count": 10, "eval_duration": random.randrange(10**8, 10**9)}
        node.record_answer(KEY, KEY, final, had_to_load=False)
    return nodes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args()
    random.seed(1)
    print(f"{arguments.nodes} nodes, {arguments.rounds} rounds; the goal is at most {LIMIT_US:.0f} us")
    for kind in (idle, busy, mixed):
        offers: Sequence[NodeOffer] = [kind(number) for number in range(arguments.nodes)]
        median_us, p99_us = microseconds(lambda offers=offers: choose_node(offers), arguments.rounds)  # type: ignore[misc]
        print(f"choose_node, {kind.__name__:5}  median {median_us:6.1f} us   p99 {p99_us:6.1f} us")
    nodes = live_nodes(arguments.nodes)
    median_us, p99_us = microseconds(
        lambda: choose_node([node.offer(KEY, 100.0) for node in nodes]), max(1, arguments.rounds // 10)
    )
    print(f"offers and choice   median {median_us:6.1f} us   p99 {p99_us:6.1f} us")


if __name__ == "__main__":
    main()
