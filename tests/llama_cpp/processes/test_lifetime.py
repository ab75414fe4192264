"""However a process with a router ends, its engines end too: immediately if it closed the router, else soon."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.engines import (
    HANG_GUARD_S,
    all_end,
    arguments_of,
    engines_of,
    eventually,
    is_alive,
    says,
    script,
    with_variable,
)

pytestmark = pytest.mark.engine

USES_A_ROUTER = """
import os, signal, sys, threading
from sollol_nb.sync_wrapper import HybridRouter

ending, endless, keep_alive = sys.argv[1:]
router = HybridRouter(auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=2, keep_alive=keep_alive)
router.route_request("demo:sharded", "What is a worker?", max_tokens=2)
if ending == "killed while generating":
    for position, _ in enumerate(router.stream(endless, "Go on", temperature=0)):
        if position == 3:
            print("ready", flush=True)
if ending == "killed while starting":
    router.events.subscribe(lambda event: event.kind == "coordinator.starting" and print("ready", flush=True))
    router.route_request("demo", "What is a worker?")
if ending == "a forked child stays":
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        signal.pause()
print("ready", flush=True)
if ending.startswith("killed") or ending == "a forked child stays":
    signal.pause()
sys.stdin.readline()
if ending == "closed":
    router.close()
elif ending == "an exception":
    raise ValueError("as a test")
elif ending == "sys.exit":
    sys.exit(3)
elif ending == "os._exit":
    os._exit(4)
elif ending == "a thread still reads":
    reads = threading.Event()

    def read():
        for _ in router.stream(endless, "Go on", temperature=0):
            reads.set()

    threading.Thread(target=read, daemon=True).start()
    reads.wait()
"""


def descendants(pid: int) -> list[psutil.Process]:
    """Engines and their supervisors."""
    return psutil.Process(pid).children(recursive=True)


def nothing_is_registered(state: Path) -> bool:
    return [path.name for path in (state / "registry").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("not closed", 0),
        ("closed", 0),
        ("an exception", 1),
        ("sys.exit", 3),
        ("os._exit", 4),
        ("a thread still reads", 0),
    ],
)
def test_engines_end_with_a_process_that_ends_by_itself(
    engine: Engine, endless: str, tmp_path: Path, ending: str, code: int
) -> None:
    # Closing ends them immediately; otherwise the next kernel may still use them. They are counted before that.
    keep_alive = "forever" if ending == "closed" else "5"
    with script(USES_A_ROUTER, ending, endless, keep_alive, SOLLOL_STATE_DIR=str(tmp_path)) as process:
        says(process, "ready")
        engines, everything = engines_of(psutil.Process(process.pid)), descendants(process.pid)
        _, errors = process.communicate("\n", timeout=HANG_GUARD_S)
    assert process.returncode == code
    assert ("ValueError: as a test" in errors) == (ending == "an exception")
    assert errors == "" or ending == "an exception", "no error is printed at the end"
    assert len(engines) == 3, "two workers and a coordinator"
    all_end(everything)
    # Also the coordinator that only the thread uses.
    eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(tmp_path)), "nothing of it is left")
    assert nothing_is_registered(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("ending", "signal_name"),
    [
        ("killed", "SIGKILL"),
        ("killed", "SIGTERM"),
        ("killed", "SIGHUP"),
        ("killed while generating", "SIGKILL"),
        ("killed while starting", "SIGKILL"),
    ],
)
def test_engines_end_with_a_process_that_is_killed(
    engine: Engine, endless: str, tmp_path: Path, ending: str, signal_name: str
) -> None:
    number = getattr(signal, signal_name)
    with script(USES_A_ROUTER, ending, endless, "1", SOLLOL_STATE_DIR=str(tmp_path)) as process:
        says(process, "ready")
        everything = descendants(process.pid)
        assert len(everything) >= 6
        eventually(
            lambda: set(filter(is_alive, everything)) < set(with_variable("SOLLOL_STATE_DIR", str(tmp_path))),
            "they and the process itself are known by the variable",
        )
        process.send_signal(number)
        assert process.wait(HANG_GUARD_S) == -number
    all_end(everything)
    # Also processes that were starting when the process was killed.
    eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(tmp_path)), "nothing of it is left")
    assert nothing_is_registered(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_supervisor_takes_its_engine_with_it_even_when_the_kernel_is_gone(
    engine: Engine, endless: str, tmp_path: Path
) -> None:
    with script(USES_A_ROUTER, "killed", endless, "forever", SOLLOL_STATE_DIR=str(tmp_path)) as process:
        says(process, "ready")
        everything = descendants(process.pid)
        supervisors = [json.loads(path.read_text()) for path in (tmp_path / "registry").glob("*.json")]
        process.kill()
        process.wait(HANG_GUARD_S)
    assert len(supervisors) == 3
    assert any(map(is_alive, everything))
    for entry in supervisors:
        psutil.Process(entry["supervisor_pid"]).kill()
    all_end(everything)
    eventually(lambda: nothing_is_registered(tmp_path), "the guards have cleaned up")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_engines_end_even_if_a_forked_child_holds_their_pipes(engine: Engine, endless: str) -> None:
    with script(USES_A_ROUTER, "a forked child stays", endless, "1") as process:
        says(process, "ready")
        forked = [child for child in descendants(process.pid) if arguments_of(child)[:2] == [sys.executable, "-c"]]
        everything = [child for child in descendants(process.pid) if child not in forked]
        process.kill()
        process.wait(HANG_GUARD_S)
    try:
        assert len(forked) == 1
        all_end(everything)
        assert forked[0].is_running()
    finally:
        for child in forked:
            child.kill()


def test_logs_of_ended_engines_can_still_be_read(engine: Engine, tmp_path: Path) -> None:
    text = """
from sollol_nb.sync_wrapper import HybridRouter
with HybridRouter(auto_discover_rpc=False) as router:
    router.route_request("demo", "What is a worker?", max_tokens=1)
    print("log", router.coordinators[0].log_path, flush=True)
"""
    with script(text) as process:
        log_path = Path(says(process, "log"))
        assert process.wait(HANG_GUARD_S) == 0
    assert "listening on http" in log_path.read_text(errors="replace")
