"""The handle of an engine process owned by a supervisor (see `supervisor.py`): start or adopt, hold, watch, stop.

Lives on the I/O loop. The engine does not depend on the handle: it lives while anybody holds a lease on it, and
`keep_alive` longer. Each method tolerates that the process is already gone, and no other failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import sys
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sollol_nb.errors import EngineError
from sollol_nb.llama_cpp.processes import registry, supervisor
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.runtime.process_identity import is_same_process
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

LOG_LIMIT_BYTES = 16 * 1024 * 1024
START_TIMEOUT_S = 15.0
ANSWER_TIMEOUT_S = 5.0
SUPERVISOR_END_POLLS = 100
MESSAGE_LIMIT_BYTES = 1024 * 1024  # the supervisor's longest message: a tail, escaped as JSON


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How an engine process ended.

    Attributes:
        code: the exit code; if negative, the number of the signal that ended it; None if the supervisor was lost.
        tail: the last lines of the log.
        why: why it was stopped, such as `idle` or `stopped`; "" if it ended by itself.
    """

    code: int | None
    tail: tuple[str, ...]
    why: str = ""


class EngineProcess:
    """One engine process under its supervisor, as seen from this process.

    Attributes:
        entry: its registry entry, as it was when this handle was made.
        key: the engine's secret; never shown.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, entry: Entry, key: str) -> None:
        self.entry = entry
        self.key = key
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._report: ExitReport | None = None
        self._detached = False
        self._exited = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch())
        _handles.add(self)

    def __repr__(self) -> str:
        return f"<EngineProcess {self.pid}, {'running' if self.is_running() else 'ended'}>"

    @property
    def pid(self) -> int:
        """Process id of the engine (not of its supervisor)."""
        return self.entry.pid

    @property
    def log_path(self) -> Path:
        """The file with its output, mode 0600."""
        return Path(self.entry.log_path)

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        kind: str,
        log_path: Path,
        about: Mapping[str, Any],
        keep_alive_s: float | None,
        key: str | None = None,
        env: Mapping[str, str] | None = None,
        debug_until: str | None = None,
        holds: Sequence[Entry] = (),
    ) -> EngineProcess:
        """Start `argv` under a supervisor, and connect to it.

        Args:
            kind: one of `registry.KINDS`.
            about: what it runs, for its registry entry.
            keep_alive_s: seconds that it lives without a lease; None is forever.
            key: its secret, which `env` also contains if the engine needs it; by default a random one.
            env: added to this process's environment; never visible in arguments.
            debug_until: after the first log line with this text, debug lines are not written to the log.
            holds: engines (local workers) that must live as long as this one.

        Raises:
            EngineError: the program cannot be run, or the engine cannot be registered.
        """
        registry.prune_logs()
        entry_id = f"{kind}-{uuid.uuid4().hex[:12]}"
        key = key or secrets.token_urlsafe(32)
        spec = {
            "argv": list(argv),
            "env": config.child_environment(**(env or {})),
            "id": entry_id,
            "kind": kind,
            "key": key,
            "entry_path": str(config.registry_dir() / f"{entry_id}.json"),
            "key_path": str(config.registry_dir() / f"{entry_id}.key"),
            "log_path": str(log_path),
            "log_limit_bytes": LOG_LIMIT_BYTES,
            "debug_until": debug_until,
            "keep_alive_s": keep_alive_s,
            "about": {**registry.own_description(), **about},
            "holds": [{"port": held.control_port, "key": held.read_key()} for held in holds],
            "psutil_folder": str(Path(psutil.__file__).parents[1]),
        }
        try:
            started = await _spawn_supervisor(spec)
            try:
                entry = registry.find(entry_id)
                if entry is None:  # no other kernel would know about it or the workers that it holds
                    raise EngineError(
                        f"could not register {argv[0]} in {config.registry_dir()}; is the disk full?"
                    )
                reader, writer = await _connect(entry.control_port, key)
            except BaseException:
                with contextlib.suppress(psutil.Error):  # an unregistered engine must not stay
                    psutil.Process(started["supervisor_pid"]).terminate()
                raise
        except (TimeoutError, OSError) as error:
            raise EngineError(f"the supervisor of {argv[0]} did not start; try again") from error
        return cls(reader, writer, entry, key)

    @classmethod
    async def adopt(cls, entry: Entry) -> EngineProcess | None:
        """The handle of a running engine; None if its supervisor does not answer (a dead one is cleaned up)."""
        key = entry.read_key()
        try:
            if key is None:
                return None
            reader, writer = await _connect(entry.control_port, key)
        except (TimeoutError, OSError, EngineError):
            if not entry.is_alive():
                registry.clean(entry)
            return None
        return cls(reader, writer, entry, key)

    def is_running(self) -> bool:
        """Whether the engine process is alive, as far as this handle knows."""
        return self._report is None

    @property
    def exit_report(self) -> ExitReport | None:
        """How it ended; None while it runs."""
        return self._report

    async def wait(self) -> ExitReport:
        """Wait until the process ends."""
        await self._exited.wait()
        assert self._report is not None
        return self._report

    async def ended_within(self, seconds: float) -> ExitReport | None:
        """How it ended, if it ends within some seconds: a broken connection is seen shortly before the exit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.wait()
        return None

    async def hold(self) -> bool:
        """Take a lease, until `free`: the engine is not ended when idle. False if it has ended or is ending."""
        try:
            return bool((await self._request("hold")).get("ok"))
        except asyncio.CancelledError:
            self.free()  # it may have been granted by now
            raise

    def ask_lease(self) -> Lease:
        """Take a lease without waiting for the supervisor's answer; end it with its `free`."""
        return Lease(self)

    def free(self) -> None:
        """End a lease."""
        self._send("free")

    async def keep_alive(self, seconds: float | None) -> None:
        """Set how long it lives without a lease; None is forever."""
        await self._request("keep_alive", seconds=seconds)

    async def update_about(self, **about: Any) -> None:
        """Add to the `about` of its registry entry."""
        await self._request("about", about=about)

    def note_about(self, **about: Any) -> None:
        """As `update_about`, without waiting for the supervisor's answer."""
        self._send("about", about=about)

    async def status(self) -> dict[str, Any]:
        """`clients` (except this handle), `users` (their names), `leases`, `idle_s`, `ends_in_s`; empty if it has
        ended."""
        return await self._request("status")

    async def stop(self, *, grace_s: float = supervisor.STOP_GRACE_S, why: str = "stopped") -> ExitReport:
        """End the process (SIGTERM, then SIGKILL after `grace_s`) and wait for its end. Stopping twice is fine."""
        self._send("stop", grace_s=grace_s, why=why)
        try:
            async with asyncio.timeout(grace_s + 2 * supervisor.STOP_GRACE_S):
                return await self.wait()
        except TimeoutError:
            self._kill_engine()
            return await self.wait()

    async def stop_unless_shared(self) -> bool:
        """End the process unless another process (or router) is connected; False if it keeps running for them."""
        return not await self._stop_unless("shared", why="closed", leave=True)

    async def stop_unless_used(self, *, leave: bool = False) -> list[str]:
        """End the process, unless another process is connected or anybody else has a lease.

        Args:
            leave: detach from it if it keeps running.

        Returns:
            Who keeps it running; empty if it has ended.
        """
        return await self._stop_unless("used", why="stopped", leave=leave)

    async def stop_unless_foreign(self, *, why: str = "stopped") -> list[str]:
        """As `stop_unless_used` with `leave`, but leases of this process do not count."""
        return await self._stop_unless("foreign", why=why, leave=True)

    async def _stop_unless(self, unless: str, *, why: str, leave: bool) -> list[str]:
        answer = await self._request("stop", unless=unless, why=why, leave=leave)
        if not answer.get("ok") and self.is_running():
            if leave:
                self.detach()
            return [str(user) for user in answer.get("users") or ("another process",)]
        await self.wait()
        return []

    def detach(self) -> None:
        """Disconnect from the engine without stopping it; the leases of this handle end."""
        self._detached = True
        self._writer.close()

    # --- control protocol ---------------------------------------------------------------------------

    def _send(self, do: str, **arguments: Any) -> int:
        number = next(self._numbers)
        if self.is_running() and not self._writer.is_closing():
            self._writer.write(json.dumps({"n": number, "do": do, **arguments}).encode() + b"\n")
        return number

    async def _request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The supervisor's answer; empty if it has ended or does not answer."""
        return await _in_time(self._ask(do, **arguments))

    def _ask(self, do: str, **arguments: Any) -> asyncio.Future[dict[str, Any]]:
        """Send a message; returns where the answer will be, which is empty if the supervisor has ended."""
        number = self._send(do, **arguments)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if not self.is_running() or self._detached:
            answer.set_result({})
        else:
            self._answers[number] = answer
        return answer

    async def _watch(self) -> None:
        report: ExitReport | None = None
        with contextlib.suppress(OSError, ValueError):
            while report is None and (line := await self._reader.readline()):
                message = json.loads(line)
                if message.get("event") == "exited":
                    report = ExitReport(message["code"], tuple(message["tail"]), message["why"])
                answer = self._answers.pop(message.get("n", 0), None)
                if answer is not None and not answer.done():
                    answer.set_result(message)
        if report is None and self._detached:
            report = ExitReport(None, (), "detached")
        if report is None and await self._supervisor_ends():
            # It was killed; its guard ends the engine, and so do we.
            self._kill_engine()
            report = ExitReport(None, ("the supervisor of this process was lost",))
        if report is None:  # the engine still runs and others may use it; only this handle lost it
            report = ExitReport(None, ("the connection to the supervisor of this process was lost",))
        self._report = report
        self._writer.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result({})
        self._exited.set()

    async def _supervisor_ends(self) -> bool:
        """Whether the supervisor has ended; its connections close shortly before."""
        for _ in range(SUPERVISOR_END_POLLS):
            if not self.entry.is_alive():
                return True
            await asyncio.sleep(0.02)
        return False

    def _kill_engine(self) -> None:
        # Never another process that got a recycled pid.
        started = self.entry.pid_started
        if started is not None and is_same_process(self.pid, started):
            with contextlib.suppress(psutil.Error):
                psutil.Process(self.pid).kill()


