"""Workers of machines behind a real sshd: one line from nothing to an answer, and nothing left in the end."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import link, ssh
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, eventually, is_alive, kill_at_once, linux_only, posix_only, run
from tests.support.machines import Machine, running_machines, short_folder, wait_gone
from tests.support.supervised import nothing_is_left

pytestmark = [pytest.mark.engine, posix_only]

SILENCE_S = 3


@pytest.fixture(scope="module")
def gpu1() -> Iterator[Machine]:
    with short_folder() as folder, running_machines(folder, ["gpu1"]) as (machine,):
        yield machine


@pytest.fixture(autouse=True)
def empty_state(gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without any engine here, whose ssh reaches the machine; at the end nothing runs here or there."""
    state = tmp_path / "state"
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(state))
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    yield state
    wait_gone(gpu1)
    nothing_is_left(state)


def the_link() -> Entry:
    (entry,) = registry.entries(registry.LINK)
    return entry


def only_worker(router: HybridRouter) -> WorkerStatus:
    (worker,) = router.check_workers()
    return worker


def answer(router: HybridRouter) -> str:
    return str(router.route_request("demo:sharded", QUESTION, max_tokens=2)["message"]["content"])


# --- processes of a link, here and there ------------------------------------------------------------


def only(parent: Callable[[], psutil.Process], is_wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
    """The only wanted child of a process: others begin and end at any moment, such as each `sleep` of a script."""

    def found() -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [child for child in parent().children() if is_wanted(child)]
            return children[0] if len(children) == 1 else None
        return None

    child = eventually(found, "there is one")
    assert child is not None
    return child


def master(machine: Machine) -> psutil.Process:
    """The ssh process here that keeps the connection."""
    return only(lambda: psutil.Process(the_link().pid), lambda child: "-M" in child.cmdline())


def worker_there(machine: Machine) -> psutil.Process:
    (found,) = machine.workers()
    return found


def session_there(machine: Machine) -> psutil.Process:
    """The process of sshd that serves the connection for its user."""
    return agent(machine).parent()  # type: ignore[return-value]


def agent(machine: Machine) -> psutil.Process:
    return keeper(machine).parent()  # type: ignore[return-value]


def keeper(machine: Machine) -> psutil.Process:
    """The part of the agent that started the worker."""
    return worker_there(machine).parent()  # type: ignore[return-value]


def guard(machine: Machine) -> psutil.Process:
    return only(lambda: agent(machine), lambda child: child != keeper(machine))


def listener(machine: Machine) -> psutil.Process:
    return only(lambda: keeper(machine), lambda child: child.name() == "sh")


# --- tests ------------------------------------------------------------------------------------------


def test_one_line_leads_to_an_answer_and_nothing_listens_beyond_loopback_or_is_left(
    gpu1: Machine, empty_state: Path
) -> None:
    with HybridRouter(rpc_backends=[gpu1.target]) as mine:
        assert answer(mine) == "A worker"
        worker = only_worker(mine)
        assert (worker.name, worker.state) == ("gpu1", "held")
        assert mine.coordinator is not None
        (endpoint,) = mine.coordinator.rpc_backends
        assert endpoint.startswith("127.0.0.1:")
        assert worker.probe is not None
        assert worker.probe.round_trip_ms is not None
        ours = {(address, port) for address, port in gpu1.listening() if port != gpu1.host.port}
        assert [address for address, _ in ours] == ["127.0.0.1"]
        with HybridRouter(rpc_backends=[gpu1.target]) as second:
            answer(second)
            assert second.coordinator is not None
            assert second.coordinator.pid == mine.coordinator.pid
            link_pid = the_link().pid
        assert answer(mine) == "A worker", "the other one left it running"
        assert the_link().pid == link_pid
    assert registry.entries() == []
    wait_gone(gpu1)
    assert {path.name for path in gpu1.home.iterdir()} <= {".cache"}


def test_a_link_that_nobody_uses_ends_after_its_keep_alive(gpu1: Machine) -> None:
    with HybridRouter(rpc_backends=[gpu1.target], keep_alive=1) as mine:
        answer(mine)
        mine.close(keep=True)
    eventually(lambda: not registry.entries(), "coordinator and link end")
    wait_gone(gpu1)


def test_after_the_loss_of_any_process_of_the_link_its_worker_comes_back_at_the_same_endpoint(
    gpu1: Machine,
) -> None:
    with HybridRouter(rpc_backends=[gpu1.target]) as mine:
        answer(mine)
        endpoint, link_pid = only_worker(mine).endpoint, the_link().pid
        guard(gpu1).kill()  # it is needed only where the process that it guards is lost
        for victim in (worker_there, agent, keeper, master, listener, session_there):
            worker = worker_there(gpu1)
            victim(gpu1).kill()
            eventually(lambda: not is_alive(worker), f"without {victim.__name__}, the worker ends")  # noqa: B023
            eventually(gpu1.workers, "another one is started")
            eventually(lambda: list(the_link().endpoints) == [endpoint], "it is reached")
        assert the_link().pid == link_pid
        assert answer(mine) == "A worker"


@linux_only
def test_where_all_that_watches_a_worker_is_killed_at_once_the_worker_ends_and_comes_back(
    gpu1: Machine, engine: Engine
) -> None:
    with link_to(gpu1, engine, silence_s=ssh.SILENCE_S) as entry:  # a late heartbeat must not end the worker first
        eventually(lambda: entry().about["state"] == link.READY, "it is ready")
        worker = worker_there(gpu1)
        kill_at_once(
            process for process in [agent(gpu1), *agent(gpu1).children(recursive=True)] if process != worker
        )
        eventually(lambda: not is_alive(worker), "the worker ends")
        eventually(gpu1.workers, "another one is started")
        eventually(lambda: entry().endpoints, "it is reached")


@pytest.mark.parametrize("victim", ["pid", "supervisor_pid"])
def test_after_the_loss_of_the_link_itself_the_next_request_starts_it_again(gpu1: Machine, victim: str) -> None:
    with HybridRouter(rpc_backends=[gpu1.target]) as mine:
        answer(mine)
        before = worker_there(gpu1)
        psutil.Process(getattr(the_link(), victim)).kill()
        eventually(lambda: not is_alive(before), "nothing runs there any more")
        assert answer(mine) == "A worker"


@contextlib.contextmanager
def link_to(machine: Machine, engine: Engine, silence_s: int = SILENCE_S) -> Iterator[Callable[[], Entry]]:
    """A link; gives its registry entry as it is now.

    Args:
        silence_s: how long the far side waits for the next heartbeat, by default shorter than usual.
    """
    spec = {
        "ssh": shlex.split(machine.ssh),
        "server": str(engine.server),
        "worker": str(engine.worker),
        "version": engine.version,
        "source": engine.source,
        "protocol": engine.protocol,
        "silence_s": silence_s,
    }
    process = run(link.start_link("ssh", machine.target, spec, keep_alive_s=600.0))
    try:
        run(process.hold())
        yield the_link
    finally:
        run(process.stop())


def test_where_the_network_is_cut_silently_the_far_side_ends_everything_and_the_link_connects_again(
    gpu1: Machine, engine: Engine
) -> None:
    with link_to(gpu1, engine) as entry:
        eventually(lambda: entry().about["state"] == link.READY, "it is ready")
        endpoints = eventually(lambda: set(entry().endpoints), "its worker is reached")
        gpu1.cut()
        try:
            wait_gone(gpu1)
        finally:
            gpu1.connect_again()
        lost = eventually(lambda: now if (now := entry()).about["state"] == link.LOST else None, "it notices")
        assert lost is not None
        assert lost.endpoints == {}
        eventually(lambda: set(entry().endpoints) == endpoints, "it is ready again, at the same endpoint")


def test_where_the_network_is_cut_for_good_nothing_stays_there_after_the_link_has_ended(
    gpu1: Machine, engine: Engine
) -> None:
    try:
        with link_to(gpu1, engine) as entry:
            eventually(lambda: entry().about["state"] == link.READY, "it is ready")
            gpu1.cut()
        wait_gone(gpu1)
    finally:
        gpu1.connect_again()


def test_a_machine_that_cannot_be_used_is_one_line_and_leaves_nothing(gpu1: Machine) -> None:
    gpu1.restart_sshd(AllowTcpForwarding="no")
    try:
        with HybridRouter(rpc_backends=[gpu1.target]) as mine:
            with pytest.raises(WorkersUnavailableError) as failure:
                answer(mine)
            assert "gpu1: its sshd forbids forwarding" in str(failure.value)
            assert "\n" not in str(failure.value)
            assert registry.entries(registry.LINK) == []
            wait_gone(gpu1)
    finally:
        gpu1.restart_sshd()
