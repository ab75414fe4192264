"""The workers' caches of weights around a load: verified before it, sealed after it; and how much was sent.

The caches are those of the workers on this machine; those of other machines are looked after there
(`workers/lent.py`, `links/agent.sh`), and verified before each load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings
from sollol_nb.llama_cpp.links.verifying import verify
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import Address
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.traffic import delivered_bytes
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe_all
from sollol_nb.settings.endpoints import addresses_of, parse_endpoint
from sollol_nb.text.tables import format_bytes

IDLE_LIMIT_S = 5.0
MOSTLY_SENT = 0.95
"""If more of the weights was sent, it is not worth a word."""


class CachedWeights:
    """Lives on the I/O loop."""

    def __init__(self) -> None:
        self._settling: set[asyncio.Task[None]] = set()

    async def prepare(self, settings: CoordinatorSettings, workers: Iterable[Entry]) -> set[str]:
        """Before a coordinator is started; returns the workers that it must not use.

        A worker whose cache cannot be verified might take a damaged file from it.

        Args:
            workers: the registry entries of its workers and of the links to them.
        """
        sizes = settings.facts.cacheable_sizes
        if settings.plan is None or not settings.plan.workers or not sizes:
            return set()
        workers = [*workers]
        needs = _needs(settings, workers)
        by_link = [
            (entry, entry.endpoints.keys() & {*settings.plan.endpoints}) for entry in workers if entry.endpoints
        ]
        # A worker answers once it has carried out all that its last client has sent: then it writes nothing more.
        caching = [endpoint for endpoint in settings.plan.endpoints if _cache_of(endpoint) in needs]
        caching += [endpoint for _, endpoints in by_link for endpoint in endpoints]
        probes = await probe_all(caching, timeout_s=IDLE_LIMIT_S)
        unsafe = {probe.endpoint for probe in probes if probe.outcome is not ProbeOutcome.FREE}
        unverified = await asyncio.to_thread(cache.prepare, needs, sizes)  # links tell the sizes to other machines
        unsafe |= {endpoint for endpoint in caching if _cache_of(endpoint) in unverified}
        answers = await asyncio.gather(*(verify(entry, endpoints, sizes) for entry, endpoints in by_link))
        for (_, endpoints), is_verified in zip(by_link, answers, strict=True):
            unsafe |= set() if is_verified else endpoints
        return unsafe

    def settle(self, settings: CoordinatorSettings, workers: Iterable[Entry]) -> None:
        """After its weights are loaded: in the background, since the disk may be slow. Where this process ends
        before, the next `prepare` does it."""
        needs = _needs(settings, workers)
        if needs:
            task = asyncio.create_task(asyncio.to_thread(cache.settle, list(needs)))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)


def _needs(settings: CoordinatorSettings, workers: Iterable[Entry]) -> dict[str, int]:
    """The caches of the workers on this machine, and the bytes of weights that each worker gets."""
    if settings.plan is None:
        return {}
    caching = {
        entry.name for entry in workers if entry.kind == registry.WORKER and entry.about.get("caches") is True
    }
    unit_bytes = settings.facts.cacheable_bytes
    return {
        _cache_of(shard.endpoint): sum(unit_bytes[shard.first_layer : shard.first_layer + shard.unit_count])
        for shard in settings.plan.workers
        if shard.endpoint in caching
    }


def _cache_of(endpoint: str) -> str:
    """The name of the cache of a worker of this machine."""
    return cache.local_name(parse_endpoint(endpoint)[1])


def weight_bytes(settings: CoordinatorSettings) -> int:
    """Of the weights that the workers of a coordinator get."""
    unit_bytes = (*settings.facts.layer_bytes, settings.facts.output_bytes)
    shards = settings.plan.workers if settings.plan else ()
    return sum(sum(unit_bytes[shard.first_layer : shard.first_layer + shard.unit_count]) for shard in shards)


def describe_sent(sent: int | None, total_bytes: int) -> str:
    """How much of the weights was sent to the workers, for people; "" where that is not known, or all was."""
    if sent is None or sent > MOSTLY_SENT * total_bytes:
        return ""
    return f"sent {format_bytes(sent)} of {format_bytes(total_bytes)}, the rest was cached on the workers"


async def count_sent(settings: CoordinatorSettings, pid: int) -> int | None:
    """Bytes that a coordinator has sent its workers so far; None without workers, or where the system does not
    count."""
    if settings.plan is None or not settings.plan.workers:
        return None
    endpoints = [shard.endpoint for shard in settings.plan.workers]

    def count() -> int | None:
        counts = delivered_bytes(pid)
        peers = frozenset[Address]().union(*map(addresses_of, endpoints))
        return None if counts is None else sum(counts.get(peer, 0) for peer in peers)

    return await asyncio.to_thread(count)
