"""The RPC workers that a router may use, and the state of each.

A worker is free, held (by which coordinator), busy (another user's coordinator holds it, or it hangs), down or
incompatible. The supervisor of a local worker reports its end immediately; the end of another worker is noticed at
the next probe.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Iterable, Sequence

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.machine import free_ports, usable_cores
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.local import start_worker, wait_until_free
from sollol_nb.llama_cpp.workers.probe import DEFAULT_TIMEOUT_S, Probe, ProbeOutcome, discover, probe_all
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, LOOPBACK, format_endpoint, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.table import DEFAULT_KEEP_ALIVE
from sollol_nb.text.tables import counted

MAX_LOCAL_WORKERS = 64
DEFAULT_KEEP_ALIVE_S = keep_alive_seconds(DEFAULT_KEEP_ALIVE)
LOSSES_COUNT_FOR_S = 600.0
FIRST_COOL_DOWN_S = 30.0
LONGEST_COOL_DOWN_S = 300.0


class Workers:
    """The workers that a router may use: given ones, discovered ones, local ones. Lives on the I/O loop."""

    def __init__(self, endpoints: Iterable[str], events: EventBus) -> None:
        self._events = events
        self._probes: dict[str, Probe | None] = {}
        self._holders: dict[str, Entry] = {}
        self._losses = WorkerLosses()
        self._local: dict[str, EngineProcess] = {}
        self._round_trips_ms: dict[str, float | None] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        for endpoint in endpoints:
            self._probes[format_endpoint(*parse_endpoint(endpoint))] = None

    @property
    def endpoints(self) -> list[str]:
        """All known endpoints, in the order they became known."""
        return list(self._probes)

    @property
    def has_external(self) -> bool:
        """Whether workers are known that were not started here."""
        return any(endpoint not in self._local for endpoint in self._probes)

    @property
    def running_local_count(self) -> int:
        """How many of the workers started here are not down."""
        return sum(1 for worker in self.statuses() if worker.is_local and worker.state != "down")

    @property
    def round_trips_ms(self) -> dict[str, float | None]:
        """The last measured round trip of each worker, including those that are held now."""
        return dict(self._round_trips_ms)

    def add(self, endpoint: str) -> str:
        """Add a worker by its endpoint (`host`, `host:port`); returns it as `host:port`. Adding twice is fine."""
        endpoint = format_endpoint(*parse_endpoint(endpoint))
        if endpoint not in self._probes:
            self._probes[endpoint] = None
            self._events.publish(EventKind.WORKER_ADDED, endpoint, f"added worker {endpoint}")
        return endpoint

    def remove(self, endpoint: str) -> None:
        """Remove a worker.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        if endpoint not in self._probes:
            known = ", ".join(self._probes) or "none"
            raise ConfigError(f"{endpoint} is not a known worker; known workers: {known}")
        holder = registry.holders().get(endpoint)
        if holder is not None:
            raise ConfigError(f"{endpoint} is {_describe_holder(holder)}; stop that coordinator first")
        del self._probes[endpoint]
        self._events.publish(EventKind.WORKER_REMOVED, endpoint, f"removed worker {endpoint}")

    async def find_lost(self, endpoints: Iterable[str]) -> frozenset[str]:
        """After the end of a coordinator: those of its workers that do not answer. Each is published as lost.

        A healthy worker needs a moment to notice that its coordinator is gone; the probe waits for that.
        """
        lost = []
        for probe in await probe_all([endpoint for endpoint in endpoints if endpoint in self._probes]):
            if probe.endpoint not in self._probes:  # removed during the probe
                continue
            if probe.outcome is ProbeOutcome.FREE:
                self._record(probe)
            else:
                self._record_loss(probe)
                lost.append(probe.endpoint)
        return frozenset(lost)

    def _record_loss(self, probe: Probe) -> None:
        endpoint = probe.endpoint
        self._losses.record(endpoint)
        self._probes[endpoint] = probe
        # The supervisor of a local worker reports its end.
        if probe.outcome is not ProbeOutcome.REFUSED or endpoint not in self._local:
            self._events.publish(EventKind.WORKER_LOST, endpoint, f"lost worker {endpoint}: {probe.detail}")

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds during which this repeatedly lost worker is used only if the other workers do not suffice."""
        return self._losses.cool_down_s(endpoint)

    async def refresh_holders(self) -> None:
        """Read from the registry which workers are held now; no worker is probed."""
        self._holders = await asyncio.to_thread(registry.holders)

    async def refresh(self, *, except_for: Collection[str] = ()) -> list[WorkerStatus]:
        """Probe every worker that is not held; the status of all workers.

        The registry says who holds which worker; a held worker is not probed, since it would not answer.

        Args:
            except_for: endpoints not to probe now, because they were just found lost.
        """
        await self.probe([endpoint for endpoint in self._probes if endpoint not in except_for])
        return self.statuses()

    async def probe(self, endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Probe these workers, except those that are held."""
        await self.refresh_holders()
        free = [endpoint for endpoint in endpoints if endpoint not in self._holders]
        probes = await probe_all(free, timeout_s=timeout_s)
        if any(probe.outcome is ProbeOutcome.BUSY for probe in probes):  # a coordinator may have taken it since
            await self.refresh_holders()
        for probe in probes:
            if probe.endpoint in self._probes and probe.endpoint not in self._holders:
                self._record(probe)

    def _record(self, probe: Probe) -> None:
        endpoint = probe.endpoint
        if probe.round_trip_ms is not None:
            self._round_trips_ms[endpoint] = probe.round_trip_ms
        self._events.report(EventKind.PROBE_DONE, endpoint, probe.detail, round_trip_ms=probe.round_trip_ms)
        before = self._probes[endpoint]
        self._probes[endpoint] = probe
        was, now = before and _STATE_OF_OUTCOME[before.outcome], _STATE_OF_OUTCOME[probe.outcome]
        if was == "free" and now == "down" and endpoint not in self._local:  # supervisors report the end of these
            self._events.publish(EventKind.WORKER_LOST, endpoint, f"lost worker {endpoint}: {probe.detail}")
        elif now == "free" and (was == "down" or (was != "free" and endpoint in self._losses)):
            self._events.publish(EventKind.WORKER_RETURNED, endpoint, f"worker {endpoint} is back")

    def statuses(self) -> list[WorkerStatus]:
        """The status of all workers as last seen, without a new probe."""
        return [self._status(endpoint) for endpoint in self._probes]

    async def discover(self) -> list[str]:
        """Search this machine's usual ports for workers; returns the endpoints that were not known before."""
        found = [probe for probe in await discover() if probe.endpoint not in self._probes]
        for probe in found:
            self._probes[probe.endpoint] = None
            self._events.publish(EventKind.WORKER_DISCOVERED, probe.endpoint, f"found worker {probe.endpoint}")
            self._record(probe)
        return [probe.endpoint for probe in found]

    async def adopt_local(self, endpoints: Iterable[str] | None = None) -> list[str]:
        """Adopt local workers of this user that outlived the kernel that started them.

        Args:
            endpoints: the workers of an adopted coordinator, whoever else uses them; by default all that nobody
                has a lease on.

        Returns:
            The endpoints that were not known before.
        """
        if endpoints is None:
            # A worker that another kernel is starting has no lease yet.
            async with registry.locked("workers", "starting workers"):
                return await self._adopt_local(None)
        return await self._adopt_local(set(endpoints))

    async def _adopt_local(self, wanted: Collection[str] | None) -> list[str]:
        new = []
        for entry in await asyncio.to_thread(registry.entries, registry.WORKER):
            endpoint = str(entry.about.get("endpoint"))
            known = self._local.get(endpoint)
            if (known is not None and known.is_running()) or (wanted is not None and endpoint not in wanted):
                continue
            process = await EngineProcess.adopt(entry)
            if process is None:
                continue
            if (wanted is None and (await process.status()).get("leases") != 0) or not await process.hold():
                process.detach()
                continue
            if endpoint not in self._probes:
                new.append(endpoint)
                self._events.publish(EventKind.WORKER_ADOPTED, endpoint, f"adopted worker {endpoint}")
            self._add_local(endpoint, process)
        return new

    async def start_local(
        self,
        engine: Engine,
        count: int,
        *,
        first_port: int = DEFAULT_RPC_PORT,
        keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S,
    ) -> list[str]:
        """Start workers on this machine, on loopback, from `first_port` upward, skipping taken ports.

        They share the machine's cores (by default, the worker program uses one thread).

        Args:
            keep_alive_s: seconds that they live without this process and without a coordinator; None is forever.

        Returns:
            Their endpoints, once each worker answers a probe.

        Raises:
            ConfigError: `count` is not between 1 and 64.
            WorkerStartError: a worker could not be started; the others are stopped again.
        """
        if not 1 <= count <= MAX_LOCAL_WORKERS:
            raise ConfigError(f"cannot start {count} workers; choose between 1 and {MAX_LOCAL_WORKERS}")
        threads = max(1, usable_cores() // count)
        started: dict[str, EngineProcess] = {}
        # No other kernel may choose a port until our workers listen on theirs.
        async with registry.locked("workers", "starting workers"):
            port = first_port
            try:
                held = await asyncio.to_thread(registry.holders)
                while len(started) < count:
                    (port,) = free_ports(port, 1)
                    endpoint = f"{LOOPBACK}:{port}"
                    # A coordinator may not have noticed yet that its worker is gone; leave its port alone.
                    if endpoint not in held:
                        started[endpoint] = await start_worker(engine, LOOPBACK, port, threads, keep_alive_s)
                    port += 1
                await asyncio.gather(*itertools.starmap(wait_until_free, started.items()))
                await asyncio.gather(*(process.hold() for process in started.values()))
            except BaseException:
                await asyncio.gather(*(process.stop() for process in started.values()))
                raise
        for endpoint, process in started.items():
            self._add_local(endpoint, process)
            message = f"started worker {endpoint} with {counted(threads, 'thread')}"
            self._events.publish(EventKind.WORKER_STARTED, endpoint, message)
        await self.refresh()
        return list(started)

    async def stop_local(self, endpoints: Sequence[str] | None = None) -> list[str]:
        """Stop and remove workers started here (all, or these). Returns the stopped ones."""
        processes = self._forget_local(endpoints)
        await asyncio.gather(*(process.stop() for process in processes.values()))
        for endpoint in processes:
            self._events.publish(EventKind.WORKER_STOPPED, endpoint, f"stopped worker {endpoint}")
        return list(processes)

    async def close(self) -> None:
        """Stop the workers started here, except those that other processes use."""
        processes = self._forget_local(None)
        ended = await asyncio.gather(*(process.stop_unless_shared() for process in processes.values()))
        for endpoint, is_stopped in zip(processes, ended, strict=True):
            if is_stopped:
                self._events.publish(EventKind.WORKER_STOPPED, endpoint, f"stopped worker {endpoint}")

    def detach(self) -> None:
        """Disconnect from the workers started here; they keep running for their keep_alive."""
        for process in self._forget_local(None).values():
            process.detach()

    def _forget_local(self, endpoints: Sequence[str] | None) -> dict[str, EngineProcess]:
        chosen = [endpoint for endpoint in self._local if endpoints is None or endpoint in endpoints]
        for endpoint in chosen:
            self._probes.pop(endpoint, None)
            self._watches.pop(endpoint).cancel()
        return {endpoint: self._local.pop(endpoint) for endpoint in chosen}

    def _add_local(self, endpoint: str, process: EngineProcess) -> None:
        """Add a worker on this machine, and publish its end when it comes."""

        async def publish_end() -> None:
            report = await process.wait()
            if report.why and report.code is not None:  # stopped on request, or by its keep_alive
                self._events.publish(
                    EventKind.WORKER_STOPPED, endpoint, f"worker {endpoint} was stopped: {report.why}"
                )
            else:
                message = f"lost worker {endpoint}: {_describe_end(report)}"
                self._events.publish(EventKind.WORKER_LOST, endpoint, message)

        if (before := self._watches.get(endpoint)) is not None:
            before.cancel()
        self._local[endpoint] = process
        self._watches[endpoint] = asyncio.create_task(publish_end())
        self._probes.setdefault(endpoint, None)

    def entries_of(self, endpoints: Iterable[str]) -> list[Entry]:
        """The registry entries of these workers; only workers on this machine with a supervisor have one."""
        wanted = set(endpoints)
        return [entry for entry in registry.entries(registry.WORKER) if entry.about.get("endpoint") in wanted]

    def _status(self, endpoint: str) -> WorkerStatus:
        probe, holder, local = self._probes[endpoint], self._holders.get(endpoint), self._local.get(endpoint)
        if local is not None and local.exit_report is not None:
            state, detail = "down", _describe_end(local.exit_report)
        elif holder is not None:
            state, detail = "held", _describe_holder(holder)
        elif probe is None:
            state, detail = "unknown", "not probed yet"
        else:
            state, detail = _STATE_OF_OUTCOME[probe.outcome], probe.detail
        return WorkerStatus(
            endpoint=endpoint,
            state=state,
            detail=detail,
            held_by=holder.name if holder is not None else None,
            probe=probe,
            is_local=local is not None,
        )


def _describe_end(report: ExitReport) -> str:
    was_killed = report.code is not None and report.code < 0
    return f"{'killed' if was_killed else 'ended'} ({describe_exit(report.code)})"


def _describe_holder(holder: Entry) -> str:
    return f"held by the coordinator of {holder.name}, started by {registry.describe_owner(holder.about)}"


_STATE_OF_OUTCOME = {
    ProbeOutcome.FREE: "free",
    ProbeOutcome.BUSY: "busy",
    ProbeOutcome.REFUSED: "down",
    ProbeOutcome.UNREACHABLE: "down",
    ProbeOutcome.INCOMPATIBLE: "incompatible",
}


class WorkerLosses:
    """How often each worker was lost lately, and how long it is therefore avoided.

    One loss may have any cause. A worker that is lost for the second time within ten minutes cools down for half a
    minute, and for twice as long after each further loss.
    """

    def __init__(self) -> None:
        self._lost_at: dict[str, list[float]] = {}

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._lost_at

    def record(self, endpoint: str) -> None:
        """Record that a worker was lost now."""
        self._lost_at[endpoint] = [*self._recent(endpoint), time.monotonic()]

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds during which it is still avoided; 0 if it is not."""
        losses = self._recent(endpoint)
        if len(losses) < 2:
            return 0.0
        pause_s = min(FIRST_COOL_DOWN_S * 2.0 ** (len(losses) - 2), LONGEST_COOL_DOWN_S)
        return max(0.0, losses[-1] + pause_s - time.monotonic())

    def _recent(self, endpoint: str) -> list[float]:
        now = time.monotonic()
        return [at for at in self._lost_at.get(endpoint, ()) if now - at < LOSSES_COUNT_FOR_S]
