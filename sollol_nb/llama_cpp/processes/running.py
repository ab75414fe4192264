"""The engines of this user on this machine, of all kernels: list them, stop them, read their logs.

Read from the registry and from the supervisors; no router is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.runtime.io_loop import io_bound
from sollol_nb.settings import config


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """One engine process.

    Attributes:
        id: of its registry entry.
        kind: `coordinator` or `worker`.
        name: the model of a coordinator, the endpoint of a worker.
        pid: process id of the engine.
        url: of a coordinator, "" for a worker.
        workers: endpoints that a coordinator holds.
        age_s: seconds since its start.
        leases: requests, coordinators and kernels that hold it; None when its supervisor does not answer.
        clients: processes that are connected to it.
        ends_in_s: seconds until it ends if nobody asks; None while it is held, or when it lives for ever.
        started_by: in words.
        log_path: its log.
    """

    id: str
    kind: str
    name: str
    pid: int
    url: str
    workers: tuple[str, ...]
    age_s: float
    leases: int | None
    clients: int | None
    ends_in_s: float | None
    started_by: str
    log_path: str

    @property
    def state(self) -> str:
        """In words: whether it is used, and when it ends."""
        if self.leases is None:
            return "does not answer"
        if self.leases:
            return "in use"
        return "idle, kept for ever" if self.ends_in_s is None else f"idle, ends in {self.ends_in_s:.0f} s"

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self) | {"state": self.state}


@io_bound
async def running_engines() -> list[RunningEngine]:
    """All engines of this user that run now, coordinators first."""
    entries = await asyncio.to_thread(registry.entries)
    found = await asyncio.gather(*map(_look, entries))
    return sorted(found, key=lambda one: (one.kind, -one.age_s))


@io_bound
async def stop_engines(names: Collection[str] = (), *, also_used: bool = False) -> list[RunningEngine]:
    """End engines; gives those that were ended.

    Args:
        names: models, endpoints or ids; by default all.
        also_used: end them although someone uses them; engines that were named are ended in any case.

    Raises:
        ConfigError: a name that nothing has.
    """
    engines = await running_engines()
    known = {label for one in engines for label in (one.name, one.id)}
    for name in names:
        if name not in known:
            raise ConfigError(f"nothing called {name!r} runs; running are {', '.join(sorted(known)) or 'none'}")
    ended = []
    # Coordinators come first; the workers that they held are free then.
    for kind in (registry.COORDINATOR, registry.WORKER):
        chosen = [one for one in engines if one.kind == kind and (not names or {one.name, one.id} & set(names))]
        entries = {entry.id: entry for entry in await asyncio.to_thread(registry.entries, kind)}
        for one in chosen:
            entry = entries.get(one.id)
            if entry is not None and await _stop(entry, also_used=also_used or bool(names)):
                ended.append(one)
    return ended


def engine_log(name: str, *, last: int = 20, grep: str | None = None) -> str:
    """The last lines of the log of an engine that runs, and a first line that says which file they are from.

    Args:
        name: a coordinator's model, a worker's `host:port`, or an id of `sollol-nb ps`.
        last: how many lines at most.
        grep: only lines that contain this text, in any case.

    Raises:
        ConfigError: no such engine runs (the message names those that do, and the folder of older logs), or its
            log cannot be read.
    """
    entries = registry.entries()
    # Of several coordinators of a model the one that was started last.
    found = [one for one in sorted(entries, key=lambda one: one.started_at) if name in (one.name, one.id)]
    if not found:
        running = ", ".join(sorted({one.name for one in entries})) or "nothing"
        raise ConfigError(
            f"nothing called {name!r} runs (running: {running}); logs of what has ended are in {config.log_dir()}"
        )
    path = Path(found[-1].log_path)
    wanted = (grep or "").casefold()
    try:
        with path.open(encoding="utf-8", errors="replace") as log:
            lines = deque((line for line in log if wanted in line.casefold()), maxlen=last)
    except OSError as error:
        raise ConfigError(f"the log of {name} cannot be read: {path} ({error.strerror or error})") from None
    return f"{path}\n" + "".join(lines).rstrip("\n")


def as_table(engines: Sequence[RunningEngine]) -> str:
    """A table for a terminal."""
    if not engines:
        return "nothing runs"
    rows = [("KIND", "NAME", "PID", "STATE", "AGE", "WHERE")]
    for one in engines:
        where = f"{one.url} over {', '.join(one.workers)}" if one.workers else one.url
        rows.append((one.kind, one.name, str(one.pid), one.state, _age(one.age_s), where))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


async def _look(entry: Entry) -> RunningEngine:
    process = await EngineProcess.adopt(entry)
    status: dict[str, Any] = {}
    if process is not None:
        status = await process.status()
        process.detach()
    return RunningEngine(
        id=entry.id,
        kind=entry.kind,
        name=entry.name,
        pid=entry.pid,
        url=str(entry.about.get("url", "")),
        workers=tuple(entry.workers),
        age_s=time.time() - entry.started_at,
        leases=status.get("leases"),
        clients=status.get("clients"),
        ends_in_s=status.get("ends_in_s"),
        started_by=registry.describe_owner(entry.about),
        log_path=entry.log_path,
    )


async def _stop(entry: Entry, *, also_used: bool) -> bool:
    process = await EngineProcess.adopt(entry)
    if process is None:
        return False
    if not also_used and (await process.status()).get("leases"):
        process.detach()
        return False
    await process.stop(why="stopped by its user")
    return True


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
