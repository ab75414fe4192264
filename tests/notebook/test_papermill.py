"""A notebook that papermill runs with parameters: what it saves is complete and can be read without widgets."""

from __future__ import annotations

from typing import Any

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from tests.support.kernels import CELL_TIMEOUT_S, ONE_THREAD

pytestmark = pytest.mark.engine

CELLS = (
    "question = 'What is a coordinator?'\nmodel = 'no-such-model'",
    "%load_ext sollol_nb\nimport pandas as pd",
    "%%sollol {{ model }} --temperature 0 --out answer\n{{ question }}",
    "%%sollol {{ model }} --temperature 0 --background --out behind\nWhat is a coordinator?",
    "frame = pd.DataFrame({'what': ['a worker', 'a token']})\n"
    "answers = frame.sollol.map('What is {{ what }}?', model=model, temperature=0)\nanswers",
    "behind.result(60)\n%sollol_cluster",
    "print(answer.text)",
    "%%sollol {{ other }}\nnever asked",
    "%sollol_stop --all",
)
BEGIN = "A worker is a small server"


@pytest.fixture(scope="module")
def saved(engine: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The notebook as papermill saved it, and why it stopped."""
    folder = tmp_path_factory.mktemp("papermill")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
    parameters = {"question": "What is a worker?", "model": "demo", "other": "no-such-model"}
    with pytest.MonkeyPatch.context() as its:
        for name, value in {
            "SOLLOL_STATE_DIR": str(folder / "state"),
            "SOLLOL_KEEP_ALIVE": "5s",
            **ONE_THREAD,
        }.items():
            its.setenv(name, value)
        with pytest.raises(PapermillExecutionError) as stopped:
            papermill.execute_notebook(
                folder / "in.ipynb",
                folder / "out.ipynb",
                parameters,
                kernel_name="python3",
                language="python",
                cwd=folder,
                progress_bar=False,
                execution_timeout=CELL_TIMEOUT_S,
            )
    return nbformat.read(folder / "out.ipynb", as_version=4), str(stopped.value)


def outputs(saved: tuple[Any, str], source: str) -> list[Any]:
    """Those of the cell that contains this."""
    (cell,) = (cell for cell in saved[0].cells if source in cell.source)
    found: list[Any] = cell.outputs
    return found


def test_the_parameters_are_asked_and_the_answer_is_saved_once_and_whole(saved: tuple[Any, str]) -> None:
    (shown,) = outputs(saved, "--out answer")
    assert shown.output_type == "display_data"
    (printed,) = outputs(saved, "print(answer.text)")
    text = printed.text.strip()
    assert text.startswith(BEGIN)
    for kind in ("text/markdown", "text/plain"):
        assert text.split("`")[0] in shown.data[kind]
        assert "tokens" in shown.data[kind], "its footer"


def test_an_answer_in_the_background_is_saved_whole(saved: tuple[Any, str]) -> None:
    (shown,) = outputs(saved, "--out behind")
    assert shown.data["text/plain"].startswith("A coordinator is one")
    assert shown.data["text/plain"].endswith("tokens]")


def test_progress_and_cluster_can_be_read_without_widgets(saved: tuple[Any, str]) -> None:
    bar, frame = outputs(saved, "sollol.map")
    assert "2 of 2" in bar.data["text/html"]
    assert BEGIN[:20] in frame.data["text/html"]
    assert any("demo" in shown.get("data", {}).get("text/html", "") for shown in outputs(saved, "%sollol_cluster"))


def test_a_cell_that_fails_says_why_in_one_line(saved: tuple[Any, str]) -> None:
    (error,) = outputs(saved, "never asked")
    assert error.ename == "ModelNotFoundError"
    assert len(error.traceback) == 1
    assert "ModelNotFoundError: no-such-model is not available" in saved[1]
    assert outputs(saved, "%sollol_stop --all") == []
