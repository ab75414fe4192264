"""`sollol-nb contexts`: what is listed of saved contexts, and what is deleted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from sollol_nb.cli import main as cli
from sollol_nb.cli.contexts import Listed, as_table, listed, total
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.coordinators.settings import file_identity


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ContextStore:
    """The store of a user who keeps contexts."""
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "2")
    return ContextStore()


def saved(store: ContextStore, model: Path, *, title: str = "trip.ipynb", age_s: float = 0.0) -> SavedContext:
    """A context of a model's file, last used so many seconds ago."""
    if not model.exists():
        model.write_bytes(b"GGUF")
    part = store.begin(2048)
    assert part is not None
    part.write_bytes(b"k" * 2048)
    made_of = {"model_file": file_identity(model)}
    about = SavedContext(
        id="", model=str(model), title=title, made_of=made_of, text="secret words", tokens=6020, size=2048
    )
    context = store.keep(part, about)
    assert context is not None
    used = time.time() - age_s
    os.utime(store.folder / f"{context.id}.json", (used, used))
    return context


def test_contexts_are_listed_with_their_model_age_and_total(
    store: ContextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    old = saved(store, tmp_path / "big.gguf", title="old.ipynb", age_s=7200)
    new = saved(store, tmp_path / "small.gguf")

    assert cli.main(["contexts"]) == 0
    header, first, second, end = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "MODEL", "TOKENS", "SIZE", "USED", "OF", "STATE"]
    assert first.split() == [new.id[:8], "small", "6,020", "2.0", "KiB", "0", "s", "ago", "trip.ipynb", "usable"]
    assert second.split() == [old.id[:8], "big", "6,020", "2.0", "KiB", "2", "h", "ago", "old.ipynb", "usable"]
    assert end == "2 saved contexts, 4.0 KiB of 2 GB (setting context_cache_gb)"


def test_json_has_what_a_script_needs_and_nothing_of_the_conversation(
    store: ContextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = saved(store, tmp_path / "m.gguf")
    assert cli.main(["contexts", "--json"]) == 0
    printed = capsys.readouterr().out
    data = json.loads(printed)
    assert (data["bytes"], data["limit_bytes"]) == (2048, 2_000_000_000)
    (row,) = data["contexts"]
    assert (row["id"], row["tokens"], row["why_not"]) == (context.id, 6020, "")
    assert "secret" not in printed


def test_it_says_why_a_context_cannot_be_used(store: ContextStore, tmp_path: Path) -> None:
    cut, changed, gone, without = (saved(store, tmp_path / f"{name}.gguf") for name in "abcd")
    with (store.folder / cut.file_name).open("r+b") as file:
        file.truncate(1024)
    (tmp_path / "b.gguf").write_bytes(b"GGUF, another one")
    (tmp_path / "c.gguf").unlink()
    (store.folder / without.file_name).unlink()

    why = {each.context.id: each.why_not for each in listed()}
    assert why == {
        cut.id: "damaged: 1.0 KiB of 2.0 KiB",
        changed.id: "outdated: its model file has changed",
        gone.id: "outdated: its model file is gone",
        without.id: "its file cannot be read: No such file or directory",
    }


def test_named_contexts_are_forgotten_and_no_others(
    store: ContextStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (saved(store, tmp_path / f"{name}.gguf") for name in ("a", "b", "c"))
    assert cli.main(["contexts", first.id[:9], "--forget"]) == 0
    assert capsys.readouterr().out == "deleted 1 saved context (2.0 KiB)\n"
    assert cli.main(["contexts", "--model", "b", "--forget"]) == 0
    assert {context.id for context in store.list()} == {third.id}
    assert not (store.folder / second.file_name).exists()
    assert cli.main(["contexts", "--all", "--forget"]) == 0
    assert not list(store.folder.iterdir())
    capsys.readouterr()
    assert cli.main(["contexts"]) == 0
    assert "there are no saved contexts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--forget"], "say which contexts to forget"),
        (["--forget", "--all", "--model", "a"], "say which contexts to forget"),
        (["--forget", "ffff"], "no saved context has the id ffff"),
        (["--forget", "--model", "zebra"], "no saved context is of zebra (there are some of: a)"),
    ],
)
def test_what_does_not_say_which_contexts_deletes_none(
    arguments: list[str],
    reason: str,
    store: ContextStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved(store, tmp_path / "a.gguf")
    assert cli.main(["contexts", *arguments]) == 1
    assert reason in capsys.readouterr().err
    assert len(store.list()) == 1


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_table_fits_a_narrow_terminal(width: int, store: ContextStore, tmp_path: Path) -> None:
    name = tmp_path / f"{'a-long-name-of-a-model-' * 3}.gguf"
    context = saved(store, name, title="a notebook with a long name.ipynb")
    rows = [Listed(context, ""), Listed(context, "outdated: its model file has changed")]
    shown = as_table(rows, width)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count(context.id[:8]) == shown.count("6,020") == shown.count("2.0 KiB") == 2
    assert ("MODEL" in shown) is (width == 80), "a table where there is room for one"
    wide = as_table(rows, 500).splitlines()
    assert wide[2].endswith("outdated: its model file has changed")


def test_without_room_nothing_is_saved_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "0")
    assert total([]) == "0 saved contexts, 0 B; nothing is saved, since context_cache_gb = 0"
    cli.main(["doctor"])
    assert "contexts      0 saved contexts, 0 B; nothing is saved" in capsys.readouterr().out
