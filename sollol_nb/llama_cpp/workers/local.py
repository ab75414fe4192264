"""Worker processes on this machine: start one, and wait until it answers.

The only module that knows the flags of the worker program. Workers neither authenticate nor encrypt (and have had
remote code execution bugs), so the ones started here listen on loopback only. There any user of this machine can
reach them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection
from dataclasses import dataclass

import psutil

from sollol_nb.errors import WorkerStartError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.llama_cpp.workers.probe import ANY_CLIENT, Client, ProbeOutcome, probe
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint, parse_endpoint

START_TIMEOUT_S = 20.0
PORT_TRIES = 5
"""How many workers may find their port taken, after it was found free, before that is an error."""

PORT_TAKEN = "Failed to create server socket"  # the worker program prints this where it cannot listen

_TROUBLE = re.compile(r"fail|error|abort|cannot|invalid", re.IGNORECASE)


class WorkerPortTakenError(WorkerStartError):
    """Another program took the worker's port after it was found free."""


async def start_worker(
    engine: Engine, host: str, port: int, threads: int, keep_alive_s: float | None
) -> EngineProcess:
    """Start one worker process, which may not answer yet.

    Args:
        keep_alive_s: seconds that it lives without a lease; None is forever.

    Raises:
        EngineError: the program cannot be run.
    """
    folder = await asyncio.to_thread(cache.open_cache, cache.local_name(port))
    argv = [str(engine.worker), "-H", host, "-p", str(port), "-t", str(threads)]
    return await EngineProcess.start(
        [*argv, cache.FLAG] if folder else argv,
        kind=registry.WORKER,
        about={"endpoint": format_endpoint(host, port), "threads": threads, "caches": folder is not None},
        keep_alive_s=keep_alive_s,
        log_path=registry.new_log_path(registry.WORKER, port),
        env=cache.worker_environment(folder),
    )


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How many workers to start, the threads of each, and the seconds that they live without a lease."""

    count: int
    threads: int
    keep_alive_s: float | None


async def start_workers(
    engine: Engine, first_port: int, options: LocalOptions, barred: Collection[str]
) -> dict[str, EngineProcess]:
    """Start workers on loopback, from a port upward, each with a lease; returns them by endpoint once all answer.

    A worker whose port another program takes in the meantime starts again on another one.

    Args:
        barred: endpoints not to use.

    Raises:
        EngineError: the program cannot be run, or its RPC protocol is another one than that of other workers.
        WorkerStartError: one could not be started; the others are stopped again.
    """
    client = Client.of(engine)
    started: dict[str, EngineProcess] = {}
    port, tries_left = first_port, PORT_TRIES
    try:
        while len(started) < options.count:
            starting: dict[str, EngineProcess] = {}
            while len(started) < options.count:
                (port,) = free_ports(port, 1)
                endpoint = format_endpoint(LOOPBACK, port)
                if endpoint not in barred:
                    process = await start_worker(engine, LOOPBACK, port, options.threads, options.keep_alive_s)
                    started[endpoint] = starting[endpoint] = process
                port += 1
            for endpoint, process in starting.items():
                try:
                    await wait_until_free(endpoint, process, client)
                    await process.hold()
                except WorkerPortTakenError:
                    tries_left -= 1
                    if not tries_left:
                        raise
                    del started[endpoint]
    except BaseException:
        await asyncio.gather(*(process.stop() for process in started.values()))
        raise
    return started


async def wait_until_free(endpoint: str, process: EngineProcess, client: Client = ANY_CLIENT) -> None:
    """Wait until a started worker answers a probe of the engine that it belongs to.

    Raises:
        WorkerPortTakenError: another program has its port.
        WorkerStartError: it has ended, or does not answer within 20 s.
    """
    host, port = parse_endpoint(endpoint)
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.is_running():
        # Another program's worker may have taken the port just before ours, and would answer too.
        is_ours = _is_listening(process.pid, port)
        if is_ours and (await probe(host, port, timeout_s=1.0, client=client)).outcome is ProbeOutcome.FREE:
            return
        if time.monotonic() > deadline:
            raise WorkerStartError(
                f"worker {endpoint} did not answer within {START_TIMEOUT_S:g} s; log: {process.log_path}"
            )
        await asyncio.sleep(0.02)
    report = process.exit_report
    tail = report.tail if report else ()
    # Its standard output is buffered until it ends, so the error is not the last line of the log.
    reason = " / ".join([line for line in tail if _TROUBLE.search(line)][-3:] or tail[-3:])
    kind = WorkerPortTakenError if any(PORT_TAKEN in line for line in tail) else WorkerStartError
    raise kind(f"worker {endpoint} ended while starting: {reason}; log: {process.log_path}")


def _is_listening(pid: int, port: int) -> bool:
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return any(sock.status == psutil.CONN_LISTEN and sock.laddr.port == port for sock in sockets)
