"""Before a load: seed the caches of far workers whose machines have the model's file themselves, where that is
quicker than sending the weights (`links/seeding.py` does it)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from sollol_nb.errors import LinkError, SollolError
from sollol_nb.layers.plan import LayerPlan, Shard
from sollol_nb.llama_cpp.coordinators.planning import Start
from sollol_nb.llama_cpp.coordinators.settings import file_identity
from sollol_nb.llama_cpp.links.seeding import NoFileError, Seed, seed
from sollol_nb.llama_cpp.processes.machine import boot_id
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import SSH
from sollol_nb.settings.kinds import split_command
from sollol_nb.text.tables import format_bytes

logger = logging.getLogger(__name__)

LEAST_GAIN_S = 20.0
"""Seeding must save at least so many seconds: it connects, and may have to send llama-server once."""
SEEDING_BYTES_PER_S = 250e6
"""At which a machine is expected to seed: it reads each byte, hashes it twice and writes it, on one core."""
USUAL_BYTES_PER_S = 117e6
"""Of a link that was not calibrated: 1 Gb/s."""
SHORTEST_LIMIT_S = 60.0
TRIED_AGAIN_AFTER_S = 600.0
"""A machine that could not be seeded with a model is not asked again before."""


@dataclass(slots=True)
class _Machine:
    """What is to be seeded behind one target: the shares of its workers by device, and the seconds that saves."""

    seeds: list[Seed] = field(default_factory=list)
    endpoints: dict[str, str] = field(default_factory=dict)
    saved_s: float = 0.0

    @property
    def byte_count(self) -> int:
        return sum(each.byte_count for each in self.seeds)


class Seeder:
    """Seeds caches for starts. Lives on the I/O loop."""

    def __init__(self, workers: Workers, events: EventBus) -> None:
        self._workers = workers
        self._events = events
        self._not_before: dict[tuple[str, str], float] = {}  # target and model: when it is tried again

    async def seed(self, start: Start, plan: LayerPlan) -> None:
        """Seed what the far workers of a plan lack, all machines at the same time. What cannot be seeded is sent
        by the load, as usual; an event says why."""
        machines = self._worth_seeding(start, plan)
        if not machines:
            return
        progress = _Progress(self._events, start.model, machines)
        await asyncio.gather(*(self._seed(start, target, found, progress) for target, found in machines.items()))

    def _worth_seeding(self, start: Start, plan: LayerPlan) -> dict[str, _Machine]:
        """What to seed, by target."""
        sizes, links = start.facts.cacheable_bytes, self._workers.links
        model, now = file_identity(start.model_path), time.monotonic()
        room = float(config.default("tensor_cache_gb")) * 1e9
        machines: dict[str, _Machine] = {}
        for shard in plan.workers:
            target, linked = links.target_of(shard.endpoint), links.worker(shard.endpoint)
            if target is None or linked is None or not target.startswith(SSH):
                continue
            if now < self._not_before.get((target, str(start.model_path)), now):
                continue
            known = self._workers.cached.of(self._workers.cache_of(shard.endpoint), model)
            lacking = [unit for unit in shard.units if unit not in known and sizes[unit]]
            byte_count = sum(sizes[unit] for unit in lacking)
            if not lacking or byte_count > room:
                continue
            sending_s = byte_count / self._rate(shard, is_here=linked.machine == boot_id() != "")
            limit_s = max(SHORTEST_LIMIT_S, sending_s)  # longer than that, sending is quicker
            machine = machines.setdefault(target, _Machine())
            machine.saved_s += sending_s - byte_count / SEEDING_BYTES_PER_S
            machine.endpoints[linked.device] = shard.endpoint
            machine.seeds.append(Seed(device=linked.device, units=lacking, byte_count=byte_count, limit_s=limit_s))
        return {target: found for target, found in machines.items() if found.saved_s >= LEAST_GAIN_S}

    def _rate(self, shard: Shard, *, is_here: bool) -> float:
        """Bytes a second on the way to a worker."""
        calibration = self._workers.calibration_of(shard.endpoint)
        if calibration is not None and calibration.bytes_per_s:
            return calibration.bytes_per_s
        return float("inf") if is_here else USUAL_BYTES_PER_S

    async def _seed(self, start: Start, target: str, found: _Machine, progress: _Progress) -> None:
        name = target.removeprefix(SSH).rpartition("@")[2]
        try:
            done = await seed(
                target,
                split_command(config.default("ssh")),
                start.engine,
                start.facts,
                found.seeds,
                partial(progress.note, target),
            )
        except (SollolError, OSError) as error:
            self._not_before[target, str(start.model_path)] = time.monotonic() + TRIED_AGAIN_AFTER_S
            if isinstance(error, NoFileError):  # nothing was expected
                logger.info("%s", error)
                return
            why = str(error) if isinstance(error, LinkError) else f"{type(error).__name__}: {error}"
            message = f"{name} was not seeded from its own copy of {start.model}, so its layers are sent: {why}"
            self._events.publish(EventKind.WORKER_SEEDED, target, message, error=why)
            return
        self._note(start, found, done)
        total = format_bytes(sum(done.values()))
        message = f"{name} was seeded from its own copy of {start.model}: {total} need not be sent"
        self._events.publish(EventKind.WORKER_SEEDED, target, message, byte_count=sum(done.values()))

    def _note(self, start: Start, found: _Machine, done: Mapping[str, int]) -> None:
        loaded: list[tuple[str, Collection[int]]] = [
            (self._workers.cache_of(found.endpoints[each.device]), each.units)
            for each in found.seeds
            if done.get(each.device)
        ]
        self._workers.cached.note(file_identity(start.model_path), loaded)


class _Progress:
    """How much is seeded of all machines, reported as the load of the model."""

    def __init__(self, events: EventBus, model: str, machines: Mapping[str, _Machine]) -> None:
        self._events = events
        self._model = model
        self._names = [target.removeprefix(SSH).rpartition("@")[2] for target in machines]
        self._total = sum(found.byte_count for found in machines.values())
        self._written: dict[tuple[str, str], int] = {}
        self._report()

    async def note(self, target: str, device: str, byte_count: int) -> None:
        """So much of a device's cache is written."""
        self._written[target, device] = byte_count
        self._report()

    def _report(self) -> None:
        written = min(sum(self._written.values()), self._total)
        share = written / self._total
        names = ", ".join(self._names)
        whose = "its own copy" if len(self._names) == 1 else "their own copies"
        message = (
            f"seeding {names} from {whose} of {self._model}: {int(share * 100)} % "
            f"({format_bytes(written)} of {format_bytes(self._total)})"
        )
        self._events.report(
            EventKind.COORDINATOR_LOADING,
            self._model,
            message,
            share=share,
            loaded_bytes=written,
            total_bytes=self._total,
            per_worker=[],
        )