class Lease:
    """A lease that was just requested. Messages to the supervisor keep their order, so what follows is covered
    by it, unless the engine is ending: then `is_granted` is False.

    Args:
        process: the engine.
    """

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._answer = process._ask("hold")

    async def is_granted(self) -> bool:
        """Whether it was granted; False if the engine has ended or is ending."""
        return bool((await _in_time(self._answer)).get("ok"))

    @property
    def others(self) -> int:
        """How many leases others had when it was granted; 0 before."""
        return self._count("others")

    @property
    def uses_by_others(self) -> int:
        """How many leases others had ever had when it was granted; 0 before."""
        return self._count("uses_by_others")

    def _count(self, name: str) -> int:
        return int(self._answer.result().get(name) or 0) if self._answer.done() else 0

    def free(self) -> None:
        """End it. One that was refused had no effect, and neither has its end: the engine is ending."""
        self._process.free()


async def _in_time(answer: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    """The supervisor's answer; empty if it takes too long. It may be awaited again, so no limit cancels it."""
    if not answer.done():
        await asyncio.wait({answer}, timeout=ANSWER_TIMEOUT_S)
    return answer.result() if answer.done() else {}


_handles: weakref.WeakSet[EngineProcess] = weakref.WeakSet()


def _release_in_forked_child() -> None:
    # A lease lasts as long as its connection, so the child must not keep a copy of the connection open.
    devnull = os.open(os.devnull, os.O_RDWR)
    for handle in _handles:
        descriptor = handle._writer.get_extra_info("socket").fileno()
        if descriptor >= 0:
            os.dup2(devnull, descriptor, inheritable=False)
    os.close(devnull)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_forked_child)


