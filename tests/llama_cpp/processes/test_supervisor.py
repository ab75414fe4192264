"""The supervisor: owns one engine, serves every client that has its key, and leaves nothing behind.

Here it is started directly, as its protocol says; `test_process.py` is about its handle.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.llama_cpp.processes import supervisor
from tests.support.engines import eventually, posix_only, script
from tests.support.supervised import (
    IGNORES,
    KEY,
    MINUTES,
    nothing_is_left,
    supervised,
    with_code,
    with_constants,
)


def report_of(folder: Path, code: str, **more: Any) -> dict[str, Any]:
    """The report on an engine that ends by itself."""
    with supervised(folder, code, **more) as owner:
        return owner.connect().exited()


# --- reports and files -----------------------------------------------------------------------


def test_parent_and_registry_get_the_same_facts(folder: Path) -> None:
    with supervised(folder, about={"endpoint": "127.0.0.1:50052"}, keep_alive_s=7.5) as owner:
        entry = owner.entry()
        hello = owner.connect().hello

    assert owner.engine is not None
    assert owner.started == {"event": "started", "pid": owner.engine.pid, "control_port": owner.control_port}
    assert hello == {"event": "hello", "id": "worker-1", "pid": owner.engine.pid}
    assert abs(entry.pop("pid_started") - owner.engine.create_time()) < 1
    assert entry.pop("supervisor_started") <= entry.pop("started_at")
    assert entry == {
        "id": "worker-1",
        "kind": "worker",
        "pid": owner.engine.pid,
        "supervisor_pid": owner.process.pid,
        "control_port": owner.control_port,
        "key_path": str(folder / "worker-1.key"),
        "log_path": str(folder / "worker-1.log"),
        "keep_alive_s": 7.5,
        "about": {"endpoint": "127.0.0.1:50052"},
    }


@posix_only
def test_entry_and_log_are_readable_by_their_owner_only(folder: Path) -> None:
    with supervised(folder, f"print('a prompt', flush=True); {MINUTES}") as owner:
        owner.line("a prompt")
        for path in (owner.spec["entry_path"], owner.log_path):
            assert Path(path).stat().st_mode & 0o777 == 0o600


def test_it_listens_on_loopback_only_and_is_small(folder: Path) -> None:
    with supervised(folder) as owner:
        process = psutil.Process(owner.process.pid)
        listening = [sock.laddr for sock in process.net_connections() if sock.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.1", owner.control_port)]
        assert process.memory_info().rss < 20 * 1024**2


def test_secrets_are_in_no_argument_and_in_no_environment_except_the_engines(folder: Path) -> None:
    code = f"import os; print('got', len(os.environ['API_KEY']), flush=True); {MINUTES}"
    with supervised(folder, code, env={**os.environ, "API_KEY": KEY}) as owner:
        assert owner.line("got ") == f"got {len(KEY)}"
        assert owner.engine is not None
        family = [psutil.Process(owner.process.pid), *psutil.Process(owner.process.pid).children(recursive=True)]
        assert owner.engine in family
        for process in family:
            assert KEY not in " ".join(process.cmdline())
        for process in set(family) - {owner.engine}:
            assert KEY not in " ".join(process.environ().values())
        assert KEY not in json.dumps(owner.entry())
        assert KEY not in owner.log_path.read_text("utf-8")


# --- the engine's end and its log -------------------------------------------------------------


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
def test_exit_code_or_signal_is_reported_and_logged(code: str, exit_code: int, folder: Path) -> None:
    with supervised(folder, code) as owner:
        assert owner.connect().exited() == {"code": exit_code, "tail": [], "why": ""}
        owner.all_gone()
    assert owner.log_path.read_text("utf-8") == f"[the engine ended: exit code {exit_code}]\n"


def test_last_lines_of_both_streams_are_reported(folder: Path) -> None:
    code = "import os\nfor i in range(100): os.write(1 + i % 2, b'line %d\\n' % i)"
    lines = [f"line {i}" for i in range(100)]
    with supervised(folder, code) as owner:
        assert owner.connect().exited()["tail"] == lines[-supervisor.TAIL_LINES :]
    assert owner.log_path.read_text("utf-8").splitlines()[:-1] == lines


def test_log_ends_at_its_size_limit_but_the_engine_and_the_tail_continue(folder: Path) -> None:
    with supervised(folder, "for i in range(100000): print('line', i)", log_limit_bytes=2000) as owner:
        report = owner.connect().exited()
    assert (report["code"], report["tail"][-1]) == (0, "line 99999")
    assert owner.log_path.stat().st_size < 2000 + 200
    assert owner.log_path.read_text("utf-8").splitlines()[-2:] == [
        "[the log ends here: it reached its size limit]",
        "[the engine ended: exit code 0]",
    ]


@pytest.mark.parametrize(
    "log_path",
    [
        pytest.param(
            "/dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
        ),
        str(Path(__file__).parent / "no such folder" / "engine.log"),
    ],
    ids=["full disk", "no folder"],
)
def test_log_that_cannot_be_written_does_not_stop_the_engine(log_path: str, folder: Path) -> None:
    report = report_of(folder, "for i in range(100000): print('line', i)", log_path=log_path)
    assert report == {"code": 0, "tail": [f"line {i}" for i in range(99960, 100000)], "why": ""}


@pytest.mark.parametrize(
    "text", ["'x' * 1_000_000", "'\\x00' * 100_000", "'\U0001f600' * 100_000", "'a' * 100_000 + '\\n'"]
)
def test_very_long_lines_do_not_lose_the_exit_report(text: str, folder: Path) -> None:
    code = f"import sys; sys.stdout.buffer.write((({text}) + chr(10)).encode() * 50); raise SystemExit(7)"
    report = report_of(folder, code)
    assert (report["code"], len(report["tail"])) == (7, supervisor.TAIL_LINES)


def test_output_that_is_not_utf8_is_kept_unchanged(folder: Path) -> None:
    with supervised(folder, "import sys; sys.stdout.buffer.write(b'caf\\xe9\\n')") as owner:
        assert owner.connect().exited()["tail"] == ["caf\ufffd"]
    assert owner.log_path.read_bytes().startswith(b"caf\xe9\n[the engine ended")


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


@pytest.mark.parametrize(
    ("debug_until", "dropped"),
    [("listening on", (3, 4, 7)), ("a warning", (7,)), ("never logged", ()), (None, ())],
)
def test_debug_lines_after_the_marker_are_dropped_and_an_abort_is_kept(
    debug_until: str | None, dropped: tuple[int, ...], folder: Path
) -> None:
    kept = [line for number, line in enumerate(LOG.splitlines()) if number not in dropped]
    with supervised(folder, f"print({LOG!r}, end='')", debug_until=debug_until) as owner:
        assert owner.connect().exited()["tail"] == kept
    assert owner.log_path.read_text("utf-8").splitlines()[:-1] == kept


def test_engine_reads_nothing_and_has_the_given_environment(folder: Path) -> None:
    code = "import os, sys; print(repr(sys.stdin.read()), os.environ)"
    with supervised(folder, code, env={"ONLY": "this"}) as owner:
        (line,) = owner.connect().exited()["tail"]
    assert line.startswith("'' environ({'ONLY': 'this'")


# --- how long it lives ------------------------------------------------------------------------


def test_engine_without_a_lease_ends_after_keep_alive_and_not_before(folder: Path) -> None:
    with supervised(folder, program=with_constants(folder, MIN_IDLE_S=0.05), keep_alive_s=600) as owner:
        holder, watcher = owner.connect(), owner.connect()
        assert holder.ask("hold")["ok"]
        holder.ask("keep_alive", seconds=0)
        assert watcher.ask("status")["ends_in_s"] is None
        assert owner.is_running()
        holder.ask("free")
        assert watcher.exited()["why"] == "idle"
        owner.all_gone()


def test_keep_alive_counts_from_the_last_lease_and_not_from_a_status_request(folder: Path) -> None:
    with supervised(folder) as owner:
        first = owner.connect()
        first.ask("hold")
        first.ask("free")
        idle_s = []
        for _ in range(3):
            watcher = owner.connect()
            idle_s.append(watcher.ask("status")["idle_s"])
            watcher.close()
        eventually(lambda: first.ask("status")["clients"] == 0, "all watchers have left")
        idle_s.append(first.ask("status")["idle_s"])
        assert idle_s == sorted(idle_s), "it only grows"
        held_at = time.monotonic()
        first.ask("hold")
        first.ask("free")
        status = first.ask("status")
        since_lease_s = time.monotonic() - held_at
        assert status["idle_s"] <= since_lease_s, "a lease restarts it"
        assert status["ends_in_s"] >= 600 - since_lease_s


def test_with_a_keep_alive_of_0_one_request_can_follow_another(folder: Path) -> None:
    with supervised(folder, program=with_constants(folder, MIN_IDLE_S=30.0), keep_alive_s=0.0) as owner:
        control = owner.connect()
        for _ in range(3):
            assert control.ask("hold") == {"ok": True}
            assert control.ask("free") == {"ok": True}
            assert 0 < control.ask("status")["ends_in_s"] <= 30
    assert supervisor.MIN_IDLE_S > 0


def test_an_engine_that_connects_before_its_starter_is_not_taken_for_it(folder: Path) -> None:
    program = with_constants(folder, MIN_IDLE_S=0.05, FIRST_CLIENT_S=500.0)
    with supervised(folder, program=program, keep_alive_s=0.0) as owner:
        link = owner.connect(pid=owner.started["pid"])
        assert link.ask("status")["ends_in_s"] > 100
        owner.connect()
        assert link.exited()["why"] == "idle"


@posix_only
def test_lease_of_a_killed_process_ends(folder: Path) -> None:
    text = """
