"""The handle of an engine process: start or adopt it, hold it, watch it, stop it or disconnect from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socketserver
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from sollol_nb.errors import EngineError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import process as engine_process
from sollol_nb.llama_cpp.processes import registry, supervisor
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport, Lease
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.local import start_worker
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.settings import config
from tests.support.engines import (
    eventually_async,
    is_alive,
    posix_only,
    run,
    serving,
    silent_peer,
    unused_port,
)
from tests.support.supervised import IGNORES, MINUTES, PYTHON, nothing_is_left, supervised, with_constants

LOST = ExitReport(None, ("the supervisor of this process was lost",))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder for this test; in the end, no process of it runs and no file of an engine is left."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    yield tmp_path
    nothing_is_left(tmp_path)
    left = {path.suffix for path in config.registry_dir().iterdir()}
    assert not left & {".json", ".new", ".key"}


@pytest.fixture
def hurried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervisors with short waits."""
    copy = with_constants(tmp_path, STOP_GRACE_S=0.3, MIN_IDLE_S=0.05)
    monkeypatch.setattr(supervisor, "__file__", str(copy))


async def start(code: str = MINUTES, **options: Any) -> EngineProcess:
    given: dict[str, Any] = {
        "kind": registry.WORKER,
        "about": {"endpoint": "127.0.0.1:1"},
        "keep_alive_s": 600.0,
        "log_path": registry.new_log_path(registry.WORKER, 1),
        **options,
    }
    return await EngineProcess.start([*PYTHON, code], **given)


@contextlib.asynccontextmanager
async def running(code: str = MINUTES, **options: Any) -> AsyncIterator[EngineProcess]:
    engine = await start(code, **options)
    try:
        yield engine
    finally:
        await engine.stop(grace_s=0.1)


async def is_up(engine: EngineProcess) -> None:
    """Wait until it has written so; its log is made after its start."""
    log = engine.log_path
    await eventually_async(lambda: log.exists() and "up" in log.read_text(), "it is up")


def only_entry() -> Entry:
    (entry,) = registry.entries()
    return entry


async def adopted() -> EngineProcess:
    handle = await EngineProcess.adopt(only_entry())
    assert handle is not None
    return handle


def supervisor_of(engine: EngineProcess) -> psutil.Process:
    return psutil.Process(
        next(entry.supervisor_pid for entry in registry.entries() if entry.id == engine.entry.id)
    )


# --- starting ---------------------------------------------------------------------------------


def test_started_engine_is_reported_and_registered() -> None:
    async def check() -> None:
        async with running(about={"model": "m"}, keep_alive_s=None) as engine:
            assert engine.is_running()
            assert engine.exit_report is None
            assert psutil.Process(engine.pid).cmdline() == [*PYTHON, MINUTES]
            entry = only_entry()
            assert entry == engine.entry
            assert entry.about == {"model": "m", **registry.own_description()}
            assert entry.about["owner"] == registry.own_name()
            assert entry.keep_alive_s is None
            assert entry.read_key() == engine.key
            assert entry.log_path == str(engine.log_path)
        assert not engine.is_running()
        assert engine.exit_report == await engine.wait() == await engine.stop()
        assert registry.entries() == []

    run(check())


@pytest.mark.parametrize("kind", ["missing", "folder", "not executable", "not a program"])
@posix_only
def test_binary_that_cannot_run_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    if kind == "folder":
        binary.mkdir()
    elif kind != "missing":
        binary.write_bytes(b"\0not a program")
        binary.chmod(0o755 if kind == "not a program" else 0o644)
    started = EngineProcess.start(
        [str(binary)], kind="worker", about={}, keep_alive_s=0.0, log_path=tmp_path / "log"
    )

    with pytest.raises(EngineError) as caught:
        run(started)

    assert str(binary) in str(caught.value)
    assert "sollol-nb doctor" in str(caught.value)
    assert "\n" not in str(caught.value)


