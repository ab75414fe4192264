"""Engine processes: owned by a supervisor, logged within limits, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from sollol_nb import engine_process, supervisor
from sollol_nb.engine_process import EngineProcess, ExitReport
from sollol_nb.errors import EngineError
from sollol_nb.io_loop import run_blocking
from sollol_nb.rpc_discovery import ProbeOutcome, probe
from sollol_nb.toolchain import Engine
from sollol_nb.workers import free_ports

T = TypeVar("T")

HANG_GUARD_S = 60.0
MINUTES = "import time; time.sleep(600)"

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and process groups")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def guarded() -> T:
        async with asyncio.timeout(HANG_GUARD_S):
            return await coroutine

    return run_blocking(guarded())  # where engine processes live


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


async def start(code: str, log_path: Path, **options: Any) -> EngineProcess:
    return await EngineProcess.start([sys.executable, "-c", code], log_path=log_path, **options)


@contextlib.asynccontextmanager
async def running(code: str, log_path: Path, **options: Any) -> AsyncIterator[EngineProcess]:
    engine = await start(code, log_path, **options)
    try:
        yield engine
    finally:
        await engine.stop()


async def report_of(code: str, log_path: Path, **options: Any) -> ExitReport:
    return await (await start(code, log_path, **options)).wait()


async def line_in(log_path: Path, text: str) -> str:
    """The first line of the log with this text, once it is there."""
    while True:  # ends with the hang guard
        found = await asyncio.to_thread(_line, log_path, text)
        if found:
            return found
        await asyncio.sleep(0.01)


def _line(log_path: Path, text: str) -> str:
    lines = log_path.read_text().splitlines(keepends=True) if log_path.exists() else []
    return next((line.strip() for line in lines if text in line and line.endswith("\n")), "")


def wait_ended(process: psutil.Process) -> None:
    """Return when the process has ended; fails if it does not."""
    deadline = time.monotonic() + HANG_GUARD_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} is still there"
            time.sleep(0.01)


@pytest.fixture
def short_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that insists after 0.3 s instead of 5 s; it runs by path, so it is a copy."""
    text = Path(supervisor.__file__).read_text()
    assert text.count("STOP_GRACE_S = 5.0") == 1
    copy = tmp_path / "supervisor.py"
    copy.write_text(text.replace("STOP_GRACE_S = 5.0", "STOP_GRACE_S = 0.3"))
    monkeypatch.setattr(supervisor, "__file__", str(copy))


# --- the end of an engine, as told ------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        pytest.param("import os; os.abort()", -6, marks=posix_only),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, marks=posix_only),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, marks=posix_only),
    ],
)
def test_exit_report_tells_the_code_or_the_signal(code: str, exit_code: int, log_path: Path) -> None:
    assert run(report_of(code, log_path)).code == exit_code


def test_exit_report_carries_the_last_lines_of_both_streams(log_path: Path) -> None:
    code = "import os\nfor i in range(100): os.write(1 + i % 2, b'line %d\\n' % i)"

    report = run(report_of(code, log_path))

    assert report.tail == tuple(f"line {i}" for i in range(100 - supervisor.TAIL_LINES, 100))
    assert log_path.read_text().splitlines() == [f"line {i}" for i in range(100)]


def test_running_is_told_until_the_end(log_path: Path) -> None:
    async def look() -> None:
        engine = await start(MINUTES, log_path)
        assert engine.is_running()
        assert engine.exit_report is None
        assert psutil.Process(engine.pid).is_running()
        report = await engine.stop()
        assert not engine.is_running()
        assert engine.exit_report == report
        assert await engine.stop() == report

    run(look())


@pytest.mark.parametrize("kind", ["missing", "folder", "not executable", "not a program"])
@posix_only
def test_binary_that_cannot_run_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    if kind == "folder":
        binary.mkdir()
    elif kind != "missing":
        binary.write_bytes(b"\0not a program")
        binary.chmod(0o755 if kind == "not a program" else 0o644)

    with pytest.raises(EngineError) as caught:
        run(EngineProcess.start([str(binary)], log_path=tmp_path / "log"))

    assert str(binary) in str(caught.value)
    assert "sollol-nb doctor" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the log ----------------------------------------------------------------------------------


@posix_only
def test_log_is_readable_by_its_owner_only(log_path: Path) -> None:
    run(report_of("print('a prompt')", log_path))

    assert log_path.stat().st_mode & 0o777 == 0o600


def test_log_ends_at_its_size_limit_but_the_engine_and_the_tail_go_on(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "LOG_LIMIT_BYTES", 2000)

    report = run(report_of("for i in range(100000): print('line', i)", log_path))

    assert report.code == 0
    assert report.tail[-1] == "line 99999"
    assert log_path.stat().st_size < 2000 + 100
    assert log_path.read_text().splitlines()[-1] == "[the log ends here: it reached its size limit]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_does_not_stop_the_engine() -> None:
    report = run(report_of("for i in range(100000): print('line', i)", Path("/dev/full")))

    assert report == ExitReport(0, tuple(f"line {i}" for i in range(99960, 100000)))


