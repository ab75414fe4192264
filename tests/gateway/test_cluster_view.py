"""What the gateway shows of itself: health, readiness, metrics, and the cluster's state with its changes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sollol_nb.gateway import cluster_view, health
from sollol_nb.gateway.cluster_view import MAX_PENDING, MAX_VIEWERS, Viewer
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.events import EventKind
from tests.chaos.machines import Cluster
from tests.support.engines import HANG_GUARD_S, eventually, run, with_variable
from tests.support.gateway import GatewayProcess, end_engines, gateway_without_engines, running_gateway
from tests.support.merge_patch import patched
from tests.support.simulated_cluster import SimulatedCluster

MODEL = "demo:sharded"
STORY = [{"role": "user", "content": "Tell me everything about sharding."}]


@pytest.fixture(scope="module")
def machines(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("view")
    with pytest.MonkeyPatch.context() as patch, Cluster(engine) as cluster:
        patch.setenv("SOLLOL_STATE_DIR", str(folder))
        yield cluster
        end_engines(folder)
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(folder)), "no process is left")


@pytest.fixture(scope="module")
def client(machines: Cluster) -> Iterator[httpx.Client]:
    """A client of a gateway over four machines."""
    with gateway_over(machines) as gateway, gateway.client() as opened:
        yield opened


@contextmanager
def gateway_over(cluster: Cluster) -> Iterator[GatewayProcess]:
    endpoints = ",".join(machine.wired_endpoint for machine in cluster.machines)
    # The model stays loaded however slow a test is, and a result of a worker is one token.
    settings = {"RPC_BACKENDS": endpoints, "SOLLOL_SPECULATION": "off", "SOLLOL_KEEP_ALIVE": "600s"}
    with running_gateway(variables=settings) as running:
        yield running


def ask(client: httpx.Client, model: str = MODEL, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": STORY, "temperature": 0, **more}
    return client.post("/v1/chat/completions", json=body)


def samples(client: httpx.Client) -> dict[str, float]:
    """The metrics by name and labels."""
    answer = client.get("/metrics")
    families = list(parse_text(answer.text))
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in families
        for sample in family.samples
    }


def named(name: str, **labels: str) -> str:
    return name + json.dumps(labels, sort_keys=True)


@contextmanager
def events(client: httpx.Client) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of `/cluster`: their name, and their data."""
    with client.stream("GET", "/cluster", headers={"Accept": "text/event-stream"}) as answer:
        assert answer.status_code == 200, answer.read()

        def read() -> Iterator[tuple[str, Any]]:
            lines = answer.iter_lines()
            for number, first in enumerate(lines):
                assert first == f"id: {number}"
                yield next(lines).removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))
                assert next(lines) == ""

        yield read()


# --- metrics ----------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_metrics_are_those_of_the_requests(client: httpx.Client, machines: Cluster) -> None:
    machines.make_well()
    answer = ask(client, max_tokens=40).json()
    assert ask(client, "no-such-model").status_code == 404
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "llama.cpp-distributed",
        "gen_ai_request_model": MODEL,
    }
    # The client has an answer a moment before it is counted.
    refused = named("sollol_http_responses_total", api="openai", status="404")
    duration = "gen_ai_server_request_duration_seconds"
    counted = {refused, named(f"{duration}_count", **labels, error_type="")}
    eventually(lambda: counted <= samples(client).keys(), "the answer and the refusal are counted")
    seen = samples(client)
    usage = "gen_ai_client_token_usage"
    assert (
        seen[named(f"{usage}_sum", **labels, gen_ai_token_type="output")] == answer["usage"]["completion_tokens"]
    )
    assert seen[named(f"{usage}_sum", **labels, gen_ai_token_type="input")] == answer["usage"]["prompt_tokens"]
    assert seen[named(f"{duration}_count", **labels, error_type="")] == 1
    first = seen[named("gen_ai_server_time_to_first_token_seconds_sum", **labels)]
    each = seen[named("gen_ai_server_time_per_output_token_seconds_sum", **labels)]
    whole = seen[named(f"{duration}_sum", **labels, error_type="")]
    assert first + 39 * each == pytest.approx(whole)
    unknown = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "", "gen_ai_request_model": ""}
    assert seen[named(f"{duration}_count", **unknown, error_type="not_found")] == 1
    assert seen[refused] == 1
    assert seen[named("sollol_workers", state="held")] == 3
    assert seen[named("sollol_coordinators")] == 1
    assert sum(seen[key] for key in seen if key.startswith("sollol_slots{") and "free" in key) >= 4
    assert "no-such-model" not in "".join(seen), "clients cannot make up time series"


@pytest.mark.engine
def test_a_failover_is_counted(client: httpx.Client, machines: Cluster) -> None:
    machines.make_well()
    ask(client, max_tokens=2)
    failovers = named("sollol_failovers_total", gen_ai_provider_name="llama.cpp-distributed")
    before = samples(client).get(failovers, 0)
    worker = machines.machine(sorted(registry.holders())[0])
    worker.swallow_after(20)
    body = {"model": MODEL, "messages": STORY, "temperature": 0, "max_tokens": 1500, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_lines()
        next(pieces)
        eventually(lambda: worker.is_swallowing, "the engine is in the middle of the answer")
        worker.kill()
        assert [piece for piece in pieces if piece][-1] == "data: [DONE]"
    eventually(lambda: samples(client).get(failovers, 0) > before, "the failover is counted")


@pytest.mark.engine
def test_prometheus_gets_openmetrics_if_it_accepts_that(client: httpx.Client) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"gen_ai_server_request_duration_seconds", "sollol_http_responses", "sollol_slots"} <= names


