"""Clusters for benchmarks: workers and llama-servers that no router has started, slow machines and far ones."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import wait_until

from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint, parse_endpoint


def free_port() -> int:
    """A random port, since several benchmarks may run; below those that the system gives to connections."""
    return free_ports(20_000 + secrets.randbelow(10_000), 1)[0]


@dataclass(frozen=True)
class Worker:
    """A worker that the router did not start."""

    endpoint: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def running_worker(threads: int = 1) -> Iterator[Worker]:
    """A worker on loopback, from when it answers."""
    port = free_port()
    command = [str(find_engine().worker), "-H", LOOPBACK, "-p", str(port), "-t", str(threads)]
    with ended(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)) as process:
        wait_until(
            lambda: run_blocking(probe(LOOPBACK, port)).outcome is ProbeOutcome.FREE,
            f"a worker on port {port}",
            process,
        )
        yield Worker(format_endpoint(LOOPBACK, port), process)


def answers(port: int) -> bool:
    """Whether a free worker is there."""
    return run_blocking(probe(LOOPBACK, port)).outcome is ProbeOutcome.FREE


@dataclass(frozen=True)
class Server:
    """A bare llama-server: no router, no supervisor.

    Attributes:
        url: such as `http://127.0.0.1:23110`.
        key: to be sent as a bearer token.
        ready_s: seconds from its start until it was ready.
    """

    url: str
    key: str
    process: subprocess.Popen[bytes]
    ready_s: float


@contextmanager
def bare_server(model: Path | str, endpoints: Sequence[str] = (), *flags: str) -> Iterator[Server]:
    """A llama-server over these workers (none: on this machine), from when it is ready, with these flags."""
    port = free_port()
    command = [str(find_engine().server), "-m", str(model), "--host", LOOPBACK, "--port", str(port)]
    if endpoints:
        command += ["--rpc", ",".join(endpoints), "-ngl", "99"]
    key = secrets.token_urlsafe(16)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, *flags],
        env=environment | {"LLAMA_API_KEY": key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with ended(process):
        url = f"http://{LOOPBACK}:{port}"
        wait_until(lambda: is_healthy(f"{url}/health"), f"llama-server on port {port}", process, poll_s=0.002)
        yield Server(url, key, process, time.perf_counter() - began)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process afterwards."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_healthy(url: str) -> bool:
    """Whether a server answers 200 there. Proxies are not used."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# --- slow machines ----------------------------------------------------------------------------

QUOTA_US = 1000  # the smallest that the kernel takes
_V1 = Path("/sys/fs/cgroup/cpu")
_V2 = Path("/sys/fs/cgroup")


@contextmanager
def slowed(worker: Worker, share: float) -> Iterator[str]:
    """Let a worker run for this share of a core; yields how, for a note.

    By the quota of a control group (version 1 or 2): 1 ms in every 4 ms for a quarter. A worker that waits for
    others most of the time may not need more than its share; then nothing slows it. Where no group can be made,
    the process is stopped and continued (SIGSTOP, SIGCONT) in the same proportion.
    """
    make = next((make for make in (_group_v1, _group_v2) if make(worker.pid, share)), None)
    if make is None:
        with _stopped_at_times(worker.pid, share):
            yield f"{share:.0%} of a core, by stopping it at times"
        return
    root = _V1 if make is _group_v1 else _V2
    try:
        yield f"{share:.0%} of a core, by the quota of a control group"
    finally:
        with contextlib.suppress(OSError):  # it may have ended
            (root / "cgroup.procs").write_text(str(worker.pid))
        wait_until(lambda: _removed(root / f"sollol-{worker.pid}"), "a control group")


def _group_v1(pid: int, share: float) -> bool:
    values = {"cpu.cfs_period_us": str(round(QUOTA_US / share)), "cpu.cfs_quota_us": str(QUOTA_US)}
    return _made_group(_V1 / f"sollol-{pid}", pid, values)


def _group_v2(pid: int, share: float) -> bool:
    with contextlib.suppress(OSError):
        (_V2 / "cgroup.subtree_control").write_text("+cpu")
    return _made_group(_V2 / f"sollol-{pid}", pid, {"cpu.max": f"{QUOTA_US} {round(QUOTA_US / share)}"})


def _made_group(group: Path, pid: int, values: Mapping[str, str]) -> bool:
    """Whether the process is now in a new control group with these values."""
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        for name, value in values.items():
            if not (group / name).exists():  # where the folder is no control group, any file could be written
                raise FileNotFoundError(name)
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        _removed(group)
        return False
    return True


def _removed(group: Path) -> bool:
    """Whether a control group is gone; it cannot be removed before its last process has left."""
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextmanager
def _stopped_at_times(pid: int, share: float) -> Iterator[None]:
    is_over = threading.Event()

    def stop_and_continue() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not is_over.wait(QUOTA_US / 1e6):
                os.kill(pid, signal.SIGSTOP)
                time.sleep((1 / share - 1) * QUOTA_US / 1e6)
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_continue)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def stuttering(worker: Worker, share: float, period_s: float = 0.001) -> Iterator[None]:
    """Let a worker run for this share of the time, in steps of a millisecond: see `stutter.py`."""
    script = Path(__file__).with_name("stutter.py")
    command = [sys.executable, str(script), str(worker.pid), str(share), str(period_s)]
    try:
        with ended(subprocess.Popen(command, stdout=subprocess.PIPE)) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"the worker {worker.endpoint} could not be slowed down")
            yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)


# --- far machines -----------------------------------------------------------------------------


@contextmanager
def delayed(endpoint: str, round_trip_s: float) -> Iterator[str]:
    """The endpoint of a proxy to a worker that is this much farther away. It is a separate process."""
    host, port = parse_endpoint(endpoint)
    script = Path(__file__).with_name("delay_proxy.py")
    command = [sys.executable, str(script), host, str(port), str(round_trip_s)]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        listens_on = process.stdout.readline()
        if not listens_on:
            raise RuntimeError(f"the delay proxy to {endpoint} did not start")
        yield format_endpoint(LOOPBACK, int(listens_on))
