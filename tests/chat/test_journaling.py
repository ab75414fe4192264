"""Answers on their way into the journal: what is written, and when the file cannot be used for a while."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat import journaling
from sollol_nb.chat.journal import CANCELLED, DONE, INTERRUPTED, RUNNING, Journal, JournaledAnswer, new_id
from sollol_nb.chat.journaling import JournalEntry, JournalWriter
from sollol_nb.runtime import sqlite_file
from tests.support.engines import HANG_GUARD_S, eventually


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "answers.sqlite")


@pytest.fixture
def writer(journal: Journal) -> JournalWriter:
    return JournalWriter(journal)


def begun(writer: JournalWriter, first: Callable[[], dict[str, Any]] | None = None) -> JournalEntry:
    """An answer of which one word is written."""
    about = {"owner": "a", "conversation": "", "model": "demo", "question": "Why?", "started_at": time.time()}
    entry = JournalEntry(new_id(), new_id(), {"messages": [], "options": {}}, first or (lambda: about))
    writer.follow(entry)
    entry.add({"message": {"content": "one"}})
    writer.wait_written(HANG_GUARD_S)
    return entry


def row(journal: Journal, entry: JournalEntry) -> JournaledAnswer:
    found = journal.get(entry.id)
    assert found is not None
    return found


def test_a_new_answer_is_written_at_once(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journaling, "INTERVAL_S", 3600.0)
    for _ in range(2):  # also one that comes while another streams
        about = {"owner": "a", "conversation": "", "model": "demo", "question": "Why?", "started_at": time.time()}
        entry = JournalEntry(new_id(), new_id(), {"messages": [], "options": {}}, lambda about=about: about)
        writer.follow(entry)
        eventually(lambda entry=entry: journal.path.exists() and journal.get(entry.id), "it is written")
        assert row(journal, entry).request is not None


def test_the_end_of_an_answer_is_written_when_the_file_is_free_again(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = begun(writer)
    entry.written_at -= 3600  # the file was locked for long before the end
    with sqlite3.connect(journal.path) as other, monkeypatch.context() as patched:
        other.execute("BEGIN IMMEDIATE")
        patched.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.05)  # the writer gives up while it is locked
        entry.add({"message": {"content": " two"}})
        entry.finish(DONE)
        writer.wait_written(HANG_GUARD_S)
        other.rollback()
    writer.wait_written(HANG_GUARD_S)
    assert (row(journal, entry).status, row(journal, entry).text) == (DONE, "one two")


def test_calls_that_come_before_the_last_chunk_are_kept(journal: Journal, writer: JournalWriter) -> None:
    entry, call = begun(writer), {"function": {"name": "clock", "arguments": {}}}
    entry.add({"message": {"content": "", "tool_calls": [call]}})
    entry.add({"message": {"content": ""}, "done": True})
    entry.finish(DONE)
    writer.wait_written(HANG_GUARD_S)
    state = row(journal, entry).state
    assert state is not None
    assert state["message"]["tool_calls"] == [call]


def test_an_end_is_written_though_the_writer_looks_while_it_is_noted(
    journal: Journal, writer: JournalWriter
) -> None:
    entry = begun(writer)

    def state() -> dict[str, Any]:
        writer.wait_written(HANG_GUARD_S)
        return {"kind": "raw"}

    entry.state = state
    entry.finish(CANCELLED)
    writer.wait_written(HANG_GUARD_S)
    assert row(journal, entry).status == CANCELLED


def test_an_answer_that_goes_on_after_its_end_is_no_other_process_s(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journaling, "_writer", writer)
    entry = begun(writer)
    entry.finish(INTERRUPTED, "another engine begins it differently")
    writer.wait_written(HANG_GUARD_S)
    assert row(journal, entry).status == INTERRUPTED
    entry.go_on_as_text()
    writer.wait_written(HANG_GUARD_S)
    assert (row(journal, entry).status, row(journal, entry).text) == (RUNNING, "one")
    entry.finish(DONE)
    writer.wait_written(HANG_GUARD_S)


def test_an_answer_with_a_name_that_is_no_text_does_not_hold_up_the_others(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journaling, "_writer", writer)
    monkeypatch.setattr(journaling, "_owner", lambda: "/nb/caf\udce9.ipynb")  # its path is not in UTF-8
    entry = journaling.begin("m\udce9.gguf", "Why?", {}, conversation="c\udce9", own_name=lambda: "")
    other = begun(writer)
    assert row(journal, entry).owner == "/nb/caf?.ipynb"
    assert row(journal, other).text == "one"
    entry.finish(DONE)
    other.finish(DONE)
    writer.wait_written(HANG_GUARD_S)


def test_an_end_that_can_never_be_written_is_given_up(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = begun(writer)
    monkeypatch.setattr(journal, "_path", journal.path.parent / "none" / "answers.sqlite")
    entry.finish(DONE)
    writer.wait_written(HANG_GUARD_S)
    assert writer._entries
    monkeypatch.setattr(journaling, "KEEP_TRYING_S", 0.0)
    writer.wait_written(HANG_GUARD_S)
    assert not writer._entries


def test_one_answer_that_cannot_be_written_does_not_hold_up_the_others(
    journal: Journal, writer: JournalWriter
) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("no name")

    nameless = begun(writer, fail)
    nameless.add({"message": {"content": " two"}})
    entry = begun(writer)
    assert row(journal, entry).text == "one"
