"""Real `sollol-nb worker --join` processes on other machines, which dial the machine that invited them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.settings.endpoints import INVITATIONS
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import HANG_GUARD_S, QUESTION, all_end, eventually, run, says, script, suspended
from tests.support.joining import connected, here, invite, join
from tests.support.machines import Machine, running_machines, wait_gone

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="network namespaces or several loopback addresses"),
]
MODEL = "demo:sharded"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    with running_machines(tmp_path_factory.mktemp("machines"), ["gpu1", "gpu2"]) as made:
        yield made


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom nobody has joined yet."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(autouse=True)
def all_leave(empty_state: None, machines: list[Machine]) -> Iterator[None]:
    """Nothing runs after a test, here or there."""
    yield
    run(stop_engines(also_used=True))
    for machine in machines:
        for process in machine.started:
            if process is not machine.sshd and process.poll() is None:
                process.terminate()
                process.wait()
        wait_gone(machine)


def hub_entry() -> Entry:
    (entry,) = [entry for entry in registry.entries(registry.LINK) if entry.name == INVITATIONS]
    return entry


def hub() -> psutil.Process:
    """The process through which all workers come that have joined."""
    return psutil.Process(hub_entry().pid)


def open_ports(process: psutil.Process) -> list[str]:
    """The addresses on which a process listens, without those of loopback ports for workers."""
    found = [item.laddr for item in process.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    workers = {port for member in memberships.read().members for port in member.ports}
    return [f"{address.ip}:{address.port}" for address in found if address.port not in workers]


def answer(
    router: HybridRouter,
    at_token: Mapping[int, Callable[[], object]] | None = None,
    model: str = MODEL,
    **more: Any,
) -> str:
    """The text of an answer, with something that happens when so many pieces have come."""
    text = ""
    for position, chunk in enumerate(router.stream(model, QUESTION, recovery="exact", **more)):
        text += chunk["message"]["content"]
        if at_token and position in at_token:
            at_token[position]()
    return text


def test_two_machines_that_dial_out_answer_together_and_end_when_they_are_revoked(
    engine: Engine, machines: list[Machine]
) -> None:
    first = machines[0]
    with HybridRouter(num_rpc_backends=2, auto_setup_rpc=False) as router:
        workers = [join(machine, engine, invite(router, machine)) for machine in machines]
        connected(router, "gpu1", "gpu2")

        assert answer(router).startswith("A worker")
        assert router.coordinator is not None
        used = router.coordinator.rpc_backends
        names = {worker.endpoint: worker.name for worker in router.check_workers()}
        assert sorted(names[endpoint] for endpoint in used) == ["gpu1", "gpu2"]
        assert all(endpoint.startswith("127.0.0.1:") for endpoint in used)
        (address,) = open_ports(hub())
        assert address.startswith(f"{here(first)}:")
        for machine in machines:
            if machine.namespace:
                addresses = {address for address, port in machine.listening() if port != machine.host.port}
                assert addresses == {"127.0.0.1"}
        assert "gpu1" in str(router.cluster()).partition("\nlast events\n")[0]

        for name, worker in (("gpu2", workers[1]), (None, workers[0])):
            router.revoke(name)
            assert worker.wait(HANG_GUARD_S) == 0
            assert worker.stderr is not None
            said = worker.stderr.read()
            assert "revoked" in said.splitlines()[-1]
            assert "lost the connection" not in said, "it learns this at once, not when it comes back"
        for machine in machines:
            wait_gone(machine)
        eventually(lambda: not open_ports(hub()), "the port is closed")


LONG: dict[str, Any] = {"backend": "llama.cpp-distributed", "temperature": 0, "max_tokens": 400}
"""Options of an answer of `endless` that has not ended when its first words are read."""


def test_an_answer_continues_when_the_network_is_cut_and_returns(
    engine: Engine, machines: list[Machine], endless: str
) -> None:
    machine = machines[0]
    with HybridRouter(num_rpc_backends=1, auto_setup_rpc=False) as router:
        worker = join(machine, engine, invite(router, machine))
        connected(router, "gpu1")
        undisturbed = answer(router, model=endless, **LONG)

        def cut() -> None:
            assert router.coordinator is not None
            with suspended(psutil.Process(router.coordinator.pid)):
                if machine.namespace:
                    machine.cut()
                else:
                    worker.send_signal(signal.SIGSTOP)
                eventually(
                    lambda: not any(item.is_connected for item in router.invitations().joined), "it is lost"
                )
            if machine.namespace:
                machine.connect_again()
            else:
                worker.send_signal(signal.SIGCONT)

        assert answer(router, {2: cut}, endless, **LONG) == undisturbed
        assert worker.poll() is None


def test_an_answer_continues_when_the_link_is_killed_and_its_members_come_back(
    engine: Engine, machines: list[Machine], endless: str
) -> None:
    machine = machines[0]
    with HybridRouter(num_rpc_backends=1, auto_setup_rpc=False) as router:
        worker = join(machine, engine, invite(router, machine))
        connected(router, "gpu1")
        undisturbed = answer(router, model=endless, **LONG)

        def kill() -> None:
            assert router.coordinator is not None
            with suspended(psutil.Process(router.coordinator.pid)):
                killed = hub()
                killed.kill()
                all_end([killed])

        assert answer(router, {2: kill}, endless, **LONG) == undisturbed
        connected(router, "gpu1")
        assert worker.poll() is None


KERNEL = """
import sys
from sollol_nb.sync_wrapper import HybridRouter
router = HybridRouter(num_rpc_backends=1, auto_setup_rpc=False)
print("link", router.invite(name="gpu1", host=sys.argv[1]).link, flush=True)
sys.stdin.read()
"""


def test_the_next_kernel_uses_the_machines_that_have_joined_the_last_one(
    engine: Engine, machines: list[Machine]
) -> None:
    machine = machines[0]
    with script(KERNEL, here(machine)) as kernel:
        worker = join(machine, engine, says(kernel, "link"))
        eventually(lambda: hub_entry().about.get("connected"), "it has joined")
        before = hub().pid
        kernel.kill()
        kernel.wait()
    with HybridRouter(num_rpc_backends=1, auto_setup_rpc=False) as router:
        assert answer(router).startswith("A worker")
        assert [item.name for item in router.invitations().joined] == ["gpu1"]
        assert (hub().pid, worker.poll()) == (before, None)


def test_nothing_is_left_there_when_the_worker_is_killed(engine: Engine, machines: list[Machine]) -> None:
    machine = machines[0]
    with HybridRouter() as router:
        worker = join(machine, engine, invite(router, machine), "--give-up", "1s")
        connected(router, "gpu1")
        worker.kill()
        worker.wait()
        wait_gone(machine)


def test_a_worker_gives_up_when_the_machine_that_invited_it_is_gone(
    engine: Engine, machines: list[Machine]
) -> None:
    machine = machines[0]
    with HybridRouter() as router:
        worker = join(machine, engine, invite(router, machine), "--give-up", "1s")
        connected(router, "gpu1")
    assert worker.wait(60) == 1
    assert worker.stderr is not None
    assert "was gone for 1 s" in worker.stderr.read().splitlines()[-1]
    wait_gone(machine)
