"""The folder of saved contexts: what is kept, found, deleted, and not believed."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.contexts import store as store_module
from sollol_nb.llama_cpp.contexts.store import UNFINISHED_S, ContextStore, SavedContext


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path / "contexts", 1000)


def saved(store: ContextStore, text: str, size: int = 100, *, age_s: float = 0.0) -> SavedContext:
    """A context as a keeper saves it, last used so many seconds ago."""
    part = store.begin(size)
    assert part is not None
    part.write_bytes(text[:1].encode() * size)
    context = store.keep(
        part, SavedContext(id="", model="m", title="t", made_of={"engine": "1"}, text=text, tokens=9, size=size)
    )
    assert context is not None
    used = time.time() - age_s
    os.utime(store.folder / f"{context.id}.json", (used, used))
    return context


def test_a_context_is_found_by_another_kernel_and_its_files_are_private(store: ContextStore) -> None:
    context = saved(store, "hello \u00fc")
    (found,) = ContextStore(store.folder, 1000).list()

    assert (found.id, found.text, found.tokens, found.made_of) == (context.id, "hello \u00fc", 9, {"engine": "1"})
    assert store.is_whole(found) is True
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()} == {0o600}


def test_the_least_recently_used_are_deleted_where_the_folder_would_become_too_large(store: ContextStore) -> None:
    old, used, new = (saved(store, name, 300, age_s=age) for name, age in (("a", 300), ("b", 200), ("c", 100)))
    store.use(old)  # so that `used` is the least recently used
    added = saved(store, "d", 300)

    assert {context.id for context in store.list()} == {old.id, new.id, added.id}
    assert not (store.folder / used.file_name).exists()
    assert store.begin(1001) is None, "there is never room for as much"
    assert len(store.list()) == 3, "so nothing is deleted for it"


def test_saved_contexts_take_at_most_half_of_the_free_disk(
    store: ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(store, "a", 300)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))

    assert store.begin(201) is None
    assert store.begin(200) is not None
    assert store.list() == []


def test_an_incomplete_file_is_not_kept(store: ContextStore) -> None:
    part = store.begin(100)
    assert part is not None
    part.write_bytes(b"x" * 50)  # the disk was full
    context = SavedContext(id="", model="m", title="t", made_of={}, text="x", tokens=1, size=100)

    assert store.keep(part, context) is None
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_context_is_deleted(store: ContextStore, damage: str) -> None:
    context = saved(store, "hello")
    path = store.folder / context.file_name
    data = path.read_bytes()
    path.write_bytes(data[:50] if damage == "cut" else data[:-1] + b"!")

    assert [found.id for found in store.list()] == [context.id], "it is looked at before it is used"
    assert store.is_whole(context) is False
    assert store.list() == []


def test_a_context_that_another_kernel_has_deleted_is_gone_and_not_damaged(store: ContextStore) -> None:
    context = saved(store, "hello")
    ContextStore(store.folder, 1000).forget()

    assert store.is_whole(context) is None
    store.use(context)
    assert store.list() == []


def test_what_describes_no_context_is_passed_over_and_deleted_when_it_is_old(store: ContextStore) -> None:
    context = saved(store, "hello")
    remains = [store.folder / name for name in (f"{'a' * 16}.json", f"{'b' * 16}.part", f"{'c' * 16}.kv")]
    for path in remains:
        path.write_text(json.dumps({"text": 1}))
    store.prune()
    assert all(path.exists() for path in remains), "another kernel may be writing them"

    for path in remains:
        os.utime(path, (time.time() - UNFINISHED_S - 10,) * 2)
    (store.folder / "notes.txt").write_text("mine")
    store.prune()

    assert [found.id for found in store.list()] == [context.id]
    assert {path.name for path in store.folder.iterdir()} == {
        f"{context.id}.kv",
        f"{context.id}.json",
        "notes.txt",
    }


@pytest.mark.parametrize(("written", "said"), [(50, 100), (0, 100), (0, 0), (100, 0)])
def test_what_a_full_disk_did_not_take_is_not_kept(store: ContextStore, written: int, said: int) -> None:
    part = store.begin(100)
    assert part is not None
    part.write_bytes(b"k" * written)
    about = SavedContext(id="", model="m", title="t", made_of={}, text="hello", tokens=9, size=said)
    assert store.keep(part, about) is None
    assert not list(store.folder.iterdir())


def test_the_contexts_of_a_conversation_are_found_by_its_messages(store: ContextStore) -> None:
    saved(store, "<system>Be brief.<user>My cat is Kim.<assistant>Nice!<user>And?")
    saved(store, "<user>My dog is Tom.<assistant>Nice!")
    cat = ["My cat is Kim.", " Nice!\n", "And?", "Well, no"]

    deleted = store.forget(lambda context: context.has_turns(cat))

    assert [context.text[:24] for context in deleted] == ["<system>Be brief.<user>M"]
    assert [context.text[:16] for context in store.known] == ["<user>My dog is "]
    assert not store.known[0].has_turns([])


@pytest.mark.parametrize(
    ("text", "contents", "is_of_it"),
    [
        ("<s>Be brief.<u>Hi<a>Hello!<u>More?", ["Hi", "Hello!", "More?", "No."], True),
        ("<s>Be brief.<u>Hi<a>Hello!", ["Hi", "Goodbye", "More?"], False),
        # Its oldest turns were dropped.
        ("<s>Be brief.<u>More?<a>No.", ["Hi", "Hello!", "More?", "No."], True),
        ("<u>" + "long " * 100 + "<a>and then", ["long " * 100 + "but longer", "an answer"], True),
        ("<u>Summarise: " + "long " * 99, ["Summarise: " + "long " * 9, "an answer"], False),
        ("<u>Hi<a>Hel", ["Hi"], True),
        ("<u>Hi<a>" + "other " * 50, ["Hi"], False),
        ("<u>Hi", ["", "", " "], False),
        ("<u>Hi", [" "], False),
        ("<u>Hi<a>Hello!", [], False),
    ],
)
def test_only_what_has_turns_of_a_conversation_is_of_it(text: str, contents: list[str], is_of_it: bool) -> None:
    context = SavedContext(id="", model="m", title="", made_of={}, text=text, tokens=1, size=1)
    assert context.has_turns(contents) is is_of_it


def test_nothing_is_saved_where_the_setting_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "1.5")
    assert ContextStore().limit_bytes == 1_500_000_000
    assert ContextStore().folder == tmp_path / "contexts"

    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "0")
    assert not ContextStore().is_on
