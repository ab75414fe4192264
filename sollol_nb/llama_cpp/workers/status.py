"""One worker as it was seen last: its state, and what a layer plan needs to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import psutil

from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import boot_id
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.settings.endpoints import LOOPBACK, SSH, is_loopback

STATE_OF_OUTCOME = {
    ProbeOutcome.FREE: "free",
    ProbeOutcome.BUSY: "busy",
    ProbeOutcome.REFUSED: "down",
    ProbeOutcome.UNREACHABLE: "down",
    ProbeOutcome.INCOMPATIBLE: "incompatible",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as it was seen last.

    Attributes:
        endpoint: `host:port`; of a machine whose workers are not known, what leads to it, such as `ssh://gpu1`.
        state: `free`, `held`, `busy`, `down`, `incompatible`, `duplicate` (a second name of another worker) or
            `unknown` (not probed, or its machine not connected yet). Of a worker behind a link also `lost` (the
            link is trying to connect again); of a machine whose workers are not known yet `connecting`,
            `installing` (llama.cpp), or `lost`.
        detail: one line: who holds it, or what is wrong and what to do.
        held_by: the model whose coordinator holds it, or None.
        probe: its last probe; memory and round trip are from then.
        is_local: whether it is a process on this machine that this router started or adopted.
        name: how people call it, if it is reached through a link; else "".
        machine: equal for workers that share one machine's memory, if it is reached through a link; else "".
        target: what the link leads to, such as `ssh://gpu1`, if this router knows the link; else "".
        calibration: how fast it is; None if that was not measured.
    """

    endpoint: str
    state: str
    detail: str
    held_by: str | None
    probe: Probe | None
    is_local: bool
    name: str = ""
    machine: str = ""
    target: str = ""
    calibration: Calibration | None = None

    @property
    def label(self) -> str:
        """How people call it."""
        return self.name or self.endpoint

    @property
    def problem(self) -> str:
        """Its detail, in which it is named."""
        target = self.target or self.endpoint
        names = (self.label, target, target.removeprefix(SSH))
        return self.detail if any(name in self.detail for name in names) else f"{self.label}: {self.detail}"

    @property
    def capacity(self) -> WorkerCapacity:
        """What a layer plan needs to know about it."""
        seen = self.probe
        if seen is None:
            return WorkerCapacity(self.endpoint, free_bytes=0, total_bytes=0, name=self.name)
        free_bytes, memory_domain = seen.free_bytes, self.machine or None
        if _is_system_memory(seen.total_bytes) and self._is_here:
            # All CPU workers of a machine share its memory, and each reports all of it as free.
            free_bytes = min(free_bytes, psutil.virtual_memory().available)
            memory_domain = LOOPBACK
        return WorkerCapacity(
            self.endpoint,
            free_bytes=free_bytes,
            total_bytes=seen.total_bytes,
            round_trip_ms=seen.round_trip_ms,
            memory_domain=memory_domain,
            name=self.name,
            device_count=max(1, len(seen.device_free_bytes)),
        )

    @property
    def _is_here(self) -> bool:
        """Whether it runs on this machine; the endpoint of a linked worker does not tell."""
        if not self.target:
            return is_loopback(self.endpoint)
        return self.machine == boot_id() != "" or (self.target.startswith("[") and is_loopback(self.target))


def describe_holder(holder: Entry) -> str:
    """Who holds a worker, as text."""
    what = "standby" if holder.standby_of else "coordinator"
    return f"held by the {what} of {holder.name}, started by {registry.describe_owner(holder.about)}"


def _is_system_memory(total_bytes: int) -> bool:
    return abs(total_bytes - _system_memory_bytes()) < 64 * 1024**2


@lru_cache
def _system_memory_bytes() -> int:
    return psutil.virtual_memory().total
