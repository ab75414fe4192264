"""Workers are measured by real engines; what the figures mean shows in how they differ between workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import psutil
import pytest

from sollol_nb.cli.main import EXIT_ATTENTION, main
from sollol_nb.errors import ConfigError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.layers.plan import THIS_MACHINE
from sollol_nb.llama_cpp.coordinators.calibration_models import ALL
from sollol_nb.llama_cpp.coordinators.calibrator import Calibrated
from sollol_nb.llama_cpp.coordinators.pool import ANSWERS_PER_CORRECTION
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.workers.calibrations import Calibration, Calibrations
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.router.remote.calls import CALLS
from sollol_nb.router.remote.plain_data import to_plain
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings.endpoints import parse_endpoint
from tests.support.calibrations import know_this_machine
from tests.support.engines import (
    QUESTION,
    WireProxy,
    all_end,
    engine_on,
    engines_of,
    eventually_async,
    run,
    script,
)

DELAY_S = 0.02
BYTES_PER_S = 20e6
PRINT_KEPT = """
from sollol_nb.sync_wrapper import HybridRouter
print(HybridRouter().calibrations().to_json(double_precision=15))
"""


@contextmanager
def running_workers(engine: Engine, count: int) -> Iterator[list[str]]:
    """Workers with one thread each, which routers know only by their endpoints."""
    started = run(start_workers(engine, 53052, LocalOptions(count, threads=1, keep_alive_s=60.0), set()))
    try:
        yield list(started)
    finally:
        for process in started.values():
            run(process.stop())


@asynccontextmanager
async def known(*endpoints: str) -> AsyncIterator[HybridRouter]:
    """A router that knows these workers, and spreads models over them only."""
    async with HybridRouter(
        rpc_backends=endpoints, auto_discover_rpc=False, layer_strategy="memory_aware", speculation="off"
    ) as router:
        yield router


def measured(results: list[Calibrated]) -> dict[str, Calibration]:
    """The calibrations, by endpoint; all were measured."""
    assert not [result.problem for result in results if result.problem]
    return {result.endpoint: result.calibration for result in results if result.calibration}


def test_the_models_differ_in_one_thing_each() -> None:
    narrow, deep, wide, light = (read_facts(model.path()) for model in ALL)

    assert set(narrow.layer_bytes) == set(deep.layer_bytes)
    assert (narrow.layer_count, deep.layer_count) == (1, 17)
    assert 70e6 < wide.file_bytes < 75e6
    assert wide.layer_bytes[0] > 50 * narrow.layer_bytes[0]
    assert light.file_bytes == pytest.approx(wide.file_bytes, rel=0.06)
    assert light.block_weights == pytest.approx(wide.block_weights / 2, rel=0.01)
    assert ALL[2].path().stat().st_mtime_ns == ALL[2].path().stat().st_mtime_ns, "written once"


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("alone", "patient_probes")
def test_figures_of_workers_differ_as_the_workers_do(engine: Engine) -> None:
    async def calibrate(direct: str) -> tuple[list[str], dict[str, Calibration], list[Event], float | None]:
        events: list[Event] = []
        port = parse_endpoint(direct)[1]
        async with AsyncExitStack() as stack:
            far = await stack.enter_async_context(WireProxy(port, delay_s=DELAY_S))
            narrow = await stack.enter_async_context(WireProxy(port, bytes_per_s=BYTES_PER_S))
            endpoints = [direct, far.endpoint, narrow.endpoint]
            router = await stack.enter_async_context(known(*endpoints))
            router.events.subscribe(events.append)
            found = measured(await router.calibrate())
            statuses = {worker.endpoint: worker for worker in (await router.status()).workers}
            assert {endpoint: statuses[endpoint].calibration for endpoint in endpoints} == {
                endpoint: found[endpoint] for endpoint in endpoints
            }
            assert found[direct].describe() in (await router.status())._repr_html_(), "in its tooltip"
        async with known(direct) as router:  # which has measured no token
            await router.preload("demo:sharded")
            assert router.coordinator is not None
            predicted_ms = router.own_coordinators[0].plan.predicted_token_ms  # type: ignore[union-attr]
            for _ in range(ANSWERS_PER_CORRECTION):
                await router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=4)
            kept = Calibrations()
            await eventually_async(
                lambda: [figures.endpoint for figures in kept.all if figures.corrections] == [direct],
                "answers have corrected the calibration of their worker",
            )
        return endpoints, found, events, predicted_ms

    with running_workers(engine, 1) as (worker,):
        # pytest limits the time: many engines are started.
        (direct, far, narrow), found, events, predicted_ms = run_blocking(calibrate(worker))
        with script(PRINT_KEPT) as process:
            frame = json.loads(process.communicate(timeout=60)[0])

    assert list(found) == [THIS_MACHINE, direct, far, narrow]
    this_machine = found[THIS_MACHINE]
    assert this_machine.round_trip_ms is None
    assert this_machine.bytes_per_s is None
    assert all(calibration.ms_per_byte > 0 for calibration in found.values())
    assert all(0 < figures.prompt_ms_per_byte < figures.ms_per_byte for figures in found.values()), "in a batch"
    assert found[far].round_trip_ms >= found[direct].round_trip_ms + DELAY_S * 1000 * 0.9  # type: ignore[operator]
    # On systems that count no bytes of connections, nothing is known about these.
    if found[direct].bytes_per_s is not None:
        assert found[narrow].bytes_per_s < min(found[direct].bytes_per_s, 1.5 * BYTES_PER_S)  # type: ignore[operator]
    steps = [event.data["step"] for event in events if event.kind == EventKind.WORKER_CALIBRATING]
    assert steps == [1, 2, 3, 4] * 4
    assert all(0 <= figures.weight_share <= 1 for figures in found.values())
    assert found[direct].context_ms_per_byte > 0
    assert predicted_ms is not None

    assert sorted(frame["endpoint"].values()) == sorted(found), "for another process"
    hops_ms = sorted(frame["hop_ms"].values())
    assert hops_ms == pytest.approx(sorted(figures.hop_ms for figures in found.values()))


@pytest.mark.engine
@pytest.mark.usefixtures("alone", "patient_probes")
def test_a_held_worker_is_left_alone_and_a_lost_one_is_one_line(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    async def calibrate(held: str, lost: str, free: str) -> list[Calibrated]:
        async with known(held) as holding, known(held, lost, free) as router:
            await holding.route_request("demo:sharded", QUESTION, max_tokens=1)

            def kill_it(event: Event) -> None:
                is_this = event.kind == EventKind.WORKER_CALIBRATING and event.subject == lost
                if is_this and event.data["step"] == 2:
                    engine_on(parse_endpoint(lost)[1]).kill()

            router.events.subscribe(kill_it)
            results = await router.calibrate([held, lost, free])
            assert holding.own_coordinators[0].is_running()
            with pytest.raises(ConfigError, match=r"10\.0\.0\.7:50052 is not a known worker"):
                await router.calibrate(["10.0.0.7:50052"])
            return results

    know_this_machine(engine)
    with running_workers(engine, 3) as (held, lost, free):
        results = {result.endpoint: result for result in run(calibrate(held, lost, free))}
        unreachable = main(["calibrate", lost, "--json"])

    assert "held by the coordinator of demo" in results[held].problem
    assert results[lost].problem == "it was lost while it was measured"
    assert results[free].calibration is not None
    assert str(results[free]) == f"{free}: {results[free].calibration.describe()}"  # type: ignore[union-attr]
    assert unreachable == EXIT_ATTENTION
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["endpoint"] == lost
    assert "not measured" in printed["problem"]


@pytest.mark.engine
@pytest.mark.usefixtures("alone", "patient_probes")
@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupt_leaves_no_process_and_the_worker_free(engine: Engine, step: int) -> None:
    async def interrupt(endpoint: str) -> tuple[list[psutil.Process], str]:
        async with known(endpoint) as router:
            reached = asyncio.Event()

            def notice(event: Event) -> None:
                is_this = event.kind == EventKind.WORKER_CALIBRATING and event.subject == endpoint
                if is_this and event.data["step"] == step:
                    reached.set()

            router.events.subscribe(notice)
            before = engines_of(psutil.Process(), "llama-server")
            calibrating = asyncio.create_task(router.calibrate([endpoint]))
            await reached.wait()
            await eventually_async(lambda: endpoint in registry.holders(), "its coordinator has the worker")
            servers = [engine for engine in engines_of(psutil.Process(), "llama-server") if engine not in before]
            assert servers
            calibrating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calibrating
            await eventually_async(lambda: not registry.entries(registry.COORDINATOR), "it has ended")
            (worker,) = await router.check_workers()
            return servers, worker.state

    know_this_machine(engine)
    with running_workers(engine, 1) as (worker,):
        servers, state = run(interrupt(worker))
        all_end(servers)

    assert state == "free"


def test_a_gateway_sends_what_was_measured() -> None:
    figures = {"round_trip_ms": 0.3, "bytes_per_s": None, "hop_ms": 0.1, "block_ms": 0.0, "ms_per_byte": 1e-7}
    calibration = Calibration(
        identity="x", engine="b1", endpoint="a:1", name="a", measured_at=1.0, prompt_ms_per_byte=1e-8, **figures
    )
    results = [
        Calibrated(endpoint="a:1", name="a", calibration=calibration),
        Calibrated(endpoint="b:1", name="b", problem="not measured: it is held"),
    ]

    assert CALLS["calibrate"].result(json.loads(json.dumps(to_plain(results)))) == results
    assert CALLS["calibrate"].controls
    assert CALLS["kept_calibrations"].result(json.loads(json.dumps(to_plain([calibration])))) == [calibration]
