"""A worker with an IPv6 address, which llama.cpp itself cannot connect to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.calibrations import know_this_machine
from tests.support.engines import QUESTION, eventually, tunnel_to, unused_port, worker_on

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without any engine."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))


@contextmanager
def ipv6_worker(engine: Engine, port: int, worker_port: int) -> Iterator[None]:
    """A worker that is reached at `[::1]:port`."""
    with worker_on(engine, "127.0.0.1", worker_port), tunnel_to(worker_port, "::1", port):
        yield


def only_worker(router: HybridRouter) -> WorkerStatus:
    (worker,) = router.check_workers()
    return worker


def test_an_ipv6_worker_answers_is_shared_by_two_routers_and_its_relay_ends_with_the_last(engine: Engine) -> None:
    port = unused_port()
    target = f"[::1]:{port}"
    with ipv6_worker(engine, port, unused_port()), HybridRouter(rpc_backends=[target]) as mine:
        answer = mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert answer["done"]
        assert mine.coordinator is not None
        (endpoint,) = mine.coordinator.rpc_backends
        assert endpoint.startswith("127.0.0.1:")
        worker = only_worker(mine)
        assert (worker.name, worker.state, worker.endpoint) == (target, "held", endpoint)
        with HybridRouter(rpc_backends=[target]) as second:
            second.route_request("demo:sharded", QUESTION, max_tokens=2)
            assert second.coordinator is not None
            assert second.coordinator.pid == mine.coordinator.pid
            assert len(registry.entries(registry.LINK)) == 1
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"], "the other one left it running"
        mine.stop_coordinator()
        mine.remove_worker(target)
        assert registry.entries(registry.LINK) == []
        assert mine.worker_endpoints == []


def test_the_calibration_of_a_worker_behind_a_link_stays_known_when_its_port_changes(engine: Engine) -> None:
    port = unused_port()
    target = f"[::1]:{port}"
    know_this_machine(engine)
    with ipv6_worker(engine, port, unused_port()):
        with HybridRouter(rpc_backends=[target]) as before:
            (measured,) = before.calibrate([target])
            assert str(measured).startswith(f"{target}: ")
            assert only_worker(before).calibration == measured.calibration
        assert registry.entries(registry.LINK) == []
        with HybridRouter(auto_discover_rpc=False) as after:
            worker = after.add_worker(target)

    assert measured.calibration is not None
    assert worker.calibration == measured.calibration
    assert measured.endpoint not in measured.calibration.identity


def test_a_lost_ipv6_worker_is_described_by_its_address_and_comes_back_at_the_same_endpoint(
    engine: Engine,
) -> None:
    port, worker_port = unused_port(), unused_port()
    target = f"[::1]:{port}"

    def state() -> str:
        return only_worker(mine).state

    with ExitStack() as there, HybridRouter(rpc_backends=[target], num_rpc_backends=1) as mine:
        with pytest.raises(WorkersUnavailableError) as failure:
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        start_it = f"nothing listens on {target}; start a worker there: ggml-rpc-server -H ::1 -p {port}"
        assert start_it in str(failure.value)
        assert "\n" not in str(failure.value)
        there.enter_context(ipv6_worker(engine, port, worker_port))
        eventually(lambda: state() == "free", "it is found")
        endpoint = only_worker(mine).endpoint
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        there.close()
        eventually(lambda: only_worker(mine).detail == start_it, "the loss is noticed")
        there.enter_context(ipv6_worker(engine, port, worker_port))
        eventually(lambda: state() == "free", "it is back")
        assert only_worker(mine).endpoint == endpoint
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"]


def test_a_tunnel_without_a_worker_at_its_other_end_is_down(engine: Engine) -> None:
    port, worker_port = unused_port(), unused_port()
    with tunnel_to(worker_port, port=port), HybridRouter(rpc_backends=[f"127.0.0.1:{port}"]) as mine:
        worker = only_worker(mine)
        assert worker.state == "down"
        assert "if it is a tunnel, start the worker at its other end" in worker.detail
        with worker_on(engine, "127.0.0.1", worker_port):
            assert only_worker(mine).state == "free"
