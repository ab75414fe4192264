"""How much of its model a coordinator has loaded: bytes and layers of the weights, per worker.

The engine's log says which units each worker gets, and when the weights are loaded, but nothing in between. That
is known from the operating system, where it counts the bytes that a TCP connection has delivered (see
`traffic.delivered_bytes`): while it loads, a coordinator sends its workers their weights and next to nothing
else. The workers are not probed, because each answers only its coordinator. A worker with its own cache of tensors
receives only those that it lacks; such a load is shown as less until all weights are loaded, and then it is said
how much was sent.

Source of the order in which a worker gets its units: llama.cpp loads a device's tensors in the order in which
`load_tensors` (llama-model.cpp) creates them, the output layer before the blocks.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sollol_nb.llama_cpp.coordinators.cached_weights import describe_sent
from sollol_nb.llama_cpp.coordinators.placement import Placement, read_placement
from sollol_nb.llama_cpp.coordinators.readiness import LISTENING
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings
from sollol_nb.llama_cpp.processes.machine import Address
from sollol_nb.llama_cpp.processes.traffic import delivered_bytes
from sollol_nb.settings.endpoints import addresses_of
from sollol_nb.text.tables import counted, format_bytes

CHECK_INTERVAL_S = 0.25
WEIGHTS_LOADED = "constructing llama_context"  # the engine logs this after the weights
_RELEVANT_LINE = re.compile(f"using device|assigned to device|{WEIGHTS_LOADED}|{LISTENING}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerProgress:
    """How much of its weights one worker has.

    Attributes:
        endpoint: the worker.
        placed_units: its blocks, and the output layer, that it has completely; None where that is not known.
        planned_units: how many it gets.
        loaded_bytes: weights that it has received; None where that is not known.
        total_bytes: weights that it gets.
        name: how people call the worker; "" if by its endpoint.
    """

    endpoint: str
    placed_units: int | None
    planned_units: int
    loaded_bytes: int | None
    total_bytes: int
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadProgress:
    """How much of its model a coordinator has loaded.

    Attributes:
        share: of the weights, 0 to 1; None where that is not known.
        loaded_bytes: the same in bytes.
        total_bytes: the weights that workers get; without workers, the model's file.
        bytes_sent: to the workers so far, with what is not weights; None where that is not known.
        per_worker: in the order of the layers; empty without workers.
        message: one line for a person.
    """

    share: float | None
    loaded_bytes: int | None
    total_bytes: int
    bytes_sent: int | None
    per_worker: tuple[WorkerProgress, ...]
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for an event, without the message."""
        data = asdict(self)
        del data["message"]
        return data | {"per_worker": list(data["per_worker"])}


def load_progress(
    settings: CoordinatorSettings, log: str, delivered: Mapping[str, int] | None = None
) -> LoadProgress:
    """How much is loaded.

    Args:
        settings: what is loaded, and by which plan.
        log: the engine's log so far.
        delivered: bytes that each endpoint has received from the coordinator; None where the system does not
            count.
    """
    is_loaded = WEIGHTS_LOADED in log
    workers = _workers(settings, read_placement(log), delivered, is_loaded=is_loaded)
    total_bytes = sum(worker.total_bytes for worker in workers) if workers else settings.facts.file_bytes
    share: float | None = None
    loaded_bytes: int | None = None
    sent = (
        sum(delivered.get(worker.endpoint, 0) for worker in workers) if workers and delivered is not None else None
    )
    if is_loaded:
        share, loaded_bytes = 1.0, total_bytes
    elif workers and delivered is not None:
        loaded_bytes = sum(worker.loaded_bytes or 0 for worker in workers)
        share = loaded_bytes / total_bytes if total_bytes else 0.0
    weights = _describe_weights(share, loaded_bytes, total_bytes)
    if is_loaded and (how := describe_sent(sent, total_bytes)):
        weights = f"100 % ({how})"
    message = f"loading {settings.model}: {weights}"
    if is_loaded:
        message += "; allocating the context (KV cache)"
    elif workers:
        message += "; " + ", ".join(map(_describe_layers, workers))
    else:
        message += " on this machine"
    return LoadProgress(
        share=share,
        loaded_bytes=loaded_bytes,
        total_bytes=total_bytes,
        bytes_sent=sent,
        per_worker=workers,
        message=message,
    )


