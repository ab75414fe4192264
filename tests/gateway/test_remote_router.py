"""A router that uses a gateway works as one with own engines does, and survives the gateway's restarts."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from sollol_nb import hybrid_router
from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.errors import (
    AnswerInterruptedError,
    ConfigError,
    ContextOverflowError,
    GatewayError,
    GatewayKeyError,
    GatewayUnavailableError,
    ModelNotFoundError,
)
from sollol_nb.gateway.keys import Key, add_key
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.join_link import JoinLink
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.router.remote import connection
from sollol_nb.runtime.events import EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.chaos.machines import Cluster, Machine
from tests.support.engines import (
    HANG_GUARD_S,
    engines_of,
    eventually,
    eventually_async,
    http_stranger,
    run,
    serving,
    silent_peer,
    suspended,
    unused_port,
)
from tests.support.gateway import GatewayProcess, RestartableGateway, engine_at, own_gateway
from tests.support.merge_patch import patched

pytestmark = pytest.mark.engine
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

QUESTION = "Tell me everything about sharding."
LENGTH = 300
HELD_AFTER = 40
"""Results of a worker: one for each token, and some for the prompt."""
NO_DRAFTS = {"SOLLOL_SPECULATION": "off"}
"""With drafts, which are chosen where round trips are slow, a result may be several tokens."""
STRIKE_AFTER = 10
"""Chunks. Each has a token or two, so that all of these come before the worker is held."""


@pytest.fixture(scope="module")
def router(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HybridRouter]:
    """A blocking router over the gateway, with a separate latency log."""
    log = LatencyLog(tmp_path_factory.mktemp("log") / "latency.sqlite")
    with HybridRouter(gateway=gateway.url, latency=log) as remote:
        yield remote


@pytest.fixture(scope="module")
def machines(engine: Engine) -> Iterator[Cluster]:
    """Machines whose workers can be kept from going on."""
    with Cluster(engine) as cluster:
        yield cluster


@pytest.fixture
def backends(machines: Cluster) -> str:
    """The addresses of the machines, which are well."""
    machines.make_well()
    return ",".join(machine.wired_endpoint for machine in machines.machines)


@pytest.fixture
def restartable(backends: str, tmp_path: Path) -> Iterator[RestartableGateway]:
    """A gateway that can be killed and started again. Its machine's state is not that of the reader."""
    its = RestartableGateway(tmp_path / "gateway", RPC_BACKENDS=backends, **NO_DRAFTS)
    yield its
    its.close()


# --- the same as with own engines -----------------------------------------------------------------


def test_an_answer_has_its_route_its_times_and_a_row_in_the_log_of_the_kernel(router: HybridRouter) -> None:
    chunks = list(router.stream("demo:sharded", "What is a worker?", temperature=0))
    answer = Completion.from_chunks(chunks)
    assert "worker" in answer.text
    assert answer.routing["backend"] == "llama.cpp-distributed"
    assert answer.routing["gateway"] == router.gateway
    assert answer.routing["layout"].count("/") == 2
    assert answer.routing["failovers"] == []
    assert "_routing" in chunks[0]
    row = router.latency.frame().iloc[-1]
    assert (row["model"], row["status"], row["layout"]) == ("demo:sharded", "ok", answer.routing["layout"])
    assert row["completion_tokens"] == answer["eval_count"] > 10
    assert row["ttft_ms"] <= row["total_ms"]


def test_an_answer_is_journaled_by_the_kernel_and_not_by_the_gateway(router: HybridRouter) -> None:
    before = {each.id for each in journaling.journal().newest()}
    answer = router.route_request("demo:sharded", "Hello!", max_tokens=2)
    found = [each for each in journaling.journal().newest() if each.id not in before]
    assert [(each.id, each.is_own) for each in found] == [(answer.routing["answer_id"], True)]


def test_the_kernel_starts_no_engine(router: HybridRouter) -> None:
    gateway = psutil.Process(gateway_pid(router))

    def not_of_the_gateway() -> set[psutil.Process]:
        before = engines_of(gateway)  # those that end meanwhile
        return {*engines_of(psutil.Process())}.difference(before, engines_of(gateway))

    before = not_of_the_gateway()  # other tests' engines
    router.route_request("demo:sharded", "Hello!", max_tokens=2)
    assert engines_of(gateway, "llama-server")
    assert not_of_the_gateway() <= before


def gateway_pid(router: HybridRouter) -> int:
    """The process that listens where the router's gateway is."""
    port = int(str(router.gateway).rpartition(":")[2])
    return next(
        listening.pid
        for listening in psutil.net_connections("tcp")
        if listening.status == psutil.CONN_LISTEN and listening.laddr.port == port and listening.pid
    )