async def _spawn_supervisor(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Start a supervisor, which outlives this process; returns its report that the engine has started."""
    flags: dict[str, Any] = (
        {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x00000200}
    )  # an interrupt reaches the whole process group of a kernel; 0x200 is CREATE_NEW_PROCESS_GROUP
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(supervisor.__file__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=MESSAGE_LIMIT_BYTES,
        **flags,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        await process.stdin.drain()
        async with asyncio.timeout(START_TIMEOUT_S):  # not wait_for: Python 3.11's may swallow a cancellation
            line = await process.stdout.readline()
    except BaseException:
        # On this signal it ends its engine, if it has started one.
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        raise
    finally:
        process.stdin.close()
    try:
        message = json.loads(line)
    except ValueError:
        message = {}
    if message.get("event") != "started":
        reason = " ".join(message.get("tail", [])) or "the supervisor ended"
        raise EngineError(f"could not run {reason}; run `sollol-nb doctor` to check the installation")
    return {**message, "supervisor_pid": process.pid}


async def _connect(port: int, key: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A control connection to a supervisor that has accepted the key.

    Raises:
        TimeoutError, OSError: nothing answers.
        EngineError: another program answers.
    """
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=MESSAGE_LIMIT_BYTES)
        try:
            greeting = {"key": key, "pid": os.getpid(), "name": registry.own_name()}
            writer.write(json.dumps(greeting).encode() + b"\n")
            hello = await reader.readline()
            if not hello.startswith(b'{"event": "hello"'):
                raise EngineError(f"the program that listens on {LOOPBACK}:{port} is not the expected supervisor")
        except BaseException:
            writer.close()
            raise
    return reader, writer