def _workers(
    settings: CoordinatorSettings, placement: Placement, delivered: Mapping[str, int] | None, *, is_loaded: bool
) -> tuple[WorkerProgress, ...]:
    if settings.plan is None:
        return ()
    unit_bytes = (*settings.facts.layer_bytes, settings.facts.output_bytes)
    progress = []
    for shard in settings.plan.workers:  # what an own device has loaded is not known
        units = tuple(range(shard.first_layer, shard.first_layer + shard.unit_count))
        device = placement.of(shard.endpoint)
        if device is not None and device.units:  # what it placed counts, not what was planned
            units = device.units
        output = len(unit_bytes) - 1
        in_order = [unit_bytes[unit] for unit in sorted(units, key=lambda unit: (unit != output, unit))]
        total_bytes = sum(in_order)
        loaded_bytes: int | None = None
        if is_loaded:
            loaded_bytes = total_bytes
        elif delivered is not None:
            loaded_bytes = min(delivered.get(shard.endpoint, 0), total_bytes)
        progress.append(
            WorkerProgress(
                endpoint=shard.endpoint,
                name=shard.name,
                placed_units=None if loaded_bytes is None else _complete_count(in_order, loaded_bytes),
                planned_units=len(units),
                loaded_bytes=loaded_bytes,
                total_bytes=total_bytes,
            )
        )
    return tuple(progress)


def _complete_count(sizes: list[int], loaded_bytes: int) -> int:
    """How many parts of these sizes, loaded one after the other, are complete."""
    count = 0
    for size in sizes:
        loaded_bytes -= size
        if loaded_bytes < 0:
            break
        count += 1
    return count


def _describe_weights(share: float | None, loaded_bytes: int | None, total_bytes: int) -> str:
    if share is None or loaded_bytes is None:
        return format_bytes(total_bytes)
    # Rounded down: 100 % means that all of it is loaded.
    return f"{int(share * 100)} % ({format_bytes(loaded_bytes)} of {format_bytes(total_bytes)})"


def _describe_layers(worker: WorkerProgress) -> str:
    name = worker.name or worker.endpoint
    if worker.placed_units is None:
        return f"{name} {counted(worker.planned_units, 'layer')}"
    return f"{name} {worker.placed_units} of {counted(worker.planned_units, 'layer')}"


# --- watching ---------------------------------------------------------------------------------


@asynccontextmanager
async def reporting_progress(
    settings: CoordinatorSettings, pid: int, log_path: Path, report: Callable[[LoadProgress], None]
) -> AsyncGenerator[None, None]:
    """In this context, report a coordinator's progress whenever its message changes, at most every
    `CHECK_INTERVAL_S`. A quicker load is not reported at all, and nothing is reported after its end.

    Args:
        pid: of the engine, whichever kernel started it.
        log_path: its log.
    """
    watching = asyncio.create_task(_watch(_Load(settings, pid, log_path), report))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _watch(load: _Load, report: Callable[[LoadProgress], None]) -> None:
    reported = ""
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        progress = await asyncio.to_thread(load.progress)
        if progress is None:
            return
        if progress.message != reported:
            reported = progress.message
            report(progress)


class _Load:
    """A load in progress, seen from outside the engine."""

    def __init__(self, settings: CoordinatorSettings, pid: int, log_path: Path) -> None:
        self._settings = settings
        self._pid = pid
        self._log_path = log_path
        self._read_bytes = 0
        self._log = ""
        self._addresses: dict[str, frozenset[Address]] | None = None
        self._delivered: dict[str, int] | None = None

    def progress(self) -> LoadProgress | None:
        """Its progress now; None once it has ended. Blocks for some milliseconds."""
        self._read_log()
        if LISTENING in self._log:
            return None
        self._count_bytes()
        return load_progress(self._settings, self._log, self._delivered)

    def _read_log(self) -> None:
        """Keep the relevant lines among those written since the last call: a debug log is long."""
        try:
            with self._log_path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except OSError:  # it does not exist yet
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines(keepends=True)
        self._log += "".join(line for line in lines if _RELEVANT_LINE.search(line))

    def _count_bytes(self) -> None:
        plan = self._settings.plan
        counts = delivered_bytes(self._pid) if plan is not None else None
        if plan is None or counts is None:
            return
        if self._addresses is None:
            self._addresses = {endpoint: addresses_of(endpoint) for endpoint in plan.endpoints}
        before = self._delivered or {}
        self._delivered = {
            # Bytes of a connection that is closed by now still count.
            endpoint: max(sum(counts.get(address, 0) for address in addresses), before.get(endpoint, 0))
            for endpoint, addresses in self._addresses.items()
        }
