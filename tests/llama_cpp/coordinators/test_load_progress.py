"""Progress of a load: from the engine's log and the system's counters, and on a real engine over a slow wire."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.llama_cpp.coordinators import start as start_module
from sollol_nb.llama_cpp.coordinators.load_progress import LoadProgress, load_progress
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.running import RunningCoordinators
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings
from sollol_nb.llama_cpp.coordinators.start import CoordinatorStarter
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.traffic import delivered_bytes
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import Event, EventBus
from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import format_bytes
from tests.support.engines import QUESTION, MeteredWire, eventually_async, run
from tests.support.gguf_files import write_llama
from tests.support.layer_plans import shard

MIB = 2**20
ONE, TWO = "127.0.0.1:50052", "127.0.0.1:50053"
BLOCK_BYTES, OUTPUT_BYTES = 10 * MIB, 4 * MIB
CONSTRUCTING = "0.01.126.820 I llama_context: constructing llama_context\n"
LAYERS = f"""\
0.00.011.384 I llama_prepare_model_devices: using device RPC0 ({ONE}) (unknown id) - 24105 MiB free
0.00.011.534 I llama_prepare_model_devices: using device RPC1 ({TWO}) (unknown id) - 24105 MiB free
0.00.054.501 D load_tensors: layer   0 assigned to device RPC0, is_swa = 0
0.00.054.516 D load_tensors: layer   1 assigned to device RPC0, is_swa = 0
0.00.054.517 D load_tensors: layer   2 assigned to device RPC1, is_swa = 0
0.00.054.518 D load_tensors: layer   3 assigned to device RPC1, is_swa = 0
0.00.054.519 D load_tensors: layer   4 assigned to device RPC1, is_swa = 0
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Four blocks of 10 MiB and an output layer of 4 MiB."""
    real = read_facts(write_llama(tmp_path_factory.mktemp("models") / "small.gguf"))
    return replace(real, layer_bytes=(BLOCK_BYTES,) * 4, output_bytes=OUTPUT_BYTES, file_bytes=50 * MIB)


@pytest.fixture(scope="module")
def sharded(facts: ModelFacts) -> CoordinatorSettings:
    plan = LayerPlan(
        strategy="even",
        layer_count=4,
        context_tokens=4096,
        shards=(shard(ONE, 0, 2), shard(TWO, 2, 2, output=True)),
    )
    return CoordinatorSettings(model="big:70b", model_path=facts.path, facts=facts, plan=plan, context_tokens=4096)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "delivered", "share", "message"),
    [
        pytest.param(
            "",
            {},
            0.0,
            f"0 % (0 B of 44.0 MiB); {ONE} 0 of 2 layers, {TWO} 0 of 3 layers",
            id="the log is empty yet",
        ),
        pytest.param(
            LAYERS,
            {ONE: 11 * MIB},
            11 / 44,
            f"25 % (11.0 MiB of 44.0 MiB); {ONE} 1 of 2 layers, {TWO} 0 of 3 layers",
            id="in the middle of the first worker",
        ),
        pytest.param(
            LAYERS,
            {ONE: 21 * MIB, TWO: 4 * MIB},
            24 / 44,
            f"54 % (24.0 MiB of 44.0 MiB); {ONE} 2 of 2 layers, {TWO} 1 of 3 layers",
            id="more was sent than weights; the output layer comes first",
        ),
        pytest.param(
            LAYERS,
            {ONE: 30 * MIB, TWO: 24 * MIB - 1},
            1 - 1 / (44 * MIB),
            f"99 % (44.0 MiB of 44.0 MiB); {ONE} 2 of 2 layers, {TWO} 2 of 3 layers",
            id="a byte is missing",
        ),
        pytest.param(
            LAYERS.replace("layer   2 assigned to device RPC1", "layer   2 assigned to device RPC0"),
            {ONE: 30 * MIB},
            30 / 44,
            f"68 % (30.0 MiB of 44.0 MiB); {ONE} 3 of 3 layers, {TWO} 0 of 2 layers",
            id="the engine places layers other than planned",
        ),
        pytest.param(
            LAYERS, None, None, f"44.0 MiB; {ONE} 2 layers, {TWO} 3 layers", id="the system counts nothing"
        ),
        pytest.param(
            LAYERS + CONSTRUCTING,
            {ONE: 1 * MIB},
            1.0,
            "100 % (sent 1.0 MiB of 44.0 MiB, the rest was cached on the workers); "
            "allocating the context (KV cache)",
            id="the workers had the rest in their caches",
        ),
        pytest.param(
            LAYERS + CONSTRUCTING,
            None,
            1.0,
            "100 % (44.0 MiB of 44.0 MiB); allocating the context (KV cache)",
            id="the engine says that the weights are loaded",
        ),
    ],
)
def test_progress_is_what_the_log_and_the_counters_say(
    sharded: CoordinatorSettings, log: str, delivered: dict[str, int] | None, share: float | None, message: str
) -> None:
    progress = load_progress(sharded, log, delivered)

    assert progress.message == f"loading big:70b: {message}"
    assert progress.share == (None if share is None else pytest.approx(share))
    assert progress.total_bytes == 44 * MIB
    assert progress.loaded_bytes == (None if share is None else pytest.approx(share * 44 * MIB))
    assert [worker.endpoint for worker in progress.per_worker] == [ONE, TWO]
    assert sum(worker.planned_units for worker in progress.per_worker) == 5
    assert sum(worker.total_bytes for worker in progress.per_worker) == 44 * MIB
    if share is not None:
        assert sum(worker.loaded_bytes or 0 for worker in progress.per_worker) == progress.loaded_bytes


def test_progress_without_workers_says_what_is_loaded_and_when_it_is(facts: ModelFacts) -> None:
    settings = CoordinatorSettings(
        model="small", model_path=facts.path, facts=facts, plan=None, context_tokens=4096
    )

    loading, loaded = load_progress(settings, ""), load_progress(settings, CONSTRUCTING)

    assert (loading.share, loading.loaded_bytes, loading.total_bytes) == (None, None, 50 * MIB)
    assert loading.message == "loading small: 50.0 MiB on this machine"
    assert (loaded.share, loaded.loaded_bytes, loaded.per_worker) == (1.0, 50 * MIB, ())


def test_an_event_gets_plain_values(sharded: CoordinatorSettings) -> None:
    assert load_progress(sharded, LAYERS, {ONE: 11 * MIB}).as_dict() == {
        "share": 0.25,
        "loaded_bytes": 11 * MIB,
        "total_bytes": 44 * MIB,
        "bytes_sent": 11 * MIB,
        "per_worker": [
            {
                "endpoint": ONE,
                "placed_units": 1,
                "planned_units": 2,
                "loaded_bytes": 11 * MIB,
                "total_bytes": 20 * MIB,
                "name": "",
            },
            {
                "endpoint": TWO,
                "placed_units": 0,
                "planned_units": 3,
                "loaded_bytes": 0,
                "total_bytes": 24 * MIB,
                "name": "",
            },
        ],
    }


# --- counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_delivered_bytes_are_those_that_the_peer_received_over_all_connections(
    family: socket.AddressFamily, host: str
) -> None:
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        peer = listener.getsockname()[:2]
        with socket.create_connection(peer) as first, socket.create_connection(peer) as second:
            for connection, count in ((first, 100_000), (second, 50_000)):
                accepted, _ = listener.accept()
                with accepted:
                    connection.sendall(bytes(count))
                    left = count
                    while left:
                        left -= len(accepted.recv(left))
            counts = delivered_bytes(os.getpid())

    if sys.platform == "linux":
        assert counts is not None
        assert counts[peer] == pytest.approx(150_000, abs=10)  # a SYN counts as a byte
    else:
        assert counts is None


def test_of_an_ended_process_no_delivered_bytes_are_known() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert delivered_bytes(process.pid) is None


# --- on a real engine -------------------------------------------------------------------------

HALT_EVERY_BYTES, HALF_BYTES = 12 * MIB, 6 * MIB
ON_THE_WAY_BYTES = 16 * MIB  # more than is buffered for the metered connection


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 150 MB: far more than the system buffers."""
    path = tmp_path_factory.mktemp("models") / "heavy.gguf"
    return str(write_llama(path, blocks=8, embedding=768, feed_forward=3072, heads=12, vocabulary=400))


