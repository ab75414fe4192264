"""Looking for workers on this machine, in a private network and by announcement; each is found once."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sollol_nb.cli import main as cli
from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.workers import announcements, discovery, scan, workers
from sollol_nb.llama_cpp.workers.announcements import Announced, announceable, cleaned, reachable
from sollol_nb.llama_cpp.workers.discovery import FoundWorker, as_table
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.llama_cpp.workers.scan import addresses_in
from sollol_nb.router.remote.calls import CALLS
from sollol_nb.router.remote.plain_data import to_plain
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import REPOSITORY, eventually, run, says, tunnel_to, unused_ports, worker_on
from tests.support.machines import Machine, running_machines

PORTS = range(50052, 50056)
"""In the network namespaces of the test machines all ports are free."""


# --- what may be scanned --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("8.8.8.0/24", r"^8\.8\.8\.0/24 is not a private network"),
        ("100.64.0.0/24", "is not a private network"),
        ("0.0.0.0/0", "is not a private network"),
        ("192.168.0.0/21", r"^192\.168\.0\.0/21 has 2,048 addresses; at most 1,024 \(a /22\) are scanned"),
        ("fd00::/120", "is not an IPv4 network; use one such as 192.168.1.0/24"),
        ("gpu1", "is not an IPv4 network"),
        ("", "is not an IPv4 network"),
    ],
)
def test_only_a_small_private_network_is_scanned(network: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        addresses_in(network)


def test_addresses_of_a_network_are_those_of_its_hosts() -> None:
    assert len(addresses_in("192.168.1.0/24")) == 254
    assert len(addresses_in("172.16.4.0/22")) == 1022
    assert addresses_in("169.254.3.7") == ["169.254.3.7"]


def test_a_scan_of_a_network_stops_at_addresses_that_do_not_react_and_bounds_its_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[str, int]] = []
    now = most = 0

    async def sock_connect(self: Any, trial: Any, address: tuple[str, int]) -> None:
        nonlocal now, most
        if not address[0].startswith("10.0."):  # of something that other tests left to end
            raise ConnectionRefusedError
        tried.append(address)
        now += 1
        most = max(most, now)
        try:
            await asyncio.sleep(0)
            host, port = address
            if host.endswith((".7", ".9")):
                if port != 50053:
                    raise ConnectionRefusedError
            else:
                raise TimeoutError
        finally:
            now -= 1

    async def check() -> list[str]:
        monkeypatch.setattr(type(asyncio.get_running_loop()), "sock_connect", sock_connect)
        return await scan.scan(addresses_in("10.0.0.0/22"), range(50052, 50068))

    assert run(check()) == [f"10.0.{part}.{host}:50053" for part in range(4) for host in (7, 9)]
    assert len(tried) == 1022 + 8 * 15
    assert most <= scan.MAX_CONNECTIONS


# --- what an announcement may say -----------------------------------------------------------------


def test_an_announced_address_counts_only_in_a_private_network_of_this_machine() -> None:
    import ipaddress

    networks = [ipaddress.IPv4Interface("192.168.1.5/24"), ipaddress.IPv4Interface("203.0.113.5/24")]
    given = ["192.168.2.9", "8.8.8.8", "127.0.0.1", "203.0.113.9", "fe80::1", "not an address", "192.168.1.9"]
    assert reachable(given, networks) == ["192.168.1.9"]


def test_announced_texts_are_cleaned_and_cut() -> None:
    assert cleaned("gpu\x1b[2J1\n\u202e") == "gpu[2J1"
    assert cleaned(b"\xff" * 10_000) == "\ufffd" * 64
    assert cleaned(None) == ""


def test_a_worker_that_only_this_machine_reaches_is_not_announced() -> None:
    with pytest.raises(ConfigError, match=r"^a worker that listens on 127\.0\.0\.1 cannot be announced"):
        announceable("127.0.0.1")


def test_a_worker_on_loopback_is_not_started_to_be_announced(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["worker", "--announce"]) == 1
    assert capsys.readouterr().err.startswith("sollol-nb: a worker that listens on 127.0.0.1 cannot be announced")


def test_without_zeroconf_the_command_that_installs_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("zeroconf", "zeroconf.asyncio"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["discover", "--mdns"]) == 1
    assert capsys.readouterr().err == "sollol-nb: mDNS needs the package zeroconf; run: pip install zeroconf\n"


def test_a_gateway_can_look_for_its_notebooks() -> None:
    found = [FoundWorker(name="ssh://gpu1", sources=("ssh", "mDNS"), state="reachable", free_bytes=2**30)]
    call = CALLS["find_workers"]
    assert call.controls
    assert call.result(json.loads(json.dumps(to_plain(found)))) == found
    assert call.arguments({"ssh": ["gpu1"], "scan": None, "mdns": True}) == {
        "ssh": ["gpu1"],
        "scan": None,
        "mdns": True,
    }


# --- real workers -----------------------------------------------------------------------------------


@pytest.fixture
def ports(alone: None, monkeypatch: pytest.MonkeyPatch) -> range:
    """The usual ports, on which nothing listens yet, and a user without any engine."""
    first = unused_ports(4)
    monkeypatch.setattr(discovery, "DISCOVERY_PORTS", range(first, first + 4))
    return range(first, first + 4)


@pytest.mark.engine
def test_a_worker_that_several_sources_have_is_one_row(
    engine: Engine, ports: range, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named, unnamed = f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    monkeypatch.setenv("RPC_BACKENDS", named)
    with worker_on(engine, "0.0.0.0", ports[0]), worker_on(engine, "127.0.0.1", ports[1]):
        assert cli.main(["discover", "--scan", "127.0.0.0/24", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["name"], row["sources"], row["state"], row["add_line"]) for row in rows] == [
            (named, ["RPC_BACKENDS", "this machine", "scan of 127.0.0.0/24"], "free", ""),
            (unnamed, ["this machine", "scan of 127.0.0.0/24"], "free", f"%sollol_cluster add {unnamed}"),
        ]
        assert all(row["free_bytes"] > 0 and row["round_trip_ms"] > 0 for row in rows)
        with HybridRouter(rpc_backends=[]) as mine:
            mine.find_workers(scan="127.0.0.0/24")
            assert mine.worker_endpoints == [], "what is found is not taken"


@pytest.mark.engine
def test_a_worker_that_another_notebook_reaches_through_a_link_is_not_taken(
    engine: Engine, ports: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    (far,) = (unused_ports(1),)
    with worker_on(engine, "127.0.0.1", far), tunnel_to(far, "::1") as port:
        target = f"[::1]:{port}"
        with HybridRouter(rpc_backends=[target]) as theirs, HybridRouter(auto_discover_rpc=True) as mine:
            theirs.add_worker(target)
            (linked,) = theirs.worker_endpoints
            linked_port = int(linked.rpartition(":")[2])
            monkeypatch.setattr(workers, "discover", lambda: workers_on(linked_port))
            monkeypatch.setattr(discovery, "DISCOVERY_PORTS", range(linked_port, linked_port + 1))
            assert mine.discover_workers() == []
            (row,) = mine.find_workers()
            assert (row.name, row.state) == (target, "connected")
            assert row.sources[0].startswith("link started by ")
            assert row.add_line == f"%sollol_cluster add {target}"


async def workers_on(port: int) -> list[Any]:
    return [await probe("127.0.0.1", port)]


# --- other machines ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu1(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine in this network with a worker on its address."""
    with running_machines(tmp_path_factory.mktemp("machines"), ["gpu1"]) as (machine,):
        argv = [engine.worker, "-H", machine.address, "-p", str(PORTS[0]), "-t", "1"]
        machine.start(*argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        free = ProbeOutcome.FREE
        eventually(lambda: run(probe(machine.address, PORTS[0])).outcome is free, "it listens")
        yield machine


@pytest.fixture
def looking(alone: None, gpu1: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[HybridRouter]:
    monkeypatch.setattr(discovery, "DISCOVERY_PORTS", PORTS)
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    with HybridRouter(auto_discover_rpc=False) as router:
        yield router


def rows_of(machine: Machine, found: list[FoundWorker]) -> list[tuple[str, tuple[str, ...], str]]:
    """Those of another machine: this one may have others on the usual ports."""
    rows = [row for row in found if machine.address in row.name]
    return [(row.name, row.sources, row.state) for row in rows]


@pytest.mark.engine
def test_a_scan_finds_the_worker_of_another_machine_and_names_the_line_that_adds_it(
    looking: HybridRouter, gpu1: Machine
) -> None:
    name = f"{gpu1.address}:{PORTS[0]}"
    network = f"{gpu1.address.rpartition('.')[0]}.0/24"
    found = looking.find_workers(scan=network)
    assert rows_of(gpu1, found) == [(name, (f"scan of {network}",), "free")]
    assert f"%sollol_cluster add {name}" in as_table(found)
    assert looking.add_worker(name).state == "free"
    again = looking.find_workers(scan=network)
    assert rows_of(gpu1, again) == [(name, ("used here", f"scan of {network}"), "free")]


LIE = """
import asyncio, sys
from zeroconf import ServiceInfo
from zeroconf.asyncio import AsyncZeroconf
SERVICE = "_sollol-rpc._tcp.local."
async def main():
    zeroconf = AsyncZeroconf(interfaces=[sys.argv[1]])
    own = sys.argv[1]
    lies = ("here", "127.0.0.1", 22), ("public", "8.8.8.8", 50052), ("nothing", own, 9), ("sshd", own, 22)
    infos = [
        ServiceInfo(SERVICE, f"{name}.{SERVICE}", port=port, parsed_addresses=[address], server=f"{name}.local.")
        for name, address, port in lies
    ]
    await asyncio.gather(*map(zeroconf.async_register_service, infos))
    print("announced", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await zeroconf.async_close()
asyncio.run(main())
"""


@contextmanager
def lying(machine: Machine) -> Iterator[None]:
    """A program on a machine that announces what is not there."""
    process = machine.start(
        sys.executable,
        "-c",
        LIE,
        machine.address,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        says(process, "announced")
        yield
    finally:
        process.communicate("\n", timeout=60)


@contextmanager
def announced_worker(machine: Machine, port: int) -> Iterator[None]:
    """`sollol-nb worker --announce` on a machine, until it is interrupted."""
    process = machine.start(
        *(
            sys.executable,
            "-m",
            "sollol_nb",
            "worker",
            "--announce",
            "--host",
            machine.address,
            "--port",
            str(port),
        ),
        cwd=REPOSITORY,
        env={"SOLLOL_LLAMA_CPP": str(find_engine().server.parent), "XDG_CACHE_HOME": str(machine.home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said: list[str] = []
        while not said or not said[-1].endswith(f"announced to the local network as {machine.address}:{port}\n"):
            said.append(process.stderr.readline())
            assert said[-1], said
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.engine
def test_an_announced_worker_is_found_and_false_announcements_are_not_shown(
    looking: HybridRouter, gpu1: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    async def browse() -> list[Announced]:
        announced = await announcements.browse()
        heard.extend(worker.name for worker in announced)
        return announced

    monkeypatch.setattr(discovery, "browse", browse)
    if gpu1.namespace is None:
        with pytest.raises(ConfigError, match="cannot be announced"):
            announceable(gpu1.address)
        return

    def look() -> list[FoundWorker]:
        heard.clear()
        found = looking.find_workers(mdns=True)
        return found if len(heard) >= 3 else []

    with announced_worker(gpu1, PORTS[1]), lying(gpu1):
        found = eventually(look, "all have answered while it looked")
    assert sorted(heard) == [f"gpu1-{PORTS[1]}", "nothing", "sshd"]
    assert rows_of(gpu1, found) == [(f"{gpu1.address}:{PORTS[1]}", ("mDNS",), "free")]
    (row,) = (row for row in found if gpu1.address in row.name)
    assert row.detail == f"announced as gpu1-{PORTS[1]}, llama.cpp {find_engine().version}"
    assert not any("8.8.8.8" in row.name or row.name.endswith(":22") for row in found)


@pytest.mark.engine
def test_a_host_that_is_named_for_ssh_is_looked_at_and_nothing_is_installed_there(
    looking: HybridRouter, gpu1: Machine
) -> None:
    before = sorted(gpu1.home.rglob("*"))
    hosts = [row for row in looking.find_workers(ssh=["gpu1", "nowhere.invalid"]) if row.sources == ("ssh",)]
    there, nowhere = hosts
    assert (there.name, there.state, there.is_known) == ("ssh://gpu1", "reachable", False)
    assert "core" in there.detail
    assert there.free_bytes
    assert there.add_line == "%sollol_cluster add ssh://gpu1"
    assert (nowhere.name, nowhere.state, nowhere.add_line) == ("ssh://nowhere.invalid", "down", "")
    assert "nowhere.invalid" in nowhere.detail
    assert "\n" not in nowhere.detail
    assert sorted(gpu1.home.rglob("*")) == before
    assert looking.worker_endpoints == []