# --- health -----------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_gateway_with_an_engine_is_alive_and_ready(client: httpx.Client, machines: Cluster) -> None:
    machines.make_well()
    assert client.get("/health").json()["status"] == "ok"
    ready = eventually(lambda: now if (now := client.get("/ready")).status_code == 200 else None, "it has looked")
    assert ready is not None
    assert ready.json()["ready"] is True
    assert sum(ready.json()["workers"].values()) == 4


def test_without_an_engine_and_without_ollama_it_is_alive_and_not_ready(tmp_path: Path, own_state: object) -> None:
    own = {"SOLLOL_LLAMA_CPP": str(tmp_path), "SOLLOL_STATE_DIR": str(tmp_path / "state")}
    with running_gateway(variables=own) as gateway, gateway.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        # A request does not wait long for the check, which asks the node last.
        ready = eventually(lambda: now if is_checked(now := client.get("/ready")) else None, "the check has ended")
        assert ready is not None
        assert ready.status_code == 503
        assert ready.json()["ready"] is False
        assert str(tmp_path) in ready.json()["reason"]
        assert ready.json()["nodes"] == {"absent": 1}


def is_checked(ready: httpx.Response) -> bool:
    return "unknown" not in ready.json()["nodes"]


def test_it_is_not_ready_before_it_has_looked_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(health, "CHECK_WAIT_S", 0.01)
    monkeypatch.setattr(health, "locate_engine", lambda: may_end.wait(HANG_GUARD_S))

    async def ask() -> None:
        async with gateway_without_engines() as client:
            try:
                early = await client.get("/ready")
                assert (early.status_code, early.json()["engine"]) == (503, False)
                assert "still looking for llama.cpp" in early.json()["reason"]
            finally:
                may_end.set()
            monkeypatch.setattr(health, "CHECK_WAIT_S", HANG_GUARD_S)
            assert (await client.get("/ready")).status_code == 200

    run(ask())


# --- the cluster ------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_patches_lead_from_the_first_state_to_the_present_state(
    client: httpx.Client, machines: Cluster
) -> None:
    machines.make_well()
    with events(client) as received:
        name, state = next(received)
        assert name == "state"
        assert len(state["workers"]) == 4
        machines.machines[3].kill()
        endpoint = machines.machines[3].wired_endpoint
        ask(client, max_tokens=5)
        while state["workers"][endpoint]["state"] != "down" or not state.get("coordinators"):
            name, patch = next(received)
            state = patched(state, patch) if name == "patch" else state
        deadline = time.monotonic() + HANG_GUARD_S
        while state != client.get("/cluster").json():  # round trips may change in between
            assert time.monotonic() < deadline, "the patches lead to another state"
            name, patch = next(received)
            state = patched(state, patch) if name == "patch" else state


@pytest.mark.engine
def test_viewers_are_limited_and_a_disconnected_viewer_frees_a_place(client: httpx.Client) -> None:
    limits = httpx.Limits(max_connections=None)
    with ExitStack() as stack:
        many = stack.enter_context(httpx.Client(base_url=client.base_url, timeout=HANG_GUARD_S, limits=limits))
        watching = [stack.enter_context(events(many)) for _ in range(MAX_VIEWERS)]
        assert {next(received)[0] for received in watching} == {"state"}
        refused = many.get("/cluster", headers={"Accept": "text/event-stream"})
        assert refused.status_code == 429
        assert "viewers" in refused.text
        assert refused.headers["Retry-After"]

    def is_let_in() -> bool:
        with client.stream("GET", "/cluster", headers={"Accept": "text/event-stream"}) as answer:
            return answer.status_code == 200

    eventually(is_let_in, "there is room again")


@pytest.mark.engine
def test_the_events_end_with_the_gateway(machines: Cluster) -> None:
    with gateway_over(machines) as gateway, gateway.client() as client, events(client) as received:
        assert next(received)[0] == "state"
        threading.Timer(0.1, gateway.process.terminate).start()
        for name, _ in received:  # to a clean end
            assert name in ("patch", "alive")
        assert gateway.wait() == 0


def test_a_viewer_that_reads_too_little_gets_the_whole_state() -> None:
    cluster = SimulatedCluster(3)

    async def watch() -> None:
        viewer = Viewer(cluster.state)
        await cluster.state.watch(viewer.add)
        assert (await viewer.next()).startswith(b"id: 0\nevent: state\n")
        viewer.add({"totals": {"running": 1}})
        assert (await viewer.next()) == b'id: 1\nevent: patch\ndata: {"totals":{"running":1}}\n\n'
        for number in range(MAX_PENDING + 1):
            viewer.add({"totals": {"total": number}})
        assert (await viewer.next()).startswith(b"id: 2\nevent: state\n")
        reading = asyncio.create_task(viewer.next())
        cluster.change_worker(1, "down", "gone", EventKind.WORKER_LOST)
        assert b"gone" in await reading
        await cluster.state.close()
        assert b"closed" in await viewer.next()
        assert await viewer.next() == b""

    run(watch())


def test_a_stream_ends_after_its_time_with_an_end_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_view, "STREAM_S", 0)
    cluster = SimulatedCluster(3)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def watch() -> None:
        viewer = Viewer(cluster.state)
        await cluster.state.watch(viewer.add)
        await cluster_view.send_events(viewer, send)
        await cluster.state.unwatch(viewer.add)

    run(watch())
    assert sent[1].startswith(b"id: 0\nevent: state\n")
    assert sent[-1].endswith(b"id: 1\nevent: end\ndata: {}\n\n")
