"""Conversations that are kept for the next kernel of a notebook: private, bounded, and forgotten on demand."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from sollol_nb.chat import kept as kept_module
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ChatBook
from sollol_nb.chat.kept import KeptChats
from sollol_nb.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chats.sqlite"


def book(file: Path, notebook: str = "/nb/a.ipynb") -> ChatBook:
    """The conversations of a new kernel of a notebook."""
    return ChatBook(lambda: KeptChats(notebook, file))


def talk(chats: ChatBook, name: str, answer: str, question: str = "Hi") -> None:
    completion = Completion(model="demo", message={"role": "assistant", "content": answer}, done_reason="stop")
    chats.open(name).add({"role": "user", "content": question}, completion)
    chats.flush()


def test_the_next_kernel_of_a_notebook_has_its_conversations(file: Path) -> None:
    first = book(file)
    talk(first, "talk", "one")
    first["talk"].system = "Be brief."
    talk(first, "talk", "two")
    talk(first, "other", "three")
    second = book(file)
    assert [*second] == ["talk", "other"]
    assert second["talk"].to_messages() == first["talk"].to_messages()
    assert second["talk"].title == first["talk"].title
    talk(second, "talk", "four")
    assert [entry.text for entry in book(file)["talk"].history][-1] == "four"


def test_other_notebooks_do_not_have_them(file: Path) -> None:
    talk(book(file), "talk", "one")
    assert [*book(file, "/nb/b.ipynb")] == []


def test_only_their_owner_can_read_them(file: Path) -> None:
    talk(book(file), "talk", "one")
    assert [stat.S_IMODE(each.stat().st_mode) for each in file.parent.iterdir()] == [0o600]


def test_a_conversation_from_an_earlier_kernel_is_announced_once(file: Path) -> None:
    talk(book(file), "talk", "one")
    chats = book(file)
    restored = chats.restored("talk")
    assert restored is chats["talk"]
    assert chats.restored("talk") is None
    assert chats.restored("other") is None


def test_what_is_forgotten_is_gone_from_the_file_too(file: Path) -> None:
    chats = book(file)
    for name in ("a", "b", "c"):
        talk(chats, name, f"secret of {name}")
    forgotten = chats["a"]
    chats.remove("a")
    forgotten.clear()  # an answer that is under way must not bring it back
    chats.flush()
    assert [*book(file)] == ["b", "c"]
    assert chats.forget() == ["b", "c"]
    assert [*chats] == [*book(file)] == []
    assert b"secret of" not in file.read_bytes()


def test_a_conversation_that_starts_over_is_kept_anew(file: Path) -> None:
    chats = book(file)
    talk(chats, "talk", "one")
    chats = book(file)
    chats.add(Chat("talk"), replace=True)
    assert chats.restored("talk") is None
    talk(chats, "talk", "two")
    assert [entry.text for entry in book(file)["talk"].history] == ["Hi", "two"]


def test_of_a_conversation_that_is_too_long_the_oldest_messages_are_not_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_module, "LIMIT_BYTES", 1000)
    chats = book(file)
    for number in range(20):
        talk(chats, "talk", f"answer {number}", f"question {number}")
    history = book(file)["talk"].history
    assert history[0].role == "user"
    assert [entry.text for entry in history[-2:]] == ["question 19", "answer 19"]
    assert 0 < len(history) < 20
    assert len(chats["talk"].history) == 40
    assert [record.getMessage() for record in caplog.records] == [
        "conversation talk is too long to be kept whole; its oldest messages are not kept"
    ]


def test_old_conversations_make_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = book(file)
    talk(chats, "old", "one")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE chats SET used_at = 1")
    talk(chats, "a", "x" * 1000)
    assert [*book(file)] == ["a"]
    monkeypatch.setattr(kept_module, "KEEP_BYTES", 3000)
    for name in ("b", "c", "d"):
        talk(chats, name, "x" * 1000)
    assert [*book(file)] == ["c", "d"]


def test_a_damaged_conversation_hides_no_other(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = book(file)
    for name in ("a", "b", "c"):
        talk(chats, name, "one")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE chats SET chat = 'x' WHERE name = 'a'")
        connection.execute("""UPDATE chats SET chat = '{"system": "", "said": [3]}' WHERE name = 'b'""")
    assert [*book(file)] == ["c"]
    assert [record.getMessage()[:32] for record in caplog.records] == [
        "the kept conversation a is damag",
        "the kept conversation b is damag",
    ]


def test_a_file_that_cannot_be_used_costs_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = book(tmp_path / "no such folder" / "chats.sqlite")
    talk(chats, "talk", "one")
    talk(chats, "talk", "two")
    assert chats["talk"].turn_count == 2
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "cannot read the conversations of earlier kernels ("
    ]


def test_a_file_that_is_locked_for_a_while_gets_the_newest_state_in_one_write(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = book(file)
    talk(chats, "talk", "0")
    written: list[str] = []
    as_dict = Chat.as_dict
    monkeypatch.setattr(Chat, "as_dict", lambda chat: written.append(chat.name) or as_dict(chat))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(1, 50):
        completion = Completion(model="demo", message={"role": "assistant", "content": str(number)})
        chats["talk"].add({"role": "user", "content": "Hi"}, completion)
    other.execute("COMMIT")
    other.close()
    chats.flush()
    assert [entry.text for entry in book(file)["talk"].history][1::2] == [str(number) for number in range(50)]
    assert len(written) <= 2  # the first may have begun before the last change


def test_a_damaged_file_is_named_with_the_way_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_bytes(b"no database " * 1000)
    chats = book(file)
    talk(chats, "talk", "one")
    assert f"({file}): file is not a database" in caplog.text
    with pytest.raises(ConfigError, match=f"{file}: file is not a database; try again, or delete that file"):
        chats.forget()


def test_nothing_is_kept_while_that_is_switched_off_and_all_can_still_be_forgotten(file: Path) -> None:
    is_on = True

    def chats_of_kernel() -> ChatBook:
        return ChatBook(lambda: KeptChats("/nb/a.ipynb", file, is_on=lambda: is_on))

    first = chats_of_kernel()
    talk(first, "talk", "one")
    is_on = False
    talk(first, "talk", "secret")
    assert [entry.text for entry in book(file)["talk"].history] == ["Hi", "one"]
    second = chats_of_kernel()
    talk(second, "other", "secret")
    assert [*second] == ["other"]
    assert second.forget() == ["other", "talk"]
    assert [*book(file)] == []