def test_a_schema_is_held_and_its_answer_is_a_value(router: HybridRouter) -> None:
    @dataclass
    class Sharding:
        workers: int

    answer = router.route_request("demo", "How many workers?", schema=Sharding, temperature=0, max_tokens=40)
    assert isinstance(answer.value, Sharding)


def test_a_raw_prompt_is_continued(router: HybridRouter) -> None:
    answer = router.generate("demo", "A worker is", max_tokens=8, temperature=0)
    assert answer.text
    assert answer["eval_count"] == 8


def test_the_cluster_is_shown_and_controlled(router: HybridRouter) -> None:
    router.preload("demo:sharded")
    status = router.cluster()
    (sharded,) = (shown for shown in status.coordinators if shown.model == "demo:sharded")
    # What is known without a call comes with the events, too: those of a moment ago may come last.
    eventually(lambda: "demo:sharded" in [shown.model for shown in router.coordinators], "it is known here")
    eventually(lambda: "\nlast events\n" in str(router.status()), "a snapshot has the gateway's events")
    assert [segment.endpoint for segment in sharded.segments] == router.worker_endpoints[:3]
    assert router.coordinator_model == "demo:sharded"
    assert "demo:sharded" in repr(router)
    assert router.get_stats()["coordinators"]["demo:sharded"] == sharded.url
    assert router.route("demo:sharded").backend == "llama.cpp-distributed"
    plan = router.plan("demo:sharded")
    assert plan is not None
    assert (len(plan.workers), plan.endpoints) == (3, router.coordinator.rpc_backends)  # type: ignore[union-attr]
    assert router.profile("demo:sharded").requires_distributed
    assert router.should_use_distributed("demo:sharded")
    assert router.slots_for("demo:sharded").slots == 4
    models = router.models()
    assert "3 workers" in models[models["model"] == "demo:sharded"]["running"].item()
    assert "llama" in router.engine_log("demo:sharded", last=200)

    counts = dict(zip(router.worker_endpoints, (6, 4, 3), strict=False))
    assert router.what_if("demo:sharded", counts).fits
    router.apply_plan("demo:sharded", counts)
    assert router.route_request("demo:sharded", "Hello!", max_tokens=2).routing["layout"] == "6/4/3"
    router.configure(layer_strategy="even")
    eventually(lambda: router.layer_strategy == "even", "the new strategy is known here")
    router.configure(layer_strategy="memory_aware")
    assert router.stop_coordinator("demo:sharded") == ["demo:sharded"]
    eventually(
        lambda: "demo:sharded" not in [shown.model for shown in router.coordinators], "its end is known here"
    )


def test_events_of_the_gateway_arrive(router: HybridRouter) -> None:
    router.stop_coordinator()
    before = time.time()
    router.route_request("demo", "Hello!", max_tokens=2)
    eventually(
        lambda: (
            {event.kind for event in router.events.recent() if event.at >= before}
            >= {EventKind.COORDINATOR_STARTING, EventKind.COORDINATOR_READY, EventKind.REQUEST_FINISHED}
        ),
        "the gateway's events are here",
    )


def test_errors_are_the_same_exceptions(router: HybridRouter) -> None:
    with pytest.raises(ModelNotFoundError, match="nope is not available"):
        router.route_request("nope", "Hello!")
    with pytest.raises(ConfigError, match="is not an endpoint"):
        router.add_worker("not an endpoint")
    with pytest.raises(ConfigError, match="temperature"):
        router.route_request("demo", "Hello!", temperature="hot")
    with pytest.raises(ContextOverflowError) as overflow:
        router.route_request("demo", "worker " * 9000)
    assert overflow.value.context_tokens
    assert router.latency.frame().iloc[-1]["status"] == "error"


def test_a_map_uses_all_slots(router: HybridRouter) -> None:
    router.preload("demo")

    def demo() -> CoordinatorStatus:
        return next(shown for shown in router.status().coordinators if shown.model == "demo")

    def mapped() -> pd.DataFrame:
        rows, asked = range(8), "What is {{ item }}?"
        return router.map(rows, asked, model="demo", max_tokens=20, fresh=True, progress=False)

    with ThreadPoolExecutor(1) as pool:
        with suspended(engine_at(demo().url)):
            mapping = pool.submit(mapped)
            eventually(lambda: demo().running == 4, "four are asked at the same time")
        frame = mapping.result(HANG_GUARD_S)
    assert list(frame["status"]) == ["ok"] * 8


