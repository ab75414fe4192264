"""Jupyter Notebook 7: an answer streams, the cluster's widget is live, and the file keeps what was shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.lab.lab import HeadlessLab
from tests.lab.page import LabPage
from tests.lab.server import LabServer
from tests.support.engines import eventually
from tests.support.held_answers import holding

pytestmark = [pytest.mark.engine, pytest.mark.lab]

FOOTER = re.compile(r"demo .*tokens/s")


@pytest.fixture(scope="module")
def page(lab: HeadlessLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabPage]:
    """A notebook with the extension loaded."""
    folder = tmp_path_factory.mktemp("notebook7")
    own = {"SOLLOL_STATE_DIR": str(folder / "state"), "LLAMA_ARG_THREADS": "1"}
    with lab.beside(LabServer(folder, application="notebook", extensions=(), **own)) as notebook7:
        opened = notebook7.open(["%load_ext sollol_nb"], viewport=(1200, 1000))
        try:
            opened.run_all()
            yield opened
            opened.ask("%sollol_stop --all")
        finally:
            opened.close()


def test_an_answer_streams_and_ends_as_markdown_with_a_footer(page: LabPage, tmp_path: Path) -> None:
    goes_on = tmp_path / "goes-on"
    page.ask(holding(40, until=goes_on))
    cell = page.add("%%sollol demo --temperature 0 --out answer\nWhat is a worker?")
    page.start(cell)
    try:
        page.wait_for_text(cell, "A worker is a small server")
        assert not page.is_idle(), "it streams"
    finally:
        goes_on.touch()
    page.wait_done(cell)
    page.wait_for_text(cell, FOOTER)
    assert page.output(cell).locator("[data-mime-type='text/markdown'] > p").count() > 0
    page.screenshot("notebook7-answer")


def test_code_in_an_answer_is_code(page: LabPage) -> None:
    cell = page.add("%%sollol demo --temperature 0\nShow me an example cell.")
    page.run(cell)
    code = page.output(cell).locator("pre code")
    assert code.inner_text().startswith("from sollol_nb.sync_wrapper import HybridRouter, OllamaPool\n\nrouter =")
    assert code.locator("span").count() > 0, "in colours"
    page.screenshot("notebook7-code")


def test_the_widget_is_live(page: LabPage) -> None:
    cell = page.add("%sollol_cluster")
    page.run(cell)
    page.output(cell).locator(".jupyter-widgets", has_text="demo").first.wait_for()
    page.screenshot("notebook7-cluster")


def test_the_file_keeps_the_answer(page: LabPage) -> None:
    file = page.save()
    eventually(lambda: "--out answer" in file.read_text(encoding="utf-8"), "the file is saved")
    saved = nbformat.read(file, as_version=4)
    (cell,) = (cell for cell in saved.cells if "--out answer" in cell.source)
    (shown,) = cell.outputs
    assert shown.data["text/plain"].startswith("A worker is a small server")
