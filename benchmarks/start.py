"""How long a model takes until it is ready: a coordinator, beside a bare llama-server over the same workers.

    python benchmarks/start.py [--rounds 5] [--models demo smollm2]

In turns: the router starts a coordinator over three workers that run already; a llama-server is started with the
same flags over the same workers; and a new router adopts a coordinator that runs. The router's time has all that
it does before: probing the workers, the plan, the supervisor, and checking where the engine placed the layers.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from clusters import answers, bare_server, running_worker
from common import (
    MODELS,
    Report,
    add_models,
    isolated,
    measured,
    paired_difference,
    paired_ratio,
    parser_of,
    run,
    seconds_of,
    wait_until,
)

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter

BARE, OURS, ADOPTED = "bare llama-server", "coordinator of the router", "a running one, adopted"
OWN_FLAGS = {"-m", "--host", "--port", "--rpc", "-ngl"}  # those that `bare_server` sets; each has a value
WORKERS = 3


def main() -> Report:
    """Measure each model."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    add_models(parser)
    arguments = parser.parse_args()
    report = Report()
    table = report.table(
        f"Until the model is ready over {WORKERS} workers, medians",
        *("model", "way", "s", "added, s", "of bare"),
    )
    for name in arguments.models:
        path = MODELS[name]()
        with isolated(), ExitStack() as stack:
            endpoints = [stack.enter_context(running_worker()).endpoint for _ in range(WORKERS)]
            cluster = Cluster(path, endpoints)
            ways = {BARE: cluster.start_bare, OURS: cluster.start, ADOPTED: cluster.adopt}
            times_s = measured(ways, arguments.rounds)
        for way, found in times_s.items():
            added_s, ratio = paired_difference(found, times_s[BARE]), paired_ratio(found, times_s[BARE])
            table.add(name, way, median(found), added_s if way == OURS else "", ratio)
    return report


class Cluster:
    """A model, and free workers for it."""

    def __init__(self, model: Path, endpoints: list[str]) -> None:
        self.model = str(model)
        self.endpoints = endpoints
        with self.router() as router:
            router.preload(self.model)
            self.flags = flags_of(router)
        self.wait_until_free()

    def router(self) -> HybridRouter:
        return HybridRouter(
            rpc_backends=self.endpoints,
            num_rpc_backends=WORKERS,
            auto_discover_rpc=False,
            distributed_threshold_params=1e-6,
            keep_alive=0,
        )

    def start(self) -> float:
        """Seconds until a coordinator of a new router is ready."""
        with self.router() as router:
            taken_s = seconds_of(partial(router.preload, self.model))
        self.wait_until_free()
        return taken_s

    def adopt(self) -> float:
        """Seconds until a new router uses a coordinator that runs already."""
        with self.router() as first:
            first.preload(self.model)
            with self.router() as second:
                taken_s = seconds_of(partial(second.preload, self.model))
        self.wait_until_free()
        return taken_s

    def start_bare(self) -> float:
        """Seconds until a llama-server with the same flags is ready."""
        with bare_server(self.model, self.endpoints, *self.flags) as server:
            taken_s = server.ready_s
        self.wait_until_free()
        return taken_s

    def wait_until_free(self) -> None:
        for endpoint in self.endpoints:
            port = parse_endpoint(endpoint)[1]
            wait_until(partial(answers, port), f"the worker {endpoint}")


def flags_of(router: HybridRouter) -> list[str]:
    """The flags of the router's llama-server, without those that `bare_server` sets."""
    (coordinator,) = router.coordinators
    assert isinstance(coordinator, Coordinator)
    given = psutil.Process(coordinator.pid).cmdline()[1:]
    kept, skips = [], False
    for flag in given:
        if not skips and flag not in OWN_FLAGS:
            kept.append(flag)
        skips = not skips and flag in OWN_FLAGS
    return kept


if __name__ == "__main__":
    sys.exit(run(main))
