"""An engine whose parent process ends: the lease ends, and keep_alive counts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from tests.support.engines import (
    HANG_GUARD_S,
    eventually,
    is_alive,
    posix_only,
    run,
    says,
    script,
    with_variable,
)
from tests.support.supervised import nothing_is_left, with_constants


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder for this test; in the end, none of its processes runs."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    yield tmp_path
    nothing_is_left(tmp_path)


PARENT = """
import asyncio, os, signal, sys, time
from pathlib import Path
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.runtime.io_loop import run_blocking

async def start():
    engine = await EngineProcess.start(
        [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"],
        kind="worker", about={}, keep_alive_s=600.0, log_path=Path(sys.argv[1])
    )
    await engine.hold()
    return engine

engine = run_blocking(start())
"""
WAITS = "print('engine', engine.pid, flush=True); sys.stdin.readline()\n"


def end_left_behind(pid: int) -> None:
    """End the engine that was left behind, once nobody has a lease."""

    async def check() -> None:
        (entry,) = registry.entries()
        handle = await EngineProcess.adopt(entry)
        assert handle is not None
        assert handle.pid == pid
        while (await handle.status())["leases"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await handle.stop_unless_shared()

    run(check())


@pytest.mark.parametrize(
    "ending",
    ["", "os._exit(0)", "raise SystemExit(1)", "os.kill(os.getpid(), signal.SIGKILL)"],
    ids=lambda ending: ending or "end",
)
def test_engine_outlives_the_process_that_started_it_but_not_its_lease(ending: str, tmp_path: Path) -> None:
    with script(PARENT + WAITS + ending, str(tmp_path / "log")) as process:
        pid = int(says(process, "engine"))
        process.communicate("\n", timeout=HANG_GUARD_S)
    end_left_behind(pid)


@posix_only
def test_forked_child_does_not_keep_the_lease_of_a_killed_parent(tmp_path: Path) -> None:
    forks = "child = os.fork() or time.sleep(600); print('child', child, flush=True)\n"
    with script(PARENT + forks + WAITS, str(tmp_path / "log")) as process:
        child, pid = psutil.Process(int(says(process, "child"))), int(says(process, "engine"))
        try:
            process.kill()
            end_left_behind(pid)
            assert is_alive(child)
        finally:
            child.kill()


@posix_only
def test_parent_keeps_its_lease_when_a_forked_child_ends(tmp_path: Path) -> None:
    forks = "child = os.fork() or os._exit(0); os.waitpid(child, 0)\n"
    holds = "print('held', run_blocking(engine.status())['leases'], flush=True)\n"
    with script(PARENT + forks + holds + WAITS, str(tmp_path / "log")) as process:
        assert says(process, "held") == "1"
        pid = int(says(process, "engine"))
    end_left_behind(pid)


@posix_only
def test_starter_that_is_killed_while_it_starts_leaves_nothing(state: Path) -> None:
    """At any moment: the supervisor may have no engine yet, or an engine without a client."""
    hurried = with_constants(state, FIRST_CLIENT_S=0.2, GREETING_LIMIT_S=0.2, MIN_IDLE_S=0.05)
    head = f"from sollol_nb.llama_cpp.processes import supervisor\nsupervisor.__file__ = {str(hurried)!r}\n"
    text = PARENT.replace("600.0", "0.0").replace("engine = run", "print('starting', flush=True)\nengine = run")
    for pauses in range(6):
        with script(head + text + WAITS, str(state / "log")) as process:
            says(process, "starting")
            for _ in range(pauses):  # each is a few milliseconds long
                with_variable("SOLLOL_STATE_DIR", str(state))
            process.kill()
            process.wait(HANG_GUARD_S)
        nothing_is_left(state)
    eventually(lambda: registry.entries() == [], "no entry is left")


@posix_only
def test_interrupt_of_the_parents_process_group_does_not_reach_the_engine(tmp_path: Path) -> None:
    then = """
signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))
print('engine', engine.pid, flush=True)
sys.stdin.readline()
print('code', abs(run_blocking(engine.stop()).code), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT + then, str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        engine = psutil.Process(int(says(process, "engine")))
        os.killpg(process.pid, signal.SIGINT)
        says(process, "interrupted")
        assert is_alive(engine)
        process.stdin.write("\n")
        process.stdin.flush()
        # An interrupt would have ended it with another code; the supervisor ended it.
        assert says(process, "code") == str(int(signal.SIGTERM))