import sys
from tests.support.supervised import Control
control = Control(int(sys.argv[1]))
print("held", control.ask("hold")["ok"], flush=True)
sys.stdin.readline()
"""
    with supervised(folder) as owner:
        watcher = owner.connect()
        with script(text, str(owner.control_port)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held True\n"
            assert watcher.ask("status")["leases"] == 1
            process.send_signal(signal.SIGKILL)
            process.wait()
            eventually(lambda: watcher.ask("status")["leases"] == 0, "its lease has ended")


@pytest.mark.parametrize("code", [MINUTES, "pass"], ids=["running engine", "ended engine"])
def test_a_starter_that_never_connects_is_not_waited_for_forever(code: str, folder: Path) -> None:
    limits = {"FIRST_CLIENT_S": 0.5, "GREETING_LIMIT_S": 0.2} if code == MINUTES else {"GREETING_LIMIT_S": 0.5}
    with supervised(folder, code, program=with_constants(folder, **limits), keep_alive_s=0.0) as owner:
        owner.all_gone()


# --- how it ends ------------------------------------------------------------------------------

STARTS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {child!r}])
print("child", child.pid, flush=True)
{then}
"""


@posix_only
@pytest.mark.parametrize("child", [MINUTES, IGNORES + MINUTES], ids=["obeys", "ignores the request"])
@pytest.mark.parametrize("ending", ["stopped", "by itself", "supervisor killed", "supervisor terminated"])
def test_processes_that_the_engine_started_end_with_it(ending: str, child: str, folder: Path) -> None:
    may_end = folder / "may end"
    then = f"import os\nwhile not os.path.exists({str(may_end)!r}): time.sleep(0.01)"
    with supervised(folder, STARTS_A_CHILD.format(child=child, then=then)) as owner:
        started = psutil.Process(int(owner.line("child ").split()[1]))
        control = owner.connect()
        match ending:
            case "stopped":
                control.ask("stop")
            case "by itself":
                may_end.touch()
            case "supervisor killed":
                owner.process.kill()
            case "supervisor terminated":
                owner.process.terminate()
        owner.all_gone()
        eventually(lambda: not started.is_running() or started.status() == "zombie", "the child has ended")
        report = control.line()
    if ending == "supervisor killed":
        assert report is None
    else:
        assert report is not None
        whys = {"stopped": "stopped", "by itself": "", "supervisor terminated": "its supervisor was terminated"}
        assert report["why"] == whys[ending]


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_end_signals_work_from_the_first_moment(number: signal.Signals, folder: Path) -> None:
    with supervised(folder, IGNORES + MINUTES, program=with_constants(folder, STOP_GRACE_S=0.1)) as owner:
        owner.process.send_signal(number)
        owner.all_gone()
    assert owner.process.returncode == 0


