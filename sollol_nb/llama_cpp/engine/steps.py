"""Run the programs of a build: output in a log file, progress, a time limit, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from sollol_nb.errors import EngineBuildError
from sollol_nb.llama_cpp.engine import build_guard
from sollol_nb.runtime.private_files import open_private
from sollol_nb.runtime.progress_bars import progress_bar
from sollol_nb.settings import config

Progress = Callable[[str, float | None], None]
"""Called with the current step and the share of the whole that is done (0 to 1), or with a remark and None."""

_BUILD_COUNT = re.compile(r"^\[(\d+)/(\d+)\]|^\[ *(\d+)%\]")  # Ninja's and Make's
_TROUBLE = re.compile(
    r"^FAILED: |^CMake Error|^ERROR|\berror:|\berror [A-Z]+\d+|\bfatal error\b"
    r"|undefined reference|No space left|Killed"
)
_TAIL_LINES = 15
_LINE_LIMIT = 240
_POLL_S = 0.1
_KILL_LIMIT_S = 10.0
_GONE_LIMIT_S = 1.0  # after the kill; where nothing reaps orphans, they stay as zombies


class BuildSteps:
    """Runs the programs of one build: their output goes to one log file, their steps to `progress`."""

    def __init__(self, log_path: Path, progress: Progress, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            is_stopped: asked ten times a second; the running program is ended once it is true.
        """
        self.log_path = log_path
        self.progress = progress
        self._is_stopped = is_stopped
        os.close(open_private(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))

    def run(
        self, *command: str | Path, limit_s: float, on_line: Callable[[str], None] = lambda line: None
    ) -> int | None:
        """The program's exit code, or None if it was ended at the time limit or because the steps are stopped.

        Output goes to a file, not a pipe, so that a helper process that outlives the compiler cannot block us.
        KeyboardInterrupt ends the whole process tree and is raised again; a guard ends it if we are killed. The
        program stays in our process group, so that an interrupt from terminal or notebook also stops it while we
        run in another thread.
        """
        step = uuid.uuid4().hex
        environment = config.child_environment(
            GIT_TERMINAL_PROMPT="0", PYTHONUNBUFFERED="1", **{build_guard.STEP: step}
        )
        with _guarded(step), self.log_path.open("ab") as sink, self.log_path.open("rb") as source:
            source.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            deadline = time.monotonic() + limit_s
            try:
                while True:
                    code = process.poll()
                    for line in _complete_lines(source):
                        on_line(line)
                    if code is not None or time.monotonic() > deadline or self._is_stopped():
                        return code
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_S)
            finally:
                end_process_tree(process)
                if process.returncode != 0:  # it may have ended before the processes that it started
                    build_guard.end_all_of(step)

    def must_run(
        self,
        doing: str,
        *command: str | Path,
        limit_s: float,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Like `run`, for a step that must succeed.

        Raises:
            EngineBuildError: it failed; the message ends with the relevant log lines.
        """
        code = self.run(*command, limit_s=limit_s, on_line=on_line)
        if code == 0:
            return
        if code is None:
            why = f"took longer than {limit_s / 60:.0f} min and was stopped"
        elif code in (-signal.SIGINT, 128 + signal.SIGINT):
            why = "was interrupted"
        else:
            why = f"failed (exit code {code})"
        lines = log_tail(self.log_path.read_text(errors="replace"))
        raise EngineBuildError("\n".join([f"{doing} {why}; full log: {self.log_path}", *lines]))


def build_share(line: str) -> float | None:
    """Share of the build that is done (0 to 1), from a line of Ninja (`[12/240] ...`) or Make (`[ 5%] ...`)."""
    match = _BUILD_COUNT.match(line)
    if match is None:
        return None
    done, total, percent = match.groups()
    return int(percent) / 100 if percent else int(done) / max(int(total), 1)


def log_tail(text: str) -> list[str]:
    """The relevant lines of a build log: from the first error on, else the last ones."""
    lines = [line.rstrip()[:_LINE_LIMIT] for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if build_share(line) is None]
    for number, line in enumerate(lines):
        if _TROUBLE.search(line) and not line.startswith("--"):  # CMake's "-- Looking for x - not found"
            return lines[number : number + _TAIL_LINES]
    return lines[-_TAIL_LINES:]


def end_process_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and its descendants; each is suspended before its children are listed, so none escapes."""
    if process.poll() is not None:
        return  # its pid may be recycled by now
    try:
        family = [psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:  # grows while it is walked
        with suppress(psutil.Error):
            member.suspend()
            family.extend(member.children())
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_LIMIT_S)
    psutil.wait_procs(family, timeout=_GONE_LIMIT_S)


@contextmanager
def _guarded(step: str) -> Iterator[None]:
    """While a step runs, another process waits to end its programs: a killed kernel cannot do it itself."""
    flags: dict[str, Any] = (
        {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x00000200}
    )  # CREATE_NEW_PROCESS_GROUP; an interrupt ends the step, not its guard
    command = [sys.executable, "-I", "-S", build_guard.__file__, str(Path(psutil.__file__).parents[1]), step]
    guard = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **flags
    )
    try:
        yield
    finally:
        with suppress(OSError, subprocess.TimeoutExpired):
            guard.communicate(build_guard.DONE, timeout=_KILL_LIMIT_S)
        guard.kill()
        guard.wait()


@contextmanager
def shown_progress(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress, or a progress bar in the terminal or notebook, created when first needed."""
    if progress is not None:
        yield progress
        return
    bar: Any = None

    def show(text: str, share: float | None) -> None:
        nonlocal bar
        if share is None:
            print(text)
            return
        if bar is None:
            bar = progress_bar(total=100, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}")
        bar.set_description_str(text, refresh=False)
        bar.n = round(100 * share, 1)
        bar.refresh()

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _complete_lines(source: IO[bytes]) -> Iterator[str]:
    """The complete lines so far; an incomplete line stays for the next call."""
    while True:
        start = source.tell()
        line = source.readline()
        if not line.endswith(b"\n"):
            source.seek(start)
            return
        yield line.decode(errors="replace").rstrip()
