"""Look for workers that could be used, and say of each where it was found; nothing is added, started or installed.

Sources, in this order: the workers that the router knows, this user's other workers and links, this machine's
usual ports, hosts named for ssh, announcements by multicast DNS, and a scan of a network that was named. A worker
that several sources have is one row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.links import link
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.announcements import Announced, browse
from sollol_nb.llama_cpp.workers.identities import Identities
from sollol_nb.llama_cpp.workers.probe import DISCOVERY_PORTS, Probe, ProbeOutcome, probe_all
from sollol_nb.llama_cpp.workers.scan import addresses_in, scan
from sollol_nb.llama_cpp.workers.ssh_hosts import SshHost, look_at
from sollol_nb.llama_cpp.workers.status import STATE_OF_OUTCOME, WorkerStatus, describe_holder
from sollol_nb.llama_cpp.workers.workers import Workers, other_user_at
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK, SSH, format_endpoint, is_target, parse_endpoint, ssh_target
from sollol_nb.text.tables import counted, format_bytes, format_ms

PROBES_AT_ONCE = 64

UNKNOWN = "unknown"
_ADDABLE = ("free", "held", "busy", "reachable", "connected")
_HEADER = ("worker", "found in", "state", "memory free", "round trip", "add it with")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWorker:
    """A worker that was found, or a machine that can have some.

    Attributes:
        name: how to name it, such as `192.168.1.10:50052` or `ssh://gpu1`.
        sources: where it was found, such as `RPC_BACKENDS` or `mDNS`.
        state: as of `WorkerStatus`; of a machine `reachable`, `connected` (this user has a link to it) or `down`.
        detail: one line about it, or what is wrong and what to do.
        is_known: whether the router uses it already.
        free_bytes: its free memory; None if unknown.
        round_trip_ms: None if unknown.
    """

    name: str
    sources: tuple[str, ...]
    state: str = UNKNOWN
    detail: str = ""
    is_known: bool = False
    free_bytes: int | None = None
    round_trip_ms: float | None = None

    @property
    def add_line(self) -> str:
        """The line that adds it in a notebook; "" if it is used already or cannot be."""
        return "" if self.is_known or self.state not in _ADDABLE else f"%sollol_cluster add {self.name}"

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**asdict(self), "add_line": self.add_line}


async def find_workers(
    workers: Workers, *, ssh: Sequence[str] = (), scan_network: str | None = None, mdns: bool = False
) -> list[FoundWorker]:
    """The workers of all sources.

    Args:
        workers: those that the router knows.
        ssh: hosts to look at through the ssh program, such as `gpu1` or `user@gpu2:2222`.
        scan_network: a private network to scan, such as `192.168.1.0/24`.
        mdns: whether to look for announcements in the local network.

    Raises:
        ConfigError: a host or the network cannot be used, or zeroconf is missing.
    """
    targets = [ssh_target(host) for host in ssh]
    addresses = [] if scan_network is None else addresses_in(scan_network)
    known = [_known(worker, workers) for worker in await workers.refresh()]
    connected = {target for target in workers.links.targets if workers.links.is_connected(target)}
    targets += [row.name for row in known if row.name.startswith(SSH)]
    hosts, announced, scanned, entries = await asyncio.gather(
        look_at([target for target in dict.fromkeys(targets) if target not in connected]),
        browse() if mdns else _nothing(),
        scan(addresses, DISCOVERY_PORTS),
        asyncio.to_thread(registry.entries),
    )
    linked = {endpoint for entry in entries for endpoint in entry.endpoints}
    local = [format_endpoint(LOOPBACK, port) for port in DISCOVERY_PORTS]
    rows = [
        *known,
        *_of_this_user(entries, workers),
        *(FoundWorker(name=endpoint, sources=("this machine",)) for endpoint in local),
        *map(_host, hosts),
        *map(_announced, announced),
        *(FoundWorker(name=endpoint, sources=(f"scan of {scan_network}",)) for endpoint in scanned),
    ]
    rows = [row for row in rows if row.is_known or row.name not in linked]
    identities = Identities()
    await identities.resolve(row.name for row in rows if _is_endpoint(row.name))
    rows = _merged(rows, identities.of)
    return await _probed(rows, identities)


async def _nothing() -> list[Any]:
    return []


def _is_endpoint(name: str) -> bool:
    """Whether this is an address to connect to, not a machine, nor the name of a worker behind a link."""
    try:
        parse_endpoint(name)
    except ConfigError:
        return False
    return ":" in name


def _known(worker: WorkerStatus, workers: Workers) -> FoundWorker:
    """A worker that the router knows, checked just now."""
    target = workers.links.target_of(worker.endpoint) or worker.endpoint
    setting = config.find("workers")
    source = setting.source if target in setting.value else "used here"
    probe = worker.probe
    if is_target(target) and not workers.links.is_connected(target):
        return FoundWorker(name=target, sources=(source,), is_known=True)
    return FoundWorker(
        name=worker.name or worker.endpoint,
        sources=(source,),
        state=worker.state,
        detail=worker.detail,
        is_known=True,
        free_bytes=worker.capacity.free_bytes if probe and probe.device_free_bytes else None,
        round_trip_ms=probe.round_trip_ms if probe else None,
    )


def _of_this_user(entries: Iterable[Entry], workers: Workers) -> Iterable[FoundWorker]:
    """The workers and links that processes of this user have started."""
    for entry in entries:
        source = f"started by {registry.describe_owner(entry.about)}"
        if entry.kind == registry.WORKER:
            yield FoundWorker(name=entry.name, sources=(source,))
        elif entry.kind == registry.LINK and is_target(entry.name) and entry.name not in workers.links.targets:
            state = "connected" if entry.about.get("state") == link.READY else "down"
            detail = f"{counted(len(entry.endpoints), 'worker')}; {entry.about.get('detail')}"
            yield FoundWorker(name=entry.name, sources=(f"link {source}",), state=state, detail=detail)


def _host(host: SshHost) -> FoundWorker:
    state = "down" if host.trouble else "reachable"
    detail = host.trouble or host.description
    return FoundWorker(name=host.target, sources=("ssh",), state=state, detail=detail, free_bytes=host.free_bytes)


def _announced(worker: Announced) -> FoundWorker:
    version = f", llama.cpp {worker.version}" if worker.version else ""
    return FoundWorker(name=worker.endpoint, sources=("mDNS",), detail=f"announced as {worker.name}{version}")


def _merged(rows: Iterable[FoundWorker], identity: Callable[[str], Hashable]) -> list[FoundWorker]:
    """One row for each worker, with all its sources; the first name counts, and the first state that is known."""
    merged: dict[Hashable, FoundWorker] = {}
    for row in rows:
        key = identity(row.name)
        first = merged.setdefault(key, row)
        if first is row:
            continue
        known = row if first.state == UNKNOWN else first
        merged[key] = replace(
            known,
            name=first.name,
            sources=tuple(dict.fromkeys(first.sources + row.sources)),
            detail=known.detail or row.detail,
            is_known=first.is_known,
        )
    return list(merged.values())


async def _probed(rows: Sequence[FoundWorker], identities: Identities) -> list[FoundWorker]:
    """The rows with the states of their workers; without those where no worker is."""
    holders = await asyncio.to_thread(registry.holders)
    await identities.resolve(holders)
    held = {identities.of(endpoint): entry for endpoint, entry in holders.items()}
    gate = asyncio.Semaphore(PROBES_AT_ONCE)

    async def check(row: FoundWorker) -> FoundWorker | None:
        if row.state != UNKNOWN or not _is_endpoint(row.name):
            return row
        if (holder := held.get(identities.of(row.name))) is not None:
            return replace(row, state="held", detail=describe_holder(holder))
        async with gate:
            (probe,) = await probe_all([row.name])
        user = await asyncio.to_thread(other_user_at, row.name)
        return _of_probe(row, probe, user)

    return [row for row in await asyncio.gather(*map(check, rows)) if row is not None]


def _of_probe(row: FoundWorker, probe: Probe, user: str | None) -> FoundWorker | None:
    """The row with the state of its worker; None if it is none."""
    is_worker = probe.outcome in (ProbeOutcome.FREE, ProbeOutcome.BUSY) or probe.protocol is not None
    if not is_worker and not row.is_known:
        return None
    details = [row.detail, "" if probe.detail == "free" else probe.detail]
    details += [f"a worker of user {user}; add it if you may use it"] if user else []
    return replace(
        row,
        state=STATE_OF_OUTCOME[probe.outcome],
        detail="; ".join(filter(None, details)),
        free_bytes=probe.free_bytes if probe.device_free_bytes else None,
        round_trip_ms=probe.round_trip_ms,
    )


def as_table(found: Sequence[FoundWorker]) -> str:
    """The found workers as text: a line for each, and its detail below it."""
    if not found:
        return "found no worker"
    lines = [
        (
            row.name,
            ", ".join(row.sources),
            row.state,
            "" if row.free_bytes is None else format_bytes(row.free_bytes),
            "" if row.round_trip_ms is None else format_ms(row.round_trip_ms),
            row.add_line or ("added already" if row.is_known else ""),
        )
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *lines, strict=True)]
    text = []
    for line, row in zip([_HEADER, *lines], [None, *found], strict=True):
        text.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if row is not None and row.detail and row.detail != row.state:
            text.append(f"    {row.detail}")
    return "\n".join(text)
