"""One llama-server over real workers: what it is started with, when it is ready, why it is not, and who it is."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import (
    CoordinatorStartError,
    CoordinatorTimeoutError,
    EngineError,
    ModelFileError,
    RequestRejectedError,
    SollolError,
)
from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.coordinators import start as coordinator_start
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.readiness import READY_POLL_S, StartingCoordinator
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings, known_flags
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_COORDINATOR_PORT, parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import (
    HANG_GUARD_S,
    QUESTION,
    MeteredWire,
    OtherProtocolWorker,
    all_end,
    arguments_of,
    busy_slots,
    engine_on,
    engines_of,
    eventually_async,
    http_stranger,
    is_alive,
    run,
    serving,
    silent_peer,
    unused_port,
    unused_ports,
)
from tests.support.gguf_files import cut, write_llama

pytestmark = pytest.mark.engine

GIB = 1024**3


@pytest.fixture(scope="module")
def endpoints(engine: Engine) -> Iterator[list[str]]:
    """Three real workers for the coordinators of this module, which take turns."""
    workers = Workers([], EventBus())
    yield run(workers.local.start(engine, 3))
    run(workers.local.stop())


@pytest.fixture
def running(router: HybridRouter) -> Coordinator:
    """The shared coordinator of the demo model over three workers, just used: after a minute it would end."""
    router.route_request("demo:sharded", QUESTION, max_tokens=5)
    assert router.coordinator is not None
    return router.coordinator


def over(
    endpoints: Sequence[str], path: Path = DEMO_MODEL_PATH, *, strategy: str = "even", slots: int = 2
) -> CoordinatorSettings:
    """Settings for a model over these workers."""
    facts = read_facts(path)
    capacities = [WorkerCapacity(endpoint, free_bytes=4 * GIB, total_bytes=4 * GIB) for endpoint in endpoints]
    plan = plan_layers(facts, capacities, strategy=strategy, context_tokens=1024)
    return CoordinatorSettings(
        model="test:sharded", model_path=path, facts=facts, plan=plan, context_tokens=1024, slots=slots
    )


async def start(
    engine: Engine,
    settings: CoordinatorSettings,
    *,
    first_port: int = DEFAULT_COORDINATOR_PORT,
    timeout_s: float = HANG_GUARD_S,
) -> Coordinator:
    (port,) = free_ports(first_port, 1)
    coordinator = await Coordinator.launch(engine, settings, port=port, keep_alive_s=60)
    await coordinator.until_ready(timeout_s)
    return coordinator


def start_error(engine: Engine, settings: CoordinatorSettings, timeout_s: float = HANG_GUARD_S) -> SollolError:
    """The error that a start ends in; no process is left of it."""
    before = engines_of(psutil.Process())

    async def attempt() -> None:
        await (await start(engine, settings, timeout_s=timeout_s)).stop()

    with pytest.raises(SollolError) as caught:
        run(attempt())
    assert [engine for engine in engines_of(psutil.Process()) if engine not in before and is_alive(engine)] == []
    assert "\n" not in str(caught.value)
    return caught.value


def log_named_in(error: SollolError) -> Path:
    match = re.search(r"log: (\S+)$", str(error))
    assert match is not None, error
    return Path(match[1])


# --- the plan is what runs --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["even", "memory_aware"])
def test_the_engine_places_the_layers_exactly_as_planned(
    engine: Engine, endpoints: list[str], strategy: str, count: int
) -> None:
    settings = over(endpoints[:count], strategy=strategy)
    plan = settings.plan
    assert plan is not None

    async def placed() -> Coordinator:
        coordinator = await start(engine, settings)
        await coordinator.stop()
        return coordinator

    coordinator = run(placed())

    assert coordinator.placement is not None
    assert coordinator.placement_differences == []
    assert {device.name: device.units for device in coordinator.placement.devices if device.units} == {
        shard.endpoint: tuple(range(shard.first_layer, shard.first_layer + shard.unit_count))
        for shard in plan.shards
    }
    for shard in plan.shards:
        placed_there = coordinator.placement.of(shard.endpoint)
        assert placed_there is not None
        assert placed_there.model_bytes == pytest.approx(shard.weight_bytes, abs=0.02 * 2**20)
        assert placed_there.kv_bytes == pytest.approx(shard.kv_bytes, abs=0.02 * 2**20)


def test_a_placement_other_than_planned_is_reported_worker_by_worker(running: Coordinator) -> None:
    placement, plan = running.placement, running.plan
    assert placement is not None
    assert plan is not None
    assert placement.differences(plan) == []
    first, second, third = plan.shards
    moved = replace(
        plan,
        shards=(
            replace(first, layer_count=first.layer_count + 1),
            replace(second, first_layer=second.first_layer + 1, layer_count=second.layer_count - 1),
        ),
    )

    assert placement.differences(moved) == [
        f"{first.endpoint}: planned {first.unit_count + 1} units from unit 0, "
        f"but the engine placed {first.unit_count} from unit 0",
        f"{second.endpoint}: planned {second.unit_count - 1} units from unit {second.first_layer + 1}, "
        f"but the engine placed {second.unit_count} from unit {second.first_layer}",
        f"{third.endpoint}: planned no units, but the engine placed {third.unit_count}",
    ]


def test_a_model_of_more_than_98_blocks_is_placed_wholly_on_the_workers(
    engine: Engine, endpoints: list[str], tmp_path: Path
) -> None:
    deep = write_llama(tmp_path / "deep.gguf", blocks=110, embedding=32, feed_forward=32, heads=2)

    async def placed() -> Coordinator:
        coordinator = await start(engine, over(endpoints[:2], deep))
        await coordinator.stop()
        return coordinator

    placement = run(placed()).placement

    assert placement is not None
    units = [unit for endpoint in endpoints[:2] for unit in getattr(placement.of(endpoint), "units", ())]
    assert units == list(range(111))


# --- who may talk to it -----------------------------------------------------------------------


def api_key_of(coordinator: Coordinator) -> str:
    return psutil.Process(coordinator.pid).environ()["LLAMA_API_KEY"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of another process")
def test_the_api_key_is_its_own_and_in_no_process_list_and_no_log(
    router: HybridRouter, running: Coordinator
) -> None:
    key = api_key_of(running)
    assert len(key) > 32
    router.route_request("demo", QUESTION, max_tokens=1)
    (local,) = [coordinator for coordinator in router.coordinators if coordinator.model == "demo"]
    assert api_key_of(local) != key
    for process in psutil.Process().children(recursive=True):  # engines and supervisors
        assert key not in " ".join(arguments_of(process))
    assert key not in running.log_path.read_text(errors="replace")


def test_only_loopback_is_listened_on(running: Coordinator) -> None:
    connections = psutil.Process(running.pid).net_connections()
    listening = [link.laddr for link in connections if link.status == psutil.CONN_LISTEN]
    assert [f"http://{address.ip}:{address.port}" for address in listening] == [running.base_url]
    assert running.base_url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer guessed"}])
@pytest.mark.parametrize("path", ["/slots", "/props", "/v1/chat/completions"])
def test_requests_without_the_key_are_refused(running: Coordinator, path: str, headers: dict[str, str]) -> None:
    method = "POST" if path.startswith("/v1") else "GET"
    assert httpx.request(method, running.base_url + path, headers=headers).status_code == 401


def test_the_log_is_a_private_file_that_holds_no_prompt(router: HybridRouter, running: Coordinator) -> None:
    secret = (
        "The harbour is zanzibar\nharbour.cpp:12: zanzibar\nGGML_ASSERT(zanzibar)\nterminate called in zanzibar"
    )
    router.route_request("demo:sharded", secret, max_tokens=20)
    router.route_request("demo:sharded", [{"role": "system", "content": secret}], format="json", max_tokens=20)

    log = running.log_path.read_text(errors="replace")
    assert "zanzibar" not in log
    assert "harbour" not in log
    assert "listening on http" in log, "it is the engine's log"
    assert running.log_path.parent == config.log_dir()
    if os.name == "posix":
        assert stat.S_IMODE(running.log_path.stat().st_mode) == 0o600
        assert stat.S_IMODE(running.log_path.parent.stat().st_mode) == 0o700


# --- its port ---------------------------------------------------------------------------------


def test_the_default_port_is_18080_or_one_after_it(running: Coordinator) -> None:
    assert inspect.signature(HybridRouter).parameters["settings"].kind is inspect.Parameter.VAR_KEYWORD
    assert DEFAULT_COORDINATOR_PORT == 18080
    assert running.port >= 18080


EVERYTHING_IS_FINE = http_stranger(200)


@pytest.mark.parametrize("looks_free", [False, True], ids=["seen to be used", "used after the check"])
def test_a_stranger_on_the_port_is_never_used(
    engine: Engine, endpoints: list[str], monkeypatch: pytest.MonkeyPatch, looks_free: bool
) -> None:
    first = unused_ports(3)
    if looks_free:
        monkeypatch.setattr(coordinator_start, "free_ports", lambda port, count: [port])
    with (
        serving(EVERYTHING_IS_FINE, first),
        HybridRouter(rpc_backends=endpoints, auto_discover_rpc=False, coordinator_port=first) as mine,
    ):
        mine.route_request("demo:sharded", QUESTION, max_tokens=1)
        assert mine.coordinator is not None
        assert mine.coordinator.base_url == f"http://127.0.0.1:{first + 1}"
        assert engine_on(first + 1).pid == mine.coordinator.pid


def test_when_every_port_is_taken_it_says_so(
    engine: Engine, endpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_start, "free_ports", lambda port, count: [port])
    monkeypatch.setattr(coordinator_start, "START_TRIES", 2)
    first = unused_ports(2)
    with ExitStack() as held:
        for port in (first, first + 1):
            held.enter_context(silent_peer(port))
        mine = held.enter_context(
            HybridRouter(rpc_backends=endpoints, auto_discover_rpc=False, coordinator_port=first)
        )
        with pytest.raises(CoordinatorStartError, match=f"port {first + 1} is used by another program; free it"):
            mine.route_request("demo:sharded", QUESTION, max_tokens=1)
        assert mine.coordinators == []


@pytest.mark.parametrize(
    ("stranger", "is_ours"),
    [
        pytest.param("itself", True, id="itself"),
        pytest.param("other key", False, id="a llama-server with another key"),
        pytest.param("other model", False, id="a llama-server with our key and another model"),
        pytest.param(http_stranger(200), False, id="answers everything with 200"),
        pytest.param(http_stranger(401, b"{}"), False, id="answers everything with 401"),
        pytest.param(http_stranger(500, b"no"), False, id="answers everything with 500"),
        pytest.param(http_stranger(200, b"<html>"), False, id="answers everything with HTML"),
        pytest.param(None, False, id="nothing listens"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the key from the environment of the engine")
def test_what_answers_must_prove_to_be_ours(
    running: Coordinator, stranger: str | type | None, is_ours: bool, tmp_path: Path
) -> None:
    own_port = int(running.base_url.rpartition(":")[2])
    settings, key = running.settings, api_key_of(running)
    place: AbstractContextManager[int] = nullcontext(own_port)
    if stranger == "other key":
        key = key[::-1]
    elif stranger == "other model":
        settings = replace(settings, model_path=Path(shutil.copy(settings.model_path, tmp_path)))
    elif isinstance(stranger, type):
        place = serving(stranger)
    elif stranger is None:
        place = nullcontext(unused_port())

    async def proven(port: int) -> bool:
        url = f"http://127.0.0.1:{port}"
        client, keyless = JsonClient(url, api_key=key), JsonClient(url, read_timeout_s=5.0)
        try:
            claimed = StartingCoordinator(settings, running._process, client, keyless, is_adopted=False)
            return await claimed.own_chat_template() is not None
        finally:
            await client.aclose()
            await keyless.aclose()

    with place as port:
        assert run(proven(port)) is is_ours


# --- ready, or why not ------------------------------------------------------------------------


def test_it_is_ready_when_its_health_says_so_and_not_before(engine: Engine, endpoints: list[str]) -> None:
    assert READY_POLL_S <= 0.05
    first = unused_ports(1)

    async def started() -> tuple[int, bool, bool]:
        worker_port = parse_endpoint(endpoints[0])[1]
        async with MeteredWire(worker_port, allowed_bytes=100_000) as proxy:  # of 5 MB of weights
            starting = asyncio.create_task(start(engine, over([proxy.endpoint]), first_port=first))
            async with asyncio.timeout(HANG_GUARD_S):
                await proxy.halted.wait()
            async with httpx.AsyncClient() as client:

                async def health() -> int:
                    return (await client.get(f"http://127.0.0.1:{first}/health")).status_code

                loading = await health()
                ready_before = starting.done()
                await proxy.let_through(2**40)
                coordinator = await starting
                healthy = await health() == 200
            await coordinator.stop()
            return loading, ready_before, healthy

    assert run(started()) == (503, False, True)


def test_a_coordinator_that_cannot_load_in_time_is_ended(engine: Engine, endpoints: list[str]) -> None:
    with silent_peer() as silent:
        error = start_error(engine, over([f"127.0.0.1:{silent}"]), timeout_s=1.0)
    assert isinstance(error, CoordinatorTimeoutError)
    assert isinstance(error, TimeoutError)
    assert "was not ready within 1 s; pass a larger coordinator_timeout, or see its log" in str(error)
    assert log_named_in(error).is_file()


def test_a_worker_that_hangs_in_the_middle_of_loading_ends_in_the_timeout(
    engine: Engine, endpoints: list[str]
) -> None:
    before = engines_of(psutil.Process())

    async def attempt() -> None:
        worker_port = parse_endpoint(endpoints[0])[1]
        async with MeteredWire(worker_port, allowed_bytes=100_000) as proxy:
            await start(engine, over([proxy.endpoint]), timeout_s=1.0)

    with pytest.raises(CoordinatorTimeoutError):
        run(attempt())
    assert [engine for engine in engines_of(psutil.Process()) if engine not in before and is_alive(engine)] == []


def test_a_start_that_is_cancelled_leaves_no_process(engine: Engine) -> None:
    before = engines_of(psutil.Process())

    def new_ones() -> list[psutil.Process]:
        return [engine for engine in engines_of(psutil.Process()) if engine not in before]

    async def cancelled() -> list[psutil.Process]:
        with silent_peer() as silent:
            starting = asyncio.create_task(start(engine, over([f"127.0.0.1:{silent}"])))
            started = await eventually_async(new_ones, "the engine runs")
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            return started

    all_end(run(cancelled()))


def truncated(folder: Path) -> CoordinatorSettings:
    whole = write_llama(folder / "whole.gguf")
    settings = CoordinatorSettings(
        model="cut", model_path=whole, facts=read_facts(whole), plan=None, context_tokens=512
    )
    cut(whole, missing_bytes=10_000)
    return settings


@pytest.mark.parametrize(
    ("case", "kind", "reason"),
    [
        ("truncated model", ModelFileError, "the model file is damaged, or llama.cpp does not support it"),
        ("dead worker", CoordinatorStartError, "a worker was lost; %sollol_cluster shows which"),
        ("other protocol", CoordinatorStartError, "speaks another RPC protocol; "),
        ("no program", EngineError, "does not run"),
    ],
)
def test_an_end_before_it_is_ready_is_reported_with_its_reason(
    engine: Engine, endpoints: list[str], tmp_path: Path, case: str, kind: type[SollolError], reason: str
) -> None:
    with serving(OtherProtocolWorker) as newer:
        if case == "truncated model":
            error = start_error(engine, truncated(tmp_path))
        elif case == "dead worker":
            error = start_error(engine, over([endpoints[0], f"127.0.0.1:{unused_port()}"]))
        elif case == "other protocol":
            error = start_error(engine, over([f"127.0.0.1:{newer}"]))
        else:
            program = tmp_path / "llama-server"
            program.write_text("not a program")
            error = start_error(replace(engine, server=program), over(endpoints))
    assert type(error) is kind
    assert reason in str(error)
    if kind is not EngineError:
        assert "ended while starting (" in str(error)
        assert log_named_in(error).is_file()


# --- start and end ----------------------------------------------------------------------------


def test_a_coordinator_can_be_stopped_twice_and_shows_its_state(engine: Engine, endpoints: list[str]) -> None:
    async def life() -> list[object]:
        coordinator = await start(engine, over(endpoints[:2], slots=3))
        seen: list[object] = [
            coordinator.is_running(),
            coordinator.rpc_backends,
            repr(coordinator),
            await busy_slots(coordinator),
            coordinator.gate.slots,
        ]
        process = psutil.Process(coordinator.pid)
        assert coordinator.uptime_s > 0
        assert coordinator.load_ms > 0
        report = await coordinator.stop()
        assert await coordinator.stop() == report
        return [*seen, is_alive(process), coordinator.is_running(), repr(coordinator).rpartition(", ")[2]]

    is_running, backends, text, *rest = run(life())
    assert is_running is True
    assert backends == endpoints[:2]
    assert re.fullmatch(r"<Coordinator of test:sharded at http://127\.0\.0\.1:\d+, running>", str(text))
    assert rest == [0, 3, False, False, "ended>"]


def test_a_refusal_of_the_engine_has_its_reason_and_leaves_it_running(running: Coordinator) -> None:
    async def ask() -> None:
        schema = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
        answer = running.answer([{"role": "user", "content": "Hello!"}], {"format": schema})
        async for _ in running.stream(answer):
            pass

    with pytest.raises(RequestRejectedError, match="demo:sharded") as caught:
        run(ask())
    assert "\n" not in str(caught.value)
    assert running.is_running()


def test_variables_of_other_work_in_the_kernel_do_not_break_the_engine(
    engine: Engine, endpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a Vertex AI workbench, or in a kernel that a llama-server in router mode started."""
    for name, value in {
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": "not a number",
        "LLAMA_SERVER_ROUTER_PORT": "1",
        "LLAMA_ARG_PORT": "not a number",
        "LLAMA_API_KEY": "another",
        "GGML_SCHED_DEBUG_REALLOC": "1",
    }.items():
        monkeypatch.setenv(name, value)
    known_flags.cache_clear()

    async def check() -> Completion:
        coordinator = await start(engine, over(endpoints[:1]))
        try:
            answer = coordinator.answer([{"role": "user", "content": QUESTION}], {"max_tokens": 5})
            return Completion.from_chunks([chunk async for chunk in coordinator.stream(answer)])
        finally:
            await coordinator.stop()

    assert run(check())["eval_count"] == 5
    assert "--jinja" in known_flags(engine.server)


def test_a_local_coordinator_has_no_plan_and_no_worker_flags(router: HybridRouter) -> None:
    router.route_request("demo", QUESTION, max_tokens=1)
    (local,) = [coordinator for coordinator in router.coordinators if coordinator.model == "demo"]
    plan: LayerPlan | None = local.plan
    assert plan is None
    assert (local.rpc_backends, local.placement_differences) == ([], [])
    assert "--rpc" not in psutil.Process(local.pid).cmdline()