@posix_only
def test_keys_are_random_and_shown_nowhere() -> None:
    async def check() -> None:
        async with running() as engine, running() as another:
            assert engine.key != another.key
            assert len(engine.key) >= 32
            (key_path,) = config.registry_dir().glob(f"{engine.entry.id}.key")
            assert key_path.stat().st_mode & 0o777 == 0o600
            for process in (psutil.Process(engine.pid), supervisor_of(engine)):
                assert engine.key not in " ".join(process.cmdline())
                assert engine.key not in " ".join(process.environ().values())
            assert engine.key not in repr(engine)
            assert engine.key not in repr(registry.entries())

    run(check())


def test_engine_gets_this_environment_without_llama_cpp_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "17")
    monkeypatch.setenv("SOLLOL_TEST_KEPT", "yes")
    code = "import os; print(*map(os.environ.get, ['LLAMA_ARG_CTX_SIZE', 'SOLLOL_TEST_KEPT', 'LLAMA_API_KEY']))"

    async def check() -> ExitReport:
        return await (await start(code, env={"LLAMA_API_KEY": "key"})).wait()

    assert run(check()) == ExitReport(0, ("None yes key",))


@posix_only
def test_engine_that_ends_immediately_is_reported_too() -> None:
    async def check() -> list[ExitReport]:
        started = [await start("print('I cannot'); raise SystemExit(3)") for _ in range(3)]
        return [await engine.wait() for engine in started]

    assert run(check()) == [ExitReport(3, ("I cannot",))] * 3


@posix_only
@pytest.mark.usefixtures("hurried")
def test_start_that_is_cancelled_leaves_nothing_behind() -> None:
    async def check(pauses: int) -> None:
        starting = asyncio.create_task(start(IGNORES + MINUTES))
        for _ in range(pauses):
            await asyncio.sleep(0.004)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).stop(grace_s=0.0)  # it started before it could be cancelled

    for pauses in range(0, 24, 3):
        run(check(pauses))
    # The fixture checks the rest: no process, no file.


@pytest.mark.parametrize("error", [TimeoutError, ConnectionRefusedError, asyncio.CancelledError])
@pytest.mark.usefixtures("hurried")
def test_engine_whose_supervisor_cannot_be_reached_does_not_stay(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine_process, "_connect", unreachable)
    expected = asyncio.CancelledError if error is asyncio.CancelledError else EngineError

    async def check() -> None:
        with pytest.raises(expected):
            await start(keep_alive_s=None)

    run(check())


def test_a_lease_whose_request_is_cancelled_meanwhile_is_not_kept() -> None:
    async def check() -> None:
        async with running(f"print('up', flush=True); {MINUTES}") as engine:
            assert await engine.hold()
            holding = asyncio.create_task(engine.hold())
            await asyncio.sleep(0)  # it has sent its request
            holding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holding
            assert (await engine.status())["leases"] == 1

    run(check())


# --- adopting ---------------------------------------------------------------------------------


def test_adopted_engine_is_the_same_for_both_handles() -> None:
    async def check() -> None:
        async with running(f"print('up', flush=True); {MINUTES}") as engine:
            other = await adopted()
            assert (other.pid, other.key, other.log_path) == (engine.pid, engine.key, engine.log_path)
            assert await engine.hold()
            assert (await other.status())["leases"] == 1
            engine.free()
            assert (await engine.status())["leases"] == 0
            other.note_about(acts_until=9)
            await other.update_about(load_ms=5)
            await engine.keep_alive(7)
            about = only_entry().about
            assert (about["acts_until"], about["load_ms"], only_entry().keep_alive_s) == (9, 5, 7.0)
            report = await other.stop(why="as a test")
            assert await engine.wait() == report
            assert report.why == "as a test"
            assert not await engine.hold()
            assert await engine.status() == {}

    run(check())


