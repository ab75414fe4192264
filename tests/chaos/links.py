"""Cuts of links over SSH at random moments of answers: `python -m tests.chaos.links --n 20`.

Three machines (network namespaces, each with a real sshd) run a model's layers. A cut strikes one of them in the
middle of an answer; the answer must be the undisturbed one, and the machine must take part again afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually, suspended
from tests.support.machines import Machine, running_machines, short_folder, wait_gone
from tests.support.smollm2 import smollm2_path

NAMES = ("gpu1", "gpu2", "gpu3")
CUTS = ("sshd ends", "network falls silent", "ssh is killed", "worker is killed", "agent is killed")


@dataclass
class Answer:
    """One answer, and what was seen of the cut.

    Attributes:
        text: the whole answer.
        chunks: how many came.
        failovers: as in its `_routing`.
        silence_s: the longest time without a chunk.
    """

    text: str = ""
    chunks: int = 0
    failovers: list[dict[str, Any]] = field(default_factory=list)
    silence_s: float = 0.0


@dataclass
class LinkedCluster:
    """Machines behind links, and a router over them.

    Attributes:
        model, question, options: what is asked, so that the answer is the same each time.
    """

    machines: list[Machine]
    router: HybridRouter
    model: str = "demo:sharded"
    question: str = "Tell me everything about sharding."
    options: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, cut_at: int = 0, cut: str = "", victim: Machine | None = None) -> Answer:
        """Ask, and cut a machine off right after a chunk (from 1), before anything more is read or computed."""

        async def read() -> Answer:
            answer, seen_at, chunk = Answer(), time.perf_counter(), dict[str, Any]()
            asked = self.router.stream_async(self.model, self.question, temperature=0, **self.options)
            async with contextlib.aclosing(asked) as stream:
                async for chunk in stream:
                    now = time.perf_counter()
                    answer.silence_s, seen_at = max(answer.silence_s, now - seen_at), now
                    answer.text += chunk["message"]["content"]
                    answer.chunks += 1
                    coordinator = self.router.coordinator
                    if answer.chunks == cut_at and victim is not None and coordinator is not None:
                        with suspended(psutil.Process(coordinator.pid)):
                            self.strike(cut, victim)
            answer.failovers = chunk["_routing"]["failovers"]
            return answer

        return run_blocking(read())

    def strike(self, cut: str, machine: Machine) -> None:
        """Cut a machine off."""
        match cut:
            case "sshd ends":
                machine.stop_sshd()
            case "network falls silent":
                machine.cut()
            case "ssh is killed":
                link = next(entry for entry in registry.entries(registry.LINK) if entry.name == machine.target)
                _kill(psutil.Process(link.pid).children())
            case "worker is killed":
                _kill(machine.workers())
            case "agent is killed":
                _kill(filter(None, [worker.parent() for worker in machine.workers()]))

    def make_well(self, machine: Machine) -> None:
        """Connect a machine again, and wait until its worker is there."""
        if machine.sshd is None:
            machine.start_sshd()
        machine.connect_again()

        def is_there() -> bool:
            states = {worker.name: worker.state for worker in self.router.check_workers()}
            return states.get(machine.name) in ("free", "held", "busy")

        eventually(is_there, f"the worker of {machine.name} is there again")

    def used(self) -> list[Machine]:
        """The machines that a new coordinator of the model uses: without those that were often lost lately."""
        self.router.stop_coordinator(self.model)
        self.router.route_request(self.model, "Hello!", **{**self.options, "max_tokens": 1})
        coordinator = self.router.coordinator
        assert coordinator is not None
        names = {
            worker.name for worker in self.router.check_workers() if worker.endpoint in coordinator.rpc_backends
        }
        return [machine for machine in self.machines if machine.name in names]

    def listening(self) -> dict[str, set[str]]:
        """The addresses on which each machine listens, without those of its sshd."""
        return {
            machine.name: {
                address for address, port in machine.listening() if (address, port) != (machine.address, 22)
            }
            for machine in self.machines
        }


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with one before it
            process.kill()


@contextlib.contextmanager
def linked_cluster(folder: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> Iterator[LinkedCluster]:
    """Machines and a router over them, whose links end with it; nothing is left on the machines."""
    with running_machines(folder, names) as machines:
        os.environ["SOLLOL_SSH"] = machines[0].ssh
        targets = [machine.target for machine in machines]
        usual = {"num_rpc_backends": len(machines), "keep_alive": "20s", "coordinator_port": 26800}
        try:
            with HybridRouter(rpc_backends=targets, **{**usual, **settings}) as router:
                yield LinkedCluster(machines, router)
        finally:
            del os.environ["SOLLOL_SSH"]
        for machine in machines:
            wait_gone(machine)


def smollm2(cluster: LinkedCluster) -> LinkedCluster:
    """The same machines with a real instruct model, which wavers between tokens; recovered exactly."""
    options = {"backend": "sharded", "deterministic": True, "recovery": "exact", "max_tokens": 80}
    return replace(
        cluster,
        model=str(smollm2_path()),
        question="Explain step by step how a steam engine works.",
        options=options,
    )


def main() -> int:
    """Cut links at random moments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=["demo", "smollm2"], default="demo")
    arguments = parser.parse_args()
    failed = 0
    with short_folder() as folder:
        os.environ["SOLLOL_STATE_DIR"] = str(folder / "state")
        with linked_cluster(folder / "machines") as cluster:
            if arguments.model == "smollm2":
                cluster = smollm2(cluster)
            undisturbed = cluster.ask()
            for number in range(arguments.n):
                rng = random.Random(f"{arguments.seed} {number}")
                cut, victim = CUTS[number % len(CUTS)], rng.choice(cluster.used())
                at = rng.randint(1, undisturbed.chunks // 2)
                answer = cluster.ask(at, cut, victim)
                same = answer.text == undisturbed.text and len(answer.failovers) == 1
                failed += not same
                result = "identical" if same else f"DIFFERENT: {answer.failovers}"
                print(f"{number:>3} {victim.name} {cut} at {at}: {result}, silent for {answer.silence_s:.2f} s")
                cluster.make_well(victim)
    print(f"{arguments.n - failed} of {arguments.n} answers were identical to the undisturbed one")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
