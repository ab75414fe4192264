"""A model's weights travel once: bytes that are sent over warm caches, and after the death of a worker.

Three workers with caches of their own, as on three machines, get a generated model whose tensors are large enough
for these. In each trial another of them dies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.lasting.goals import Goal, Show, all_of, at_most
from tests.support.caching_workers import CachingWorker, caching_workers, count_anew, received_bytes
from tests.support.gguf_files import write_heavy

N = 6
RELOAD_GOAL = 0.01
"""Share of the weights that a load over warm caches may send."""
FAILOVER_GOAL = 0.4
"""Share that may be sent after the death of one of three workers."""


@dataclass(frozen=True, slots=True)
class Round:
    """Bytes that were sent to all workers in one round.

    Attributes:
        lost: which worker died, from 0 in the order of the layers.
        first: for the first load; the others are as they are named.
        again: for the load over three workers once the dead one was back, with its cache.
    """

    lost: int
    first: int
    reload: int
    failover: int
    again: int


def run(n: int, seed: int, show: Show) -> list[Goal]:
    """Play rounds with a generated model, and show what each has sent."""
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        model = write_heavy(Path(folder) / "heavy.gguf")
        total = weight_bytes(model)
        show(f"weights: {total:,} bytes")
        played = []
        for number in range(n):
            played.append(play(find_engine(), model, Path(folder) / f"round{number}", lost=(seed + number) % 3))
            shutil.rmtree(Path(folder) / f"round{number}")
            last = played[-1]
            show(
                f"{number + 1}: first load {last.first:,}, reload {last.reload:,}, "
                f"worker {last.lost + 1} of 3 died {last.failover:,}, it came back {last.again:,}"
            )
        return [
            all_of(
                "rounds whose first load has sent the weights", [each.first >= 0.99 * total for each in played]
            ),
            at_most("bytes of a reload", [each.reload for each in played], RELOAD_GOAL * total),
            at_most("bytes of a failover", [each.failover for each in played], FAILOVER_GOAL * total),
            at_most("bytes once it came back", [each.again for each in played], RELOAD_GOAL * total),
        ]


def play(engine: Engine, model: Path, folder: Path, *, lost: int) -> Round:
    """One round with empty caches: load, end, load again, kill a worker, load over the two that are left, and
    again over all three.

    Args:
        lost: which one dies, from 0 in the order of the layers.
    """
    with caching_workers(engine, folder, 3) as workers:
        endpoints = [worker.endpoint for worker in workers]
        with HybridRouter(
            rpc_backends=endpoints, auto_discover_rpc=False, auto_setup_rpc=False, context_tokens=512
        ) as router:
            return _round(router, str(model), workers, lost)


def _round(router: HybridRouter, model: str, workers: Sequence[CachingWorker], lost: int) -> Round:
    def load() -> int:
        count_anew(workers)
        router.route_request(model, "hello", backend="sharded", max_tokens=1, temperature=0)
        return received_bytes(workers)

    first = load()
    router.stop_coordinator(model)
    reload = load()
    coordinator = router.coordinator
    assert coordinator is not None
    dead = next(worker for worker in workers if worker.endpoint == coordinator.rpc_backends[lost])
    dead.kill()
    failover = load()
    assert router.coordinator is not None
    assert len(router.coordinator.rpc_backends) == 2
    dead.start()
    router.check_workers()
    router.stop_coordinator(model)
    again = load()
    return Round(lost, first, reload, failover, again)


def weight_bytes(model: Path) -> int:
    """Bytes of the weights that workers get."""
    facts = read_facts(model)
    return sum(facts.layer_bytes) + facts.output_bytes
