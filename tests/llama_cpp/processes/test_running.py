"""Running engines of all kernels: `sollol-nb ps`, `sollol-nb stop`, their logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sollol_nb.cli import main as cli
from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.running import engine_log
from sollol_nb.settings import config
from tests.support.engines import run


async def start(kind: str, **about: object) -> EngineProcess:
    return await EngineProcess.start(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        kind=kind,
        about=about,
        keep_alive_s=60,
        log_path=config.log_dir() / f"{kind}.log",
    )


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EngineProcess]]:
    """A coordinator that is in use, and an idle worker."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    worker = run(start("worker", endpoint="127.0.0.1:50052"))
    coordinator = run(start("coordinator", model="big", url="http://127.0.0.1:1", workers=["127.0.0.1:50052"]))
    assert run(coordinator.hold())
    yield [coordinator, worker]
    for process in (coordinator, worker):
        run(process.stop())


def test_ps_lists_what_runs_as_a_table_and_as_json(
    running: list[EngineProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator, worker = running
    assert cli.main(["ps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["KIND", "NAME", "PID", "STATE", "AGE", "WHERE"]
    assert lines[1].split()[:5] == ["coordinator", "big", str(coordinator.pid), "in", "use"]
    assert lines[1].endswith("http://127.0.0.1:1 on 127.0.0.1:50052")
    assert lines[2].split()[:6] == ["worker", "127.0.0.1:50052", str(worker.pid), "held", "by", "the"]

    assert cli.main(["ps", "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)
    assert [(engine["kind"], engine["leases"]) for engine in engines] == [("coordinator", 1), ("worker", 0)]
    assert engines[0]["state"] == "in use"


def test_stop_ends_unused_engines_and_says_what_it_left_running(
    running: list[EngineProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator, worker = running
    assert cli.main(["stop"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"stopped worker 127.0.0.1:50052 (pid {worker.pid})",
        f"left running: coordinator big (pid {coordinator.pid}), in use; use --all to stop it too",
    ]
    assert run(worker.wait()).why == "stopped by the user"
    assert coordinator.is_running()


@pytest.mark.parametrize("arguments", [["--all"], ["big", "127.0.0.1:50052"]])
def test_stop_ends_all_or_those_named_also_in_use(
    running: list[EngineProcess], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(["stop", *arguments]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["stopped", "coordinator", "big"],
        ["stopped", "worker", "127.0.0.1:50052"],
    ]
    assert cli.main(["ps"]) == 0
    assert capsys.readouterr().out == "nothing is running\n"


def test_stop_of_an_unknown_name_is_one_error_line(
    running: list[EngineProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stop", "bog"]) == 1
    assert "nothing named 'bog' is running (running: 127.0.0.1:50052, big)" in capsys.readouterr().err


# --- logs -------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "demo.log"
    entry = SimpleNamespace(name="demo", id="c1", started_at=0.0, standby_of="", log_path=str(path))
    monkeypatch.setattr(registry, "entries", lambda: [entry])
    return path


def test_the_last_lines_that_contain_a_text(log: Path) -> None:
    log.write_text("Loading a\nready\nloading b\nloading c\n")
    assert engine_log("demo", last=2, grep="LOADING") == f"{log}\nloading b\nloading c"


def test_a_deleted_log_is_one_error_line(log: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the log of demo: .*demo\.log \(No such file"):
        engine_log("demo")
