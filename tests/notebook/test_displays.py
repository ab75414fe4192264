"""A value that a cell has shown already is not shown as the cell's result, but is shown anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from sollol_nb.chat.completion import Completion
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
