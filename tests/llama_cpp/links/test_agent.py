"""The script that runs a machine's workers there, in each POSIX shell that is installed, with a stand-in for the
worker: it prints its arguments, and waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.links import ssh
from tests.support.engines import HANG_GUARD_S, eventually, is_alive, kill_at_once, linux_only, posix_only

pytestmark = posix_only

SHELLS = [
    shell
    for shell in (
        ("sh",),
        ("dash",),
        ("bash", "--posix"),
        ("busybox", "sh"),
        ("ksh",),
        ("mksh",),
        ("zsh", "--emulate", "sh"),
    )
    if shutil.which(shell[0])
]
"""Systems have different ones as `sh`."""


class Agent:
    """The running script."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> list[str]:
        """The next line that it reports, as its parts."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def workers(self) -> list[psutil.Process]:
        """The stand-ins that run."""
        return list(filter(_is_stand_in, psutil.Process(self.process.pid).children(recursive=True)))

    def ended(self) -> int:
        """Wait until it has ended and all that it has started is gone."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        code = self.process.wait(HANG_GUARD_S)
        eventually(lambda: not any(map(is_alive, family)), "nothing is left")
        return code


def _is_stand_in(process: psutil.Process) -> bool:
    try:
        return "-d" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def agent(
    folder: Path, shell: tuple[str, ...], *devices: str, silence_s: int = 60, body: str = ""
) -> Iterator[Agent]:
    program = folder / "worker"
    log = f'echo "$@ $GGML_NO_BACKTRACE$LLAMA_ARG_HOST" >>"{folder}/log"'
    program.write_text(f"#!/bin/sh\n{log}\n{body}\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    process = subprocess.Popen(
        [*shell, "-c", ssh.AGENT.read_text(), "sh", str(program), str(silence_s), "7", "3", "0", *devices],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LLAMA_ARG_HOST": "no"},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield Agent(process)
    finally:
        for left in (
            [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_each_device_gets_a_worker_that_is_started_again_and_ends_with_the_input(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(tmp_path, shell, "CPU", "CUDA0") as running:
        started = [running.line(), running.line()]
        assert [line[:2] for line in started] == [["worker", "0"], ["worker", "1"]]
        ports = [int(line[2]) for line in started]
        assert all(16384 <= port < 32768 for port in ports)
        assert ports[0] != ports[1]
        log = tmp_path / "log"
        eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "both have started")
        assert sorted(log.read_text().splitlines()) == sorted(
            f"-H 127.0.0.1 -p {port} -t 3 -d {device} 1"
            for port, device in zip(ports, ("CPU", "CUDA0"), strict=True)
        )
        (first,) = (worker for worker in running.workers() if "CPU" in worker.cmdline())
        first.kill()
        assert running.line() == ["ended", "0", "137", "1"]
        again = running.line()
        assert again[:2] == ["worker", "0"]
        running.send("\n")
        assert running.process.stdin is not None
        running.process.stdin.close()
        running.ended()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_all_ends_when_no_heartbeat_comes_and_a_worker_that_ends_at_once_gets_another_port(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(
        tmp_path,
        shell,
        "CPU",
        silence_s=3,
        body=f'[ -e "{tmp_path}/again" ] || {{ touch "{tmp_path}/again"; exit 1; }}',
    ) as running:
        kind, index, port = running.line()
        assert (kind, index) == ("worker", "0")
        assert running.line() == ["ended", "0", "1", "1"]
        kind, index, other = running.line()
        assert (kind, index) == ("worker", "0")
        assert other != port
        running.ended()


@linux_only
@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_workers_end_where_all_of_the_script_is_killed_at_the_same_moment(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(tmp_path, shell, "CPU", "CUDA0") as running:
        assert [running.line()[0], running.line()[0]] == ["worker", "worker"]
        log = tmp_path / "log"
        eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "both have started")
        workers = running.workers()
        kill_at_once(
            process
            for process in [
                psutil.Process(running.process.pid),
                *psutil.Process(running.process.pid).children(recursive=True),
            ]
            if process not in workers and process.parent() not in workers
        )
        try:
            eventually(lambda: not any(map(is_alive, workers)), "no worker is left")
        finally:
            for worker in filter(is_alive, workers):
                worker.kill()