def test_a_benchmark_measures_models_as_the_gateway_runs_them(router: HybridRouter) -> None:
    result = router.bench("demo", prompts=2, repeat=1, warmup=0, max_tokens=4)
    assert len(result.frame) == 2
    with pytest.raises(
        ConfigError, match=r"layout 2: over the gateway http://\S+, models are measured as it runs"
    ):
        router.bench("demo:sharded", layouts=[2], prompts=1, repeat=1)


def test_arguments_that_the_gateway_decides_are_refused_by_name(gateway: GatewayProcess) -> None:
    with pytest.raises(
        ConfigError, match=f"slots, keep_alive: the engines are those of the gateway {gateway.url}"
    ):
        HybridRouter(gateway=gateway.url, slots=2, keep_alive="1h")
    with HybridRouter(gateway=gateway.url) as remote, pytest.raises(ConfigError, match="settings of coordinators"):
        _ = remote.settings


def test_a_stopped_reader_cancels_the_answer_at_the_gateway(router: HybridRouter, endless: str) -> None:
    stream = router.stream(endless, "Hello!", max_tokens=30_000, temperature=0)
    assert next(stream)["message"]["content"] is not None
    stream.close()
    eventually(
        lambda: all(shown.running == 0 for shown in router.status().coordinators),
        "the slot at the gateway is free",
    )


def test_the_live_state_arrives_as_patches(router: HybridRouter, gateway: GatewayProcess) -> None:
    router.preload("demo:sharded")
    victim = router.worker_endpoints[1]

    async def watched() -> None:
        seen: dict[str, Any] = {}

        def note(patch: Mapping[str, Any]) -> None:
            seen.update(patched(seen, patch))

        seen |= await router.state.watch(note)
        await eventually_async(lambda: seen["workers"][victim]["state"] == "held", "the worker is held")
        entry = next(entry for entry in registry.entries(registry.WORKER) if entry.name == victim)
        psutil.Process(entry.pid).kill()
        await eventually_async(
            lambda: seen["workers"].get(victim, {}).get("state") != "held", "the dead worker is shown"
        )
        assert seen["workers"] == router.state.data["workers"]
        assert router.state.status().workers
        await router.state.unwatch(note)
        assert not router.state.is_watched

    run(watched())


# --- who may do what ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A gateway with two keys; its URL, and the keys by name."""
    folder = tmp_path_factory.mktemp("guarded")
    before = pytest.MonkeyPatch()
    before.setenv("SOLLOL_STATE_DIR", str(folder))
    keys = {"ana": add_key(Key(name="ana")), "head": add_key(Key(name="head", may_control=True))}
    before.undo()
    with own_gateway(folder) as running:
        yield running.url, keys


def test_a_key_without_control_may_ask_only(guarded: tuple[str, dict[str, str]]) -> None:
    url, keys = guarded
    with HybridRouter(gateway=url, gateway_key=keys["ana"]) as remote:
        info = remote.connect()
        assert (info.key, info.may_control) == ("ana", False)
        assert remote.route_request("demo", "Hello!", max_tokens=2).text
        assert remote.cluster().coordinators
        for change in (
            lambda: remote.start_workers(1),
            lambda: remote.stop_coordinator("demo"),
            lambda: remote.engine_log("demo"),
            lambda: remote.add_worker("127.0.0.1:1"),
            lambda: remote.invite(host="127.0.0.1"),
            lambda: remote.revoke(),
        ):
            with pytest.raises(GatewayError, match=f"the gateway {url}: this key may ask, but not change"):
                change()
        assert keys["ana"] not in repr(remote)
    with HybridRouter(gateway=url, gateway_key=keys["head"]) as remote:
        assert remote.stop_coordinator("demo") == ["demo"]


def test_a_machine_is_invited_to_the_gateways_machine(guarded: tuple[str, dict[str, str]]) -> None:
    url, keys = guarded
    with HybridRouter(gateway=url, gateway_key=keys["head"]) as remote:
        invitation = remote.invite(name="gpu1", uses=2, host="127.0.0.1")
        link = JoinLink.of(invitation.link)
        assert link.token not in repr(link)
        now = remote.invitations()
        assert now.listens == link.address
        assert [(item.name, item.uses_left, item.expires_at) for item in now.open] == [
            ("gpu1", 2, invitation.expires_at)
        ]
        with pytest.raises(ConfigError, match="is named gpu2; known: gpu1"):
            remote.revoke("gpu2")
        assert remote.revoke("gpu1") == ["gpu1"]
        assert remote.invitations().open == ()
        eventually(lambda: not remote.invitations().listens, "the port is closed")


