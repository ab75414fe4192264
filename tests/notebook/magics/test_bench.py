"""`%sollol_bench` in a real kernel: table and plot, variables, the stop button, errors as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.latency.log import LatencyLog
from sollol_nb.notebook.magics.bench import BenchMagics
from tests.support.engines import eventually
from tests.support.kernels import Kernel, notebook_kernel

pytestmark = pytest.mark.engine

QUICK = "--repeat 2 --prompts 2 --max-tokens 6"
EXAMPLES = re.findall(r"^ *(%sollol_bench demo.*)$", BenchMagics.sollol_bench.__doc__ or "", re.MULTILINE)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's state folder."""
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="module")
def notebook(engine: object, state: Path) -> Iterator[Kernel]:
    """A kernel with the magic and three workers."""
    with notebook_kernel(state, "%sollol_cluster start 3") as fresh:
        yield fresh


def test_a_benchmark_shows_its_table_and_its_plot(notebook: Kernel) -> None:
    shown = notebook.run(f"%sollol_bench demo:sharded --layouts 1,2 {QUICK} --out result")
    assert shown.status == "ok", shown.error
    assert "image/png" in shown.displays[-2]
    assert "2 workers" in shown.displays[-1]["text/html"]
    assert "medians over 2 rounds" in shown.text
    assert notebook.value("list(result.frame['case'].unique())") == "['1 worker', '2 workers']"
    assert notebook.value("_ is result, result.complete, len(result.rows)") == "(True, True, 8)"


def test_prompts_are_a_variable_of_the_notebook(notebook: Kernel) -> None:
    notebook.run("questions = ['What is a worker?', 'What is a coordinator?', 'Hello!']")
    for prompts in ("questions", "__import__('pandas').Series(questions)"):
        shown = notebook.run(f"result = %sollol_bench demo:sharded --repeat 1 --max-tokens 4 --prompts {prompts}")
        assert shown.status == "ok", shown.error
        assert notebook.value("list(result.settings['prompts']) == questions") == "True"


def test_the_help_has_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_help_run(notebook: Kernel, example: str) -> None:
    shown = notebook.run(f"{example} --repeat 1 --prompts 1")
    assert shown.status == "ok", shown.error


def test_the_stop_button_keeps_the_measurements(notebook: Kernel, state: Path) -> None:
    log = LatencyLog(state / "latency.sqlite")
    before = len(log.frame())
    cell = notebook.client.execute("%sollol_bench demo:sharded --layouts 1,2 --repeat 500 --out stopped")
    eventually(lambda: len(log.frame()) > before + 5, "some requests were measured")
    notebook.manager.interrupt_kernel()
    shown = notebook.collect(cell)
    assert shown.status == "ok", shown.error
    assert "stopped before the end" in shown.text
    assert notebook.value("0 < len(stopped.rows) < 3000, stopped.complete") == "(True, False)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "%sollol_bench: model is missing"),
        ("demo:sharded --layuots 1", "unknown option --layuots; did you mean --layouts?"),
        ("demo:sharded --layouts 5/4", "layout 5/4 places 9 units, but demo:sharded has 13"),
        ("demo:sharded --layouts 9", "the benchmark needs 9 workers but found only 3; start workers here with"),
        ("demo:sharded --prompts questoins", "did you mean questions?"),
        ("demo:sharded --prompts 99", "prompts=99: choose between 1 and 8 built-in prompts"),
        ("demo:sharded --repeat x", "--repeat takes a whole number"),
        ("demo:sharded --out 1x", "'1x' (--out) is not a valid variable name"),
    ],
)
def test_mistakes_are_one_line(notebook: Kernel, line: str, message: str) -> None:
    notebook.run("questions = ['Hello!']")
    shown = notebook.run(f"%sollol_bench {line}")
    assert shown.status == "error"
    assert message in "".join([*shown.error, shown.stream])
    assert shown.displays == [], "no progress bar"