@posix_only
def test_killed_supervisor_with_a_killed_starter_leaves_nothing(folder: Path) -> None:
    text = """
import sys, time
from pathlib import Path
from tests.support.supervised import IGNORES, MINUTES, supervised
with supervised(Path(sys.argv[1]), IGNORES + MINUTES) as owner:
    print(owner.process.pid, flush=True)
    time.sleep(600)
"""
    with script(text, str(folder), SOLLOL_STATE_DIR=str(folder)) as starter:
        assert starter.stdout is not None
        owner = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
        owner.kill()
    nothing_is_left(folder)
    eventually(lambda: not list(folder.glob("*.json*")) and not list(folder.glob("*.key")), "no file is left")


@posix_only
def test_supervisor_killed_just_after_it_started_its_engine_leaves_nothing(folder: Path) -> None:
    dies_immediately = """
start = subprocess.Popen
subprocess.Popen = lambda *args, **options: (start(*args, **options), os.kill(os.getpid(), signal.SIGKILL))
"""
    program = with_code(with_constants(folder), "if __name__", dies_immediately)
    with supervised(folder, IGNORES + MINUTES, program=program) as owner:
        assert owner.process.wait() == -signal.SIGKILL
        nothing_is_left(folder)
        eventually(lambda: not owner.files, "its files are gone")


