"""RPC workers: starting them on this machine, and knowing the state of all that a router may use.

A worker is free, held (by which coordinator), busy (a stranger holds it, or it hangs), down or incompatible.
Flags of the worker binary live here. Workers do no authentication and no encryption (and have had remote code
execution bugs), so the ones started here listen on loopback only.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from sollol_nb import config
from sollol_nb.engine_process import EngineProcess
from sollol_nb.errors import ConfigError, WorkerStartError
from sollol_nb.events import EventBus
from sollol_nb.layer_plan import WorkerCapacity
from sollol_nb.rpc_discovery import Probe, ProbeOutcome, discover, probe, probe_all
from sollol_nb.toolchain import Engine

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 20.0
START_LOCK_TIMEOUT_S = 60.0
MAX_LOCAL_WORKERS = 64

_TROUBLE = re.compile(r"fail|error|abort|cannot|invalid", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as seen now.

    Attributes:
        endpoint: `host:port`.
        state: `free`, `held`, `busy`, `down` or `incompatible`.
        detail: one line in words: by whom it is held, or what is wrong and what to do.
        held_by: the model whose coordinator holds it, or None.
        probe: the last look at it; memory and round trip are from then.
        is_local: started by this process.
    """

    endpoint: str
    state: str
    detail: str
    held_by: str | None
    probe: Probe | None
    is_local: bool

    @property
    def capacity(self) -> WorkerCapacity:
        """What the layer plan needs to know of it."""
        seen = self.probe
        if seen is None:
            return WorkerCapacity(self.endpoint, free_bytes=0, total_bytes=0)
        free_bytes, memory_domain = seen.free_bytes, None
        if config.is_loopback(self.endpoint) and _is_system_memory(seen.total_bytes):
            # All CPU workers of a machine offer the same memory, and each calls all of it free.
            free_bytes = min(free_bytes, psutil.virtual_memory().available)
            memory_domain = LOOPBACK
        return WorkerCapacity(
            self.endpoint,
            free_bytes=free_bytes,
            total_bytes=seen.total_bytes,
            round_trip_ms=seen.round_trip_ms or 0.0,
            memory_domain=memory_domain,
        )


def _is_system_memory(total_bytes: int) -> bool:
    return abs(total_bytes - psutil.virtual_memory().total) < 64 * 1024**2


