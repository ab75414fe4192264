"""One worker as it was seen last: its state, and what a layer plan needs to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import psutil

from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.workers.probe import Probe
from sollol_nb.settings.endpoints import LOOPBACK, is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as it was seen last.

    Attributes:
        endpoint: `host:port`.
        state: `free`, `held`, `busy`, `down`, `incompatible`, `duplicate` (a second name of another worker) or
            `unknown` (not probed yet).
        detail: one line: who holds it, or what is wrong and what to do.
        held_by: the model whose coordinator holds it, or None.
        probe: its last probe; memory and round trip are from then.
        is_local: whether it is a process on this machine that this router started or adopted.
        name: how people call it, if it is reached through a link; else "".
        machine: equal for workers that share one machine's memory, if it is reached through a link; else "".
    """

    endpoint: str
    state: str
    detail: str
    held_by: str | None
    probe: Probe | None
    is_local: bool
    name: str = ""
    machine: str = ""

    @property
    def capacity(self) -> WorkerCapacity:
        """What a layer plan needs to know about it."""
        seen = self.probe
        if seen is None:
            return WorkerCapacity(self.endpoint, free_bytes=0, total_bytes=0)
        free_bytes, memory_domain = seen.free_bytes, self.machine or None
        if _is_system_memory(seen.total_bytes) and is_loopback(self.endpoint):
            # All CPU workers of a machine share its memory, and each reports all of it as free.
            free_bytes = min(free_bytes, psutil.virtual_memory().available)
            memory_domain = LOOPBACK
        return WorkerCapacity(
            self.endpoint,
            free_bytes=free_bytes,
            total_bytes=seen.total_bytes,
            round_trip_ms=seen.round_trip_ms,
            memory_domain=memory_domain,
        )


def _is_system_memory(total_bytes: int) -> bool:
    return abs(total_bytes - _system_memory_bytes()) < 64 * 1024**2


@lru_cache
def _system_memory_bytes() -> int:
    return psutil.virtual_memory().total
