"""The engine of another machine over a real sshd: shipped to an empty home, built where it does not fit."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.remote_engine import RemoteEngine, prepare
from sollol_nb.llama_cpp.links.ssh_shell import Shell
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import eventually, eventually_async, unused_port
from tests.support.machines import Machine, running_machines, short_folder
from tests.support.shell_machine import engine_in, let_this_cpu_have_more, tiny_source


@pytest.fixture(scope="module")
def gpu1() -> Iterator[Machine]:
    with short_folder() as folder, running_machines(folder, ["gpu1"]) as (machine,):
        yield machine


def engines_of(machine: Machine) -> list[Path]:
    folder = machine.home / ".cache" / "sollol_nb" / "engines"
    return list(folder.iterdir()) if folder.is_dir() else []


async def prepared(shell: Shell, here: Engine, reports: list[str], **options: Any) -> RemoteEngine:
    async def report(line: str) -> None:
        reports.append(line)

    return await prepare(shell, here, report, **options)


async def serve_one_listing(shell: Shell, there: RemoteEngine, here: Engine) -> str:
    """Start the worker there on its loopback; the devices that llama-server lists here through the tunnel."""
    remote_port, local_port = unused_port(), unused_port()
    session = await shell.start(f'exec "$1" -H 127.0.0.1 -p {remote_port}', there.worker)
    try:
        await shell.forward(local_port, remote_port)
        while True:  # pytest limits the time
            if (await probe("127.0.0.1", local_port)).outcome is ProbeOutcome.FREE:
                break
            await asyncio.sleep(0.02)
        listing = await asyncio.create_subprocess_exec(
            *(here.server, "--rpc", f"127.0.0.1:{local_port}", "--list-devices"), stdout=subprocess.PIPE
        )
        output, _ = await listing.communicate()
        return output.decode()
    finally:
        await session.end()


def over_ssh(machine: Machine, use: Any) -> Any:
    """What an asynchronous function returns that gets a shell on the machine."""

    async def connected() -> Any:
        shell = Shell(machine.target, shlex.split(machine.ssh))
        await shell.open()
        try:
            return await use(shell)
        finally:
            await shell.close()

    return run_blocking(connected())  # pytest limits a build's time


@pytest.mark.engine
def test_a_machine_with_nothing_installed_gets_this_machines_worker_and_serves(
    gpu1: Machine, engine: Engine
) -> None:
    reports: list[str] = []

    async def use(shell: Shell) -> tuple[RemoteEngine, str, RemoteEngine]:
        first = await prepared(shell, engine, reports)
        return first, await serve_one_listing(shell, first, engine), await prepared(shell, engine, reports)

    shipped, listing, found = over_ssh(gpu1, use)
    assert shipped.how == "shipped"
    assert Path(shipped.worker).is_relative_to(gpu1.home)
    assert not Path(shipped.worker).with_name("llama-server").exists()
    assert "RPC0" in listing
    assert reports[0].startswith("sending llama.cpp to gpu1: 0% of ")
    assert (found.how, found.worker) == ("found", shipped.worker)
    assert found.machine == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.timeout(1200)  # the build is nice to other processes of its machine
@pytest.mark.engine
def test_a_machine_with_another_cpu_builds_the_worker_and_serves(
    gpu1: Machine, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real build of llama.cpp's worker: about a minute of one core."""
    assert gpu1.sshd is not None
    if sys.platform == "linux":
        psutil.Process(gpu1.sshd.pid).cpu_affinity([])  # all cores, for what it starts from now on
    let_this_cpu_have_more(monkeypatch)
    for path in engines_of(gpu1):
        path.rename(gpu1.home / path.name)
    reports: list[str] = []

    async def use(shell: Shell) -> tuple[RemoteEngine, str]:
        built = await prepared(shell, engine, reports)
        return built, await serve_one_listing(shell, built, engine)

    built, listing = over_ssh(gpu1, use)
    assert (built.how, built.commit) == ("built", build.GIT_COMMIT)
    assert "RPC0" in listing
    assert "building llama.cpp on gpu1: 100%" in reports


def test_a_build_ends_there_when_the_connection_does_and_leaves_nothing(
    gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path / "cache"))
    let_this_cpu_have_more(monkeypatch)
    for path in engines_of(gpu1):
        path.rename(gpu1.home / f"{path.name}-before")
    pid_file = gpu1.home / "pid"
    fetch = tiny_source(
        f'add_custom_target(slow COMMAND sh -c "echo $$ > {pid_file}; exec sleep 600" VERBATIM)\n'
        "add_dependencies(ggml-rpc-server slow)\n"
    )

    def has_begun() -> bool:
        return pid_file.exists() and bool(pid_file.read_text().strip())

    async def interrupt(shell: Shell) -> None:
        preparing = asyncio.create_task(prepared(shell, engine_in(tmp_path / "here"), [], fetch=fetch))
        await eventually_async(lambda: has_begun() or preparing.done(), "the build runs")
        assert not preparing.done(), preparing.exception()
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)

    over_ssh(gpu1, interrupt)
    pid = int(pid_file.read_text())
    eventually(lambda: not psutil.pid_exists(pid), "the build has ended")
    eventually(lambda: engines_of(gpu1) == [], "nothing is left")
