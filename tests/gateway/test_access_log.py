"""The log of requests: one bounded line for each, in a private file that does not grow without end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sollol_nb.gateway import access_log
from sollol_nb.gateway.access_log import LONGEST_TEXT, AccessLog
from sollol_nb.gateway.answers import AnswerRecord
from sollol_nb.gateway.gateway import FinishedRequest


def request(path: str = "/api/chat", answer: AnswerRecord | None = None) -> FinishedRequest:
    return FinishedRequest(
        request_id="req_1",
        method="POST",
        path=path,
        status=200,
        duration_s=0.12345,
        key="ada",
        client="127.0.0.1",
        error_kind="",
        answer=answer,
    )


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_from_clients_is_one_bounded_line(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    log.note(request("/a\n{}\x1b[2J\ud800" + "p" * 1000, AnswerRecord("ollama", "m" * 1000)))
    log.write()
    (entry,) = entries(tmp_path / "log")
    assert str(entry["path"]).startswith("/a\n{}\x1b[2J\ud800")
    assert len(str(entry["path"])) == len(str(entry["model"])) == LONGEST_TEXT
    assert "\x1b" not in (tmp_path / "log").read_text()


def test_a_full_file_becomes_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "LIMIT_BYTES", 100)
    log = AccessLog(str(tmp_path / "log"))
    for number in range(4):
        log.note(request(f"/{number}"))
        log.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert [entry["path"] for entry in entries(tmp_path / "log")] == ["/3"]
    assert [entry["path"] for entry in entries(tmp_path / "log.1")] == ["/2"]


def test_a_log_that_cannot_be_written_loses_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "MAX_PENDING", 2)
    log = AccessLog(str(tmp_path / "log"))
    for _ in range(5):
        log.note(request())
    log.write()
    assert entries(tmp_path / "log")[-1] == {"lost_lines": 3}
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    log.note(request())
    log.write()
    assert "cannot write the log of requests" in caplog.text


def test_the_log_can_be_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    log = AccessLog(os.devnull)
    log.note(request())
    log.write()
    on_stderr = AccessLog("-")
    on_stderr.note(request("/shown"))
    on_stderr.write()
    assert [json.loads(line)["path"] for line in capsys.readouterr().err.splitlines()] == ["/shown"]
