"""One worker is one worker, by whatever names it is given; a router never waits for itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.link import LinkedWorker
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import boot_id
from sollol_nb.llama_cpp.workers.identities import second_targets
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, eventually, run, tunnel_to, unused_port
from tests.support.machines import Machine, running_machines

pytestmark = pytest.mark.usefixtures("alone")


def linked(place: str, *devices: str) -> list[LinkedWorker]:
    return [LinkedWorker(name="gpu1", machine="boot", device=device, place=place) for device in devices]


@pytest.mark.parametrize(
    ("workers", "second"),
    [
        ({"a": linked("box", "CPU"), "b": linked("box", "CPU"), "c": linked("box", "CPU")}, {"b": "a", "c": "a"}),
        ({"a": linked("box", "CUDA0", "CUDA1"), "b": linked("box", "CUDA1")}, {"b": "a"}),
        ({"a": linked("box", "CUDA0"), "b": linked("box", "CUDA1")}, {}),
        ({"a": linked("box", "CPU"), "b": linked("box of another user", "CPU")}, {}),
        ({"a": linked("", "CPU"), "b": linked("", "CPU"), "c": []}, {}),
    ],
)
def test_targets_that_lead_to_the_same_devices_are_one(
    workers: dict[str, list[LinkedWorker]], second: dict[str, str]
) -> None:
    assert second_targets(workers) == second


@pytest.mark.engine
def test_a_worker_that_is_named_in_every_way_is_used_once(engine: Engine, first_is_waited_for: None) -> None:
    port = unused_port()
    process = subprocess.Popen(
        [str(engine.worker), "-H", LOOPBACK, "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        restore_signals=False,  # SIGPIPE stays ignored: a cut connection must not end it
    )
    try:
        free = ProbeOutcome.FREE
        eventually(lambda: run(probe(LOOPBACK, port)).outcome is free, "it listens")
        with tunnel_to(port) as tunnelled, tunnel_to(port, "::1") as relayed:
            relay, tunnel = f"[::1]:{relayed}", f"{LOOPBACK}:{tunnelled}"
            address, name = f"{LOOPBACK}:{port}", f"localhost:{port}"
            with HybridRouter(rpc_backends=[tunnel, relay, name, address], num_rpc_backends=4) as mine:
                assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"]
                assert mine.coordinator is not None
                assert mine.coordinator.rpc_backends == [tunnel]
                others = {worker.label: worker for worker in mine.check_workers() if worker.state != "held"}
                assert others.keys() == {relay, name, address}
                for worker in others.values():
                    assert worker.state == "duplicate"
                    assert worker.detail.startswith("the same worker as ")
    finally:
        process.kill()
        process.wait()


# --- machines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu1(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with running_machines(tmp_path_factory.mktemp("machines"), ["gpu1"]) as (machine,):
        yield machine


@pytest.mark.engine
def test_a_machine_that_is_named_twice_has_one_set_of_workers(
    gpu1: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    first, second = gpu1.target, f"ssh://{gpu1.host.address}:{gpu1.host.port}"
    with HybridRouter(rpc_backends=[first, second], num_rpc_backends=2) as mine:
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"]
        workers = {worker.label: worker for worker in mine.check_workers()}
        assert workers.keys() == {"gpu1", second}
        assert workers["gpu1"].state == "held"
        assert workers[second].state == "duplicate"
        assert workers[second].detail == f"{second} leads to the same devices as {first}, which is used"
        assert [entry.name for entry in registry.entries(registry.LINK)] == [first]
        eventually(lambda: len(gpu1.workers()) == 1, "the second set of workers has ended")
        mine.stop_coordinator()
        mine.remove_worker(first)
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"]
        (worker,) = mine.check_workers()
        assert (worker.target, worker.state) == (second, "held")
        again = mine.add_worker(first)
        assert (again.state, again.problem) == (
            "duplicate",
            f"{first} leads to the same devices as {second}, which is used",
        )


@pytest.mark.engine
def test_workers_of_this_machine_behind_ssh_share_the_memory_of_its_own_workers(
    gpu1: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    with HybridRouter(rpc_backends=[gpu1.target], num_rpc_backends=2) as mine:
        (here,) = mine.start_workers(1)
        mine.add_worker(gpu1.target)
        workers = {worker.endpoint == here: worker for worker in mine.check_workers()}
        assert workers[False].machine == boot_id()
        assert {worker.capacity.memory_domain for worker in workers.values()} == {LOOPBACK}