def test_a_wrong_key_is_one_line(guarded: tuple[str, dict[str, str]]) -> None:
    url, keys = guarded
    wrong = keys["ana"][:-4] + "AAAA"
    with HybridRouter(gateway=url, gateway_key=wrong) as remote:
        with pytest.raises(GatewayKeyError, match=f"the gateway {url}: ") as refused:
            remote.route_request("demo", "Hello!")
        assert wrong not in str(refused.value)
        assert remote.latency.frame().iloc[-1]["status"] == "error"


def test_a_closed_router_follows_no_gateway(router: HybridRouter, caplog: pytest.LogCaptureFixture) -> None:
    assert router.gateway
    remote = HybridRouter(gateway=router.gateway)
    remote.close()
    for ask in (lambda: remote.route_request("demo", "Hello!"), remote.cluster, remote.models):
        with pytest.raises(GatewayError, match=f"the gateway {remote.gateway} was closed; make a new one"):
            ask()
    assert not caplog.records


# --- no gateway there -----------------------------------------------------------------------------


def test_a_missing_gateway_is_one_line_at_once() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with HybridRouter(gateway=url) as remote, pytest.raises(GatewayUnavailableError) as absent:
        remote.route_request("demo", "Hello!")
    assert str(absent.value) == (
        f"no gateway answers at {url}: cannot connect; start it there with `sollol-nb gateway`, or correct the "
        "address"
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b'{"status":"ok"}'), (404, b'{"error":{"message":"File Not Found"}}'), (404, b"404 page not found")],
)
def test_another_server_at_the_address_is_named(status: int, body: bytes) -> None:
    with (
        serving(http_stranger(status, body)) as port,
        HybridRouter(gateway=f"127.0.0.1:{port}") as remote,
        pytest.raises(GatewayError, match=f"http://127.0.0.1:{port} is not a gateway of sollol_nb: it") as error,
    ):
        remote.cluster()
    assert "\n" not in str(error.value)


def test_a_llama_server_at_the_address_is_named(router: HybridRouter) -> None:
    router.preload("demo")
    url = next(coordinator.base_url for coordinator in router.coordinators if coordinator.model == "demo")
    with HybridRouter(gateway=url) as remote, pytest.raises(GatewayError, match=f"{url} is not a gateway"):
        remote.route_request("demo", "Hello!")


def test_a_silent_server_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HELLO_LIMIT_S", 0.2)
    with (
        silent_peer() as port,
        HybridRouter(gateway=f"http://127.0.0.1:{port}") as remote,
        pytest.raises(GatewayUnavailableError, match="no answer within the time limit"),
    ):
        remote.connect()


# --- the gateway is killed and started again ------------------------------------------------------


async def _held_worker(remote: hybrid_router.HybridRouter, machines: Cluster) -> Machine:
    """A worker of `demo:sharded` that stops after some more tokens: before `pass_again`, no answer has an end."""
    await remote.preload("demo:sharded")
    (shown,) = (await remote.cluster()).coordinators
    worker = machines.machine(shown.segments[0].endpoint)
    worker.swallow_after(HELD_AFTER)
    return worker


async def _read(chunks: AsyncIterator[Chunk], strike: Callable[[], object]) -> Completion:
    """The whole answer, with a strike after some chunks."""
    received: list[Chunk] = []
    async with aclosing(chunks) as items:  # type: ignore[type-var]
        async for chunk in items:
            received.append(chunk)
            if len(received) == STRIKE_AFTER:
                await asyncio.to_thread(strike)
    return Completion.from_chunks(received)


def _restart(gateway: RestartableGateway, held: Machine) -> None:
    """Restart a gateway in the middle of an answer."""
    gateway.kill()
    held.pass_again()
    gateway.start()


@posix
@pytest.mark.parametrize("recovery", ["fast", "exact"])
def test_an_answer_continues_on_the_next_gateway(
    restartable: RestartableGateway, machines: Cluster, recovery: str
) -> None:
    async def test() -> None:
        async with hybrid_router.HybridRouter(gateway=restartable.url, recovery=recovery) as remote:
            options = {"temperature": 0, "max_tokens": LENGTH}
            whole = await remote.route_request("demo:sharded", QUESTION, **options)

            held = await _held_worker(remote, machines)
            chunks = remote.stream("demo:sharded", QUESTION, **options)
            answer = await _read(chunks, lambda: _restart(restartable, held))
            assert answer.text == whole.text
            assert answer["eval_count"] == whole["eval_count"]
            (failover,) = answer.routing["failovers"]
            assert failover["continued"]
            assert failover["recovery"] == recovery
            assert failover["cost_ms"] > 0
            assert restartable.url in failover["what"]
            row = remote.latency.frame().iloc[-1]
            assert (row["status"], row["failovers"]) == ("ok", 1)
            assert json.loads(row["failover_details"])[0]["tokens_before"] > 0
            kinds = [event.kind for event in remote.events.recent()]
            assert kinds.index(EventKind.GATEWAY_LOST) < kinds.index(EventKind.GATEWAY_RETURNED)

    run(test())


