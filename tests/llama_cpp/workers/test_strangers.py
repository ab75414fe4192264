"""Workers that nobody named: those of this user's own processes are shared, those of strangers are left alone."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import machine
from sollol_nb.llama_cpp.workers import workers
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, discover, probe
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, eventually, run, says, script, tunnel_to, unused_ports
from tests.support.machines import running_machines

pytestmark = pytest.mark.engine


@pytest.fixture
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without any engine."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))


@pytest.fixture
def listen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Starts a worker by hand, without any registry, on a port that discovery searches."""
    first = unused_ports(4)
    ports = iter(range(first, first + 4))
    monkeypatch.setattr(workers, "discover", partial(discover, ports=range(first, first + 4)))
    with ExitStack() as stack:

        def start(host: str = "127.0.0.1") -> str:
            port = next(ports)
            process = subprocess.Popen(
                [str(engine.worker), "-H", host, "-p", str(port), "-t", "1"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            free = ProbeOutcome.FREE
            eventually(lambda: run(probe("127.0.0.1", port)).outcome is free, "it listens")
            return f"127.0.0.1:{port}"

        yield start


def test_a_worker_that_somebody_else_started_is_not_taken_unasked(
    empty_state: None, listen: Callable[..., str]
) -> None:
    stranger = listen()
    with HybridRouter(num_rpc_backends=1) as mine:
        with pytest.raises(WorkersUnavailableError, match=r"none is known; .*%sollol_cluster discover"):
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        with pytest.raises(WorkersUnavailableError, match="the benchmark needs 1 worker but found only 0"):
            mine.bench("demo:sharded", layouts=[1])
        assert mine.worker_endpoints == []
        assert mine.discover_workers() == [stranger]
    with HybridRouter(num_rpc_backends=1, auto_discover_rpc=True) as asked:
        asked.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert asked.coordinator is not None
        assert asked.coordinator.rpc_backends == [stranger]


def test_who_names_workers_gets_no_others(empty_state: None, listen: Callable[..., str]) -> None:
    named, _ = listen(), listen()
    with HybridRouter(rpc_backends=[named], num_rpc_backends=2) as mine:
        answer = mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert mine.coordinator is not None
        assert mine.coordinator.rpc_backends == [named]
        assert "it runs on 1 worker instead of 2: no more were free" in answer.routing["reason"]


@pytest.mark.skipif(os.name != "posix" or machine.sys.platform != "linux", reason="only Linux says who listens")
def test_a_worker_of_another_user_is_not_discovered_but_can_be_named(
    empty_state: None, listen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = listen()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with HybridRouter(auto_discover_rpc=True) as mine:
        assert mine.discover_workers() == []
        (message,) = [event.message for event in mine.events.recent()]
        assert message.startswith(f"{theirs} is a worker of user ")
        assert message.endswith("and is not used; add it if you may use it")
        with pytest.raises(WorkersUnavailableError, match="none is known"):
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        searched = [event for event in mine.events.recent() if event.kind == "worker.discovered"]
        assert len(searched) == 2, "once for each of the two searches"
        assert mine.add_worker(theirs).state == "free"


START_ONE = """
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.sync_wrapper import HybridRouter
import sys
with HybridRouter() as router:
    print("started", *router.start_workers(1), flush=True)
    sys.stdin.readline()
"""


def test_a_free_worker_of_this_users_other_process_is_shared(
    empty_state: None, engine: Engine, tmp_path: Path
) -> None:
    with script(START_ONE, SOLLOL_STATE_DIR=str(tmp_path)) as other, HybridRouter() as mine:
        started = says(other, "started")
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert mine.coordinator is not None
        assert mine.coordinator.rpc_backends == [started]
        other.communicate("\n")
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=2)["done"], "it stays as long as it is used"


JOIN = """
import sys
from sollol_nb.cli.main import main
sys.exit(main(["worker", "--join", "-"]))
"""


def test_who_names_a_machine_gets_no_workers_that_other_notebooks_have(
    empty_state: None, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "machines"
    folder.mkdir()
    with running_machines(folder, ["gpu1", "gpu2"]) as (gpu1, gpu2):
        monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
        with (
            HybridRouter(rpc_backends=[gpu2.target]) as theirs,
            script(JOIN, SOLLOL_LLAMA_CPP=str(engine.server.parent)) as joining,
            HybridRouter(rpc_backends=[gpu1.target], num_rpc_backends=4) as mine,
        ):
            theirs.start_workers(1)
            theirs.add_worker(gpu2.target)
            assert joining.stdin is not None
            joining.stdin.write(f"{theirs.invite(host='127.0.0.1').link}\n")
            joining.stdin.flush()
            eventually(lambda: theirs.invitations().joined, "it has joined")
            eventually(lambda: len([w for w in theirs.check_workers() if w.state == "free"]) == 3, "all are free")
            # A local worker, one behind ssh and a joined one: all are of this machine.
            assert {worker.capacity.memory_domain for worker in theirs.check_workers()} == {LOOPBACK}
            answer = mine.route_request("demo:sharded", QUESTION, max_tokens=2)
            assert "it runs on 1 worker instead of 4: no more were free" in answer.routing["reason"]
            assert [worker.label for worker in mine.check_workers()] == ["gpu1"]
            assert [worker.state for worker in mine.check_workers()] == ["held"]


# --- one worker under two names --------------------------------------------------------------------------------


def test_one_worker_under_two_names_is_used_once(empty_state: None, listen: Callable[..., str]) -> None:
    name = listen()
    port = int(name.rpartition(":")[2])
    with HybridRouter(rpc_backends=[name, f"localhost:{port}", f"LOCALHOST:{port}"]) as mine:
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert mine.coordinator is not None
        assert mine.coordinator.rpc_backends == [name]
        second = mine.cluster().workers[1]
        assert (second.state, second.detail) == ("duplicate", f"the same worker as {name}, which is used")


def test_a_running_coordinator_is_used_where_its_worker_has_another_name(
    empty_state: None, listen: Callable[..., str]
) -> None:
    name = listen()
    with HybridRouter(rpc_backends=[name]) as first:
        first.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert first.coordinator is not None
        pid = first.coordinator.pid
        first.close(keep=True)
    with HybridRouter(rpc_backends=[f"localhost:{name.rpartition(':')[2]}"]) as second:
        second.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert second.coordinator is not None
        assert second.coordinator.pid == pid


@pytest.mark.skipif(machine.sys.platform != "linux", reason="only Linux says which addresses a program listens on")
def test_a_worker_that_listens_on_all_addresses_is_one_worker(
    empty_state: None, listen: Callable[..., str]
) -> None:
    port = int(listen("0.0.0.0").rpartition(":")[2])
    names = [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    names += [
        f"{address.address}:{port}"
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and address.address != "127.0.0.1"
    ]
    with HybridRouter(rpc_backends=names) as mine:
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert mine.coordinator is not None
        assert mine.coordinator.rpc_backends == names[:1]


def test_a_worker_that_is_also_named_through_a_tunnel_is_used_once(
    empty_state: None, listen: Callable[..., str], first_is_waited_for: None
) -> None:
    name = listen()
    with tunnel_to(int(name.rpartition(":")[2])) as port:
        through = f"127.0.0.1:{port}"
        with HybridRouter(rpc_backends=[name, through]) as mine:
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
            assert mine.coordinator is not None
            assert mine.coordinator.rpc_backends == [name]
            assert mine.cluster().workers[1].state == "duplicate"
