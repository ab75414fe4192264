"""The RPC workers that a router may use, and the state of each.

A worker is free, held (by which coordinator), busy (another user's coordinator holds it, or it hangs), down,
incompatible, or a duplicate: a second name of another one. The supervisor of a local worker reports its end
immediately; the end of another worker is noticed at the next probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.link import CPU
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import other_user_of
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.cached_units import CachedUnits
from sollol_nb.llama_cpp.workers.calibrations import Calibration, Calibrations, identity_of
from sollol_nb.llama_cpp.workers.identities import Identities
from sollol_nb.llama_cpp.workers.links import Links
from sollol_nb.llama_cpp.workers.local_workers import LocalWorkers
from sollol_nb.llama_cpp.workers.losses import WorkerLosses
from sollol_nb.llama_cpp.workers.own_devices import OwnDevices
from sollol_nb.llama_cpp.workers.probe import (
    ANY_CLIENT,
    DEFAULT_TIMEOUT_S,
    Client,
    Probe,
    ProbeOutcome,
    discover,
    probe_all,
)
from sollol_nb.llama_cpp.workers.status import STATE_OF_OUTCOME, WorkerStatus, describe_holder
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import INVITATIONS, is_loopback, is_target, parse_endpoint, worker_target


class Workers:
    """The workers that a router may use: given ones, discovered ones, local ones. Lives on the I/O loop.

    Attributes:
        local: those on this machine that this router started or shares.
        links: through which workers of other machines are reached.
        own: the CPU and GPUs of this machine, which need no worker.
        calibrations: how fast workers are, as far as that was measured.
        cached: what they have cached of models.
    """

    def __init__(self, endpoints: Iterable[str], events: EventBus) -> None:
        self._events = events
        self._probes: dict[str, Probe | None] = {}
        self._named: set[str] = set()
        self._holders: dict[str, Entry] = {}
        self._losses = WorkerLosses()
        self._lost: set[str] = set()
        self._identities = Identities()
        self._client = ANY_CLIENT
        self._round_trips_ms: dict[str, float | None] = {}
        self.local = LocalWorkers(self, events)
        self.links = Links(self, events)
        self.own = OwnDevices()
        self.calibrations = Calibrations()
        self.cached = CachedUnits()
        for endpoint in map(worker_target, endpoints):
            self._named.add(endpoint)
            if is_target(endpoint):
                self.links.add(endpoint)
            else:
                self._probes[endpoint] = None

    @property
    def endpoints(self) -> list[str]:
        """All known endpoints, in the order they became known."""
        return list(self._probes)

    @property
    def has_named(self) -> bool:
        """Whether somebody has named workers to use (local ones that were started here do not count)."""
        return any(endpoint not in self.local for endpoint in self._named)

    @property
    def has_external(self) -> bool:
        """Whether workers are known that were not started here."""
        is_linked = any(target != INVITATIONS for target in self.links.targets)
        return is_linked or any(endpoint not in self.local for endpoint in self._probes)

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

    @property
    def invitations(self) -> tuple[OpenInvitation, ...]:
        """With which workers can join this user's machine now."""
        return self.links.invitations

    def use_engine(self, engine: Engine) -> None:
        """From now on, workers count as compatible if this engine can use them, and only calibrations of its build
        are used.

        Raises:
            EngineIncompatibleError: its RPC protocol is another one than that of the workers.
        """
        self.calibrations.engine = engine.version
        self._client = Client.of(engine)

    def add(self, endpoint: str) -> str:
        """Add a worker by its endpoint (`host`, `host:port`), or those of a machine (`ssh://host`); returns it as
        the cluster names it. Adding twice is fine. What is reached through a link is not connected yet.

        Raises:
            ConfigError: it is neither.
        """
        endpoint = worker_target(endpoint)
        self._named.add(endpoint)
        if is_target(endpoint):
            if self.links.add(endpoint):
                self._events.publish(EventKind.WORKER_ADDED, endpoint, f"added {endpoint}")
        elif endpoint not in self._probes:
            self._probes[endpoint] = None
            self._events.publish(EventKind.WORKER_ADDED, endpoint, f"added worker {endpoint}")
        return endpoint

    def named(self, name: str) -> str:
        """The endpoint or target that a person means: it, or the name of a linked worker or its machine.

        Raises:
            ConfigError: it is neither known nor an endpoint.
        """
        if name in self._probes or name in self.links.targets:
            return name
        return self.links.target_named(name) or worker_target(name)

    def name_of(self, endpoint: str) -> str:
        """How people call a worker: its name, if it is reached through a link, else its endpoint."""
        return self.links.name_of(endpoint) or endpoint

    def by_endpoint(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts of workers that are given by their names or endpoints, by endpoint."""
        endpoints = {self.name_of(endpoint): endpoint for endpoint in self._probes}
        return {endpoints.get(worker, worker): count for worker, count in counts.items()}

    @property
    def given(self) -> list[str]:
        """What gives another router the same workers: targets, and the endpoints that are not behind one."""
        targets = self.links.targets
        return [*targets, *(endpoint for endpoint in self._probes if self.links.target_of(endpoint) is None)]

    def remove(self, endpoint: str) -> None:
        """Remove a worker.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        known = [*self._probes, *self.links.targets]
        if endpoint not in known:
            raise ConfigError(f"{endpoint} is not a known worker; known workers: {', '.join(known) or 'none'}")
        target = self.links.target_of(endpoint)
        if target is not None:
            raise ConfigError(f"{self.name_of(endpoint)} is reached through {target}; remove that")
        holders = registry.holders()
        for held in [endpoint, *self.links.endpoints_of(endpoint)]:
            if held in holders:
                what = f"{self.name_of(held)} is {describe_holder(holders[held])}"
                raise ConfigError(f"{what}; stop that coordinator first")
        self.forget(endpoint)
        self._events.publish(EventKind.WORKER_REMOVED, endpoint, f"removed worker {endpoint}")

    def note(self, endpoint: str) -> None:
        """Know a local or linked worker from now on, which nobody has named."""
        self._probes.setdefault(endpoint, None)

    def forget(self, endpoint: str) -> None:
        """Know a worker no longer; no event is published."""
        self._probes.pop(endpoint, None)
        self._named.discard(endpoint)
        self._lost.discard(endpoint)
        self._round_trips_ms.pop(endpoint, None)
        self._identities.forget(endpoint)

    def lose(self, endpoint: str, detail: str) -> None:
        """A linked worker is not reachable any more, as its link reports."""
        self._record_loss(Probe(endpoint=endpoint, outcome=ProbeOutcome.UNREACHABLE, detail=detail))

    @property
    def may_return(self) -> bool:
        """Whether linked workers that were lost may come back soon."""
        return self.links.may_return(self._lost)

    async def find_lost(self, endpoints: Iterable[str]) -> frozenset[str]:
        """After the end of a coordinator: those of its workers that do not answer. Each is published as lost.

        A healthy worker needs a moment to notice that its coordinator is gone; the probe waits for that.
        """
        await self.links.refresh()
        endpoints = list(endpoints)
        known = [endpoint for endpoint in endpoints if endpoint in self._probes]
        lost = [endpoint for endpoint in known if self.links.trouble_of(endpoint) is not None]
        lost += [endpoint for endpoint in endpoints if self.links.was_replaced(endpoint)]
        left = [endpoint for endpoint in known if endpoint not in lost]
        for probe in await probe_all(left, client=self._client):
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
        if probe.outcome is not ProbeOutcome.REFUSED or endpoint not in self.local:
            self._publish_loss(probe)

    def _publish_loss(self, probe: Probe) -> None:
        """Once, until it is back."""
        endpoint = probe.endpoint
        if endpoint not in self._lost:
            self._lost.add(endpoint)
            name = self.name_of(endpoint)
            why = self._detail(probe).removeprefix(f"{name}: ")
            self._events.publish(EventKind.WORKER_LOST, endpoint, f"lost worker {name}: {why}", name=name)

    def _detail(self, probe: Probe) -> str:
        """A probe's detail with the worker's name instead of its endpoint on loopback."""
        name = self.links.name_of(probe.endpoint)
        return probe.detail.replace(probe.endpoint, name) if name else probe.detail

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds during which this repeatedly lost worker is used only if the other workers do not suffice."""
        return self._losses.cool_down_s(endpoint)

    async def refresh_holders(self, *, again: bool = False) -> None:
        """Read from the registry which links are ready, and which workers are held now, under whichever name; no
        worker is probed.

        Args:
            again: look up the addresses of known workers again, too.
        """
        entries = await self.links.refresh()
        holders = {
            endpoint: entry
            for entry in entries
            if entry.kind == registry.COORDINATOR
            for endpoint in entry.workers
        }
        await self._identities.resolve([*holders, *self._probes], again=again)
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
        await self.refresh_holders(again=True)
        await self._probe_free([endpoint for endpoint in self._probes if endpoint not in except_for])
        return self.statuses()

    async def probe(self, endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Probe these workers, except those that are held."""
        await self.refresh_holders()
        await self._probe_free(endpoints, timeout_s=timeout_s)

    async def _probe_free(self, endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        duplicates = self._identities.second_names(self._probes)
        free = [
            endpoint
            for endpoint in endpoints
            if endpoint not in self._holders
            and endpoint not in duplicates
            and self.links.trouble_of(endpoint) is None
        ]
        probes = await probe_all(free, timeout_s=timeout_s, client=self._client)
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
        was, now = before and STATE_OF_OUTCOME[before.outcome], STATE_OF_OUTCOME[probe.outcome]
        if was == "free" and now == "down" and endpoint not in self.local:  # supervisors report the end of these
            self._publish_loss(probe)
        elif now == "free" and (
            was == "down" or endpoint in self._lost or (was != "free" and endpoint in self._losses)
        ):
            self._lost.discard(endpoint)
            name = self.name_of(endpoint)
            self._events.publish(EventKind.WORKER_RETURNED, endpoint, f"worker {name} is back", name=name)

    def statuses(self) -> list[WorkerStatus]:
        """The status of all workers as last seen, without a new probe."""
        duplicates = self._identities.second_names(self._probes)
        return [
            self._duplicate(endpoint, duplicates[endpoint]) if endpoint in duplicates else self._status(endpoint)
            for endpoint in self._probes
        ] + self.links.statuses()

    def held_by_others(self) -> list[WorkerStatus]:
        """Workers that this router does not know, and that coordinators of this user hold; only to be shown."""
        return [self._status(endpoint) for endpoint in self._holders if not self.knows_all([endpoint])]

    async def discover(self) -> list[str]:
        """Search this machine's usual ports for workers, and adopt those of this user's other processes.

        Workers of other users, and those that other notebooks reach through a link, are not used: who wants one
        adds it by its name.

        Returns:
            The endpoints that were not known before.
        """
        adopted = await self.local.adopt()
        await self.refresh_holders()
        answering = [probe for probe in await discover() if self.links.worker(probe.endpoint) is None]
        await self._identities.resolve(probe.endpoint for probe in answering)
        probes = [probe for probe in answering if not self.knows_all([probe.endpoint])]
        found = []
        for probe in probes:
            user = await asyncio.to_thread(other_user_at, probe.endpoint)
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

    def probes_of(self, endpoints: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The last probe of each worker as plain data, for processes that see it only while it is held."""
        probes = {endpoint: self._probes.get(endpoint) for endpoint in endpoints}
        return {endpoint: probe.as_dict() for endpoint, probe in probes.items() if probe is not None}

    def may_be_gpus(self, endpoints: Collection[str]) -> bool:
        """Whether one of these workers may be a GPU: its memory is not known to be that of a machine."""
        chosen = [worker for worker in self.statuses() if worker.endpoint in endpoints]
        return any(worker.capacity.memory_domain is None for worker in chosen)

    def identity_of(self, endpoint: str) -> str:
        """What the calibration of a worker (or of `THIS_MACHINE`) belongs to."""
        linked = self.links.worker(endpoint)
        if linked is None:
            return identity_of(endpoint)
        return identity_of(endpoint, target=self.links.target_of(endpoint), name=linked.name)

    def cache_of(self, endpoint: str) -> str:
        """What its cache of tensors is known by: each worker has one of its own."""
        return self.identity_of(endpoint)

    def calibration_of(self, endpoint: str) -> Calibration | None:
        """How fast a worker (or `THIS_MACHINE`) is; None if that was not measured."""
        return self.calibrations.of(self.identity_of(endpoint), threads=self.local.threads_of(endpoint))

    async def correct_calibrations(self, factors: Mapping[str, float]) -> None:
        """As `Calibrations.correct`, with factors by endpoint. The calibration of a local worker may have been
        measured on another one, and is corrected then."""
        known = {endpoint: self.calibration_of(endpoint) for endpoint in factors}
        await self.calibrations.correct(
            {calibration.identity: factors[endpoint] for endpoint, calibration in known.items() if calibration}
        )

    def entries_of(self, endpoints: Iterable[str]) -> list[Entry]:
        """The registry entries of these workers and of the links to them; other workers have none."""
        wanted = set(endpoints)
        return [
            entry
            for entry in registry.entries()
            if (entry.kind == registry.WORKER and entry.name in wanted) or wanted & entry.endpoints.keys()
        ]

    def _status(self, endpoint: str) -> WorkerStatus:
        holder, end = self._holders.get(endpoint), self.local.end_of(endpoint)
        probe, linked = self._probes.get(endpoint), self.links.worker(endpoint)
        trouble = self.links.trouble_of(endpoint)
        if probe is None and holder is not None:  # as the process that started its coordinator saw it
            probe = Probe.from_dict((holder.about.get("probes") or {}).get(endpoint))
        if end is not None:
            state, detail = "down", end
        elif trouble is not None:
            state, detail = "lost", trouble
        elif holder is not None:
            state, detail = "held", describe_holder(holder)
        elif probe is None:
            state, detail = "unknown", "not probed yet"
        else:
            state, detail = STATE_OF_OUTCOME[probe.outcome], self._detail(probe)
        return WorkerStatus(
            endpoint=endpoint,
            state=state,
            detail=detail,
            held_by=holder.name if holder is not None else None,
            probe=probe,
            is_local=endpoint in self.local,
            name=self.links.name_of(endpoint),
            target=self.links.target_of(endpoint) or "",
            machine=linked.machine if linked and linked.device in ("", CPU) else "",
            calibration=self.calibration_of(endpoint),
        )

    def _duplicate(self, endpoint: str, known: str) -> WorkerStatus:
        return WorkerStatus(
            endpoint=endpoint,
            state="duplicate",
            detail=f"the same worker as {self.name_of(known)}, which is used",
            held_by=None,
            probe=None,
            is_local=False,
            name=self.links.name_of(endpoint),
            target=self.links.target_of(endpoint) or "",
        )


def other_user_at(endpoint: str) -> str | None:
    """The user of a worker on this machine, if that is another one than who runs this; else None."""
    return other_user_of(*parse_endpoint(endpoint)) if is_loopback(endpoint) else None
