"""What a notebook keeps that nbclient ran (papermill, `nbconvert --execute`): whole answers, wherever they are."""

from __future__ import annotations

import os
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.kernels import CELL_TIMEOUT_S

pytestmark = pytest.mark.engine

CELLS = (
    "%load_ext sollol_nb\nimport ipywidgets",
    "%%sollol demo --temperature 0 --background\nWhat is a worker?",
    "%%sollol demo --temperature 0 --background --out handle\nWhat is a coordinator?",
    "handle.result(60).text[:20]",
    "first = ipywidgets.Output()\ndisplay(first)",
    "with first:\n"
    "    print('before')\n"
    "    answer = %sollol demo --temperature 0 'What is a worker?'\n"
    "    print('after')",
    "def ask(question):\n    %sollol demo --temperature 0 {{ question }}\n"
    "ipywidgets.interact(ask, question=['What is a layer plan?'])",
    "output = ipywidgets.Output()\n"
    "def clicked(_):\n"
    "    with output:\n"
    "        %sollol demo --temperature 0 --background --out clicked_handle What is a token\n"
    "        display(clicked_handle)\n"
    "button = ipywidgets.Button()\nbutton.on_click(clicked)\ndisplay(button, output)\nbutton.click()",
    "clicked_handle.result(60)\nprint(answer.text)",
    "Out[2].result(60)\n%sollol_stop --all",
)


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after its run, as it would be saved."""
    folder = tmp_path_factory.mktemp("notebook")
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    client = NotebookClient(
        made, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "SOLLOL_STATE_DIR": str(folder / "state"), "SOLLOL_KEEP_ALIVE": "5s"})
    return made


def texts(outputs: list[Any]) -> list[str]:
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]


def output_widgets(notebook: Any) -> list[list[str]]:
    """The texts in each Output widget."""
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return [texts(state["state"]["outputs"]) for state in states if state["model_name"] == "OutputModel"]


def test_answers_in_the_background_are_saved_whole(notebook: Any) -> None:
    for place, begin in ((1, "A worker is a small server"), (2, "A coordinator is one")):
        (shown,) = texts(notebook.cells[place].outputs)
        assert shown.startswith(begin)
        assert shown.endswith("tokens]")


def test_answers_in_an_output_widget_are_saved_whole(notebook: Any) -> None:
    widgets = output_widgets(notebook)
    (around,) = [shown for shown in widgets if "before\n" in shown]
    assert (len(around), around[0], around[2]) == (3, "before\n", "after\n")
    for begin in ("A worker is a small server", "A layer plan", "A token"):
        ends = [shown for (shown, *more) in filter(None, widgets) if shown.startswith(begin) and not more]
        assert len(ends) == 1, widgets
        assert ends[0].endswith("tokens]")


def test_an_answer_in_an_output_widget_can_be_read_and_shown_elsewhere(notebook: Any) -> None:
    (text,) = texts(notebook.cells[8].outputs)
    assert text.startswith("A worker is a small server")
