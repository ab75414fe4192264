"""Answers on their way into the journal: what is written, and when the file cannot be used for a while."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat import journaling
from sollol_nb.chat.journal import DONE, Journal, new_id
from sollol_nb.chat.journaling import JournalEntry, JournalWriter
from sollol_nb.runtime import sqlite_file


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "answers.sqlite")


@pytest.fixture
def writer(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> JournalWriter:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.05)
    return JournalWriter(journal)


def begun(writer: JournalWriter, first: Callable[[], dict[str, Any]] | None = None) -> JournalEntry:
    """An answer of which one word is written."""
    about = {"owner": "a", "conversation": "", "model": "demo", "question": "Why?", "started_at": time.time()}
    entry = JournalEntry(new_id(), new_id(), {"messages": [], "options": {}}, first or (lambda: about))
    writer.follow(entry)
    entry.add({"message": {"content": "one"}})
    writer.wait_written()
    return entry


def test_the_end_of_an_answer_is_written_when_the_file_is_free_again(
    journal: Journal, writer: JournalWriter
) -> None:
    entry = begun(writer)
    with sqlite3.connect(journal.path) as other:
        other.execute("BEGIN IMMEDIATE")
        entry.add({"message": {"content": " two"}})
        entry.finish(DONE)
        writer.wait_written()
        other.rollback()
    writer.wait_written()
    found = journal.get(entry.id)
    assert found is not None
    assert (found.status, found.text) == (DONE, "one two")


def test_an_end_that_can_never_be_written_is_given_up(
    journal: Journal, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = begun(writer)
    monkeypatch.setattr(journal, "_path", journal.path.parent / "none" / "answers.sqlite")
    entry.finish(DONE)
    writer.wait_written()
    assert writer._entries
    monkeypatch.setattr(journaling, "KEEP_TRYING_S", 0.0)
    writer.wait_written()
    assert not writer._entries


def test_one_answer_that_cannot_be_written_does_not_hold_up_the_others(
    journal: Journal, writer: JournalWriter
) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("no name")

    nameless = begun(writer, fail)
    nameless.add({"message": {"content": " two"}})
    entry = begun(writer)
    found = journal.get(entry.id)
    assert found is not None
    assert found.text == "one"