@pytest.mark.engine
def test_progress_grows_with_what_the_workers_receive_and_stops_with_the_wire(engine: Engine, heavy: str) -> None:
    """Both in the router that loads the model and in one that adopts it in the meantime."""

    async def load() -> tuple[list[Event], list[Event], list[tuple[int, Event]]]:
        workers = Workers([], EventBus())
        near, far = await workers.local.start(engine, 2)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(workers.local.stop)
            wire = await stack.enter_async_context(MeteredWire(parse_endpoint(near)[1], buffer_bytes=MIB))
            loads, adopts = [
                await stack.enter_async_context(
                    HybridRouter(
                        rpc_backends=[wire.endpoint, far],
                        auto_discover_rpc=False,
                        distributed_threshold_params=1e-6,
                        layer_strategy="even",
                    )
                )
                for _ in range(2)
            ]
            loading, adopting = loading_events(loads), loading_events(adopts)
            passed_bytes = 1 * MIB
            await wire.let_through(passed_bytes)  # the greetings, and a little more
            first = asyncio.create_task(loads.route_request(heavy, QUESTION, max_tokens=1))
            await eventually_async(lambda: loading, "progress is reported")
            second = asyncio.create_task(adopts.route_request(heavy, QUESTION, max_tokens=1))
            await eventually_async(lambda: adopting, "it is reported by the second router too")

            halts = [(passed_bytes, loading[-1])]
            for _ in range(3):
                await wire.let_through(HALT_EVERY_BYTES)
                passed_bytes += HALT_EVERY_BYTES
                await eventually_async(
                    lambda: loading[-1].data["loaded_bytes"] >= halts[-1][1].data["loaded_bytes"] + HALF_BYTES,
                    "progress continues with the wire",
                )
                halts.append((passed_bytes, loading[-1]))
            await wire.let_through(2**40)
            await asyncio.gather(first, second)
            return loading, adopting, halts

    loading, adopting, halts = run(load())

    for events in (loading, adopting):
        shares = [event.data["share"] for event in events]
        assert shares == sorted(shares), "it only grows"
        assert {event.subject for event in events} == {short_name(heavy)}
    total_bytes = loading[0].data["total_bytes"]
    for passed_bytes, event in halts:
        near, far = event.data["per_worker"]
        assert event.data["loaded_bytes"] <= passed_bytes + ON_THE_WAY_BYTES < total_bytes
        assert 0 <= near["placed_units"] < near["planned_units"]
        assert far["placed_units"] == 0
        assert f"of {format_bytes(total_bytes)}" in event.message
        assert f"{far['endpoint']} 0 of {far['planned_units']} layers" in event.message


