"""The supervisor: a small process that owns one engine process (a coordinator or a local worker).

Run by path with the standard library only (`python -I -S supervisor.py`), so that it starts quickly and stays
small. Its parent writes one JSON line to its stdin (`argv`, `env`, `log_path`, `log_limit_bytes`,
`debug_until`), keeps that pipe open for as long as the engine should live, and reads JSON lines from its
stdout: `{"event": "started", "pid": N}`, then `{"event": "exited", "code": N, "tail": [...]}`.

Why a process of its own: the engine gets a session of its own, so a kernel's interrupt cannot reach it; and
when the parent ends in any way, `kill -9` included, the pipe closes and the engine is stopped. Secrets travel
in `env` through the pipe, never in arguments.

The engine's log is drained here. After the line that contains `debug_until`, debug lines are dropped: at the
verbosity that tells the layer placement the engine would log every token and prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import IO, Any

STOP_GRACE_S = 5.0
PARENT_CHECK_S = 1.0
TAIL_LINES = 40
TAIL_LINE_BYTES = 1000

# llama.cpp's log lines start with a timestamp and a level letter; lines without continue the one before.
_LEVEL = re.compile(rb"^\d+\.\d+\.\d+\.\d+ ([A-Z]) ")
# What an abort prints has no prefix: source position, terminate, signal words.
_ABORT = re.compile(rb"\.(cpp|h|cu|m|c):\d+: |terminate called|what\(\):|GGML_ASSERT|error while loading")
# It may come in the middle of another thread's line, right after that one's prefix.
_ABORT_AFTER_PREFIX = re.compile(rb"\S*\.(cpp|h|cu|m|c):\d+: |terminate called")


class LogDrain(threading.Thread):
    """Copies the engine's output to a size-capped file and remembers the last lines."""

    def __init__(self, pipe: IO[bytes], path: str, limit_bytes: int, debug_until: str | None) -> None:
        super().__init__(name="log drain", daemon=True)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pipe = pipe
        self._path = path
        self._limit_bytes = limit_bytes
        self._marker = debug_until.encode() if debug_until else None
        self._quiet = False
        self._dropping = False

    def run(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as log:
            written = 0
            for line in self._pipe:
                if not self._wanted(line):
                    continue
                self.tail.append(line[:TAIL_LINE_BYTES].decode("utf-8", "replace").rstrip())
                if written < self._limit_bytes:
                    # A full disk must not stop the reading: the engine would block on its full pipe.
                    with contextlib.suppress(OSError):
                        written += log.write(line) or 0
                        if written >= self._limit_bytes:
                            log.write(b"[the log ends here: it reached its size limit]\n")

    def _wanted(self, line: bytes) -> bool:
        if not self._quiet:
            self._quiet = self._marker is not None and self._marker in line
            return True
        level = _LEVEL.match(line)
        if level and not _ABORT_AFTER_PREFIX.match(line, level.end()):
            self._dropping = level.group(1) == b"D"
            return not self._dropping
        return not self._dropping or _ABORT.search(line) is not None


def stop(engine: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """End the engine and whatever it started: ask, wait, then insist. Tolerates that it is gone."""
    _signal(engine, signal.SIGTERM)
    try:
        engine.wait(grace_s)
    except subprocess.TimeoutExpired:
        _signal(engine, getattr(signal, "SIGKILL", signal.SIGTERM))
        engine.wait()
    if os.name == "posix":
        _signal(engine, signal.SIGKILL)  # what it started may outlive it


def _signal(engine: subprocess.Popen[bytes], number: int) -> None:
    try:
        if os.name == "posix":
            os.killpg(engine.pid, number)  # the engine leads the group of its session
        else:
            engine.terminate()
    except (ProcessLookupError, PermissionError):  # gone; on macOS a group of dead processes is not permitted
        pass


def _tell(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except OSError:  # the parent is gone; the engine is stopped by the closed stdin
        pass


def main() -> int:
    spec = json.loads(sys.stdin.readline())
    # The pipe is watched by a daemon thread through the raw descriptor: a thread blocked inside the buffered
    # sys.stdin would hold its lock and abort the interpreter's shutdown.
    lifeline = sys.stdin.fileno()
    parent = os.getppid()
    if os.name == "posix":
        own_session: dict[str, Any] = {"start_new_session": True}
    else:
        own_session = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    try:
        engine = subprocess.Popen(
            spec["argv"],
            env=spec["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # SIGPIPE stays ignored, as in Python: a client that leaves must not end a worker that answers it.
            restore_signals=False,
            **own_session,
        )
    except OSError as error:
        _tell({"event": "exited", "code": 127, "tail": [f"{spec['argv'][0]}: {error.strerror}"]})
        return 1
    assert engine.stdout is not None
    drain = LogDrain(engine.stdout, spec["log_path"], spec["log_limit_bytes"], spec.get("debug_until"))
    drain.start()
    _tell({"event": "started", "pid": engine.pid})

    ended = threading.Event()

    def watch_lifeline() -> None:
        while os.read(lifeline, 4096):
            pass
        ended.set()

    def watch_engine() -> None:
        engine.wait()
        ended.set()

    threading.Thread(target=watch_lifeline, daemon=True).start()
    threading.Thread(target=watch_engine, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    # A process forked from the parent may hold the pipe open after the parent is gone.
    while not ended.wait(PARENT_CHECK_S) and os.getppid() == parent:
        pass
    stop(engine)
    drain.join(STOP_GRACE_S)
    _tell({"event": "exited", "code": engine.returncode, "tail": list(drain.tail)})
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # daemon threads may sit in reads that never end
