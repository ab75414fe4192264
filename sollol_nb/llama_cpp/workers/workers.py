"""The RPC workers that a router may use, and the state of each.

A worker is free, held (by which coordinator), busy (a stranger holds it, or it hangs), down or incompatible. The
end of a local worker is told by its supervisor at once; that of another is seen when somebody looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.find import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.machine import free_ports, usable_cores
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.local import start_worker, wait_until_free
from sollol_nb.llama_cpp.workers.probe import DEFAULT_TIMEOUT_S, Probe, ProbeOutcome, discover, probe_all
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, LOOPBACK, format_endpoint, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.table import DEFAULT_KEEP_ALIVE

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
        """How many workers started here are not down."""
        return sum(1 for one in self.statuses() if one.is_local and one.state != "down")

    @property
    def round_trips_ms(self) -> dict[str, float | None]:
        """The last round trip of each worker that was ever seen free, also of those that are held now."""
        return dict(self._round_trips_ms)

    def add(self, endpoint: str) -> str:
        """Make an endpoint known (`host`, `host:port`); returns it as `host:port`. Adding twice is fine."""
        endpoint = format_endpoint(*parse_endpoint(endpoint))
        if endpoint not in self._probes:
            self._probes[endpoint] = None
            self._events.publish(EventKind.WORKER_ADDED, endpoint, f"{endpoint} may be used")
        return endpoint

    def remove(self, endpoint: str) -> None:
        """Forget an endpoint.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        if endpoint not in self._probes:
            raise ConfigError(
                f"{endpoint} is not a known worker; known workers: {', '.join(self._probes) or 'none'}"
            )
        holder = registry.holders().get(endpoint)
        if holder is not None:
            raise ConfigError(f"{endpoint} is {_describe_holder(holder)}; stop that first")
        del self._probes[endpoint]
        self._events.publish(EventKind.WORKER_REMOVED, endpoint, f"{endpoint} is not used any more")

    async def find_lost(self, endpoints: Iterable[str]) -> frozenset[str]:
        """After the end of a coordinator: which of its workers do not answer; each is told as lost.

        A worker that is well needs a moment to see that its coordinator is gone; a probe waits for that.
        """
        silent = []
        for seen in await probe_all([one for one in endpoints if one in self._probes]):
            if seen.endpoint not in self._probes:  # removed meanwhile
                continue
            if seen.outcome is ProbeOutcome.FREE:
                self._note(seen)
            else:
                self._lost(seen)
                silent.append(seen.endpoint)
        return frozenset(silent)

    def _lost(self, seen: Probe) -> None:
        """A coordinator has lost this worker; after the second time it cools down (see `cool_down_s`)."""
        endpoint = seen.endpoint
        self._losses.note(endpoint)
        self._probes[endpoint] = seen
        if seen.outcome is not ProbeOutcome.REFUSED or endpoint not in self._local:  # else its supervisor tells
            words = f"lost the worker at {endpoint}: {seen.detail}"
            self._events.publish(EventKind.WORKER_LOST, endpoint, words)

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds for which a worker that was lost again and again is only used if no other suffices."""
        return self._losses.cool_down_s(endpoint)

    async def refresh_holders(self) -> None:
        """See which workers coordinators hold now; asks no worker."""
        self._holders = await asyncio.to_thread(registry.holders)

    async def refresh(self, *, except_for: Collection[str] = ()) -> list[WorkerStatus]:
        """Look at every worker that is not held, and tell the state of all.

        Who holds which is read from the registry; a held worker is not probed, since it would not answer.

        Args:
            except_for: endpoints not to look at now, because they were just found lost.
        """
        await self.probe([one for one in self._probes if one not in except_for])
        return self.statuses()

    async def probe(self, endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Look at these workers, unless they are held."""
        await self.refresh_holders()
        free = [one for one in endpoints if one not in self._holders]
        found = await probe_all(free, timeout_s=timeout_s)
        if any(seen.outcome is ProbeOutcome.BUSY for seen in found):  # perhaps taken since, by a coordinator
            await self.refresh_holders()
        for seen in found:
            if seen.endpoint in self._probes and seen.endpoint not in self._holders:
                self._note(seen)

    def _note(self, seen: Probe) -> None:
        if seen.round_trip_ms is not None:
            self._round_trips_ms[seen.endpoint] = seen.round_trip_ms
        self._events.report(EventKind.PROBE_DONE, seen.endpoint, seen.detail, round_trip_ms=seen.round_trip_ms)
        before, self._probes[seen.endpoint] = self._probes[seen.endpoint], seen
        was, now = (None if one is None else _STATE_OF_OUTCOME[one.outcome] for one in (before, seen))
        if was == "free" and now == "down" and seen.endpoint not in self._local:  # of these their supervisors tell
            self._events.publish(
                EventKind.WORKER_LOST, seen.endpoint, f"lost the worker at {seen.endpoint}: {seen.detail}"
            )
        elif now == "free" and (was == "down" or (was != "free" and seen.endpoint in self._losses)):
            self._events.publish(
                EventKind.WORKER_RETURNED, seen.endpoint, f"the worker at {seen.endpoint} is back"
            )

    def statuses(self) -> list[WorkerStatus]:
        """The state of all workers as last seen, without looking again."""
        return [self._status(endpoint) for endpoint in self._probes]

    async def discover(self) -> list[str]:
        """Look for workers on this machine's usual ports; returns the endpoints that were not known before."""
        found = [one for one in await discover() if one.endpoint not in self._probes]
        for seen in found:
            self._probes[seen.endpoint] = None
            self._events.publish(EventKind.WORKER_DISCOVERED, seen.endpoint, f"found a worker at {seen.endpoint}")
            self._note(seen)
        return [one.endpoint for one in found]

    async def adopt_local(self, endpoints: Iterable[str] | None = None) -> list[str]:
        """Adopt local workers of this user that run on after the kernel that started them.

        Args:
            endpoints: these, whoever else uses them (they belong to an adopted coordinator); by default those
                on which nobody has a lease.

        Returns:
            The endpoints that were not known before.
        """
        if endpoints is None:
            async with registry.locked(
                "workers", "starting workers"
            ):  # one that another kernel is starting has no lease yet
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
                self._events.publish(EventKind.WORKER_ADOPTED, endpoint, f"adopted the worker at {endpoint}")
            self._take(endpoint, process)
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

        The cores are shared out over all local workers of this start (a worker's own default is one thread).

        Args:
            keep_alive_s: how long they live after this process and without a coordinator; None is for ever.

        Returns:
            Their endpoints, once each answers its probe.

        Raises:
            ConfigError: `count` is not between 1 and 64.
            WorkerStartError: one could not be started; those that could are stopped again.
        """
        if not 1 <= count <= MAX_LOCAL_WORKERS:
            raise ConfigError(f"cannot start {count} workers; a number from 1 to {MAX_LOCAL_WORKERS} can be")
        threads = max(1, usable_cores() // count)
        started: dict[str, EngineProcess] = {}
        # Between seeing that a port is free and the worker listening on it, no other kernel may choose.
        async with registry.locked("workers", "starting workers"):
            port = first_port
            try:
                held = await asyncio.to_thread(registry.holders)
                while len(started) < count:
                    (port,) = free_ports(port, 1)
                    endpoint = f"{LOOPBACK}:{port}"
                    # A coordinator may not have noticed yet that its worker is gone; that port is not for us.
                    if endpoint not in held:
                        started[endpoint] = await start_worker(engine, LOOPBACK, port, threads, keep_alive_s)
                    port += 1
                await asyncio.gather(*(wait_until_free(*one) for one in started.items()))
                await asyncio.gather(*(process.hold() for process in started.values()))
            except BaseException:
                await asyncio.gather(*(process.stop() for process in started.values()))
                raise
        for endpoint, process in started.items():
            self._take(endpoint, process)
            self._events.publish(
                EventKind.WORKER_STARTED, endpoint, f"started a worker at {endpoint} with {threads} threads"
            )
        await self.refresh()
        return list(started)

    async def stop_local(self, endpoints: Sequence[str] | None = None) -> list[str]:
        """Stop workers started here (all, or these) and forget them. Returns the stopped ones."""
        processes = self._forget_local(endpoints)
        await asyncio.gather(*(process.stop() for process in processes.values()))
        for endpoint in processes:
            self._events.publish(EventKind.WORKER_STOPPED, endpoint, f"stopped the worker at {endpoint}")
        return list(processes)

    async def close(self) -> None:
        """Stop the workers started here, except those that others still use."""
        processes = self._forget_local(None)
        ended = await asyncio.gather(*(process.stop_unless_shared() for process in processes.values()))
        for endpoint, is_stopped in zip(processes, ended, strict=True):
            if is_stopped:
                self._events.publish(EventKind.WORKER_STOPPED, endpoint, f"stopped the worker at {endpoint}")

    def detach(self) -> None:
        """Let go of the workers started here; they live on for their keep_alive."""
        for process in self._forget_local(None).values():
            process.detach()

    def _forget_local(self, endpoints: Sequence[str] | None) -> dict[str, EngineProcess]:
        chosen = [one for one in self._local if endpoints is None or one in endpoints]
        for endpoint in chosen:
            self._probes.pop(endpoint, None)
            self._watches.pop(endpoint).cancel()
        return {endpoint: self._local.pop(endpoint) for endpoint in chosen}

    def _take(self, endpoint: str, process: EngineProcess) -> None:
        """This local worker is ours now; its end will be told."""

        async def told_at_end() -> None:
            report = await process.wait()
            if report.why and report.code is not None:  # by its keep_alive or by someone
                words = f"the worker at {endpoint} was ended: {report.why}"
                self._events.publish(EventKind.WORKER_STOPPED, endpoint, words)
            else:
                words = f"lost the worker at {endpoint}: it ended ({describe_exit(report.code)})"
                self._events.publish(EventKind.WORKER_LOST, endpoint, words)

        if (before := self._watches.get(endpoint)) is not None:
            before.cancel()
        self._local[endpoint] = process
        self._watches[endpoint] = asyncio.create_task(told_at_end())
        self._probes.setdefault(endpoint, None)

    def entries_of(self, endpoints: Iterable[str]) -> list[Entry]:
        """The registry entries of those of these workers that run on this machine under a supervisor."""
        wanted = set(endpoints)
        return [one for one in registry.entries(registry.WORKER) if one.about.get("endpoint") in wanted]

    def log_path(self, endpoint: str) -> Path | None:
        """The log file of a local worker; None for others."""
        process = self._local.get(endpoint)
        return process.log_path if process else None

    def _status(self, endpoint: str) -> WorkerStatus:
        seen, holder, local = self._probes[endpoint], self._holders.get(endpoint), self._local.get(endpoint)
        if local is not None and not local.is_running():
            report = local.exit_report
            state, detail = "down", f"{endpoint} ended with exit code {report.code if report else '?'}"
        elif holder is not None:
            state, detail = "held", _describe_holder(holder)
        elif seen is None:
            state, detail = "unknown", "not looked at yet"
        else:
            state, detail = _STATE_OF_OUTCOME[seen.outcome], seen.detail
        held_by = holder.name if holder is not None else None
        return WorkerStatus(
            endpoint=endpoint,
            state=state,
            detail=detail,
            held_by=held_by,
            probe=seen,
            is_local=local is not None,
        )


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
        self._at: dict[str, list[float]] = {}

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._at

    def note(self, endpoint: str) -> None:
        """It was lost now."""
        self._at[endpoint] = [*self._recent(endpoint), time.monotonic()]

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds for which it is still only used if no other suffices."""
        losses = self._recent(endpoint)
        if len(losses) < 2:
            return 0.0
        pause_s = min(FIRST_COOL_DOWN_S * 2.0 ** (len(losses) - 2), LONGEST_COOL_DOWN_S)
        return max(0.0, losses[-1] + pause_s - time.monotonic())

    def _recent(self, endpoint: str) -> list[float]:
        now = time.monotonic()
        return [at for at in self._at.get(endpoint, ()) if now - at < LOSSES_COUNT_FOR_S]
