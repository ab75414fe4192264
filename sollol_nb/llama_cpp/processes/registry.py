"""The registry of running engines: one small file per engine, written by its supervisor, read by every kernel.

An entry says which process the engine is, how to reach its supervisor, and (`about`) what it runs: for a
coordinator the model file and its identity, plan, workers and URL; for a local worker its endpoint; for a link to
other machines its target, its state and the loopback endpoints of their workers. The files are
in the user's state folder with mode 0600; the engine's secret is in a separate file beside the entry.

What an entry says is believed, so it counts only as a private file of this user (`runtime/private_files.py`) in a
folder where nobody else can write, and it names nothing outside: its key lies beside it, its log in the folder of
logs, and its engine listens on loopback.

The registry also says who holds which worker: a worker belongs to the coordinator whose living entry names it. A
kernel chooses workers and starts a coordinator under one lock (`claims`), so no two kernels get the same worker.

An entry counts only while its supervisor lives: same pid and same start time, so that a recycled pid is never
mistaken for it. Whoever finds an entry of a dead supervisor removes it, and its engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import psutil

from sollol_nb.errors import ConfigError, WorkersUnavailableError
from sollol_nb.runtime.private_files import check_private, read_private
from sollol_nb.runtime.process_identity import is_same_process, own_start
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK, is_loopback, parse_endpoint

COORDINATOR = "coordinator"
WORKER = "worker"
LINK = "link"
"""A process that makes workers of other machines reachable at endpoints on loopback; see `links/`."""
LENT = "lent-worker"
"""A worker that `sollol-nb worker` runs for other machines, or for whoever names it; no router here adopts it."""
KINDS = (COORDINATOR, WORKER, LINK, LENT)
GATEWAY = "the gateway"
"""What starts engines, besides notebooks and scripts."""
LOCK_TIMEOUT_S = 60.0
LOGS_KEPT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One running engine.

    Attributes:
        id: unique, also the file's name.
        kind: one of `KINDS`.
        pid, pid_started: the engine's process and its start time (seconds since the epoch, None if unknown).
        supervisor_pid, supervisor_started: the same for its supervisor.
        control_port: the supervisor's port on loopback.
        key_path: path of the file with the engine's secret, beside the entry.
        log_path: path of its log, in the folder of logs.
        started_at: seconds since the epoch.
        keep_alive_s: seconds that it lives without a lease; None is forever.
        about: what it runs.
        path: path of this entry's file.
    """

    id: str
    kind: str
    pid: int
    pid_started: float | None
    supervisor_pid: int
    supervisor_started: float | None
    control_port: int
    key_path: str
    log_path: str
    started_at: float
    keep_alive_s: float | None
    about: dict[str, Any] = field(repr=False)
    path: Path = field(repr=False)

    @property
    def name(self) -> str:
        """The model of a coordinator, the endpoint of a worker, the target of a link."""
        about = self.about
        return str(about.get("model") or about.get("endpoint") or about.get("target") or self.id)

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.time() - self.started_at

    @property
    def workers(self) -> list[str]:
        """Endpoints that a coordinator holds."""
        return list(self.about.get("workers") or ())

    @property
    def standby_of(self) -> str:
        """The id of the coordinator that this one may have to replace; "" for others."""
        return str(self.about.get("standby_of") or "")

    @property
    def endpoints(self) -> dict[str, dict[str, Any]]:
        """Loopback endpoints of the workers that a link makes reachable, each with what is known about it."""
        return dict(self.about.get("endpoints") or {})

    def is_alive(self) -> bool:
        """Whether its supervisor is running."""
        return is_same_process(self.supervisor_pid, self.supervisor_started)

    def read_key(self) -> str | None:
        """The engine's secret; None if the file is gone."""
        return read_private(Path(self.key_path))


def entries(kind: str | None = None) -> list[Entry]:
    """The running engines, oldest first. Entries of dead supervisors are removed."""
    found = []
    for path in config.registry_dir().glob("*.json"):
        entry = _read(path)
        if entry is None:
            continue
        if not entry.is_alive():
            clean(entry)
        elif kind in (None, entry.kind):
            found.append(entry)
    return sorted(found, key=lambda entry: entry.started_at)


def clean(entry: Entry) -> None:
    """Remove what a dead supervisor left behind: its engine, if that still runs, and the entry's files."""
    if entry.pid_started is not None and is_same_process(entry.pid, entry.pid_started):
        with contextlib.suppress(psutil.Error):
            psutil.Process(entry.pid).kill()
    for path in (entry.path, Path(entry.key_path)):
        with contextlib.suppress(OSError):
            path.unlink()


def holders() -> dict[str, Entry]:
    """Endpoints of workers, each with the coordinator that holds it."""
    return {endpoint: entry for entry in entries(COORDINATOR) for endpoint in entry.workers}


def own_name() -> str:
    """The name by which a person knows this process: that of its notebook, else of its script."""
    notebook = os.environ.get("JPY_SESSION_NAME")  # Jupyter servers set it for the kernels that they start
    name = Path(notebook or (sys.argv[0] if sys.argv else "")).name
    if _is_gateway():
        return GATEWAY
    return {"ipykernel_launcher.py": "a notebook", "": "python", "-c": "python", "-m": "python"}.get(name, name)


def _is_gateway() -> bool:
    program, first = Path(sys.argv[0] if sys.argv else ""), sys.argv[1:2]
    is_module = program.parts[-3:] == ("sollol_nb", "gateway", "__main__.py")
    is_command = program.stem == "sollol-nb" or program.parts[-2:] == ("sollol_nb", "__main__.py")
    return is_module or (is_command and first == ["gateway"])


