"""A model that loads while a person still reads: in JupyterLab, which tells the kernel where its notebook is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lab.lab import HeadlessLab

pytestmark = [pytest.mark.engine, pytest.mark.lab]

ASK = "%%sollol demo --temperature 0\nWhat is a worker?"


def test_the_model_of_the_first_cell_that_asks_is_ready_before_it_runs(lab: HeadlessLab, tmp_path: Path) -> None:
    # No model that another test has left running is found there.
    load = f"%env SOLLOL_STATE_DIR={tmp_path}\n%load_ext sollol_nb"
    page = lab.open([load, "%config Sollol.preload = True", ASK])
    try:
        page.run(0)
        page.run(1)
        page.wait_for_text(1, re.compile(r"demo is ready after \d+\.\d s"))
        page.screenshot("preload")
        assert re.search(r"^demo · llama\.cpp-local · ", page.run(2), re.MULTILINE)
        events = "[(event.kind, event.message) for event in router().events.recent()]"
        shown = page.ask(f"from sollol_nb.notebook import router\nprint({events})")
        # A start is tried again where another process takes its port.
        assert shown.count("('coordinator.ready', ") == 1, shown
        page.ask("%sollol_stop --all")
    finally:
        page.close()
