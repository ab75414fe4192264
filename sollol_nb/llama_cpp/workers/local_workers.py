"""The workers on this machine that a router started or shares: adopted, started, watched, and let go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.machine import usable_cores
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.table import DEFAULT_KEEP_ALIVE
from sollol_nb.text.tables import counted

MAX_LOCAL_WORKERS = 64
DEFAULT_KEEP_ALIVE_S = keep_alive_seconds(DEFAULT_KEEP_ALIVE)


class KnownWorkers(Protocol):
    """What `LocalWorkers` needs of all workers that the router may use, to which the local ones belong."""

    @property
    def endpoints(self) -> list[str]:
        """All known endpoints."""

    def note(self, endpoint: str) -> None:
        """Know a local worker from now on."""

    def forget(self, endpoint: str) -> None:
        """Know a worker no longer."""

    async def refresh(self) -> object:
        """Probe every worker that is not held."""


class LocalWorkers:
    """The workers on this machine that a router started or shares, each with a lease. Lives on the I/O loop."""

    def __init__(self, known: KnownWorkers, events: EventBus) -> None:
        self._known = known
        self._events = events
        self._processes: dict[str, EngineProcess] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, endpoint: str) -> bool:
        return endpoint in self._processes

    def end_of(self, endpoint: str) -> str | None:
        """How a local worker ended; None for one that runs, and for other workers."""
        process = self._processes.get(endpoint)
        if process is None or process.exit_report is None:
            return None
        return _describe_end(process.exit_report)

    def threads_of(self, endpoint: str) -> int | None:
        """How many threads a local worker has; None for other workers, and where that is not known."""
        process = self._processes.get(endpoint)
        threads = process.entry.about.get("threads") if process else None
        return threads if isinstance(threads, int) else None

    async def adopt(self, endpoints: Iterable[str] | None = None, *, only_left: bool = False) -> list[str]:
        """Share workers that other processes of this user started, or that outlived the one that did.

        Args:
            endpoints: the workers of an adopted coordinator; by default all that no coordinator holds.
            only_left: only those that no process uses.

        Returns:
            The endpoints that were not known before.
        """
        if endpoints is None:
            # Workers that another process is starting do not answer yet.
            async with registry.locked("workers", "starting workers"):
                held = await asyncio.to_thread(registry.holders)
                return await self._adopt(lambda endpoint: endpoint not in held, only_left=only_left)
        return await self._adopt(set(endpoints).__contains__)

    async def _adopt(self, is_wanted: Callable[[str], bool], *, only_left: bool = False) -> list[str]:
        new = []
        for entry in await asyncio.to_thread(registry.entries, registry.WORKER):
            endpoint = str(entry.about.get("endpoint"))
            ours = self._processes.get(endpoint)
            if (ours is not None and ours.is_running()) or not is_wanted(endpoint):
                continue
            process = await EngineProcess.adopt(entry)
            if process is None:
                continue
            is_used = only_left and (await process.status()).get("leases") != 0
            if is_used or not await process.hold():
                process.detach()
                continue
            if endpoint not in self._known.endpoints:
                new.append(endpoint)
                self._events.publish(EventKind.WORKER_ADOPTED, endpoint, f"adopted worker {endpoint}")
            self._add(endpoint, process)
        return new

    async def start(
        self,
        engine: Engine,
        count: int,
        *,
        first_port: int = DEFAULT_RPC_PORT,
        keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S,
    ) -> list[str]:
        """Start workers on loopback, from `first_port` upward, skipping taken ports.

        They share the machine's cores (by default, the worker program uses one thread).

        Args:
            keep_alive_s: seconds that they live without this process and without a coordinator; None is forever.

        Returns:
            Their endpoints, once each worker answers a probe.

        Raises:
            ConfigError: `count` is not between 1 and 64.
            WorkerStartError: a worker could not be started; the others are stopped again.
        """
        return await self._start(engine, count, first_port, keep_alive_s, adopts=False)

    async def ensure(
        self,
        engine: Engine,
        count: int,
        *,
        first_port: int = DEFAULT_RPC_PORT,
        keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S,
    ) -> list[str]:
        """See that so many workers of this user run on this machine, whoever started them: adopt, then start.

        Args, Raises: as for `start`.

        Returns:
            The endpoints of those that were started.
        """
        return await self._start(engine, count, first_port, keep_alive_s, adopts=True)

    async def _start(
        self, engine: Engine, count: int, first_port: int, keep_alive_s: float | None, *, adopts: bool
    ) -> list[str]:
        """Start so many workers, or with `adopts` as many as are missing."""
        if not 1 <= count <= MAX_LOCAL_WORKERS:
            raise ConfigError(f"cannot start {count} workers; choose between 1 and {MAX_LOCAL_WORKERS}")
        missing = count
        started: dict[str, EngineProcess] = {}
        # No other kernel may choose a port until our workers listen on theirs.
        async with registry.locked("workers", "starting workers"):
            if adopts:
                await self._adopt(lambda endpoint: True)
                ended = [endpoint for endpoint, process in self._processes.items() if not process.is_running()]
                self._forget(ended)  # those that died are replaced
                missing -= len(self._processes)
            if missing > 0:
                options = LocalOptions(missing, max(1, usable_cores() // count), keep_alive_s)
                # A coordinator may not have noticed yet that its worker is gone; its port is left alone.
                barred = set(await asyncio.to_thread(registry.holders))
                started = await start_workers(engine, first_port, options, barred)
                for endpoint, process in started.items():
                    self._add(endpoint, process)
                    message = f"started worker {endpoint} with {counted(options.threads, 'thread')}"
                    self._events.publish(EventKind.WORKER_STARTED, endpoint, message)
            await self._known.refresh()
        return list(started)

    async def stop(self, endpoints: Sequence[str] | None = None) -> list[str]:
        """Stop and remove workers (all, or these), whoever uses them. Returns the stopped ones."""
        return [ended.name for ended in await self.let_go(endpoints, force=True)]

    async def let_go(self, endpoints: Sequence[str] | None = None, *, force: bool = False) -> list[Ended]:
        """Remove workers (all, or these), and stop those that no other process uses.

        Args:
            force: stop the others, too.
        """

        async def let_go(endpoint: str, process: EngineProcess) -> Ended:
            users: list[str] = []
            if force:
                await process.stop()
            else:
                users = await process.stop_unless_foreign()
            message = f"stopped worker {endpoint}"
            if users:
                message = f"disconnected from worker {endpoint}, which is still used by {', '.join(users)}"
            self._events.publish(EventKind.WORKER_STOPPED, endpoint, message)
            return Ended(kind=registry.WORKER, name=endpoint, users=tuple(users))

        processes = self._forget(endpoints)
        return await asyncio.gather(*(let_go(endpoint, process) for endpoint, process in processes.items()))

    async def close(self) -> None:
        """Stop all, except those that other processes use."""
        processes = self._forget(None)
        ended = await asyncio.gather(*(process.stop_unless_shared() for process in processes.values()))
        for endpoint, is_stopped in zip(processes, ended, strict=True):
            if is_stopped:
                self._events.publish(EventKind.WORKER_STOPPED, endpoint, f"stopped worker {endpoint}")

    def detach(self) -> None:
        """Disconnect from all; they keep running for their keep_alive."""
        for process in self._forget(None).values():
            process.detach()

    def _forget(self, endpoints: Sequence[str] | None, *, but_watch: bool = False) -> dict[str, EngineProcess]:
        chosen = [endpoint for endpoint in self._processes if endpoints is None or endpoint in endpoints]
        for endpoint in chosen:
            self._known.forget(endpoint)
            watch = self._watches.pop(endpoint)
            if not but_watch:
                watch.cancel()
        return {endpoint: self._processes.pop(endpoint) for endpoint in chosen}

    def _add(self, endpoint: str, process: EngineProcess) -> None:
        """Add a worker, and publish its end when it comes."""

        async def publish_end() -> None:
            report = await process.wait()
            if report.why and report.code is not None:  # stopped on request, or by its keep_alive: it is not lost
                if self._processes.get(endpoint) is process:
                    self._forget([endpoint], but_watch=True)
                self._events.publish(
                    EventKind.WORKER_STOPPED, endpoint, f"worker {endpoint} was stopped: {report.why}"
                )
            else:
                message = f"lost worker {endpoint}: {_describe_end(report)}"
                self._events.publish(EventKind.WORKER_LOST, endpoint, message)

        if (before := self._watches.get(endpoint)) is not None:
            before.cancel()
        self._processes[endpoint] = process
        self._watches[endpoint] = asyncio.create_task(publish_end())
        self._known.note(endpoint)


def _describe_end(report: ExitReport) -> str:
    was_killed = report.code is not None and report.code < 0
    return f"{'killed' if was_killed else 'ended'} ({describe_exit(report.code)})"
