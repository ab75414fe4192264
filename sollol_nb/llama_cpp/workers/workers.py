"""The RPC workers that a router may use, and the state of each.

A worker is free, held (by which coordinator), busy (another user's coordinator holds it, or it hangs), down,
incompatible, or a duplicate: a second name of another one. The supervisor of a local worker reports its end
immediately; the end of another worker is noticed at the next probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.machine import other_user_of, usable_cores
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.identities import Identities
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.llama_cpp.workers.losses import WorkerLosses
from sollol_nb.llama_cpp.workers.probe import DEFAULT_TIMEOUT_S, Probe, ProbeOutcome, discover, probe_all
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import (
    DEFAULT_RPC_PORT,
    is_loopback,
    parse_endpoint,
    worker_endpoint,
)
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.table import DEFAULT_KEEP_ALIVE
from sollol_nb.text.tables import counted

MAX_LOCAL_WORKERS = 64
DEFAULT_KEEP_ALIVE_S = keep_alive_seconds(DEFAULT_KEEP_ALIVE)


class Workers:
    """The workers that a router may use: given ones, discovered ones, local ones. Lives on the I/O loop."""

    def __init__(self, endpoints: Iterable[str], events: EventBus) -> None:
        self._events = events
        self._probes: dict[str, Probe | None] = {}
        self._named: set[str] = set()
        self._holders: dict[str, Entry] = {}
        self._losses = WorkerLosses()
        self._identities = Identities()
        self._local: dict[str, EngineProcess] = {}
        self._round_trips_ms: dict[str, float | None] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        for endpoint in endpoints:
            endpoint = worker_endpoint(endpoint)
            self._probes[endpoint] = None
            self._named.add(endpoint)

    @property
    def endpoints(self) -> list[str]:
        """All known endpoints, in the order they became known."""
        return list(self._probes)

    @property
    def has_named(self) -> bool:
        """Whether somebody has named workers to use (local ones that were started here do not count)."""
        return any(endpoint not in self._local for endpoint in self._named)

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
        held = {worker.endpoint: worker.probe for worker in self.statuses() if worker.state == "held"}
        return {
            **{endpoint: probe.round_trip_ms for endpoint, probe in held.items() if probe is not None},
            **self._round_trips_ms,
        }

    def add(self, endpoint: str) -> str:
        """Add a worker by its endpoint (`host`, `host:port`); returns it as `host:port`. Adding twice is fine.

        Raises:
            ConfigError: it is not an endpoint, or an IPv6 address.
        """
        endpoint = worker_endpoint(endpoint)
        self._named.add(endpoint)
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
        self._named.discard(endpoint)
        self._identities.forget(endpoint)
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
        endpoint, before = probe.endpoint, self._probes[probe.endpoint]
        self._probes[endpoint] = probe
        if before is not None and before.outcome is not ProbeOutcome.FREE and endpoint in self._losses:
            return  # the same loss, which several look for: two would make the worker cool down
        self._losses.record(endpoint)
        # The supervisor of a local worker reports its end.
        if probe.outcome is not ProbeOutcome.REFUSED or endpoint not in self._local:
            self._events.publish(EventKind.WORKER_LOST, endpoint, f"lost worker {endpoint}: {probe.detail}")

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds during which this repeatedly lost worker is used only if the other workers do not suffice."""
        return self._losses.cool_down_s(endpoint)

    async def refresh_holders(self) -> None:
        """Read from the registry which workers are held now, under whichever name; no worker is probed."""
        holders = await asyncio.to_thread(registry.holders)
        await self._identities.resolve([*holders, *self._probes])
        entry_of = {self._identities.of(endpoint): entry for endpoint, entry in holders.items()}
        held = {endpoint: entry_of.get(self._identities.of(endpoint)) for endpoint in self._probes}
        self._holders = {**holders, **{endpoint: entry for endpoint, entry in held.items() if entry is not None}}

    async def held_among(self, endpoints: Collection[str]) -> set[str]:
        """Those of these workers that a coordinator holds now."""
        await self.refresh_holders()
        return {endpoint for endpoint in endpoints if endpoint in self._holders}

    def knows_all(self, endpoints: Iterable[str]) -> bool:
        """Whether all of these are known workers, under whichever name."""
        known = {self._identities.of(endpoint) for endpoint in self._probes}
        return all(self._identities.of(endpoint) in known for endpoint in endpoints)

    async def find_second_names(self, endpoints: Sequence[str]) -> Collection[str]:
        """Those of these free workers that prove to be second names of others; they are duplicates from now on."""
        return await self._identities.find_second_names(endpoints)

    async def refresh(self, *, except_for: Collection[str] = ()) -> list[WorkerStatus]:
        """Probe every worker that is not held; the status of all workers.

        The registry says who holds which worker; a held worker is not probed, since it would not answer.

        Args:
            except_for: endpoints not to probe now, because they were just found lost.
        """
        await self._identities.resolve(self._probes, again=True)
        await self.probe([endpoint for endpoint in self._probes if endpoint not in except_for])
        return self.statuses()

    async def probe(self, endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Probe these workers, except those that are held."""
        await self.refresh_holders()
        duplicates = self._identities.second_names(self._probes)
        free = [endpoint for endpoint in endpoints if endpoint not in self._holders and endpoint not in duplicates]
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
        duplicates = self._identities.second_names(self._probes)
        return [
            self._duplicate(endpoint, duplicates[endpoint]) if endpoint in duplicates else self._status(endpoint)
            for endpoint in self._probes
        ]

    def held_by_others(self) -> list[WorkerStatus]:
        """Workers that this router does not know, and that coordinators of this user hold; only to be shown."""
        return [self._status(endpoint) for endpoint in self._holders if not self.knows_all([endpoint])]

    async def discover(self) -> list[str]:
        """Search this machine's usual ports for workers, and adopt those of this user's other processes.

        Workers of other users are not used: who wants one adds it by its name.

        Returns:
            The endpoints that were not known before.
        """
        adopted = await self.adopt_local()
        await self.refresh_holders()
        answering = await discover()
        await self._identities.resolve(probe.endpoint for probe in answering)
        probes = [probe for probe in answering if not self.knows_all([probe.endpoint])]
        found = []
        for probe in probes:
            user = await asyncio.to_thread(_other_user_of, probe.endpoint)
            if user is None:
                found.append(probe)
                continue
            message = f"{probe.endpoint} is a worker of user {user} and is not used; add it if you may use it"
            self._events.publish(EventKind.WORKER_DISCOVERED, probe.endpoint, message)
        for probe in found:
            self._probes[probe.endpoint] = None
            self._events.publish(EventKind.WORKER_DISCOVERED, probe.endpoint, f"found worker {probe.endpoint}")
            self._record(probe)
        await self.probe(adopted)
        return [*adopted, *(probe.endpoint for probe in found)]

    async def adopt_local(self, endpoints: Iterable[str] | None = None, *, only_left: bool = False) -> list[str]:
        """Share local workers that other processes of this user started, or that outlived the one that did.

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
                return await self._adopt_local(lambda endpoint: endpoint not in held, only_left=only_left)
        return await self._adopt_local(set(endpoints).__contains__)

    async def _adopt_local(self, is_wanted: Callable[[str], bool], *, only_left: bool = False) -> list[str]:
        new = []
        for entry in await asyncio.to_thread(registry.entries, registry.WORKER):
            endpoint = str(entry.about.get("endpoint"))
            known = self._local.get(endpoint)
            if (known is not None and known.is_running()) or not is_wanted(endpoint):
                continue
            process = await EngineProcess.adopt(entry)
            if process is None:
                continue
            is_used = only_left and (await process.status()).get("leases") != 0
            if is_used or not await process.hold():
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
        _check_count(count)
        # No other kernel may choose a port until our workers listen on theirs.
        async with registry.locked("workers", "starting workers"):
            options = LocalOptions(count, max(1, usable_cores() // count), keep_alive_s)
            return await self._start_local(engine, first_port, options)

    async def ensure_local(
        self,
        engine: Engine,
        count: int,
        *,
        first_port: int = DEFAULT_RPC_PORT,
        keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S,
    ) -> list[str]:
        """See that so many workers of this user run on this machine, whoever started them: adopt, then start.

        Args, Raises: as for `start_local`.

        Returns:
            The endpoints of those that were started.
        """
        _check_count(count)
        async with registry.locked("workers", "starting workers"):
            await self._adopt_local(lambda endpoint: True)
            ended = [endpoint for endpoint, process in self._local.items() if not process.is_running()]
            self._forget_local(ended)  # those that died are replaced
            missing = count - len(self._local)
            if missing <= 0:
                await self.refresh()
                return []
            options = LocalOptions(missing, max(1, usable_cores() // count), keep_alive_s)
            return await self._start_local(engine, first_port, options)

    async def _start_local(self, engine: Engine, first_port: int, options: LocalOptions) -> list[str]:
        # A coordinator may not have noticed yet that its worker is gone; its port is left alone.
        barred = set(await asyncio.to_thread(registry.holders))
        started = await start_workers(engine, first_port, options, barred)
        for endpoint, process in started.items():
            self._add_local(endpoint, process)
            message = f"started worker {endpoint} with {counted(options.threads, 'thread')}"
            self._events.publish(EventKind.WORKER_STARTED, endpoint, message)
        await self.refresh()
        return list(started)

    async def stop_local(self, endpoints: Sequence[str] | None = None) -> list[str]:
        """Stop and remove workers started here (all, or these), whoever uses them. Returns the stopped ones."""
        return [ended.name for ended in await self.let_go_local(endpoints, force=True)]

    async def let_go_local(self, endpoints: Sequence[str] | None = None, *, force: bool = False) -> list[Ended]:
        """Remove workers started or shared here (all, or these), and stop those that no other process uses.

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

        processes = self._forget_local(endpoints)
        return await asyncio.gather(*(let_go(endpoint, process) for endpoint, process in processes.items()))

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

    def _forget_local(
        self, endpoints: Sequence[str] | None, *, but_watch: bool = False
    ) -> dict[str, EngineProcess]:
        chosen = [endpoint for endpoint in self._local if endpoints is None or endpoint in endpoints]
        for endpoint in chosen:
            self._probes.pop(endpoint, None)
            self._named.discard(endpoint)
            self._identities.forget(endpoint)
            watch = self._watches.pop(endpoint)
            if not but_watch:
                watch.cancel()
        return {endpoint: self._local.pop(endpoint) for endpoint in chosen}

    def _add_local(self, endpoint: str, process: EngineProcess) -> None:
        """Add a worker on this machine, and publish its end when it comes."""

        async def publish_end() -> None:
            report = await process.wait()
            if report.why and report.code is not None:  # stopped on request, or by its keep_alive: it is not lost
                if self._local.get(endpoint) is process:
                    self._forget_local([endpoint], but_watch=True)
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

    def probes_of(self, endpoints: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The last probe of each worker as plain data, for processes that see it only while it is held."""
        probes = {endpoint: self._probes.get(endpoint) for endpoint in endpoints}
        return {endpoint: probe.as_dict() for endpoint, probe in probes.items() if probe is not None}

    def entries_of(self, endpoints: Iterable[str]) -> list[Entry]:
        """The registry entries of these workers; only workers on this machine with a supervisor have one."""
        wanted = set(endpoints)
        return [entry for entry in registry.entries(registry.WORKER) if entry.about.get("endpoint") in wanted]

    def _status(self, endpoint: str) -> WorkerStatus:
        holder, local = self._holders.get(endpoint), self._local.get(endpoint)
        probe = self._probes.get(endpoint)
        if probe is None and holder is not None:  # as the process that started its coordinator saw it
            probe = Probe.from_dict((holder.about.get("probes") or {}).get(endpoint))
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

    def _duplicate(self, endpoint: str, known: str) -> WorkerStatus:
        return WorkerStatus(
            endpoint=endpoint,
            state="duplicate",
            detail=f"the same worker as {known}, which is used",
            held_by=None,
            probe=None,
            is_local=False,
        )


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_LOCAL_WORKERS:
        raise ConfigError(f"cannot start {count} workers; choose between 1 and {MAX_LOCAL_WORKERS}")


def _other_user_of(endpoint: str) -> str | None:
    """The user of a worker on this machine, if that is another one than who runs this; else None."""
    return other_user_of(*parse_endpoint(endpoint)) if is_loopback(endpoint) else None


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
