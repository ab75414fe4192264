"""A cluster of any number of workers, simulated behind a real event bus and a real `ClusterState`.

The workers, coordinators and nodes that a `ClusterState` reads are plain data here, which a test changes;
changes are published on the bus as the real ones publish them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sollol_nb.cluster.state import ClusterState
from sollol_nb.layers.plan import CPU, LayerPlan, is_own
from sollol_nb.layers.planner import plan_from_counts, plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import TokenTime, WorkerSpeeds, worker_parts
from sollol_nb.layers.what_if import Forecast, forecast
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.placement import DevicePlacement, Placement
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.coordinators.speculation import NO_SPECULATION
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import Gate
from tests.support.layer_plans import model

GIB = 2**30
BIG = model([GIB] * 40, 2 * GIB, kv_per_token=4096)


def endpoint(number: int) -> str:
    return f"10.0.{number // 200}.{number % 200 + 10}:50052"


def probe(number: int, round_trip_ms: float = 0.4) -> Probe:
    return Probe(
        endpoint=endpoint(number),
        outcome=ProbeOutcome.FREE,
        detail="free",
        protocol=(7, 0, 0),
        device_free_bytes=(30 * GIB,),
        total_bytes=32 * GIB,
        round_trip_ms=round_trip_ms + number / 100,
    )


def node(number: int, state: str = "ready", **more: Any) -> NodeStatus:
    values: dict[str, Any] = {
        "url": f"http://10.0.1.{number}:11434",
        "state": state,
        "loaded_models": ("llama3.2",) if state == "ready" else (),
        "models": ("llama3.2",),
        "running": 0,
        "waiting": 0,
        "slots": 1,
        "expected_wait_ms": 0.0,
        "ms_per_token": 21.4 if state == "ready" else None,
        "last_error": None if state == "ready" else f"nothing accepts connections at http://10.0.1.{number}:11434",
        "retry_in_s": None,
    }
    return NodeStatus(**(values | more))


class SimulatedCluster:
    """Workers, coordinators and nodes as lists to change; `state` is the real thing over them.

    Args:
        count: how many workers, all free.
    """

    def __init__(self, count: int, nodes: Iterable[NodeStatus] = ()) -> None:
        self.events = EventBus()
        self.workers = {
            endpoint(number): WorkerStatus(
                endpoint=endpoint(number),
                state="free",
                detail="free",
                held_by=None,
                probe=probe(number),
                is_local=False,
            )
            for number in range(count)
        }
        self.coordinators: list[Coordinator] = []
        self.nodes = list(nodes)
        self.probed: list[str] = []
        self.layer_strategy = "memory_aware"
        self.speeds: WorkerSpeeds | None = None
        self.better: dict[str, int] = {}
        self.state = ClusterState(
            cast(CoordinatorPool, self._pool()),
            cast(Workers, self._workers()),
            cast(OllamaPool, self._ollama()),
            self.events,
        )

    def change_worker(self, number: int, state: str, description: str, kind: EventKind, **more: Any) -> None:
        """Change a worker's state and publish it."""
        name = endpoint(number)
        self.workers[name] = replace(self.workers[name], state=state, detail=description, **more)
        self.events.publish(kind, name, description)

    def run_model(
        self, name: str, numbers: Iterable[int], token_ms: float = 25.0, counts: Sequence[int] | None = None
    ) -> Coordinator:
        """A model is ready over these workers, with `counts` units on each, or as planned."""
        capacities = [WorkerCapacity(endpoint(n), 30 * GIB, 32 * GIB, 0.4) for n in numbers]
        plan = plan_layers(BIG, capacities) if counts is None else plan_from_counts(BIG, capacities, counts)
        coordinator = coordinator_of(name, plan, port=18080 + len(self.coordinators))
        self.coordinators.append(coordinator)
        self.speeds = WorkerSpeeds({}, token_ms / sum(shard.weight_bytes for shard in plan.shards), 0.0)
        for held in plan.endpoints:
            detail = f"held by the coordinator of {name}, started by this kernel"
            self.workers[held] = replace(self.workers[held], state="held", detail=detail, held_by=name)
        message = f"{name} is ready at {coordinator.base_url} after 1.2 s"
        self.events.publish(EventKind.COORDINATOR_READY, name, message, load_ms=1234.0)
        return coordinator

    def end_model(self, name: str) -> None:
        """Its coordinator is stopped."""
        for coordinator in [running for running in self.coordinators if running.model == name]:
            self.coordinators.remove(coordinator)
            for held in coordinator.rpc_backends:
                self.workers[held] = replace(self.workers[held], state="free", detail="free", held_by=None)
        self.events.publish(EventKind.COORDINATOR_STOPPED, name, f"stopped {name}")

    async def what_if(self, name: str, counts: Mapping[str, int]) -> Forecast:
        """As `HybridRouter.what_if`."""
        (coordinator,) = [running for running in self.coordinators if running.model == name]
        capacities = [
            WorkerCapacity(worker, 30 * GIB, 32 * GIB, 0.4, device=CPU if is_own(worker) else "")
            for worker in counts
        ]
        return forecast(
            coordinator.settings.facts,
            capacities,
            list(counts.values()),
            context_tokens=coordinator.settings.context_tokens,
            speeds=self.speeds,
        )

    async def apply_plan(self, name: str, counts: Mapping[str, int]) -> None:
        """As `HybridRouter.apply_plan`."""
        self.end_model(name)
        chosen = [number for number in range(len(self.workers)) if counts.get(endpoint(number))]
        self.run_model(name, chosen, counts=[counts[endpoint(number)] for number in chosen])

    async def replan(self, name: str) -> list[str]:
        """As `HybridRouter.replan`: the model moves to `better`."""
        await self.apply_plan(name, self.better)
        return [f"new layout for {name}"]

    # --- what ClusterState reads ------------------------------------------------------------------

    def _pool(self) -> SimpleNamespace:
        async def of_other_kernels() -> list[Any]:
            return []

        def predict(coordinator: Coordinator) -> TokenTime | None:
            if coordinator.plan is None:
                return None
            parts = worker_parts(coordinator.plan, dict.fromkeys(coordinator.plan.endpoints, 0.4))
            return self.speeds.predict(parts) if self.speeds else TokenTime((), "nothing was measured")

        pool = SimpleNamespace(
            of_other_kernels=of_other_kernels,
            predict=predict,
            token_ms=lambda _: 26.3,
            drift=lambda _: None,
            advice_for=lambda _: None,
            standbys=SimpleNamespace(coordinators=(), note_of=lambda _: ""),
        )
        pool.coordinators = self.coordinators
        return pool

    def _workers(self) -> SimpleNamespace:
        async def probe_workers(endpoints: Iterable[str], *, timeout_s: float) -> None:
            for name in endpoints:
                self.probed.append(name)
                seen = self.workers[name].probe
                if seen is not None and self.workers[name].state == "free":
                    self.events.report(EventKind.PROBE_DONE, name, "free", round_trip_ms=seen.round_trip_ms)

        cluster = self

        class KnownWorkers(SimpleNamespace):
            @property
            def endpoints(self) -> list[str]:
                return list(cluster.workers)

        seen = {name: worker.probe.round_trip_ms for name, worker in self.workers.items() if worker.probe}
        return KnownWorkers(
            probe=probe_workers,
            statuses=lambda: list(self.workers.values()),
            held_by_others=list,
            round_trips_ms=seen,
            invitations=(),
        )

    def _ollama(self) -> SimpleNamespace:
        cluster = self

        class Pool(SimpleNamespace):
            @property
            def nodes(self) -> list[NodeStatus]:
                return list(cluster.nodes)

            async def refresh(self) -> list[NodeStatus]:
                return self.nodes

        return Pool()


def coordinator_of(name: str, plan: LayerPlan, port: int) -> Coordinator:
    """What a view reads of a coordinator that runs this plan as planned."""
    units = iter(range(plan.layer_count + 1))
    placed = tuple(
        DevicePlacement(
            shard.endpoint, tuple(next(units) for _ in range(shard.unit_count)), shard.weight_bytes, shard.kv_bytes
        )
        for shard in plan.shards
    )
    values: dict[str, Any] = {
        "model": name,
        "base_url": f"http://127.0.0.1:{port}",
        "log_path": Path("coordinator.log"),
        "plan": plan,
        "rpc_backends": list(plan.endpoints),
        "placement": Placement((*placed, DevicePlacement("CPU", (), 256 * 2**20, 0))),
        "settings": SimpleNamespace(
            model_path=Path(f"{name}.gguf"),
            context_tokens=plan.context_tokens,
            facts=BIG,
            slots=4,
            speculation=NO_SPECULATION,
        ),
        "gate": Gate(4),
        "uptime_s": 5.0,
        "load_ms": 1234.0,
        "bytes_sent": None,
        "sent_description": "",
        "standby_of": "",
        "placement_differences": [],
        "is_running": lambda: True,
    }
    return cast(Coordinator, SimpleNamespace(**values))
