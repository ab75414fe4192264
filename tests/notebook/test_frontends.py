"""Answers in frontends that have less than JupyterLab: no widgets (VS Code-like), or also fewer updates
(Colab-like)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.frontends import WIDGET, OnlyItsOwnUpdates, WithoutWidgets
from tests.support.held_answers import holding
from tests.support.kernels import Shown, notebook_kernel

pytestmark = pytest.mark.engine

ASK = "%sollol demo --temperature 0 'What is a worker?'"
BEGIN = "A worker is a small server"
OUTPUT = "import ipywidgets\nout = ipywidgets.Output()"


@pytest.fixture(scope="module", params=[WithoutWidgets, OnlyItsOwnUpdates])
def frontend(
    request: pytest.FixtureRequest, engine: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WithoutWidgets]:
    """A kernel with the model loaded, as such a frontend has it."""
    folder = tmp_path_factory.mktemp("frontend")
    with notebook_kernel(folder / "state", "%sollol demo --quiet Hello", OUTPUT, frontend=request.param) as ready:
        assert isinstance(ready, WithoutWidgets)
        yield ready


def whole(texts: list[str]) -> list[str]:
    """Those of these that are a whole answer with its footer."""
    return [text for text in texts if text.startswith(BEGIN) and "tokens" in text.removeprefix(BEGIN)]


def run(frontend: WithoutWidgets, code: str) -> Shown:
    shown = frontend.run(code)
    assert shown.status == "ok", shown.error
    return shown


def test_an_answer_streams_into_one_display_and_wants_no_widget(frontend: WithoutWidgets, tmp_path: Path) -> None:
    goes_on = tmp_path / "goes-on"
    run(frontend, holding(len(BEGIN), until=goes_on))
    cell = frontend.client.execute(ASK)
    try:
        live = frontend.collect(cell, until_shown=BEGIN)
        assert live.status == "", "it streams"
    finally:
        goes_on.touch()
    shown = frontend.collect(cell)
    assert shown.status == "ok", shown.error
    assert len(shown.displays) == 1
    assert len(whole(frontend.seen(shown))) == 1
    assert shown.updates >= 1
    assert shown.comms == []
    assert WIDGET not in shown.displays[0]


def test_progress_wants_no_widget(frontend: WithoutWidgets) -> None:
    shown = run(
        frontend,
        "import pandas as pd\n"
        "frame = pd.DataFrame({'what': ['a worker', 'a token']})\n"
        "answers = frame.sollol.map('What is {{ what }}?', model='demo', temperature=0)",
    )
    assert shown.comms == []
    assert not any(WIDGET in each for each in shown.displays)
    assert any("2/2" in each["text/plain"] for each in shown.displays)


def test_the_cluster_is_seen_without_its_widget(frontend: WithoutWidgets) -> None:
    seen = frontend.seen(run(frontend, "%sollol_cluster"))
    assert any("demo" in text and "<" in text for text in seen)


@pytest.mark.parametrize(
    "code",
    [
        f"with out:\n    answer = {ASK}",
        f"@out.capture()\ndef asked():\n    answer = {ASK}\nasked()",
        f"def ask(question):\n    answer = {ASK}\nipywidgets.interact(ask, question=['x'])",
    ],
    ids=["with", "capture", "interact"],
)
def test_an_answer_in_an_output_is_seen_whole_where_there_are_no_widgets(
    frontend: WithoutWidgets, code: str
) -> None:
    shown = run(frontend, code)
    assert len(whole(frontend.seen(shown))) == 1, shown.displays


def test_an_answer_in_the_background_is_seen_whole_once_it_is_waited_for(frontend: WithoutWidgets) -> None:
    run(frontend, "%sollol demo --temperature 0 --background --out handle 'What is a worker?'")
    shown = run(frontend, "handle.result(60)")
    assert len(whole(frontend.seen(shown))) == 1


def test_an_error_is_one_line(frontend: WithoutWidgets) -> None:
    shown = frontend.run("%sollol no-such-model hello")
    assert shown.status == "error"
    assert len(shown.error) == 1
