"""The log of an engine that runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.processes import engine_logs, registry


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "demo.log"
    entry = SimpleNamespace(name="demo", id="c1", started_at=0.0, log_path=str(path))
    monkeypatch.setattr(registry, "entries", lambda: [entry])
    return path


def test_the_last_lines_that_contain_a_text(log: Path) -> None:
    log.write_text("Loading a\nready\nloading b\nloading c\n")
    assert engine_logs.engine_log("demo", last=2, grep="LOADING") == f"{log}\nloading b\nloading c"


def test_a_log_that_was_deleted_is_told_in_one_line(log: Path) -> None:
    with pytest.raises(ConfigError, match=r"the log of demo cannot be read: .*demo\.log \(No such file"):
        engine_logs.engine_log("demo")