@pytest.mark.parametrize(
    "text", ["'x' * 1_000_000", "'\\x00' * 100_000", "'\U0001f600' * 100_000", "'a' * 100_000 + '\\n'"]
)
def test_very_long_lines_do_not_lose_the_exit_report(text: str, log_path: Path) -> None:
    code = f"import sys; sys.stdout.buffer.write((({text}) + chr(10)).encode() * 50); raise SystemExit(7)"

    report = run(report_of(code, log_path))

    assert report.code == 7
    assert len(report.tail) == supervisor.TAIL_LINES


def test_output_that_is_not_utf8_is_kept_as_it_is(log_path: Path) -> None:
    report = run(report_of("import sys; sys.stdout.buffer.write(b'caf\\xe9\\n')", log_path))

    assert report.tail == ("caf\ufffd",)
    assert log_path.read_bytes() == b"caf\xe9\n"


LOG = """\
0.00.001.000 D load_tensors: layer   0 assigned to device RPC0, is_swa = 0
0.00.002.000 I srv  llama_server: listening on http://127.0.0.1:8080
0.00.003.000 I slot launch_slot_: processing task
0.00.004.000 D slot process_toke: next token: 'secret'
and the rest of a prompt, which continues that line
0.00.005.000 W srv  update_slots: a warning
which continues
0.00.006.000 D slot process_toke: next token: 'secret'
/src/ggml-rpc.cpp:563: Remote RPC server crashed or returned malformed response
"""


def test_debug_lines_after_the_marker_are_dropped_and_an_abort_is_kept(log_path: Path) -> None:
    report = run(report_of(f"print({LOG!r}, end='')", log_path, debug_until="listening on"))

    dropped = (3, 4, 7)
    kept = [line for number, line in enumerate(LOG.splitlines()) if number not in dropped]
    assert log_path.read_text().splitlines() == kept
    assert list(report.tail) == kept


def test_without_a_marker_debug_lines_stay(log_path: Path) -> None:
    run(report_of(f"print({LOG!r}, end='')", log_path))

    assert log_path.read_text() == LOG


# --- what the engine is given -----------------------------------------------------------------


def test_secret_of_the_environment_reaches_the_engine_and_no_argument(log_path: Path) -> None:
    secret = "a-very-secret-key"
    code = f"import os; print('got', len(os.environ['LLAMA_API_KEY']), flush=True); {MINUTES}"

    async def look() -> None:
        async with running(code, log_path, env={"LLAMA_API_KEY": secret}) as engine:
            await line_in(log_path, f"got {len(secret)}")
            process = psutil.Process(engine.pid)
            owner = process.parent()
            assert owner is not None
            for one in (process, owner):
                assert secret not in " ".join(one.cmdline())
            assert secret not in " ".join(owner.environ().values())

    run(look())


def test_leftover_options_in_the_environment_do_not_reach_the_engine(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "17")
    monkeypatch.setenv("SOLLOL_TEST_KEPT", "yes")
    code = "import os; print(os.environ.get('LLAMA_ARG_CTX_SIZE'), os.environ['SOLLOL_TEST_KEPT'])"

    assert run(report_of(code, log_path)).tail == ("None yes",)


def test_engine_reads_nothing_from_standard_input(log_path: Path) -> None:
    assert run(report_of("print(repr(input.__self__ and __import__('sys').stdin.read()))", log_path)).tail == (
        "''",
    )


# --- stopping ---------------------------------------------------------------------------------

IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@posix_only
def test_engine_is_asked_first(log_path: Path) -> None:
    code = f"""
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("up", flush=True)
{MINUTES}"""

    async def look() -> ExitReport:
        engine = await start(code, log_path)
        await line_in(log_path, "up")
        return await engine.stop()

    assert run(look()).code == 5


@posix_only
@pytest.mark.usefixtures("short_grace")
def test_engine_that_ignores_the_request_is_killed(log_path: Path) -> None:
    async def look() -> ExitReport:
        engine = await start(f"{IGNORES} print('up', flush=True); {MINUTES}", log_path)
        await line_in(log_path, "up")
        return await engine.stop()

    assert run(look()).code == -signal.SIGKILL


