"""Faults, one function each: something happens to a machine, a wire or a process while a router answers.

A fault draws its victim from the random numbers of the scene, so that a seed repeats it.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.sync_wrapper import HybridRouter
from tests.chaos.machines import Cluster, Machine


@dataclass
class Scene:
    """Where faults strike.

    Attributes:
        wired: the router reaches the machines through their wires.
        lost: endpoints, as the router knows them, of the machines that were lost, in this order.
        struck_at: `time.perf_counter()` of the first fault, None before.
        model: what is asked.
        options: of each request.
    """

    cluster: Cluster
    router: HybridRouter
    random: random.Random
    model: str
    options: Mapping[str, Any]
    wired: bool = False
    lost: list[str] = field(default_factory=list)
    struck_at: float | None = None

    def strike(self, fault: Fault) -> None:
        """Let a fault strike now."""
        self.struck_at = self.struck_at or time.perf_counter()
        fault.strike(self)

    def strike_later(self, fault: Fault, within_s: float) -> threading.Timer:
        """Let a fault strike at some time within so many seconds; returns the thread that does it."""
        timer = threading.Timer(self.random.uniform(0, within_s), self.strike, (fault,))
        timer.start()
        return timer

    def victim(self) -> Machine:
        """One of the machines in use, or any machine if none is in use now."""
        used = [self.cluster.machine(endpoint) for endpoint in sorted(registry.holders())]
        return self.random.choice([machine for machine in used if machine.is_well] or self.cluster.well())

    def lose(self) -> Machine:
        """A victim that is counted as lost."""
        machine = self.victim()
        self.lost.append(self.endpoint(machine))
        return machine

    def endpoint(self, machine: Machine) -> str:
        """The endpoint by which the router knows the machine."""
        return machine.wired_endpoint if self.wired else machine.endpoint


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        needs_wire: it can only be done to a machine that is reached through its wire.
    """

    name: str
    strike: Callable[[Scene], None]
    needs_wire: bool = False

    def __str__(self) -> str:
        return self.name


def _signal_coordinators(number: int) -> None:
    for entry in registry.entries(registry.COORDINATOR):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(entry.pid).send_signal(number)


def _kill_supervisors() -> None:
    for entry in registry.entries(registry.COORDINATOR):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(entry.supervisor_pid).kill()


WORKER_KILLED = Fault("worker killed", lambda scene: scene.lose().kill())
WORKER_FROZEN = Fault("worker frozen", lambda scene: scene.lose().freeze())
LINK_RESET = Fault("link reset", lambda scene: scene.victim().reset(), needs_wire=True)
LINK_SWALLOWS = Fault("link swallows", lambda scene: scene.lose().swallow(), needs_wire=True)
COORDINATOR_KILLED = Fault("coordinator killed", lambda _: _signal_coordinators(signal.SIGKILL))
COORDINATOR_FROZEN = Fault("coordinator frozen", lambda _: _signal_coordinators(signal.SIGSTOP))
SUPERVISOR_KILLED = Fault("supervisor killed", lambda _: _kill_supervisors())

FAULTS = (
    WORKER_KILLED,
    WORKER_FROZEN,
    LINK_RESET,
    LINK_SWALLOWS,
    COORDINATOR_KILLED,
    COORDINATOR_FROZEN,
    SUPERVISOR_KILLED,
)
QUICK_FAULTS = (WORKER_KILLED, LINK_RESET, COORDINATOR_KILLED, SUPERVISOR_KILLED)
"""Faults that are noticed immediately; the others are noticed by silence."""
