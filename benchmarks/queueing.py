"""A discrete-event simulation of many Ollama nodes, for `scale.py`: requests arrive, are placed, wait, are served.

Arrivals are a Poisson process. Answers are heavy-tailed (Pareto, alpha 1.5, cut off), so a few of them take most
of the time. A node serves one answer at a time, and nodes are up to eight times as fast as others. Policies see
what a router can see: the router's own requests at each node, and what finished answers took.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sollol_nb.ollama.choice import choose_node, worth_waiting_for
from sollol_nb.ollama.nodes import OllamaNode

KEY = "llama3.2:latest"
MS_PER_TOKEN = (10.0, 20.0, 40.0, 80.0)
SHORTEST, LONGEST, ALPHA = 30.0, 4000.0, 1.5  # tokens
WARM_UP = 0.2  # of the requests, which are not counted


@dataclass
class Job:
    """One request.

    Attributes:
        tokens: of its answer, which no policy knows.
        waits_at: the nodes at which it waits; it is served by the first that is free.
        done_ms: when its answer is complete.
    """

    arrived_ms: float
    tokens: float
    waits_at: list[Node] = field(default_factory=list)
    done_ms: float = 0.0


class Queue:
    """What an `OllamaNode` asks of its gate."""

    slots = 1

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.jobs: deque[Job] = deque()

    @property
    def has_free_slot(self) -> bool:
        return not self.running and not self.waiting


class Node:
    """One simulated node: a real `OllamaNode` with a simulated server."""

    def __init__(self, number: int, ms_per_token: float) -> None:
        self.ms_per_token = ms_per_token
        self.queue = Queue()
        self.known = OllamaNode(f"http://node-{number}", 1, lambda node, *, has_new_state: None)
        self.known.gate = self.queue  # type: ignore[assignment]
        self.known.record_answer(KEY, KEY, {}, had_to_load=False)  # the model is loaded


Policy = Callable[["Cluster", random.Random], "list[Node]"]
"""Where the next request may be served: at the first of these nodes that is free."""


class Cluster:
    """Nodes, and what each offers; an offer is computed again only when its node has changed."""

    def __init__(self, speeds: Sequence[float], mean_tokens: float) -> None:
        self.mean_tokens = mean_tokens
        self.nodes = [Node(number, ms_per_token) for number, ms_per_token in enumerate(speeds)]
        self.by_url = {node.known.url: number for number, node in enumerate(self.nodes)}
        self.offers = [node.known.offer(KEY, mean_tokens) for node in self.nodes]
        self.turns = itertools.cycle(self.nodes)

    def changed(self, node: Node) -> None:
        self.offers[self.by_url[node.known.url]] = node.known.offer(KEY, self.mean_tokens)


def ours(cluster: Cluster, rng: random.Random) -> list[Node]:
    """What the Ollama pool does."""
    chosen = choose_node(cluster.offers, pick=rng.choice)
    assert chosen is not None
    return [cluster.nodes[cluster.by_url[offer.url]] for offer in worth_waiting_for(chosen, cluster.offers)]


def at_random(cluster: Cluster, rng: random.Random) -> list[Node]:
    """Any node."""
    return [rng.choice(cluster.nodes)]


def round_robin(cluster: Cluster, rng: random.Random) -> list[Node]:
    """Each node in its turn."""
    return [next(cluster.turns)]


def least_connections(cluster: Cluster, rng: random.Random) -> list[Node]:
    """A node with the fewest requests."""
    loads = [node.queue.running + node.queue.waiting for node in cluster.nodes]
    fewest = min(loads)
    return [rng.choice([node for node, load in zip(cluster.nodes, loads, strict=True) if load == fewest])]


POLICIES: dict[str, Policy] = {
    "ours": ours,
    "least connections": least_connections,
    "round robin": round_robin,
    "random": at_random,
}


def simulated(policy: Policy, node_count: int, load: float, requests: int, seed: int) -> list[float]:
    """Response times in seconds, from a request's arrival until its answer is complete.

    Args:
        load: of all nodes' capacity.
        seed: of arrivals, answers and speeds, which are the same for all policies, and of the policy's choices.
    """
    rng = random.Random(seed)
    speeds = [rng.choice(MS_PER_TOKEN) for _ in range(node_count)]
    tokens = [min(SHORTEST * rng.paretovariate(ALPHA), LONGEST) for _ in range(requests)]
    mean_tokens = sum(tokens) / requests
    arrivals_per_ms = load * sum(1 / ms_per_token for ms_per_token in speeds) / mean_tokens
    arrived_ms = itertools.accumulate(rng.expovariate(arrivals_per_ms) for _ in range(requests))
    jobs = [Job(*about) for about in zip(arrived_ms, tokens, strict=True)]

    cluster = Cluster(speeds, mean_tokens)
    ends: list[tuple[float, int, Node, Job]] = []  # of the answers being served
    numbers = itertools.count()

    def serve(node: Node, job: Job, now_ms: float) -> None:
        for other in job.waits_at:
            other.queue.waiting -= 1  # its entry in the queue is skipped later
            cluster.changed(other)
        job.waits_at = []
        job.done_ms = now_ms + job.tokens * node.ms_per_token
        node.queue.running = 1
        heapq.heappush(ends, (job.done_ms, next(numbers), node, job))
        cluster.changed(node)

    def finish() -> None:
        now_ms, _, node, job = heapq.heappop(ends)
        node.queue.running = 0
        final = {"eval_count": round(job.tokens), "eval_duration": round(job.tokens * node.ms_per_token * 1e6)}
        node.known.record_answer(KEY, KEY, final, had_to_load=False)
        while node.queue.jobs:
            following = node.queue.jobs.popleft()
            if following.waits_at:
                serve(node, following, now_ms)
                break
        cluster.changed(node)

    for job in jobs:
        while ends and ends[0][0] <= job.arrived_ms:
            finish()
        places = policy(cluster, rng)
        if places[0].queue.has_free_slot:
            serve(places[0], job, job.arrived_ms)
            continue
        job.waits_at = places
        for node in places:
            node.queue.waiting += 1
            node.queue.jobs.append(job)
            cluster.changed(node)
    while ends:
        finish()
    return [(job.done_ms - job.arrived_ms) / 1000 for job in jobs[int(WARM_UP * requests) :]]
