"""Load a model over workers whose caches fill the disk: `python -m tests.support.full_disk MODEL DISK`.

It is not noticed beforehand that the disk is too small, as if another program filled it meanwhile. Prints as JSON
the answers without caches (`plain`), of the load that fills the disk, of one that is given the cut files
(`unguarded`), and of a reload after that; and how many files were cut.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import unused_ports

VARIABLE = "SOLLOL_TENSOR_CACHE_GB"


def main(model: str, disk: Path) -> None:
    """Do it."""
    sizes = read_facts(model).cacheable_sizes
    answers: dict[str, str | int] = {}
    settle, prepare, measure = cache.settle, cache.prepare, cache.measure

    def ask(router: HybridRouter, key: str) -> None:
        answer = router.route_request(model, "Hello there", backend="sharded", temperature=0, max_tokens=12)
        answers[key] = str(answer["message"]["content"])
        router.stop_coordinator()

    def cut_files() -> int:
        return sum(file.byte_count not in sizes for file in cache._all_files())

    def leave(names: Collection[str]) -> None:
        """Nothing is looked at after the load."""

    def leave_all(needs: Mapping[str, int], sizes: Collection[int]) -> frozenset[str]:
        """Nothing is looked at before it, either."""
        return frozenset()

    os.environ[VARIABLE] = "0"
    with new_router() as router:
        ask(router, "plain")
    os.environ[VARIABLE] = "50"
    cache.root = lambda: disk / "tensors"
    cache.MIN_FREE_BYTES = -(2**60)
    cache.measure = lambda: replace(measure(), limit_bytes=2**60, free_bytes=2**60)
    cache.settle = leave
    with new_router() as router:
        ask(router, "filling")
        answers["cut_files"] = cut_files()
        cache.prepare = leave_all
        ask(router, "unguarded")
        cache.prepare, cache.settle = prepare, settle
        ask(router, "reloaded")
    run_blocking(stop_engines(also_used=True))
    print(json.dumps(answers))


def new_router() -> HybridRouter:
    """A router over a worker of its own."""
    return HybridRouter(
        auto_setup_rpc=True,
        auto_discover_rpc=False,
        num_rpc_backends=1,
        rpc_port=unused_ports(1),
        context_tokens=512,
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