class NotASupervisor(socketserver.BaseRequestHandler):
    """A program that is not a supervisor."""

    def handle(self) -> None:
        self.request.recv(1024)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def entry_at(port: int, *, is_alive: bool) -> Entry:
    """An entry that names this port as its supervisor's."""
    us = psutil.Process()
    name = "alive" if is_alive else "dead"
    path, key_path = (config.registry_dir() / f"{name}.{suffix}" for suffix in ("json", "key"))
    path.write_text("{}")
    key_path.write_text("key")
    return Entry(
        id=name,
        kind=registry.WORKER,
        pid=us.pid,
        pid_started=0.0,
        supervisor_pid=us.pid,
        supervisor_started=us.create_time() if is_alive else 0.0,
        control_port=port,
        key_path=str(key_path),
        log_path="log",
        started_at=0.0,
        keep_alive_s=None,
        about={},
        path=path,
    )


def test_a_lease_that_a_supervisor_does_not_grant_in_time_may_be_asked_about_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_process, "ANSWER_TIMEOUT_S", 0.01)

    class Silent:
        def _ask(self, do: str) -> asyncio.Future[dict[str, Any]]:
            self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            return self.answer

    async def granted() -> list[bool]:
        process = Silent()
        lease = Lease(cast(EngineProcess, process))
        found = [await lease.is_granted(), await lease.is_granted()]
        process.answer.set_result({"ok": True})
        return [*found, await lease.is_granted()]

    assert run(granted()) == [False, False, True]


@pytest.mark.parametrize("answer", ["refused", "silent", "another program"])
def test_entry_whose_supervisor_does_not_answer_is_not_adopted(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "ANSWER_TIMEOUT_S", 0.1)
    with contextlib.ExitStack() as peers:
        match answer:
            case "refused":
                port = unused_port()
            case "silent":
                port = peers.enter_context(silent_peer())
            case _:
                port = peers.enter_context(serving(NotASupervisor))
        alive, dead = entry_at(port, is_alive=True), entry_at(port, is_alive=False)
        assert run(EngineProcess.adopt(alive)) is None
        assert run(EngineProcess.adopt(dead)) is None
    assert alive.path.exists(), "it may answer later"
    assert not dead.path.exists()
    alive.path.unlink()
    Path(alive.key_path).unlink()


def test_entry_without_its_key_is_not_adopted() -> None:
    with supervised(config.registry_dir()) as owner:
        Path(owner.spec["key_path"]).unlink()
        assert run(EngineProcess.adopt(only_entry())) is None
    nothing_is_left(config.registry_dir())


# --- ending -----------------------------------------------------------------------------------


@posix_only
def test_stop_asks_first() -> None:
    code = f"""
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("up", flush=True)
{MINUTES}"""

    async def check() -> ExitReport:
        engine = await start(code)
        await is_up(engine)
        return await engine.stop()

    assert run(check()) == ExitReport(5, ("up",), "stopped")


@posix_only
@pytest.mark.parametrize("grace_s", [0.2, 0.0])
def test_engine_that_ignores_the_request_is_killed(grace_s: float) -> None:
    async def check() -> ExitReport:
        engine = await start(f"{IGNORES} print('up', flush=True); {MINUTES}")
        await is_up(engine)
        return await engine.stop(grace_s=grace_s)

    assert run(check()) == ExitReport(-signal.SIGKILL, ("up",), "stopped")


@posix_only
def test_stop_ends_the_engine_itself_if_the_supervisor_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 0.1)

    async def check() -> ExitReport:
        engine = await start()
        frozen = supervisor_of(engine)
        frozen.suspend()
        stopping = asyncio.create_task(engine.stop(grace_s=0.0))
        await eventually_async(lambda: psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE, "it has ended")
        frozen.resume()
        return await stopping

    assert run(check()).code == -signal.SIGKILL


