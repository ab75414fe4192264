"""The journal of answers: it outlives its process, is private and bounded, and costs no answer."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat import journal as journal_module
from sollol_nb.chat import journal_state
from sollol_nb.chat.journal import (
    CANCELLED,
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    Journal,
    JournaledAnswer,
    Progress,
    new_id,
)
from sollol_nb.chat.journal_state import merged_state, plain_json, read_parts, request_json, split_state
from sollol_nb.errors import ConfigError
from sollol_nb.runtime import sqlite_file
from tests.support.sqlite_builds import use_sqlite_that_does_not_erase

NOTEBOOK = "/nb/a.ipynb"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "answers.sqlite")


def progress(status: str, text: str = "", *, run: str = "run", id: str = "", **others: Any) -> Progress:
    return Progress(
        id=id or new_id(),
        run=run,
        status=status,
        error="",
        text=text,
        thinking=others.pop("thinking", ""),
        **others,
    )


def first(owner: str = NOTEBOOK, started_at: float | None = None) -> dict[str, Any]:
    at = time.time() if started_at is None else started_at
    return {"owner": owner, "conversation": "", "model": "demo", "question": "Why?", "started_at": at}


def add(journal: Journal, status: str = RUNNING, text: str = "one", **others: Any) -> str:
    """The id of a new answer."""
    each = progress(status, text, run=others.pop("run", new_id()), **{"first": first(), **others})
    journal.write([each])
    return each.id


def found(journal: Journal, answer_id: str) -> JournaledAnswer:
    answer = journal.get(answer_id)
    assert answer is not None
    return answer


def end_process_of(journal: Journal, answer_id: str) -> None:
    """Let an answer stream into a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET pid = ?, pid_started = 1 WHERE id = ?", [child.pid, answer_id])


def test_an_answer_is_listed_while_it_streams_and_afterwards(journal: Journal) -> None:
    answer_id = add(journal, run="a")
    assert [(each.id, each.status, each.text, each.is_own) for each in journal.newest()] == [
        (answer_id, RUNNING, "one", True)
    ]
    journal.write([progress(DONE, "one two", run="a", id=answer_id)])
    assert [(each.status, each.text) for each in journal.newest(NOTEBOOK)] == [(DONE, "one two")]
    assert journal.newest("/nb/b.ipynb") == []


def test_the_newest_come_first(journal: Journal) -> None:
    for number in range(5):
        add(journal, DONE, str(number), first=first(started_at=time.time() + number))
    assert [each.text for each in journal.newest(limit=3)] == ["4", "3", "2"]


def test_an_answer_of_a_process_that_has_ended_is_interrupted(journal: Journal) -> None:
    answer_id = add(journal)
    end_process_of(journal, answer_id)
    answer = found(journal, answer_id)
    assert (answer.status, answer.error, answer.text) == (INTERRUPTED, journal_module.PROCESS_ENDED, "one")
    assert not answer.is_own


def test_an_answer_on_another_machine_is_interrupted_once_it_is_silent(journal: Journal) -> None:
    answer_id = add(journal, run="far")
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET host = 'elsewhere', pid = 1, updated_at = updated_at - 60")
    assert found(journal, answer_id).is_running
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET updated_at = updated_at - 100")
    journal.touch(["far"])
    assert found(journal, answer_id).is_running
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET updated_at = updated_at - 200")
    assert found(journal, answer_id).status == INTERRUPTED


def test_only_one_process_continues_an_answer(journal: Journal) -> None:
    answer_id = add(journal, run="first")
    assert journal.claim(answer_id) is None, "it streams"
    end_process_of(journal, answer_id)
    claimed = journal.claim(answer_id)
    assert claimed is not None
    answer, run = claimed
    assert (answer.status, answer.text) == (INTERRUPTED, "one")
    assert Journal(journal.path).claim(answer_id) is None, "another kernel has it"
    journal.write([progress(RUNNING, "stale", run="first", id=answer_id)])
    assert found(journal, answer_id).text == "one", "a process that was taken for dead writes no more"
    journal.write([progress(DONE, "one two", run=run, id=answer_id)])
    assert found(journal, answer_id).text == "one two"
    assert journal.claim(answer_id) is None, "it is done"


@pytest.mark.parametrize("status", [INTERRUPTED, CANCELLED, FAILED])
def test_whatever_ended_early_can_be_continued(journal: Journal, status: str) -> None:
    assert journal.claim(add(journal, status)) is not None


def test_what_ended_early_without_any_text_leaves_nothing(journal: Journal) -> None:
    add(journal, FAILED, "")
    answer_id = add(journal, RUNNING, "", run="a", request="{}")
    journal.write([progress(CANCELLED, "", run="a", id=answer_id)])
    kept = add(journal, INTERRUPTED, "")
    assert [each.id for each in journal.newest()] == [kept]


def test_the_request_is_written_once_and_the_state_again(journal: Journal) -> None:
    state = {"kind": "raw", "messages": ["long"], "options": {"seed": 1}, "prompt": None, "pieces": [["a", [1]]]}
    fixed, moving = split_state(state)
    assert set(moving) == {"kind", "pieces"}
    request = request_json({"messages": ["long"], "options": {"seed": 1}, "backend": "sharded"}, fixed)
    answer_id = add(journal, run="a", request=request, state=plain_json(moving))
    moving["pieces"].append(["b", [2]])
    journal.write([progress(RUNNING, "ab", run="a", id=answer_id, state=plain_json(moving))])
    answer = found(journal, answer_id)
    assert answer.state == {**state, "pieces": [["a", [1]], ["b", [2]]]}
    assert answer.request == {"messages": ["long"], "options": {"seed": 1}, "backend": "sharded"}
    assert request is not None
    assert request.count("long") == 1
    journal.write([progress(DONE, "ab", run="a", id=answer_id)])
    assert found(journal, answer_id).request is None, "nobody continues it"


