"""Layers on the coordinator's own machine: chosen by calibrations, placed as planned, kept when a worker dies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.plan import CPU, THIS_MACHINE, LayerPlan, own_endpoint
from sollol_nb.layers.planner import model_load, plan_from_counts
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.coordinators import settings as coordinator_settings
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings, server_flags
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.workers.calibrations import Calibration, Calibrations, identity_of
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.llama_cpp.workers.own_devices import OwnDevices, read_gpus
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import MeteredWire, all_end, run, unused_port, unused_ports

FACTS = read_facts(DEMO_MODEL_PATH)
UNITS = FACTS.layer_count + 1
LONG_QUESTION = "Tell me everything about sharding."
CONTEXT_TOKENS = 2048
LISTED = """Available devices:
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  CUDA0: NVIDIA H100 80GB HBM3 (81079 MiB, 80650 MiB free)
  Vulkan1: AMD Radeon (TM) Graphics (RADV RENOIR) (4096 MiB, 4000 MiB free)
"""


def device(name: str) -> WorkerCapacity:
    return WorkerCapacity(own_endpoint(name), 2**40, 2**40, device=name)


def worker(endpoint: str) -> WorkerCapacity:
    return WorkerCapacity(endpoint, 2**40, 2**40)


def flags_of(*layout: tuple[WorkerCapacity, int], devices: dict[str, tuple[int, ...]] | None = None) -> str:
    """The flags that place layers so, as one text."""
    plan = plan_from_counts(FACTS, [used for used, _ in layout], [count for _, count in layout])
    settings = CoordinatorSettings(
        model="demo",
        model_path=DEMO_MODEL_PATH,
        facts=FACTS,
        plan=plan,
        context_tokens=512,
        device_free_bytes=devices or {},
    )
    return " ".join(server_flags(settings, 8080, frozenset({"--fit"})))


# --- flags ------------------------------------------------------------------------------------


def test_the_gpus_that_an_engine_lists_are_read_from_its_text() -> None:
    assert [(gpu.name, gpu.total_bytes >> 20, gpu.free_bytes >> 20) for gpu in read_gpus(LISTED)] == [
        ("CUDA0", 81079, 80650),
        ("Vulkan1", 4096, 4000),
    ]
    assert not read_gpus("Available devices:\n  (none)\n")


def test_the_own_cpu_has_the_first_blocks_and_own_gpus_the_last() -> None:
    given = (device("CUDA0"), 4), (worker("a:1"), 3), (device(CPU), 4), (worker("b:1"), UNITS - 11)
    flags = flags_of(*given, devices={"a:1": (1, 2)})
    rest = UNITS - 11
    assert f"--rpc a:1,b:1 --device RPC0,RPC1,RPC2,CUDA0 -ngl {UNITS - 4} -sm layer -ts 1,2,{rest},4" in flags


def test_without_own_gpus_workers_are_not_named_and_without_workers_no_device_is_used() -> None:
    assert f"--rpc a:1 -ngl {UNITS - 2} -sm layer -ts {UNITS - 2}" in flags_of(
        (device(CPU), 2), (worker("a:1"), UNITS - 2)
    )
    alone = flags_of((device(CPU), UNITS))
    assert "--device none -ngl 0" in alone
    assert not {"--rpc", "-ts"} & set(alone.split())
    only_gpu = flags_of((device("CUDA0"), UNITS))
    assert f"--device CUDA0 -ngl {UNITS} -sm layer -ts {UNITS}" in only_gpu


def test_layers_on_few_own_cores_leave_one_to_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_settings.os, "cpu_count", lambda: 4)
    for cores, threads in ((4, "-t 3"), (2, "-t 1"), (1, "-t 1")):
        monkeypatch.setattr(coordinator_settings, "usable_cores", lambda cores=cores: cores)
        assert threads in flags_of((device(CPU), 2), (worker("a:1"), UNITS - 2))
    monkeypatch.setattr(coordinator_settings, "usable_cores", lambda: 4)
    assert "-t " not in flags_of((worker("a:1"), UNITS))


# --- with real engines ------------------------------------------------------------------------


@pytest.fixture
def small_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each worker was a machine whose memory holds half of the demo model, and this machine a third."""

    def bytes_for(units: int) -> int:
        load = model_load(FACTS, CONTEXT_TOKENS)
        held = [weight + kv for weight, kv in zip(load.weight_bytes, load.kv_bytes, strict=True)]
        return round((units * max(held[:-1]) + held[-1] + load.reserve_bytes + load.output_reserve_bytes) / 0.94)

    of_worker, of_machine = WorkerStatus.capacity.fget, OwnDevices.capacities  # type: ignore[attr-defined]

    def limited(status: WorkerStatus) -> WorkerCapacity:
        return dataclasses.replace(of_worker(status), free_bytes=bytes_for(UNITS // 2), memory_domain=None)

    def own(devices: OwnDevices) -> list[WorkerCapacity]:
        return [
            dataclasses.replace(found, free_bytes=bytes_for(UNITS // 3), memory_domain=None)
            for found in of_machine(devices)
        ]

    monkeypatch.setattr(WorkerStatus, "capacity", property(limited))
    monkeypatch.setattr(OwnDevices, "capacities", own)


@pytest.fixture
def three(small_memories: None, calibrated: list[str]) -> list[str]:
    """Three workers of which none holds the model alone, nor does this machine."""
    return calibrated


@dataclasses.dataclass(frozen=True)
class Reached:
    """A worker, and the wire through which it is reached."""

    process: EngineProcess
    wire: MeteredWire


@pytest.fixture
def reached(engine: Engine, alone: None) -> Iterator[dict[str, Reached]]:
    """Three workers, by endpoint."""
    started = run(start_workers(engine, 53252, LocalOptions(3, threads=1, keep_alive_s=60.0), set()))
    found = [Reached(process, MeteredWire(parse_endpoint(endpoint)[1])) for endpoint, process in started.items()]
    for each in found:
        run(each.wire.__aenter__())
        run(each.wire.let_through(2**40))
    try:
        yield {each.wire.endpoint: each for each in found}
    finally:
        for each in found:
            run(each.wire.__aexit__())
            run(each.process.stop())


@pytest.fixture
def calibrated(engine: Engine, reached: dict[str, Reached], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workers: two are calibrated to be fast, like this machine, the last one to be ten times slower. Plans
    follow that only: what tokens really take depends on how busy this machine is."""
    monkeypatch.setattr(TokenMeasurements, "_measurement", lambda *_: None)
    figures = [
        Calibration(
            identity=identity_of(endpoint),
            engine=engine.version,
            endpoint=endpoint,
            name=endpoint,
            measured_at=1.0,
            round_trip_ms=None if endpoint == THIS_MACHINE else 0.1,
            bytes_per_s=None if endpoint == THIS_MACHINE else 1e9,
            hop_ms=0.1,
            block_ms=0.1 * slowness,
            ms_per_byte=1e-6 * slowness,
            prompt_ms_per_byte=1e-7 * slowness,
        )
        for endpoint, slowness in zip([THIS_MACHINE, *reached], (1, 1, 1, 10), strict=True)
    ]
    run(Calibrations().keep(figures))
    return list(reached)


@pytest.mark.engine
def test_a_slow_worker_is_left_out_and_this_machine_takes_part(
    three: list[str], reached: dict[str, Reached], patient: None
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    slow = three[2]
    with HybridRouter(
        rpc_backends=three,
        auto_discover_rpc=False,
        auto_setup_rpc=False,
        context_tokens=CONTEXT_TOKENS,
        layer_strategy="even",
        speculation="off",
        replan="off",
        slots=1,  # every request finds its prompt there, so the same request needs the same bytes again
    ) as router:

        def plan() -> LayerPlan:
            assert router.coordinator is not None
            assert router.coordinator.plan is not None
            assert not router.coordinator.placement_differences
            return router.coordinator.plan

        over_all = router.route_request("demo:sharded", LONG_QUESTION, **options)
        assert plan().endpoints == tuple(three)
        router.stop_coordinator("demo:sharded")

        router.configure(layer_strategy="auto")
        chosen = router.route_request("demo:sharded", LONG_QUESTION, **options)
        assert plan().own_cpu is plan().shards[0]
        assert plan().endpoints
        assert slow not in plan().endpoints
        assert any(slow in reason for reason in plan().reasons), plan().reasons
        assert chosen["message"]["content"] == over_all["message"]["content"]
        (starting,) = [event for event in router.events.recent() if event.data.get("reasons")]
        assert starting.data["reasons"] == list(plan().reasons)
        assert chosen["_routing"]["layout"] == "/".join(map(str, plan().unit_counts))

        # A worker dies: another one replaces it, and the own layers stay. Until it has died, the answer gets no
        # further than half of its length, however quick the engines are.
        lost = plan().endpoints[0]
        wire, victim = reached[lost].wire, psutil.Process(reached[lost].process.pid)
        before = wire.passed_bytes
        router.route_request("demo:sharded", LONG_QUESTION, **options)
        run(wire.let_through_only((wire.passed_bytes - before) // 2))
        answer = router.stream("demo:sharded", LONG_QUESTION, **options)
        texts = [next(answer)["message"]["content"] for _ in range(2)]
        victim.kill()
        all_end([victim])
        run(wire.let_through(2**40))
        texts += [chunk["message"]["content"] for chunk in answer]
        assert "".join(texts) == over_all["message"]["content"]
        assert plan().own_cpu is not None
        assert plan().endpoints
        assert lost not in plan().endpoints


@pytest.mark.engine
def test_given_layers_of_this_machine_are_placed_there(three: list[str]) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    first, second, _ = three
    with HybridRouter(
        rpc_backends=three,
        auto_discover_rpc=False,
        auto_setup_rpc=False,
        num_rpc_backends=2,
        context_tokens=CONTEXT_TOKENS,
        layer_strategy="even",
        speculation="off",
        replan="off",
    ) as router:
        before = router.route_request("demo:sharded", LONG_QUESTION, **options)
        layout = {THIS_MACHINE: 2, second: UNITS - 7, first: 5}
        assert router.what_if("demo:sharded", layout).token.token_ms
        router.apply_plan("demo:sharded", layout)
        after = router.route_request("demo:sharded", LONG_QUESTION, **options)
        assert router.coordinator is not None
        assert not router.coordinator.placement_differences
        assert router.coordinator.rpc_backends == [second, first]
        placed = {device.name: device for device in router.coordinator.placement.devices}  # type: ignore[union-attr]
        assert placed[CPU].units == (0, 1)
        assert placed[CPU].kv_bytes == sum(FACTS.kv_bytes(CONTEXT_TOKENS)[:2])
        assert after["message"]["content"] == before["message"]["content"]


@pytest.mark.engine
def test_a_model_that_is_sharded_for_its_size_may_run_here_alone_and_one_requested_sharded_may_not(
    engine: Engine, calibrated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 2}
    settings: dict[str, Any] = {
        "auto_discover_rpc": False,
        "auto_setup_rpc": False,
        "context_tokens": CONTEXT_TOKENS,
        "distributed_threshold_params": 0.001,
    }
    with HybridRouter(rpc_backends=calibrated[2:], **settings) as router:
        chosen = router.route_request("demo", "Hello", **options)["_routing"]
        assert chosen["reason"].endswith("; all layers are on this machine, which alone is fastest")
        assert router.coordinator is not None
        assert router.coordinator.plan is not None
        assert not router.coordinator.plan.workers
        requested = router.route_request("demo", "Hello", backend="sharded", **options)["_routing"]
        assert router.coordinator.rpc_backends == calibrated[2:]
        assert requested["coordinator_url"] == router.coordinator.base_url
        again = router.route_request("demo", "Hello", **options)["_routing"]
        assert again["coordinator_url"] == requested["coordinator_url"]
    with HybridRouter(rpc_backends=[f"127.0.0.1:{unused_port()}"], **settings) as router:
        with pytest.raises(WorkersUnavailableError):
            router.route_request("demo", "Hello", backend="sharded", **options)
        chosen = router.route_request("demo", "Hello", **options)["_routing"]
        assert chosen["reason"].endswith("; all layers are on this machine, since no worker is free")
    started = run(start_workers(engine, unused_ports(1), LocalOptions(1, threads=1, keep_alive_s=60.0), set()))
    ((endpoint, process),) = started.items()
    try:
        monkeypatch.setattr(WorkerStatus, "capacity", property(lambda status: WorkerCapacity(endpoint, 1, 1)))
        with HybridRouter(rpc_backends=[endpoint], **settings) as router:
            router.check_workers()
            foreseen = router.plan("demo")
            assert foreseen is not None
            chosen = router.route_request("demo", "Hello", **options)["_routing"]
            ending = "all layers are on this machine, since the free workers do not hold the model"
            assert chosen["reason"].endswith(f"; {ending}")
            assert foreseen.reasons == (ending,)
            with pytest.raises(ModelDoesNotFitError):
                router.route_request("demo", "Hello", backend="sharded", **options)
    finally:
        run(process.stop())