def test_held_engines_live_as_long_as_their_holder_and_no_longer(folder: Path) -> None:
    with supervised(folder, program=with_constants(folder, MIN_IDLE_S=0.05)) as worker:
        holds = [{"port": worker.control_port, "key": KEY}, {"port": 9, "key": "of an ended engine"}]
        kernel = worker.connect()
        kernel.ask("hold")
        kernel.ask("keep_alive", seconds=0)
        with supervised(folder, name="coordinator-1", holds=holds) as coordinator:
            eventually(lambda: kernel.ask("status")["leases"] == 2, "it is held twice")
            kernel.close()  # the kernel has died; only the coordinator's supervisor is left
            watcher = worker.connect()
            assert watcher.ask("status")["leases"] == 1
            last = coordinator.connect()
            last.ask("stop")
            last.exited()
            assert watcher.exited()["why"] == "idle"
        worker.all_gone()


def test_held_engines_are_released_before_the_end_is_reported(folder: Path) -> None:
    with supervised(folder) as worker:
        kernel = worker.connect()
        holds = [{"port": worker.control_port, "key": KEY}]
        done = "    _send_to_guard(guard, GUARD_DONE)\n    del"
        lingers = with_code(with_constants(folder), done, "    time.sleep(600)")
        with supervised(folder, name="coordinator-1", holds=holds, program=lingers) as coordinator:
            eventually(lambda: kernel.ask("status")["clients"] == 1, "it is held")
            last = coordinator.connect()
            last.ask("stop")
            assert last.line() is not None
            assert kernel.ask("stop", unless="shared") == {"ok": True}, "no other client is connected now"
            kernel.exited()