def own_description() -> dict[str, Any]:
    """This process as the owner of engines, for their `about`; `describe_owner` reads it."""
    return {"owner_pid": os.getpid(), "owner_started": own_start(), "owner": own_name()}


def describe_owner(about: dict[str, Any]) -> str:
    """Who started an engine, as text."""
    pid = about.get("owner_pid")
    if pid == os.getpid():
        return GATEWAY if own_name() == GATEWAY else "this kernel"
    name = str(about.get("owner") or "a kernel")
    if isinstance(pid, int) and is_same_process(pid, about.get("owner_started")):
        return f"{name} (process {pid})"
    if name == GATEWAY:
        return "an earlier gateway"
    is_this_notebook = name == own_name() and name.endswith(".ipynb")
    return f"an earlier kernel of {'this notebook' if is_this_notebook else name}"


@contextlib.asynccontextmanager
async def locked(name: str, doing: str) -> AsyncIterator[None]:
    """A lock between all processes of this user.

    It is polled: a thread that waits for it cannot be cancelled, and would acquire the lock and keep it.

    Args:
        name: name of the lock.
        doing: what the holder does, for the error.

    Raises:
        WorkersUnavailableError: another process has held it for a minute.
    """
    path = config.registry_dir() / f"{name}.lock"
    check_private(path)
    lock = filelock.FileLock(path, thread_local=False, timeout=0)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            lock.acquire()
            break
        except filelock.Timeout as error:
            if time.monotonic() > deadline:
                raise WorkersUnavailableError(
                    f"another process has been {doing} for {LOCK_TIMEOUT_S:g} s; try again"
                ) from error
        await asyncio.sleep(0.02)
    try:
        yield
    finally:
        lock.release()


def claims() -> contextlib.AbstractAsyncContextManager[None]:
    """The lock under which workers are chosen and claimed."""
    return locked("claims", "choosing workers")


def new_log_path(kind: str, port: int) -> Path:
    """Path of a new engine's log; the log of the previous engine on this port stays readable."""
    return config.log_dir() / f"{kind}-{port}-{uuid.uuid4().hex[:8]}.log"


def prune_logs() -> None:
    """Remove the oldest logs of engines, except those of running engines and the newest `LOGS_KEPT`."""
    used = {entry.log_path for entry in entries()}
    logs = [path for kind in KINDS for path in config.log_dir().glob(f"{kind}-*.log")]
    with contextlib.suppress(OSError):
        logs.sort(key=lambda path: path.stat().st_mtime)
        for path in logs[:-LOGS_KEPT]:
            if str(path) not in used:
                path.unlink(missing_ok=True)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "kind", "key_path", "log_path"), (str,)),
    **dict.fromkeys(("pid", "supervisor_pid", "control_port"), (int,)),
    **dict.fromkeys(("pid_started", "supervisor_started", "keep_alive_s"), (int, float, type(None))),
    "started_at": (int, float),
    "about": (dict,),
}
_ABOUT_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "endpoint", "url", "owner", "target", "state", "detail", "standby_of"), (str,)),
    **dict.fromkeys(("port", "owner_pid", "context_tokens", "slots", "bytes_sent"), (int,)),
    **dict.fromkeys(("load_ms", "seconds_per_token", "owner_started"), (int, float)),
    "workers": (list,),
    **dict.fromkeys(("probes", "endpoints"), (dict,)),
}


def find(entry_id: str) -> Entry | None:
    """The entry with this id; None if there is none."""
    return _read(config.registry_dir() / f"{entry_id}.json")


def _read(path: Path) -> Entry | None:
    """The entry in a file; None if the file is gone, is not private, or is not an entry (then it is removed)."""
    text = read_private(path)
    if text is None:
        return None
    try:
        values = json.loads(text)
        # A newer version of this package may have added keys; they are ignored.
        known = {name: values[name] for name in _TYPES}
        for name, types in _TYPES.items():
            if not isinstance(known[name], types):
                raise TypeError(name)
            if isinstance(known[name], int):
                float(known[name])  # an OverflowError where no process or time can have such a number
        known["key_path"] = str(path.with_suffix(".key"))
        known["log_path"] = str(path.parent.parent / config.LOGS / Path(known["log_path"]).name)
        entry = Entry(**known, path=path)
        _check_about(entry)
        return entry
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, ConfigError):
        path.unlink(missing_ok=True)
        return None


def _check_about(entry: Entry) -> None:
    """Check what the rest of the package relies on.

    Raises:
        ValueError, TypeError, ConfigError: no supervisor has written this.
    """
    about = entry.about
    for name, types in _ABOUT_TYPES.items():
        if not isinstance(about.get(name), (*types, type(None))):
            raise TypeError(name)
    if entry.id != entry.path.stem or entry.kind not in KINDS:
        raise ValueError(entry.id)
    for endpoint in [*entry.workers, *([about["endpoint"]] if about.get("endpoint") else [])]:
        parse_endpoint(endpoint)
    # Prompts and keys go only to this machine.
    if entry.kind == COORDINATOR and (url := about.get("url")) and urlsplit(url).hostname != LOOPBACK:
        raise ValueError(url)
    if entry.kind == WORKER and (endpoint := about.get("endpoint")) and not is_loopback(endpoint):
        raise ValueError(endpoint)
    for endpoint, worker in entry.endpoints.items():
        if not is_loopback(endpoint) or not isinstance(worker, dict):
            raise ValueError(endpoint)