class Workers:
    """The workers that a router may use: given ones, discovered ones, local ones. Lives on the I/O loop."""

    def __init__(self, endpoints: Iterable[str], events: EventBus) -> None:
        self._events = events
        self._probes: dict[str, Probe | None] = {}
        self._held_by: dict[str, str] = {}
        self._leases: dict[str, filelock.BaseFileLock] = {}
        self._local: dict[str, EngineProcess] = {}
        for endpoint in endpoints:
            self.add(endpoint)

    @property
    def endpoints(self) -> list[str]:
        """All known endpoints, in the order they became known."""
        return list(self._probes)

    @property
    def has_given(self) -> bool:
        """Whether workers are known that were not started here."""
        return any(endpoint not in self._local for endpoint in self._probes)

    @property
    def running_local(self) -> int:
        """How many workers started here are not down."""
        return sum(1 for one in self.statuses() if one.is_local and one.state != "down")

    def add(self, endpoint: str) -> str:
        """Make an endpoint known (`host`, `host:port`); returns it as `host:port`. Adding twice is fine."""
        endpoint = config.format_endpoint(*config.parse_endpoint(endpoint))
        self._probes.setdefault(endpoint, None)
        return endpoint

    def remove(self, endpoint: str) -> None:
        """Forget an endpoint.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        if endpoint not in self._probes:
            raise ConfigError(f"{endpoint} is not a known worker; known are {', '.join(self._probes) or 'none'}")
        if endpoint in self._held_by:
            raise ConfigError(
                f"{endpoint} is held by the coordinator of {self._held_by[endpoint]}; stop that first"
            )
        del self._probes[endpoint]

    def hold(self, endpoints: Iterable[str], holder: str) -> list[str]:
        """Lease workers for a coordinator; held ones are not probed until released.

        A lease is a lock on a file, which the system frees if this process dies: so neither another router nor
        another kernel of this user chooses the same worker in the moment before the engine has connected.

        Returns:
            Those that were leased; the others are leased elsewhere.
        """
        leased = []
        for endpoint in endpoints:
            path = config.lease_dir() / f"{endpoint.replace(':', '_')}.lock"
            lease = filelock.FileLock(path, timeout=0, thread_local=False)
            try:
                lease.acquire()
            except filelock.Timeout:
                continue
            self._leases[endpoint], self._held_by[endpoint] = lease, holder
            leased.append(endpoint)
        return leased

    def release(self, endpoints: Iterable[str]) -> None:
        """End the leases of these workers. Releasing twice is fine."""
        for endpoint in endpoints:
            self._held_by.pop(endpoint, None)
            lease = self._leases.pop(endpoint, None)
            if lease is not None:
                lease.release()

    async def refresh(self) -> list[WorkerStatus]:
        """Look at every worker that is not held, and tell the state of all."""
        free = [endpoint for endpoint in self._probes if endpoint not in self._held_by]
        for seen in await probe_all(free):
            if seen.endpoint in self._probes and seen.endpoint not in self._held_by:
                self._probes[seen.endpoint] = seen
        return self.statuses()

    def statuses(self) -> list[WorkerStatus]:
        """The state of all workers as last seen, without looking again."""
        return [self._status(endpoint) for endpoint in self._probes]

    async def discover(self) -> list[str]:
        """Look for workers on this machine's usual ports; returns the endpoints that were not known before."""
        found = [one.endpoint for one in await discover() if one.endpoint not in self._probes]
        for endpoint in found:
            self.add(endpoint)
            self._events.publish("worker.discovered", endpoint, f"found a worker at {endpoint}")
        return found

    async def start_local(
        self, engine: Engine, count: int, *, first_port: int = config.DEFAULT_RPC_PORT
    ) -> list[str]:
        """Start workers on this machine, on loopback, from `first_port` upward, skipping taken ports.

        The cores are shared out over all local workers of this start (a worker's own default is one thread).

        Returns:
            Their endpoints, once each answers its probe.

        Raises:
            ConfigError: `count` is not between 1 and 64.
            WorkerStartError: one could not be started; those that could are stopped again.
        """
        if not 1 <= count <= MAX_LOCAL_WORKERS:
            raise ConfigError(f"cannot start {count} workers; a number from 1 to {MAX_LOCAL_WORKERS} can be")
        threads = max(1, (os.cpu_count() or 1) // count)
        # Between seeing that a port is free and the worker listening on it, no other kernel may choose.
        lock = filelock.FileLock(config.state_dir() / "workers.lock", thread_local=False)
        try:
            await asyncio.to_thread(lock.acquire, timeout=START_LOCK_TIMEOUT_S)
        except filelock.Timeout as error:
            raise WorkerStartError("another process has been starting workers for a minute; try again") from error
        started: dict[str, EngineProcess] = {}
        leased: list[str] = []
        port = first_port
        try:
            while len(started) < count:
                (port,) = free_ports(port, 1)
                endpoint = f"{LOOPBACK}:{port}"
                # A lease may outlast its worker until its coordinator notices; that port is not for us.
                if self.hold([endpoint], "a worker that is being started"):
                    leased.append(endpoint)
                    started[endpoint] = await start_worker(engine, LOOPBACK, port, threads)
                port += 1
            await asyncio.gather(*(_wait_until_free(*one) for one in started.items()))
        except BaseException:
            await asyncio.gather(*(process.stop() for process in started.values()))
            raise
        finally:
            self.release(leased)
            lock.release()
        for endpoint, process in started.items():
            self._local[endpoint] = process
            self.add(endpoint)
            self._events.publish(
                "worker.started", endpoint, f"started a worker at {endpoint} with {threads} threads"
            )
        await self.refresh()
        return list(started)

    async def stop_local(self, endpoints: Sequence[str] | None = None) -> list[str]:
        """Stop workers started here (all, or these) and forget them. Returns the stopped ones."""
        chosen = [one for one in self._local if endpoints is None or one in endpoints]
        self.release(chosen)
        processes = {endpoint: self._local.pop(endpoint) for endpoint in chosen}
        await asyncio.gather(*(process.stop() for process in processes.values()))
        for endpoint in chosen:
            self._probes.pop(endpoint, None)
            self._events.publish("worker.stopped", endpoint, f"stopped the worker at {endpoint}")
        return chosen

    def log_path(self, endpoint: str) -> Path | None:
        """The log file of a local worker; None for others."""
        process = self._local.get(endpoint)
        return process.log_path if process else None

    def _status(self, endpoint: str) -> WorkerStatus:
        seen, holder, local = self._probes[endpoint], self._held_by.get(endpoint), self._local.get(endpoint)
        if local is not None and not local.is_running():
            report = local.exit_report
            state, detail = "down", f"{endpoint} ended with exit code {report.code if report else '?'}"
        elif holder is not None:
            state, detail = "held", f"held by the coordinator of {holder}"
        elif seen is None:
            state, detail = "down", f"{endpoint} has not been looked at yet"
        else:
            state, detail = _STATE_OF_OUTCOME[seen.outcome], seen.detail
        return WorkerStatus(endpoint, state, detail, holder, seen, local is not None)


_STATE_OF_OUTCOME = {
    ProbeOutcome.FREE: "free",
    ProbeOutcome.BUSY: "busy",
    ProbeOutcome.REFUSED: "down",
    ProbeOutcome.UNREACHABLE: "down",
    ProbeOutcome.INCOMPATIBLE: "incompatible",
}


async def start_worker(engine: Engine, host: str, port: int, threads: int) -> EngineProcess:
    """Start one worker process; it may not answer yet."""
    argv = [str(engine.worker), "-H", host, "-p", str(port), "-t", str(threads)]
    return await EngineProcess.start(argv, log_path=config.log_dir() / f"worker-{port}-{os.getpid()}.log")


def free_ports(first: int, count: int, host: str = LOOPBACK) -> list[int]:
    """The first `count` ports from `first` upward that nothing listens on.

    Raises:
        WorkerStartError: there are not that many.
    """
    found: list[int] = []
    for port in range(first, 65536):
        if len(found) == count:
            break
        with socket.socket() as trial:
            try:
                if os.name == "posix":  # a port whose old connections still linger is free for a server
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((host, port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise WorkerStartError(f"no {count} free ports from {first} upward on {host}; give another first port")
    return found


def _listens(pid: int, port: int) -> bool:
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


async def _wait_until_free(endpoint: str, process: EngineProcess) -> None:
    host, port = config.parse_endpoint(endpoint)
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.is_running():
        # A stranger's worker may have taken the port a moment before ours, and would answer too.
        if _listens(process.pid, port) and (await probe(host, port, timeout_s=1.0)).outcome is ProbeOutcome.FREE:
            return
        if time.monotonic() > deadline:
            raise WorkerStartError(
                f"the worker at {endpoint} does not answer after {START_TIMEOUT_S:g} s; log: {process.log_path}"
            )
        await asyncio.sleep(0.02)
    report = process.exit_report
    tail = report.tail if report else ()
    # Its standard output is buffered until it ends, so that what went wrong does not come last in the log.
    words = " / ".join([line for line in tail if _TROUBLE.search(line)][-3:] or tail[-3:])
    raise WorkerStartError(f"the worker at {endpoint} ended at once: {words}; log: {process.log_path}")
