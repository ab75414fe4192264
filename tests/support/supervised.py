"""Helpers for tests of supervisors: one started by the test, a raw control connection, other constants."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from sollol_nb.llama_cpp.processes import supervisor
from tests.support.engines import HANG_GUARD_S, eventually, is_alive, with_variable

PYTHON = [sys.executable, "-I", "-S", "-c"]  # a small engine that starts quickly
MINUTES = "import time; time.sleep(600)"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
KEY = "the-secret-of-this-engine"


def with_constants(folder: Path, **constants: float) -> Path:
    """A copy of the supervisor's program, which runs by path, with other values of some constants."""
    text = Path(supervisor.__file__).read_text("utf-8")
    for name, value in constants.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    copy = folder / "supervisor.py"
    copy.write_text(text, "utf-8")
    return copy


def with_code(program: Path, before: str, code: str) -> Path:
    """The same copy with more code before a line, which must occur once."""
    text = program.read_text("utf-8")
    assert text.count(f"\n{before}") == 1
    program.write_text(text.replace(f"\n{before}", f"\n{code}\n{before}"), "utf-8")
    return program


def nothing_is_left(folder: Path) -> None:
    """Wait until no process with this state folder runs; a process that does not end is killed."""
    variable = "SOLLOL_STATE_DIR", str(folder)
    try:
        eventually(lambda: not with_variable(*variable), f"no process of {folder} runs")
    except AssertionError:
        for process in with_variable(*variable):
            with contextlib.suppress(psutil.Error):
                process.kill()
        raise


class Control:
    """A control connection, already greeted if there is a key."""

    def __init__(self, port: int, key: str | None = KEY, **about: Any) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=HANG_GUARD_S)
        self._lines = self.socket.makefile("rb")
        if key is not None:
            self.send({"key": key, **about})
            self.hello = self.line()

    def send(self, *messages: Any) -> None:
        """Messages as JSON lines, in one write."""
        self.socket.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def line(self) -> dict[str, Any] | None:
        """The next message; None when the other side has closed."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:  # it closed before it had read everything
            return None
        message: dict[str, Any] | None = json.loads(line) if line else None
        return message

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request; its answer."""
        self.send({"n": do, "do": do, **arguments})
        answer = self.line()
        assert answer is not None, f"dropped at {do}"
        assert answer.pop("n") == do
        return answer

    def exited(self) -> dict[str, Any]:
        """The report of the engine's end: `code`, `tail`, `why`."""
        report = self.line()
        assert report is not None
        assert report.pop("event") == "exited"
        assert self.line() is None, "that is the last word"
        return report

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self.socket.close()


class Supervised:
    """A supervisor that was started directly, and its engine."""

    def __init__(self, process: subprocess.Popen[bytes], spec: dict[str, Any], started: dict[str, Any]) -> None:
        self.process = process
        self.spec = spec
        self.started = started
        self.control_port = int(started.get("control_port", 0))
        self.engine: psutil.Process | None = None
        with contextlib.suppress(KeyError, psutil.NoSuchProcess):  # it may have ended already
            self.engine = psutil.Process(started["pid"])
        self.log_path = Path(spec["log_path"])

    def connect(self, key: str | None = KEY, **about: Any) -> Control:
        return Control(self.control_port, key, **about)

    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(Path(self.spec["entry_path"]).read_text("utf-8"))
        return entry

    @property
    def files(self) -> list[Path]:
        """Those of its registry files that exist."""
        known = (self.spec["entry_path"], self.spec["entry_path"] + ".new", self.spec["key_path"])
        return [Path(path) for path in known if Path(path).exists()]

    def is_running(self) -> bool:
        return self.engine is not None and is_alive(self.engine)

    def line(self, text: str) -> str:
        """Wait for a complete line of the log with this text; the first one."""

        def found() -> str:
            lines = self.log_path.read_text("utf-8").splitlines(True) if self.log_path.exists() else []
            return next((line.strip() for line in lines if text in line and line.endswith("\n")), "")

        return eventually(found, f"{text!r} in {self.log_path}")

    def all_gone(self) -> None:
        """Wait until engine, supervisor and files are gone."""
        self.process.wait(HANG_GUARD_S)
        eventually(lambda: not self.is_running() and not self.files, "the engine and its files are gone")


@contextlib.contextmanager
def supervised(
    folder: Path, code: str = MINUTES, *, name: str = "worker-1", program: Path | None = None, **more: Any
) -> Iterator[Supervised]:
    """A supervisor of a Python program that runs `code`, started as its protocol says; killed at the end.

    Args:
        program: by default the supervisor's own file.
        more: parts of the specification to change.
    """
    spec = {
        "argv": [*PYTHON, code],
        "env": {**os.environ, "SOLLOL_STATE_DIR": str(folder)},
        "id": name,
        "kind": "worker",
        "key": KEY,
        "entry_path": str(folder / f"{name}.json"),
        "key_path": str(folder / f"{name}.key"),
        "log_path": str(folder / f"{name}.log"),
        "log_limit_bytes": 1_000_000,
        "debug_until": None,
        "keep_alive_s": 600.0,
        "about": {},
        "holds": [],
        "psutil_folder": str(Path(psutil.__file__).parents[1]),
        **more,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(program or supervisor.__file__)],
        env={**os.environ, "SOLLOL_STATE_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
        yield Supervised(process, spec, json.loads(process.stdout.readline() or "{}"))
    finally:
        process.kill()
        _, complaints = process.communicate()
    assert complaints == b"", complaints.decode()
