"""A death costs a switch to the standby: the time from a kill to the next token, and what is lost.

A model runs over two workers, and its standby over two others. In each trial a worker of the coordinator, or the
coordinator itself, is killed within an answer; then the dead worker is replaced, and the next trial waits for the
new standby. What the engine takes to process the known tokens again is not counted: it reports that itself. Half
of the trials ask the demo model, which never wavers between two tokens, with drafts; the others ask a real one,
with exact recovery and without the prompt cache (`deterministic`), after which its text must be the same.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from sollol_nb.llama_cpp.coordinators import pace
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.lasting.goals import Goal, Show, all_of
from tests.support.engines import eventually
from tests.support.engines import run as run_on_loop
from tests.support.smollm2 import smollm2_path

N = 100
LIMIT_MS = 1000.0
"""From a kill to the next token, over the engine's time for the known ones, in 95 of 100 trials."""
SHARE = 0.95
WORKER, COORDINATOR = "worker", "coordinator"
WORKERS = 2
FIRST_PORT, COORDINATOR_PORT = 53000, 18600


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked.

    Attributes:
        options: of each request.
    """

    model: str
    question: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Switch:
    """One trial.

    Attributes:
        victim: what was killed.
        gap_ms: from the kill to the next token.
        engine_ms: of that, what the new engine took for the known tokens and the next one, as it reports.
        is_whole: whether the text is that of the undisturbed answer.
        failovers: how many the answer reports.
    """

    victim: str
    gap_ms: float
    engine_ms: float
    is_whole: bool
    failovers: int

    @property
    def cost_ms(self) -> float:
        """What the switch cost."""
        return self.gap_ms - self.engine_ms


def demo() -> Subject:
    """The demo model, with drafts where they pay."""
    return Subject("demo:sharded", "Tell me everything about sharding.", {"temperature": 0})


def real() -> Subject:
    """A real instruct model."""
    options = {"temperature": 0, "max_tokens": 40, "backend": "sharded", "deterministic": True}
    return Subject(str(smollm2_path()), "Explain step by step how a steam engine works.", options)


def run(n: int, seed: int, show: Show) -> list[Goal]:
    """Kill workers and coordinators, half of the time with each model, and show what each kill has cost."""
    rng = random.Random(seed)
    switches: list[Switch] = []
    for subject, trials in ((demo(), n - n // 2), (real(), n // 2)):
        if trials:
            for switch in play(subject, trials, rng):
                switches.append(switch)
                show(
                    f"{len(switches)}: {subject.model.rsplit('/', 1)[-1]}, {switch.victim} killed: "
                    f"{switch.gap_ms:,.0f} ms to the next token, {switch.engine_ms:,.0f} ms of these in the engine"
                    f"{'' if switch.is_whole else '; ANOTHER TEXT'}"
                )
    return [
        within(switches),
        all_of("answers identical to the undisturbed one", [switch.is_whole for switch in switches]),
        all_of("answers with exactly one failover", [switch.failovers == 1 for switch in switches]),
    ]


def within(switches: list[Switch]) -> Goal:
    """The goal of the time that a switch costs."""
    costs = sorted(switch.cost_ms for switch in switches)
    at_95 = costs[min(len(costs) - 1, round(SHARE * len(costs)))]
    counted = f"median {costs[len(costs) // 2]:,.0f} ms, p95 {at_95:,.0f} ms, most {costs[-1]:,.0f} ms"
    return Goal("from a kill to the next token", counted, f"p95 <= {LIMIT_MS:,.0f} ms", at_95 <= LIMIT_MS)


class Workers:
    """RPC workers as on other machines: the router does not own them. Each has a port that no lost one had, since
    a worker that is lost again and again is avoided for a while."""

    def __init__(self, engine: Engine, router: HybridRouter, endpoint_of: Callable[[int], str]) -> None:
        self._engine = engine
        self._router = router
        self._endpoint_of = endpoint_of
        self._port = FIRST_PORT
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, number: int) -> None:
        """Start so many, and let the router use them."""
        for _ in range(number):
            (port,) = free_ports(self._port, 1)
            self._port = port + 1
            endpoint = self._endpoint_of(port)
            self._processes[endpoint] = subprocess.Popen(
                [str(self._engine.worker), "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                restore_signals=self._endpoint_of is _on_loopback,  # else a wire that is cut ends it by SIGPIPE
            )
            eventually(partial(_is_free, port), "it listens")
            self._router.add_worker(endpoint)

    def replace_dead(self) -> None:
        """For each one that has ended, another one."""
        for endpoint in [endpoint for endpoint, process in self._processes.items() if process.poll() is not None]:
            del self._processes[endpoint]
            self._router.remove_worker(endpoint)
            self.add(1)

    def kill(self, endpoint: str) -> None:
        """End one without warning."""
        self._processes[endpoint].kill()

    def end(self) -> None:
        """End all."""
        for process in self._processes.values():
            process.kill()
            process.wait()


def _on_loopback(port: int) -> str:
    return f"127.0.0.1:{port}"


def play(
    subject: Subject, trials: int, rng: random.Random, endpoint_of: Callable[[int], str] = _on_loopback
) -> Iterator[Switch]:
    """So many kills, one after the other, on one router.

    Args:
        endpoint_of: how the worker on a port is reached.
    """
    with HybridRouter(
        rpc_backends=[],
        auto_discover_rpc=False,
        num_rpc_backends=WORKERS,
        coordinator_port=COORDINATOR_PORT,
        standby=True,
    ) as router:
        workers = Workers(find_engine(), router, endpoint_of)
        try:
            workers.add(2 * WORKERS)
            undisturbed, chunks, _ = run_on_loop(_ask(router, subject, {}))
            for number in range(trials):
                eventually(lambda: _has_standby(router), "a standby is ready")
                victim = (WORKER, COORDINATOR)[number % 2]
                yield _strike(router, workers, subject, victim, rng.randint(5, chunks // 2), undisturbed)
                workers.replace_dead()
        finally:
            workers.end()


def _strike(
    router: HybridRouter, workers: Workers, subject: Subject, victim: str, at: int, undisturbed: str
) -> Switch:
    coordinator = router.coordinator
    assert isinstance(coordinator, Coordinator)
    struck: list[float] = []

    def strike() -> None:
        struck.append(time.perf_counter())
        if victim == WORKER:
            workers.kill(coordinator.rpc_backends[0])
        else:
            os.kill(coordinator.pid, signal.SIGKILL)

    with _engine_times() as engine:
        text, _, seen = run_on_loop(_ask(router, subject, {at: strike}, engine))
    return Switch(
        victim,
        gap_ms=(seen["next_at"] - struck[0]) * 1000 if "next_at" in seen else float("inf"),
        engine_ms=seen.get("engine_ms", 0.0),
        is_whole=text == undisturbed,
        failovers=len(seen["routing"]["failovers"]),
    )


async def _ask(
    router: HybridRouter, subject: Subject, at: Mapping[int, Any], engine: list[float] | None = None
) -> tuple[str, int, dict[str, Any]]:
    """Text, number of chunks, and what was seen of the first chunk from the standby, on the loop that reads it."""
    text, number, seen, taken = "", 0, dict[str, Any](), list[Event]()
    unsubscribe = router.events.subscribe(
        lambda event: taken.append(event) if event.kind == EventKind.STANDBY_TAKEN else None
    )
    async for chunk in router.stream_async(subject.model, subject.question, **subject.options):
        if taken and engine is not None and "next_at" not in seen:
            seen |= {"next_at": time.perf_counter(), "engine_ms": engine[-1]}
        text, number = text + chunk["message"]["content"], number + 1
        if number in at:
            at[number]()
    unsubscribe()
    return text, number, {**seen, "routing": chunk["_routing"]}


@contextmanager
def _engine_times() -> Iterator[list[float]]:
    """Milliseconds that the engine reports for a request, prompt and tokens, at each of its events."""
    times = [0.0]
    original = pace.Stream.on_event

    def on_event(stream: pace.Stream, event: Mapping[str, Any]) -> None:
        timings = event.get("timings") or {}
        if timings:
            times.append(float(timings.get("prompt_ms") or 0.0) + float(timings.get("predicted_ms") or 0.0))
        original(stream, event)

    with mock.patch.object(pace.Stream, "on_event", on_event):
        yield times


def _is_free(port: int) -> bool:
    return run_on_loop(probe("127.0.0.1", port)).outcome is ProbeOutcome.FREE


def _has_standby(router: HybridRouter) -> bool:
    """Whether a standby is ready, over the workers that were left or that have come since."""
    return any(coordinator.standby == "ready" for coordinator in router.status().coordinators)
