"""The running engines of this user on this machine, of all kernels: list them, stop them, read their logs.

Read from the registry and from the supervisors; no router is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.runtime.http_client import one_line
from sollol_nb.runtime.io_loop import io_bound
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import SSH
from sollol_nb.text.tables import format_age

BY_THE_USER = "stopped by the user"
SHOWN_NAMES = 10
NAME_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """One engine process.

    Attributes:
        id: id of its registry entry.
        kind: `coordinator`, `worker` or `link` (to workers of other machines).
        name: the model of a coordinator, the endpoint of a worker, the target of a link.
        pid: process id of the engine.
        url: URL of a coordinator, else "".
        workers: endpoints that a coordinator holds, or that lead through a link.
        age_s: seconds since its start.
        leases: requests, coordinators and kernels that hold it; None if its supervisor does not answer.
        clients: processes that are connected to it.
        ends_in_s: seconds until it ends unless it is used; None while it is held, or if it is kept forever.
        held_by: the model of the coordinator that holds a worker, or None.
        started_by: who started it, as text.
        log_path: path of its log.
        model_path: path of a coordinator's model file, else "".
        worker_names: `workers` as people call them.
        connection: the state of a link, such as `ready` or `lost`, and one line about it; else "".
        standby: the state of a coordinator that is the standby of another one, `starting` or `ready`; else "".
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
    held_by: str | None
    started_by: str
    log_path: str
    model_path: str = ""
    worker_names: tuple[str, ...] = ()
    connection: tuple[str, str] = ("", "")
    standby: str = ""

    @property
    def state(self) -> str:
        """Whether it is used and when it ends, as text; of a worker in the terms of the cluster."""
        if self.leases is None:
            return "not responding"
        if self.standby:
            return f"standby, {self.standby}"
        if self.held_by is not None:
            return f"held by the coordinator of {self.held_by}"
        if self.leases:
            return "free, kept by a notebook or script" if self.kind == registry.WORKER else "in use"
        return "idle, kept forever" if self.ends_in_s is None else f"idle, ends in {self.ends_in_s:.0f} s"

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self) | {"state": self.state}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An engine that was to be stopped.

    Attributes:
        kind: `coordinator`, `worker` or `link`.
        name: the model of a coordinator, the endpoint of a worker, the target of a link.
        users: who uses it, so that it runs on; empty where it was stopped.
    """

    kind: str
    name: str
    users: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.users:
            return f"stopped {self.kind} {self.name}"
        use = "uses" if len(self.users) == 1 else "use"
        return f"left {self.kind} {self.name} running: {', '.join(self.users)} {use} it"


@io_bound
async def running_engines() -> list[RunningEngine]:
    """All running engines of this user, coordinators first, then by age."""
    entries = await asyncio.to_thread(registry.entries)
    holders = {worker: entry.name for entry in entries for worker in entry.workers}
    names = {
        endpoint: one_line(str(worker.get("name") or endpoint), NAME_CHARS)
        for entry in entries
        for endpoint, worker in entry.endpoints.items()
    }
    engines = await asyncio.gather(*(_inspect(entry, holders.get(entry.name), names) for entry in entries))
    return sorted(engines, key=lambda engine: (engine.kind, -engine.age_s))


@io_bound
async def stop_engines(names: Collection[str] = (), *, also_used: bool = False) -> list[RunningEngine]:
    """Stop engines; returns the stopped ones.

    Args:
        names: models, endpoints, `ssh://host` or ids; by default all engines.
        also_used: stop engines that are in use, too; named engines are stopped in any case.

    Raises:
        ConfigError: no running engine has this name.
    """
    engines = await running_engines()
    _check_names(names, engines)
    stopped = []
    # Coordinators come first; then the workers that they held are free.
    for kind in registry.KINDS:
        entries = {entry.id: entry for entry in await asyncio.to_thread(registry.entries, kind)}
        for engine in engines:
            if engine.kind != kind or (names and not any(_is_named(engine, name) for name in names)):
                continue
            entry = entries.get(engine.id)
            if entry is not None and await _stop(entry, also_used=also_used or bool(names)):
                stopped.append(engine)
    return stopped


@io_bound
async def end_engines(names: Collection[str] = (), *, force: bool = False) -> list[Ended]:
    """Stop engines, except those that other processes use; returns what was stopped or left running.

    Args:
        names: models, endpoints, `ssh://host` or ids; by default all engines.
        force: stop them whoever uses them.

    Raises:
        ConfigError: no running engine has this name.
    """
    _check_names(names, await asyncio.to_thread(registry.entries))
    ended = []
    # Coordinators come first; then the workers that they held are free.
    for kind in registry.KINDS:
        for entry in await asyncio.to_thread(registry.entries, kind):
            if names and not any(_is_named(entry, name) for name in names):
                continue
            process = await EngineProcess.adopt(entry)
            if process is None:
                continue
            users: list[str] = []
            if force:
                await process.stop(why=BY_THE_USER)
            else:
                users = await process.stop_unless_foreign(why=BY_THE_USER)
            ended.append(Ended(kind=entry.kind, name=entry.name, users=tuple(users)))
    return ended


def _is_named(engine: RunningEngine | Entry, name: str) -> bool:
    """Whether a name that somebody writes means this engine: its name, its id, a name or path of its model, or the
    machine that a link leads to."""
    if name in (engine.name, engine.id):
        return True
    if engine.kind == registry.LINK:
        return engine.name == f"{SSH}{name}"
    if engine.kind != registry.COORDINATOR:
        return False
    path = engine.model_path if isinstance(engine, RunningEngine) else _model_path(engine)
    return bool(path) and path in (config.model_path(name), str(config.saved_model(name).gguf))


def _model_path(entry: Entry) -> str:
    file = entry.about.get("model_file")
    return str(file.get("path", "")) if isinstance(file, dict) else ""


def _check_names(names: Collection[str], engines: Sequence[RunningEngine | Entry]) -> None:
    for name in names:
        if not any(_is_named(engine, name) for engine in engines):
            running = sorted({engine.name for engine in engines})
            shown = ", ".join(running[:SHOWN_NAMES]) + ", ..." * (len(running) > SHOWN_NAMES)
            raise ConfigError(f"nothing named {name!r} is running (running: {shown or 'nothing'})")


def engine_log(name: str, *, last: int = 20, grep: str | None = None) -> str:
    """The path of the log of a running engine, then the log's last lines.

    Args:
        name: a coordinator's model, a worker's `host:port`, `ssh://host` of the link to a machine, or an id of
            `sollol-nb ps --json`.
        last: how many lines at most.
        grep: only lines that contain this text, ignoring case.

    Raises:
        ConfigError: no running engine has this name (the message lists those that run, and the folder of older
            logs), or its log cannot be read.
    """
    entries = registry.entries()
    # Of several coordinators of one model, the one that was started last, and is used.
    found = [entry for entry in entries if _is_named(entry, name)]
    found.sort(key=lambda entry: not entry.standby_of)
    if not found:
        try:
            _check_names([name], entries)
        except ConfigError as error:
            raise ConfigError(f"{error}; logs of ended engines are in {config.log_dir()}") from None
    path = Path(found[-1].log_path)
    wanted = (grep or "").casefold()
    try:
        with path.open(encoding="utf-8", errors="replace") as log:
            lines = deque((line for line in log if wanted in line.casefold()), maxlen=last)
    except OSError as error:
        raise ConfigError(f"cannot read the log of {name}: {path} ({error.strerror or error})") from None
    return f"{path}\n" + "".join(lines).rstrip("\n")


def as_table(engines: Sequence[RunningEngine]) -> str:
    """A table for a terminal."""
    if not engines:
        return "nothing is running"
    rows = [("KIND", "NAME", "PID", "STATE", "AGE", "WHERE")]
    for engine in engines:
        where = f"{engine.url} on {', '.join(engine.worker_names)}" if engine.worker_names else engine.url
        if engine.kind == registry.LINK:
            state, detail = engine.connection
            where = f"{state}: {detail}"
        rows.append((engine.kind, engine.name, str(engine.pid), engine.state, format_age(engine.age_s), where))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


async def _inspect(entry: Entry, held_by: str | None, names: Mapping[str, str]) -> RunningEngine:
    process = await EngineProcess.adopt(entry)
    status: dict[str, Any] = {}
    if process is not None:
        status = await process.status()
        process.detach()
    workers = (*entry.workers, *entry.endpoints)
    state, detail = (one_line(str(entry.about.get(key) or "")) for key in ("state", "detail"))
    return RunningEngine(
        id=entry.id,
        kind=entry.kind,
        name=entry.name,
        model_path=_model_path(entry),
        pid=entry.pid,
        url=str(entry.about.get("url", "")),
        workers=workers,
        worker_names=tuple(names.get(worker, worker) for worker in workers),
        connection=(state, detail),
        age_s=time.time() - entry.started_at,
        leases=status.get("leases"),
        clients=status.get("clients"),
        ends_in_s=status.get("ends_in_s"),
        held_by=held_by if entry.kind == registry.WORKER else None,
        started_by=registry.describe_owner(entry.about),
        log_path=entry.log_path,
        standby=("ready" if entry.about.get("load_ms") else "starting") if entry.standby_of else "",
    )


async def _stop(entry: Entry, *, also_used: bool) -> bool:
    process = await EngineProcess.adopt(entry)
    if process is None:
        return False
    if not also_used and (await process.status()).get("leases"):
        process.detach()
        return False
    await process.stop(why=BY_THE_USER)
    return True