@posix
def test_thoughts_and_values_begin_again_on_the_next_gateway(
    restartable: RestartableGateway, machines: Cluster
) -> None:
    async def test() -> None:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 80, "maxItems": 80}
        async with hybrid_router.HybridRouter(gateway=restartable.url) as remote:
            held = await _held_worker(remote, machines)
            chunks = remote.stream("demo:sharded", "Count!", format=schema, temperature=0, max_tokens=1800)
            answer = await _read(chunks, lambda: _restart(restartable, held))
            assert len(answer.value) == 80
            assert not answer.routing["failovers"][0]["continued"]

    run(test())


@posix
def test_without_another_gateway_the_partial_answer_is_reported_in_one_line(
    restartable: RestartableGateway, machines: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETURN_LIMIT_S", 1.0)

    async def test() -> None:
        async with hybrid_router.HybridRouter(gateway=restartable.url) as remote:
            held = await _held_worker(remote, machines)
            chunks = remote.stream("demo:sharded", QUESTION, temperature=0, max_tokens=LENGTH)
            with pytest.raises(GatewayUnavailableError) as lost:
                await _read(chunks, restartable.kill)
            held.pass_again()
            message = str(lost.value)
            assert message.startswith(f"no gateway answers at {restartable.url}: cannot connect")
            assert "tokens; the text so far is kept" in message
            row = remote.latency.frame().iloc[-1]
            assert row["status"] == "error"
            assert len(row["partial_text"]) > 10

    run(test())


@posix
def test_the_live_state_says_that_the_gateway_is_gone_and_comes_back_with_it(
    restartable: RestartableGateway,
) -> None:
    async def test() -> None:
        async with hybrid_router.HybridRouter(gateway=restartable.url) as remote:
            patches: list[object] = []
            await remote.preload("demo")
            first = await remote.state.watch(patches.append)
            assert first["coordinators"]
            await asyncio.to_thread(restartable.kill)
            await eventually_async(
                lambda: f"no gateway answers at {restartable.url}" in remote.state.data.get("unreachable", ""),
                "the state says that the gateway does not answer",
            )
            await asyncio.to_thread(restartable.start)
            await eventually_async(lambda: "unreachable" not in remote.state.data, "the state is back")
            assert set(remote.state.data) == set(first)

    run(test())


@posix
def test_a_stopped_gateway_lets_running_answers_finish(restartable: RestartableGateway, machines: Cluster) -> None:
    async def test() -> None:
        async with hybrid_router.HybridRouter(gateway=restartable.url) as remote:
            held = await _held_worker(remote, machines)

            def end() -> None:
                gateway = restartable.running
                gateway.process.send_signal(signal.SIGTERM)
                eventually(lambda: "waits up to" in gateway.output, "the gateway waits for the answer")
                held.pass_again()

            chunks = remote.stream("demo:sharded", QUESTION, temperature=0, max_tokens=LENGTH)
            answer = await _read(chunks, end)
            assert answer["done"]
            assert answer.routing["failovers"] == []

    run(test())


@posix
def test_an_interrupted_answer_is_resumed_over_the_gateway(
    machines: Cluster, backends: str, tmp_path: Path
) -> None:
    async def test(url: str) -> None:
        async with hybrid_router.HybridRouter(gateway=url) as remote:
            options = {"temperature": 0, "max_tokens": LENGTH}
            whole = await remote.route_request("demo:sharded", QUESTION, **options)
            await _held_worker(remote, machines)

            def strike() -> None:
                for machine in machines.machines:
                    machine.kill()

            with pytest.raises(AnswerInterruptedError) as interrupted:
                await _read(remote.stream("demo:sharded", QUESTION, **options), strike)
            assert interrupted.value.partial.text
            assert whole.text.startswith(interrupted.value.partial.text)
            await remote.start_workers(3)
            assert (await remote.resume(interrupted.value)).text == whole.text
            await remote.stop_workers()

    variables = {"RPC_BACKENDS": backends, **NO_DRAFTS}
    with own_gateway(tmp_path / "gateway", is_patient=True, **variables) as running:
        run(test(running.url))