def test_shared_engine_keeps_running_for_the_others_and_ends_with_the_last() -> None:
    async def check() -> None:
        engine = await start()
        other = await adopted()
        assert await engine.hold()
        assert not await engine.stop_unless_shared()
        assert (await engine.wait()).why == "detached"
        assert is_alive(psutil.Process(other.pid))
        assert (await other.status())["leases"] == 0, "its lease has ended with it"
        assert await other.stop_unless_shared()
        assert (await other.wait()).why == "closed"

    run(check())


def test_detached_engine_lives_on_and_can_be_adopted() -> None:
    async def check() -> None:
        engine = await start()
        pid = engine.pid
        assert await engine.hold()
        engine.detach()
        assert await engine.wait() == ExitReport(None, (), "detached")
        assert not await engine.hold()
        other = await adopted()
        status = await other.status()
        assert (other.pid, status["clients"], status["leases"]) == (pid, 0, 0)
        await other.stop()

    run(check())


@pytest.mark.usefixtures("hurried")
def test_engine_without_a_lease_ends_after_keep_alive_and_reports_why() -> None:
    async def check() -> None:
        engine = await start(keep_alive_s=600.0)
        assert await engine.hold()
        await engine.keep_alive(0)
        assert (await engine.status())["ends_in_s"] is None
        engine.free()
        assert (await engine.wait()).why == "idle"

    run(check())


@posix_only
@pytest.mark.parametrize("keep_alive_s", [600.0, None])
def test_lost_supervisor_takes_its_engine_with_it(keep_alive_s: float | None) -> None:
    async def check() -> None:
        engine = await start(IGNORES + MINUTES, keep_alive_s=keep_alive_s)
        other = await adopted()
        process = psutil.Process(engine.pid)
        supervisor_of(engine).kill()
        assert await engine.wait() == await other.wait() == LOST
        await eventually_async(lambda: not is_alive(process), "the engine has ended")
        assert await engine.stop() == LOST

    run(check())


def test_worker_lives_as_long_as_a_coordinator_holds_it() -> None:
    async def check() -> None:
        worker = await start()
        coordinator = await start(kind=registry.COORDINATOR, holds=[only_entry()])
        while (await worker.status())["leases"] != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not await worker.stop_unless_shared(), "the coordinator holds it"
        (entry,) = registry.entries(registry.WORKER)
        again = await EngineProcess.adopt(entry)
        assert again is not None
        await coordinator.stop()
        assert await again.stop_unless_shared()

    run(check())


# --- a real worker ----------------------------------------------------------------------------


@pytest.mark.engine
@posix_only
def test_real_worker_answers_logs_and_is_reported_when_killed(engine: Engine) -> None:
    async def check() -> tuple[ExitReport, Path]:
        port = unused_port()
        worker = await start_worker(engine, "127.0.0.1", port, 1, 600.0)
        while (await probe("127.0.0.1", port)).outcome is not ProbeOutcome.FREE:
            assert worker.is_running()
            await asyncio.sleep(0.02)
        assert only_entry().about["endpoint"] == f"127.0.0.1:{port}"
        os.kill(worker.pid, signal.SIGKILL)
        return await worker.wait(), worker.log_path

    report, log_path = run(check())

    assert report.code == -signal.SIGKILL
    assert any("RPC server" in line for line in report.tail)
    assert "RPC server" in log_path.read_text()


def test_a_lost_connection_does_not_end_the_engine_for_others() -> None:
    async def check() -> None:
        async with running() as engine:
            other = await adopted()
            await engine.update_about(text="x" * (2 * supervisor.LINE_LIMIT_BYTES))  # more than it accepts
            report = await engine.wait()
            assert (report.code, report.why) == (None, "")
            assert "the connection to the supervisor" in report.tail[0]
            assert other.is_running()
            assert (await other.status())["clients"] == 0
            assert psutil.pid_exists(engine.pid)
            await other.stop()

    run(check())
