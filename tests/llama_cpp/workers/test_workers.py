"""Workers: how local ones start, listen, share cores and end, and which states all of them have."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sollol_nb.errors import ConfigError, EngineError, WorkerStartError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.workers import local as local_module
from sollol_nb.llama_cpp.workers import local_workers, workers
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, parse_endpoint
from tests.support.engines import (
    OtherProtocolWorker,
    all_end,
    argument_after,
    engine_on,
    engines_of,
    eventually,
    run,
    says,
    script,
    serving,
    silent_peer,
    unused_port,
    unused_ports,
)

pytestmark = pytest.mark.engine

GIB = 2**30


@pytest.fixture
def mine(engine: Engine) -> Iterator[Workers]:
    """Workers that are all stopped at the end."""
    known = Workers([], EventBus())
    yield known
    run(known.local.stop())


def port_of(endpoint: str) -> int:
    return parse_endpoint(endpoint)[1]


def statuses_of(known: Workers) -> dict[str, WorkerStatus]:
    return {status.endpoint: status for status in run(known.refresh())}


# --- probing ----------------------------------------------------------------------------------


def test_a_worker_that_was_taken_during_its_probe_is_held_and_keeps_its_last_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "10.0.0.1:50052"
    free = Probe(
        endpoint=name,
        outcome=ProbeOutcome.FREE,
        detail="free",
        protocol=(7, 0, 0),
        device_free_bytes=(GIB,),
        total_bytes=GIB,
        round_trip_ms=0.4,
    )
    busy = Probe(endpoint=name, outcome=ProbeOutcome.BUSY, detail="in use")
    coordinator = SimpleNamespace(kind=registry.COORDINATOR, name="demo", workers=[name], about={}, standby_of="")
    found, entries = iter([free, busy]), iter([[], [], [coordinator]])

    async def probe_all(*_: object, **__: object) -> list[Probe]:
        return [next(found)]

    monkeypatch.setattr(workers, "probe_all", probe_all)
    monkeypatch.setattr(registry, "entries", lambda: next(entries))
    mine = Workers([name], EventBus())
    assert statuses_of(mine)[name].state == "free"

    (seen,) = run(mine.refresh())

    assert (seen.state, seen.held_by, seen.probe) == ("held", "demo", free)


def test_a_discovered_worker_is_immediately_known_to_be_free(engine: Engine, mine: Workers) -> None:
    (started,) = run(mine.local.start(engine, 1))
    other = Workers([], EventBus())

    assert started in run(other.discover())
    assert {status.endpoint: status.state for status in other.statuses()}[started] == "free"
    run(other.local.close())


# --- starting ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient_probes")
def test_local_workers_take_the_first_free_ports_from_the_given_one_upward(engine: Engine, mine: Workers) -> None:
    first = unused_ports(6)
    with ExitStack() as held:
        for taken in (first, first + 2):
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", taken))
            listener.listen()

        endpoints = run(mine.local.start(engine, 3, first_port=first))

    assert endpoints == [f"127.0.0.1:{first + step}" for step in (1, 3, 4)]
    assert [status.state for status in mine.statuses()] == ["free"] * 3
    assert all(status.is_local for status in mine.statuses())


def test_local_workers_start_at_the_usual_port_and_listen_on_loopback_only(engine: Engine, mine: Workers) -> None:
    endpoints = run(mine.local.start(engine, 2))

    assert DEFAULT_RPC_PORT == 50052
    assert all(port_of(endpoint) >= 50052 for endpoint in endpoints)
    for endpoint in endpoints:
        listening = [
            sock.laddr
            for sock in engine_on(port_of(endpoint)).net_connections()
            if sock.status == psutil.CONN_LISTEN
        ]
        assert listening == [("127.0.0.1", port_of(endpoint))]


@pytest.mark.parametrize(("cores", "count", "threads"), [(8, 2, "4"), (7, 3, "2"), (1, 3, "1")])
def test_the_workers_share_the_cores(
    engine: Engine,
    mine: Workers,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    count: int,
    threads: str,
) -> None:
    monkeypatch.setattr(local_workers, "usable_cores", lambda: cores)

    endpoints = run(mine.local.start(engine, count))

    assert [argument_after(engine_on(port_of(endpoint)), "-t") for endpoint in endpoints] == [threads] * count


START_THREE = """
from sollol_nb.sync_wrapper import HybridRouter
import sys
with HybridRouter(auto_discover_rpc=False) as router:
    print("started", *router.start_workers(3), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_that_start_workers_concurrently_get_different_ports(engine: Engine) -> None:
    with script(START_THREE) as first, script(START_THREE) as second:
        endpoints = says(first, "started").split() + says(second, "started").split()
        processes = [engine for each in (first, second) for engine in engines_of(psutil.Process(each.pid))]
        first.communicate("\n")
        second.communicate("\n")

    assert len(set(endpoints)) == len(endpoints) == 6
    assert len(processes) == 6
    all_end(processes)


@pytest.mark.parametrize("holder", ["a silent program", "another worker"])
@pytest.mark.usefixtures("patient_probes")
def test_a_worker_whose_port_is_taken_after_it_was_found_free_starts_on_the_next_one(
    engine: Engine, mine: Workers, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    first = unused_ports(5)
    other = Workers([], EventBus())
    with ExitStack() as held:
        if holder == "a silent program":
            held.enter_context(silent_peer(first + 1))
        else:
            run(other.local.start(engine, 1, first_port=first + 1))
        # As if another program took the port just after it was found free.
        monkeypatch.setattr(local_module, "free_ports", lambda start, count: list(range(start, start + count)))
        started = run(mine.local.start(engine, 3, first_port=first))
        run(other.local.stop())

    assert started == [f"127.0.0.1:{first + step}" for step in (0, 2, 3)]
    assert [status.state for status in mine.statuses()] == ["free"] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="a script with a shebang stands for the worker")
def test_a_worker_that_ends_while_starting_is_reported_with_its_last_log_lines_and_none_is_left(
    engine: Engine, mine: Workers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-worker"
    broken.write_text("#!/bin/sh\necho hello\necho 'error: no memory'\nexit 1\n")
    broken.chmod(0o700)
    before = engines_of(psutil.Process())

    with pytest.raises(WorkerStartError) as caught:
        run(mine.local.start(replace(engine, worker=broken), 3))

    message = str(caught.value)
    assert "ended while starting: error: no memory; log: " in message
    assert "\n" not in message
    assert Path(message.rpartition("log: ")[2]).is_file()
    assert [process for process in engines_of(psutil.Process()) if process not in before] == []
    assert mine.endpoints == []


@pytest.mark.skipif(sys.platform == "win32", reason="a script with a shebang stands for the worker")
def test_a_worker_that_never_answers_is_given_up_and_ended(
    engine: Engine, mine: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    mute = tmp_path / "mute-worker"
    mute.write_text(f"#!/bin/sh\necho $$ > {pid_file}.new; mv {pid_file}.new {pid_file}\nexec sleep 600\n")
    mute.chmod(0o700)
    # However slowly it starts, the time is over only when it runs.
    looks = count()
    clock = SimpleNamespace(monotonic=lambda: 21.0 * next(looks) if pid_file.exists() else 0.0)
    monkeypatch.setattr(local_module, "time", clock)

    with pytest.raises(WorkerStartError, match=r"did not answer within 20 s; log: "):
        run(mine.local.start(replace(engine, worker=mute), 1))

    assert not psutil.pid_exists(int(pid_file.read_text()))
    assert mine.endpoints == []


def test_a_missing_worker_program_is_named(engine: Engine, mine: Workers, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"could not run .*no-such-worker: .*sollol-nb doctor"):
        run(mine.local.start(replace(engine, worker=tmp_path / "no-such-worker"), 1))
    assert mine.endpoints == []


@pytest.mark.parametrize("count", [0, -1, 65])
def test_an_invalid_number_of_workers_is_refused(engine: Engine, mine: Workers, count: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot start {count} workers; choose between 1 and 64"):
        run(mine.local.start(engine, count))


def test_too_few_ports_say_what_to_do() -> None:
    with pytest.raises(
        WorkerStartError, match=r"127.0.0.1 has only \d free ports? from 65530 upward \(9 needed\); choose a lower"
    ):
        free_ports(65530, 9)


# --- ending -----------------------------------------------------------------------------------


def test_stopped_workers_end_and_are_forgotten(engine: Engine, mine: Workers) -> None:
    kept, *stopped = run(mine.local.start(engine, 3))
    processes = [engine_on(port_of(endpoint)) for endpoint in stopped]

    assert run(mine.local.stop(stopped)) == stopped
    all_end(processes)
    assert mine.endpoints == [kept]

    last = engine_on(port_of(kept))
    assert run(mine.local.stop()) == [kept]
    all_end([last])
    assert run(mine.local.stop()) == [], "stopping twice is fine"


def test_a_killed_local_worker_shows_as_down(engine: Engine, mine: Workers) -> None:
    killed, other = run(mine.local.start(engine, 2))
    engine_on(port_of(killed)).kill()

    description = f"killed (signal {signal.SIGKILL})"
    eventually(lambda: statuses_of(mine)[killed].detail == description, "its end is noticed")

    assert statuses_of(mine)[killed].state == "down"
    assert statuses_of(mine)[other].state == "free"


@contextmanager
def holding(endpoint: str, model: str) -> Iterator[None]:
    """A coordinator that holds this worker, according to the registry."""
    holder = run(
        EngineProcess.start(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            kind="coordinator",
            about={"model": model, "workers": [endpoint]},
            keep_alive_s=60,
            log_path=config.log_dir() / "holder.log",
        )
    )
    try:
        yield
    finally:
        run(holder.stop())


# --- states ---------------------------------------------------------------------------------


def test_each_state_is_distinguished(engine: Engine, mine: Workers) -> None:
    free, held = run(mine.local.start(engine, 2))
    with silent_peer() as silent, serving(OtherProtocolWorker) as newer:
        refused = unused_port()
        for port in (silent, newer, refused):
            mine.add(f"127.0.0.1:{port}")
        probed_before = statuses_of(mine)[held].probe
        with holding(held, "llama3.1:70b"):
            seen = statuses_of(mine)
            assert statuses_of(mine)[held].probe is probed_before, "a held worker is not probed"

    assert {endpoint: (status.state, status.held_by) for endpoint, status in seen.items()} == {
        free: ("free", None),
        held: ("held", "llama3.1:70b"),
        f"127.0.0.1:{silent}": ("busy", None),
        f"127.0.0.1:{newer}": ("incompatible", None),
        f"127.0.0.1:{refused}": ("down", None),
    }
    assert seen[held].detail == "held by the coordinator of llama3.1:70b, started by this kernel"
    assert "RPC protocol 8.0.0" in seen[f"127.0.0.1:{newer}"].detail
    assert statuses_of(mine)[held].state == "free"


def test_workers_of_one_machine_share_its_memory_in_the_plan(engine: Engine, mine: Workers) -> None:
    run(mine.local.start(engine, 2))
    capacities = [status.capacity for status in mine.statuses()]
    assert {capacity.memory_domain for capacity in capacities} == {"127.0.0.1"}
    assert all(0 < capacity.free_bytes <= capacity.total_bytes for capacity in capacities)
    assert all(capacity.round_trip_ms > 0 for capacity in capacities)


def test_an_endpoint_is_added_once_and_can_be_removed() -> None:
    known = Workers(["10.1.2.3", "10.1.2.3:50052"], EventBus())
    assert known.endpoints == ["10.1.2.3:50052"]
    message = (
        r"10.1.2.3:50052 is held by the coordinator of some model, started by this kernel; stop that coordinator"
    )
    with holding("10.1.2.3:50052", "some model"), pytest.raises(ConfigError, match=message):
        known.remove("10.1.2.3:50052")
    known.remove("10.1.2.3:50052")
    with pytest.raises(ConfigError, match=r"10.1.2.3:50052 is not a known worker; known workers: none"):
        known.remove("10.1.2.3:50052")


def test_the_start_and_stop_of_workers_are_events(engine: Engine) -> None:
    events = EventBus()
    mine = Workers([], events)
    (endpoint,) = run(mine.local.start(engine, 1))
    run(mine.local.stop())
    assert [(event.kind, event.subject) for event in events.recent()] == [
        ("worker.started", endpoint),
        ("worker.stopped", endpoint),
    ]