def test_a_request_keeps_its_own_messages_and_options_where_the_engine_got_others() -> None:
    asked = {"messages": ["why"], "options": {"tool_choice": "auto"}}
    state = {"kind": "raw", "messages": ["of the Modelfile", "why"], "options": {}, "pieces": []}
    fixed, moving = split_state(state)
    assert read_parts(request_json(asked, fixed), plain_json(moving)) == (asked, state)


def test_the_two_parts_of_a_nested_state_give_it_again() -> None:
    inner = {"kind": "raw", "messages": ["b"], "prompt": "p", "written": "text"}
    state = {"kind": "fitting", "messages": ["a", "b"], "fitted": inner, "dropped": "1 turn"}
    assert merged_state(*split_state(state)) == state
    assert merged_state(*split_state({**state, "fitted": None})) == {**state, "fitted": None}


def test_what_is_too_long_or_no_plain_data_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_json({"messages": [object()]}, None) is None
    monkeypatch.setattr(journal_state, "LIMIT_BYTES", 10)
    assert request_json({"messages": ["x" * 20]}, None) is None


@pytest.mark.parametrize("damaged", ["", "[", "[]", '{"state": 3}', '{"state": {}}', "[" * 100_000])
def test_a_damaged_row_is_shown_and_has_nothing_to_continue(journal: Journal, damaged: str) -> None:
    answer_id = add(journal, INTERRUPTED, request='{"state": {}}', state='{"kind": "raw"}')
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET state = ?", [damaged])
        connection.execute("UPDATE requests SET request = ?", [damaged])
    answer = found(journal, answer_id)
    assert answer.text == "one"
    assert not answer.state or answer.state == {"state": {}} or answer.state == {"state": 3}


def test_only_their_owner_can_read_them(journal: Journal) -> None:
    add(journal)
    assert [stat.S_IMODE(each.stat().st_mode) for each in journal.path.parent.iterdir()] == [0o600]


def test_old_and_large_answers_go_and_running_ones_stay(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    old, running = add(journal, DONE), add(journal, RUNNING)
    with sqlite3.connect(journal.path) as connection:
        connection.execute("UPDATE answers SET updated_at = 1")
    newer = add(journal, DONE, "x" * 1000)
    assert {each.id for each in journal.newest()} == {running, newer}
    assert journal.get(old) is None
    monkeypatch.setattr(journal_module, "KEEP_BYTES", 2500)
    newest = [add(journal, DONE, "x" * 1000, request="{}") for _ in range(3)][-2:]
    assert {each.id for each in journal.newest()} == {running, *newest}


def file_of(journal: Journal) -> bytes:
    """The file with all that was written, also what is in the write-ahead log."""
    with sqlite3.connect(journal.path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return journal.path.read_bytes()


def test_what_is_forgotten_is_gone_from_the_file_too(journal: Journal) -> None:
    running = add(journal, RUNNING, "secret of one that streams", run="a")
    mine = [add(journal, INTERRUPTED, f"secret {n}", request='{"messages": "secret"}') for n in range(3)]
    other = add(journal, DONE, "other", first=first("/nb/b.ipynb"))
    assert journal.forget(mine[0]) == [mine[0]]
    assert journal.forget(running) == [], "it streams"
    assert sorted(journal.forget(owner=NOTEBOOK)) == sorted(mine[1:])
    assert [each.id for each in journal.newest()] == [other, running]
    journal.write([progress(DONE, "", run="a", id=running)])
    assert journal.forget() != []
    assert b"secret" not in file_of(journal)


def test_the_request_of_an_answer_that_is_done_is_gone_from_the_file_too(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sqlite_that_does_not_erase(monkeypatch)
    answer_id = add(journal, RUNNING, run="a", request='{"messages": "secret"}')
    journal.write([progress(DONE, "all", run="a", id=answer_id)])
    assert journal.forget() == [answer_id]
    assert b"secret" not in file_of(journal)


def test_an_answer_is_not_forgotten_while_another_kernel_begins_to_continue_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_id, settle = add(journal, INTERRUPTED), journal_module._settle

    def claimed_meanwhile(connection: sqlite3.Connection) -> None:
        monkeypatch.setattr(journal_module, "_settle", settle)
        with pytest.raises(ConfigError, match="locked"):
            Journal(journal.path).claim(answer_id)

    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(journal_module, "_settle", claimed_meanwhile)
    assert journal.forget(answer_id) == [answer_id]


def test_a_file_of_a_newer_version_is_used(journal: Journal) -> None:
    add(journal)
    with sqlite3.connect(journal.path) as connection:
        connection.execute("ALTER TABLE answers ADD COLUMN added_later TEXT")
        connection.execute("PRAGMA user_version = 2")
    assert found(journal, add(journal, DONE, "two")).text == "two"


@pytest.mark.parametrize("use", [Journal.forget, Journal.newest, lambda journal: journal.claim("0" * 16)])
def test_a_file_that_cannot_be_used_is_named(journal: Journal, use: Callable[[Journal], object]) -> None:
    add(journal, DONE)
    journal.path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"answers\.sqlite.* delete that file"):
        use(journal)
