"""A value that a cell has shown already is not shown as the cell's result, but is shown anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from sollol_nb.chat.completion import Completion
from sollol_nb.notebook import displays
from sollol_nb.notebook.displays import hide_once


@pytest.fixture
def shell() -> Iterator[Any]:
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def is_shown(shell: Any, value: object) -> bool:
    return bool(shell.display_formatter.format(value)[0])


def test_all_answers_of_one_cell_are_hidden_in_it_and_shown_after_it(shell: Any) -> None:
    first, second, other = (Completion(model=name) for name in ("a", "b", "c"))
    before = dict(shell.display_formatter.ipython_display_formatter.type_printers)
    hide_once(shell, first)
    hide_once(shell, second)
    assert [is_shown(shell, completion) for completion in (first, second, other)] == [False, False, True]
    shell.events.trigger("post_execute")
    assert [is_shown(shell, completion) for completion in (first, second, other)] == [True, True, True]
    assert shell.display_formatter.ipython_display_formatter.type_printers == before


def test_the_users_own_printer_is_restored(shell: Any) -> None:
    printers = shell.display_formatter.ipython_display_formatter
    seen: list[object] = []
    printers.for_type(Completion, seen.append)
    value = Completion(model="a")
    hide_once(shell, value)
    hide_once(shell, Completion(model="b"))
    shell.events.trigger("post_execute")
    shell.display_formatter.format(value)
    assert seen == [value]


def test_a_progress_bar_is_as_wide_as_its_cell_however_long_its_texts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    def make_display(bundle: dict[str, str]) -> Callable[[dict[str, str]], None]:
        shown.append(bundle)
        return shown.append

    monkeypatch.setattr(displays, "make_display", make_display)
    bar = displays.TextBar(total=20, desc="a-model-with-a-very-long-name.Q4_K_M", unit="row", mininterval=0)
    bar.set_postfix_str("loading <another model>: 25 %")
    bar.update(5)
    bar.close()
    assert "25%|█████               | 5/20" in shown[-1]["text/plain"]
    assert "width:25.0%" in shown[-1]["text/html"]
    assert "a-model-with-a-very-long-name.Q4_K_M: 25 % · 5 of 20" in shown[-1]["text/html"]
    assert "&lt;another model&gt;" in shown[-1]["text/html"]


def test_a_closed_bar_that_need_not_stay_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(displays, "make_display", lambda bundle: (shown.append(bundle), shown.append)[1])
    bar = displays.TextBar(total=None, desc="x", leave=False, mininterval=0)
    bar.update(1)
    bar.close()
    assert shown[0]["text/plain"].startswith("x: ")
    assert shown[-1] == {"text/plain": "", "text/html": ""}
