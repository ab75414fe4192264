"""Answers put into a saved notebook: only their own outputs change."""

from __future__ import annotations

import copy
from typing import Any

import nbformat
import pytest

from sollol_nb.notebook.pages.saved_outputs import SavedDisplay, put
from tests.support.saved_notebooks import CODE, notebook, shown

END = {"text/plain": "the end", "text/markdown": "the *end*"}


def display(**changes: Any) -> SavedDisplay:
    return SavedDisplay(**{"cell_id": "c1", "code": CODE, "request": "run 1", "bundle": END} | changes)


def test_the_output_of_a_display_is_replaced_wherever_its_cell_is_now() -> None:
    one = display()
    stream = nbformat.v4.new_output("stream", name="stdout", text="hint")
    document = notebook(stream, shown(one), source="another code by now")
    before = copy.deepcopy(document)
    assert put(document, one, END, may_add=False)
    assert document["cells"][1]["outputs"][1]["data"] == END
    before["cells"][1]["outputs"][1]["data"] = END
    assert document == before, "nothing else has changed"
    nbformat.validate(nbformat.from_dict(document))


def test_an_answer_whose_display_was_not_saved_yet_is_added_to_its_cell() -> None:
    one, two = display(), display()
    document = notebook()
    assert put(document, one, END, may_add=True)
    assert put(document, two, {"text/plain": "2"}, may_add=True)
    assert [output["data"]["text/plain"] for output in document["cells"][1]["outputs"]] == ["the end", "2"]
    assert put(document, one, {"text/plain": "1"}, may_add=True), "found again"
    assert [output["data"]["text/plain"] for output in document["cells"][1]["outputs"]] == ["1", "2"]
    nbformat.validate(nbformat.from_dict(document))


@pytest.mark.parametrize(
    ("document", "of"),
    [
        pytest.param(notebook(source="changed"), display(), id="its code was changed"),
        pytest.param(notebook(), display(cell_id="gone"), id="its cell was deleted"),
        pytest.param(notebook(), display(cell_id=""), id="the frontend names no cells"),
        pytest.param(notebook(shown(display(request="run 0"))), display(), id="it shows an earlier run"),
        pytest.param(
            notebook(nbformat.v4.new_output("stream", name="stdout", text="x")),
            display(),
            id="it shows other things",
        ),
        pytest.param(
            {"cells": [None, {"cell_type": "code", "outputs": [1], "id": "c1"}]}, display(), id="damaged"
        ),
        pytest.param({}, display(), id="empty"),
    ],
)
def test_otherwise_nothing_is_added(document: dict[str, Any], of: SavedDisplay) -> None:
    before = copy.deepcopy(document)
    assert not put(document, of, END, may_add=True)
    assert document == before


def test_nothing_is_added_while_it_may_have_been_removed_by_hand() -> None:
    document = notebook()
    assert not put(document, display(), END, may_add=False)
    assert document["cells"][1]["outputs"] == []