STARTS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print("child", child.pid, flush=True)
{then}
"""


async def child_of(log_path: Path) -> psutil.Process:
    return psutil.Process(int((await line_in(log_path, "child ")).split()[1]))


@posix_only
@pytest.mark.parametrize("child", [MINUTES, IGNORES + MINUTES], ids=["obeys", "ignores the request"])
def test_children_of_a_stopped_engine_end_with_it(child: str, log_path: Path) -> None:
    code = STARTS_A_CHILD.format(child=f"{child}", then="time.sleep(600)")

    async def look() -> psutil.Process:
        async with running(code, log_path):
            return await child_of(log_path)

    wait_ended(run(look()))


@posix_only
def test_children_of_an_engine_that_ended_by_itself_end_too(log_path: Path) -> None:
    async def look() -> psutil.Process:
        engine = await start(STARTS_A_CHILD.format(child=MINUTES, then="time.sleep(0.5)"), log_path)
        child = await child_of(log_path)
        assert (await engine.wait()).code == 0
        return child

    wait_ended(run(look()))


@posix_only
def test_lost_supervisor_takes_its_engine_with_it(log_path: Path) -> None:
    async def look() -> tuple[psutil.Process, ExitReport]:
        engine = await start(f"{IGNORES} {MINUTES}", log_path)
        process = psutil.Process(engine.pid)
        owner = process.parent()
        assert owner is not None
        owner.kill()
        return process, await engine.wait()

    process, report = run(look())

    assert report == ExitReport(None, ("the supervisor of this process was lost",))
    wait_ended(process)


@posix_only
def test_start_that_is_cancelled_leaves_nothing_behind(log_path: Path) -> None:
    async def look() -> list[psutil.Process]:
        before = set(psutil.Process().children(recursive=True))
        starting = asyncio.create_task(start(MINUTES, log_path))
        new: set[psutil.Process] = set()
        while not new:
            await asyncio.sleep(0.001)
            new = set(psutil.Process().children(recursive=True)) - before
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).stop()  # it was quicker than we
        return list(new)

    for process in run(look()):
        wait_ended(process)


# --- the parent's end -------------------------------------------------------------------------

PARENT = """
import asyncio, os, signal, sys, time
from pathlib import Path
from sollol_nb.engine_process import EngineProcess

async def main():
    engine = await EngineProcess.start(
        [sys.executable, "-c", "import time; time.sleep(600)"], log_path=Path(sys.argv[1])
    )
    print("engine", engine.pid, flush=True)
    {then}

asyncio.run(main())
"""
WAITS = "await asyncio.to_thread(sys.stdin.readline)"
FORKS = "child = os.fork(); child or time.sleep(600); print('fork', child, flush=True); time.sleep(600)"


@contextlib.contextmanager
def parent(then: str, log_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process with an engine, in a process group of its own."""
    argv = [sys.executable, "-c", PARENT.format(then=then), str(log_path)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str], word: str) -> psutil.Process:
    assert process.stdout is not None
    said, number = process.stdout.readline().split()
    assert said == word
    return psutil.Process(int(number))


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@posix_only
def test_engine_ends_when_its_parent_is_killed(log_path: Path) -> None:
    with parent("time.sleep(600)", log_path) as process:
        engine = told(process, "engine")
        owner = engine.parent()
        assert owner is not None
        process.kill()
        wait_ended(engine)
        wait_ended(owner)


@pytest.mark.parametrize("then", ["return", "os._exit(0)", "raise SystemExit(1)"])
def test_engine_ends_when_its_parent_ends(then: str, log_path: Path) -> None:
    with parent(f"{WAITS}\n    {then}", log_path) as process:
        engine = told(process, "engine")
        go_on(process)
        process.wait(HANG_GUARD_S)
        wait_ended(engine)


@posix_only
def test_engine_ends_with_its_parent_though_a_forked_child_holds_the_pipe(log_path: Path) -> None:
    with parent(FORKS, log_path) as process:
        engine, fork = told(process, "engine"), told(process, "fork")
        process.kill()
        wait_ended(engine)
        assert fork.is_running()
        fork.kill()


@posix_only
def test_interrupt_of_the_parents_process_group_does_not_reach_the_engine(log_path: Path) -> None:
    then = (
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', os.getpid(), flush=True))\n"
        "    print('ready', os.getpid(), flush=True)\n"
        f"    {WAITS}\n"
        "    print('code', abs((await engine.stop()).code), flush=True)"
    )
    with parent(then, log_path) as process:
        engine, _ = told(process, "engine"), told(process, "ready")
        os.killpg(process.pid, signal.SIGINT)
        told(process, "interrupted")
        assert engine.is_running()
        go_on(process)
        assert process.stdout is not None
        # An interrupt on its way would end it with another code: it was the supervisor that did.
        assert process.stdout.readline().split() == ["code", str(int(signal.SIGTERM))]


# --- a real worker ----------------------------------------------------------------------------


@pytest.mark.engine
@posix_only
def test_real_worker_answers_logs_and_is_reported_when_killed(engine: Engine, log_path: Path) -> None:
    async def look() -> ExitReport:
        (port,) = free_ports(50400, 1)
        argv = [str(engine.worker), "-H", "127.0.0.1", "-p", str(port)]
        worker = await EngineProcess.start(argv, log_path=log_path)
        try:
            while (await probe("127.0.0.1", port)).outcome is not ProbeOutcome.FREE:
                assert worker.is_running()
                await asyncio.sleep(0.02)
            os.kill(worker.pid, signal.SIGKILL)
            return await worker.wait()
        finally:
            await worker.stop()

    report = run(look())

    assert report.code == -signal.SIGKILL
    assert any("RPC server" in line for line in report.tail)
    assert "RPC server" in log_path.read_text()
