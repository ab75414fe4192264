"""The handle of an engine process owned by a supervisor (see `supervisor.py`): start, watch, stop.

Lives on the I/O loop. Each verb tolerates exactly that the process is already gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sollol_nb import config, supervisor
from sollol_nb.errors import EngineError

LOG_LIMIT_BYTES = 16 * 1024 * 1024
START_TIMEOUT_S = 15.0
MESSAGE_LIMIT_BYTES = 1024 * 1024  # the supervisor's longest message: a tail, escaped as JSON


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How an engine process ended.

    Attributes:
        code: the exit code; negative is the number of the signal that ended it; None when the supervisor
            itself was lost.
        tail: the last lines of the log.
    """

    code: int | None
    tail: tuple[str, ...]


class EngineProcess:
    """One engine process, alive for as long as this handle's process is, and no longer.

    Attributes:
        pid: of the engine (not of its supervisor).
        log_path: the file that its output is drained to, mode 0600.
        started_at: `time.time()` of the start.
    """

    def __init__(self, supervisor_process: asyncio.subprocess.Process, pid: int, log_path: Path) -> None:
        self.pid = pid
        self.log_path = log_path
        self.started_at = time.time()
        self._supervisor = supervisor_process
        self._identity = _identity(pid)
        self._report: ExitReport | None = None
        self._exited = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        debug_until: str | None = None,
    ) -> EngineProcess:
        """Start `argv` under a supervisor.

        Args:
            env: added to this process's environment; never shown in arguments.
            debug_until: after the first log line with this text, debug lines are dropped from the log.

        Raises:
            EngineError: the binary cannot be run.
        """
        flags: dict[str, Any] = (
            {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x00000200}
        )  # a kernel's interrupt goes to its whole process group; 0x200 is CREATE_NEW_PROCESS_GROUP
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
        spec = {
            "argv": list(argv),
            "env": config.child_environment(**(env or {})),
            "log_path": str(log_path),
            "log_limit_bytes": LOG_LIMIT_BYTES,
            "debug_until": debug_until,
        }
        try:
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            await process.stdin.drain()
            async with asyncio.timeout(START_TIMEOUT_S):  # not wait_for: Python 3.11's may swallow a cancellation
                message = await _read_message(process)
        except BaseException as error:
            _close_lifeline(process)
            if isinstance(error, TimeoutError | OSError):
                raise EngineError(f"the supervisor of {argv[0]} did not start; try again") from error
            raise
        if message.get("event") != "started":
            reason = " ".join(message.get("tail", [])) or "the supervisor ended"
            raise EngineError(f"could not run {reason}; run `sollol-nb doctor` to see what was found")
        return cls(process, int(message["pid"]), log_path)

    def is_running(self) -> bool:
        """Whether the engine process is alive."""
        return self._report is None

    @property
    def exit_report(self) -> ExitReport | None:
        """How it ended, or None while it runs."""
        return self._report

    async def wait(self) -> ExitReport:
        """Wait for the end of the process."""
        await self._exited.wait()
        assert self._report is not None
        return self._report

    async def stop(self) -> ExitReport:
        """End the process (SIGTERM, after a grace SIGKILL) and wait for its end. Stopping twice is fine."""
        _close_lifeline(self._supervisor)
        try:
            async with asyncio.timeout(supervisor.STOP_GRACE_S * 3):
                return await self.wait()
        except TimeoutError:
            self._kill_engine()
            return await self.wait()

    async def _watch(self) -> None:
        message = await _read_message(self._supervisor)
        if message.get("event") != "exited":
            # The supervisor is gone without a word, and with it the one that would end the engine.
            self._kill_engine()
            message = {"code": None, "tail": ["the supervisor of this process was lost"]}
        _close_lifeline(self._supervisor)
        await self._supervisor.wait()
        self._report = ExitReport(message["code"], tuple(message["tail"]))
        self._exited.set()

    def _kill_engine(self) -> None:
        # Same pid and same start time: never a stranger that got a recycled pid.
        if self._identity is not None and _identity(self.pid) == self._identity:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self.pid).kill()


def _identity(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _close_lifeline(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()


async def _read_message(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        message = json.loads(await process.stdout.readline())
    except ValueError:  # nothing, or no line of ours
        return {}
    return message if isinstance(message, dict) else {}