def loading_events(router: HybridRouter) -> list[Event]:
    """The events of loading from now on, as they are published."""
    received: list[Event] = []
    router.events.subscribe(lambda event: received.append(event) if event.kind == "coordinator.loading" else None)
    return received


def test_who_waits_for_a_start_is_not_told_how_far_an_earlier_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def half_loaded(*arguments: Any) -> AsyncGenerator[None, None]:
        report: Callable[[LoadProgress], None] = arguments[-1]
        half: dict[str, Any] = {
            "share": 0.5,
            "loaded_bytes": MIB,
            "total_bytes": 2 * MIB,
            "bytes_sent": None,
            "per_worker": (),
        }
        report(LoadProgress(**half, message="half of it is loaded"))
        yield

    monkeypatch.setattr(start_module, "reporting_progress", half_loaded)
    events, seen = EventBus(), list[str]()
    workers, measurements = Workers([], events), TokenMeasurements(events)
    settings: Any = None
    starter = CoordinatorStarter(
        settings, workers, events, RunningCoordinators(workers, events, measurements), measurements
    )
    loading: Any = SimpleNamespace(standby_of="", settings=None, pid=1, log_path=Path())

    async def load() -> None:
        async with starter._progress_reported("m", loading):
            events.subscribe(lambda event: seen.append(event.message))
            starter.report_again("m")
        starter.report_again("m")

    run(load())
    assert seen == ["half of it is loaded", "m is being started"]
