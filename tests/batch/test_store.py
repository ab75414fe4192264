"""The store of batches' answers: found by what was asked, kept across processes, and forgotten in time."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.batch import store as batch_store
from sollol_nb.batch.store import BatchStore, answer_key
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.runtime import sqlite_file
from tests.support.engines import HANG_GUARD_S, says, script

HELLO = [{"role": "user", "content": "Hello!"}]
FILE = {"path": "/m.gguf", "size": 7, "mtime_ns": 1}


def completion(text: str, model: str = "demo") -> Completion:
    routing = {"backend": "llama.cpp-local", "ttft_ms": 1.5, "plan": {"large": "x" * 1000}}
    message = {"role": "assistant", "content": text}
    return Completion(model=model, message=message, done=True, done_reason="stop", _routing=routing)


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "batches.sqlite")


# --- the key ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        ("demo2", FILE, HELLO, {"seed": 1, "top_p": 0.5}),
        ("demo", {**FILE, "mtime_ns": 2}, HELLO, {"seed": 1, "top_p": 0.5}),
        ("demo", {}, HELLO, {"seed": 1, "top_p": 0.5}),
        ("demo", FILE, [{"role": "user", "content": "Hello"}], {"seed": 1, "top_p": 0.5}),
        ("demo", FILE, [{"role": "system", "content": ""}, *HELLO], {"seed": 1, "top_p": 0.5}),
        ("demo", FILE, HELLO, {"seed": 2, "top_p": 0.5}),
        ("demo", FILE, HELLO, {"seed": 1}),
        ("demo", FILE, HELLO, {"seed": 1, "top_p": 0.5, "format": {"type": "string"}}),
    ],
)
def test_another_model_file_question_or_option_is_another_key(other: tuple[Any, ...]) -> None:
    assert answer_key(*other) != answer_key("demo", FILE, HELLO, {"seed": 1, "top_p": 0.5})


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.5, "seed": 1},
        {"seed": 1, "top_p": 0.5, "keep_alive": "1h"},
        {"seed": 1, "top_p": 0.5, "journal": True, "conversation": "tour"},
    ],
)
def test_the_order_and_what_changes_no_answer_do_not_count(options: dict[str, Any]) -> None:
    assert answer_key("demo", FILE, HELLO, options) == answer_key("demo", FILE, HELLO, {"seed": 1, "top_p": 0.5})


def test_the_order_of_a_schemas_properties_counts_since_it_is_that_of_the_answer() -> None:
    def with_order(*names: str) -> str:
        return answer_key("demo", FILE, HELLO, {"format": {"properties": {name: {} for name in names}}})

    assert with_order("a", "b") != with_order("b", "a")


def test_what_is_no_json_has_no_key() -> None:
    with pytest.raises(ConfigError, match="must be writable as JSON"):
        answer_key("demo", FILE, HELLO, {"tools": [object()]})


# --- keeping ----------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was_but_for_its_plan(store: BatchStore) -> None:
    before = completion("Ünï \N{SNOWMAN} \ud800 \0")
    store.put({"k": before})
    after = store.get(["k", "other"])
    assert list(after) == ["k"]
    assert isinstance(after["k"], Completion)
    assert after["k"].text == before.text
    assert after["k"].routing == {"backend": "llama.cpp-local", "ttft_ms": 1.5}
    assert {**after["k"], "_routing": None} == {**before, "_routing": None}


def test_the_newer_answer_takes_the_place_of_the_older(store: BatchStore) -> None:
    store.put({"k": completion("old")})
    store.put({"k": completion("new")})
    assert (len(store), store.get(["k"])["k"].text) == (1, "new")


def test_many_keys_are_found_at_once(store: BatchStore) -> None:
    for number in range(3):
        store.put({f"k{number}": completion(str(number))})
    found = store.get([f"k{number}" for number in range(2000)])
    assert sorted(found) == ["k0", "k1", "k2"]
    assert store.get([]) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")
def test_only_the_user_may_read_the_file(store: BatchStore) -> None:
    store.put({"k": completion("x")})
    with sqlite3.connect(store.path) as connection:
        connection.execute("SELECT * FROM answers").fetchall()
        modes = {path.name: path.stat().st_mode & 0o777 for path in store.path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_many_threads_may_be_the_first_and_write_at_once(store: BatchStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: store.put({f"k{number}": completion(str(number))}), range(80)))
    assert len(store) == 80


WRITER = """
import sys
from sollol_nb.batch.store import BatchStore
from sollol_nb.chat.completion import Completion
store = BatchStore(sys.argv[1])
store.put({"theirs": Completion(message={"content": "from there"})})
print("wrote", store.get(["ours"])["ours"].text, flush=True)
"""


def test_processes_share_what_is_kept(store: BatchStore) -> None:
    store.put({"ours": completion("from here")})
    with script(WRITER, str(store.path)) as process:
        assert says(process, "wrote") == "from here"
        assert process.wait(HANG_GUARD_S) == 0
    assert store.get(["theirs"])["theirs"].text == "from there"


def test_answers_are_found_also_while_another_writes(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put({"k": completion("x")})
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert store.get(["k"])["k"].text == "x"


def test_an_answer_that_cannot_be_read_is_none(store: BatchStore) -> None:
    store.put({"whole": completion("x")})
    store.put({"torn": completion("y")})
    with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute("UPDATE answers SET completion = substr(completion, 1, 9) WHERE key = 'torn'")
    assert list(store.get(["whole", "torn"])) == ["whole"]


# --- forgetting -------------------------------------------------------------------------------


def test_answers_that_nobody_used_for_long_go(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(batch_store.time, "time", lambda: now[0])
    store.put({"old": completion("old")})
    store.put({"used": completion("used")})
    now[0] += 20 * 86_400
    store.get(["used"])
    now[0] += 20 * 86_400
    store.put({"new": completion("new")})
    assert store.prune() == 1
    assert sorted(store.get(["old", "used", "new"])) == ["new", "used"]


def test_the_least_recently_used_of_too_many_go(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(batch_store.time, "time", lambda: now[0])
    for number in range(5):
        now[0] += 1
        store.put({f"k{number}": completion("x")})
    now[0] += 1
    store.get(["k0"])
    assert store.prune(keep_rows=2) == 3
    assert sorted(store.get([f"k{number}" for number in range(5)])) == ["k0", "k4"]


def test_all_or_one_models_answers_can_be_cleared(store: BatchStore) -> None:
    for model in ("a", "b", "b"):
        store.put({f"{model}{len(store)}": completion("x" * 100_000, model)})
    size = store.path.stat().st_size
    assert store.clear("b") == 2
    assert len(store) == 1
    assert store.clear() == 1
    assert len(store) == 0
    assert store.path.stat().st_size < size
    assert store.clear() == 0


def test_the_store_lies_in_the_state_folder(own_state: Path) -> None:
    assert BatchStore().path == own_state / "batches.sqlite"
    assert repr(BatchStore("x.sqlite")) == "BatchStore('x.sqlite')"
