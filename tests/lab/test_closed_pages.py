"""The page is closed, loaded again or cut off while an answer streams, in a browser and on a real engine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sollol_nb.notebook.pages.watch import DOUBT_S
from tests.lab.lab import HeadlessLab
from tests.lab.page import LabPage
from tests.lab.proxy import cuttable
from tests.support.engines import eventually

pytestmark = [pytest.mark.engine, pytest.mark.lab]

OPTIONS = "--temperature 0 --max-tokens 100"
PROMPT = "Write a long story about a lighthouse."
WHOLE = "stopped at max_tokens"
"""In the footer of the whole answer."""
HINT = "The page was opened again while SmolLM2-135M-Instruct.Q4_1 answered; "
OTHER = 2
"""The cell below the one that asks."""


@pytest.fixture(params=[""])
def page(request: pytest.FixtureRequest, lab: HeadlessLab, smollm2: Path) -> Iterator[LabPage]:
    """A notebook with the cell that asks (with the options of the parameter), and another one."""
    asking = f"%%sollol {smollm2} {OPTIONS} {request.param}\n{PROMPT}"
    opened = lab.open(["%load_ext sollol_nb", asking, "print('hello')"], viewport=(1000, 800))
    opened.run(0)
    opened.save()
    yield opened
    opened.close()


def saved_text(page: LabPage) -> str:
    """What the file on disk shows of the cell that asks."""
    try:
        document = json.loads(page.notebook.read_text(encoding="utf-8"))
    except ValueError:  # while the server writes it
        return ""
    outputs: list[Any] = document["cells"][1]["outputs"]
    return "".join("".join(output.get("data", {}).get("text/plain", "")) for output in outputs)


def begin(page: LabPage) -> str:
    """Ask, and wait for the first words."""
    page.start(1)
    page.wait_for_text(1, re.compile(r"\w+ \w+ \w+ \w+"))
    return page.output_text(1)[:20]


@pytest.mark.parametrize("page", ["", "--background"], indirect=True)
def test_an_answer_whose_page_is_closed_is_whole_in_the_notebook(page: LabPage) -> None:
    words = begin(page)
    page.close_page()  # its file does not have the answer's display yet
    eventually(lambda: WHOLE in saved_text(page), "the end is in the file")
    assert saved_text(page).startswith(words)
    eventually(lambda: time.time() - page.notebook.stat().st_mtime > DOUBT_S, "what opens now reads it like this")
    page.open_again()
    page.wait_for_text(1, WHOLE)
    assert page.run(OTHER) == "hello", "without a hint, since nothing is missing"
    page.save()  # without a question


def test_a_page_that_is_loaded_again_says_how_to_see_what_it_has_missed(page: LabPage) -> None:
    words = begin(page)
    page.save()
    page.page.reload()
    page.wait_idle()
    hint, *rest = page.run(OTHER).splitlines()
    assert hint.startswith(HINT)
    assert rest[-1] == "hello"
    page.screenshot("opened-again")
    again = page.ask(hint.removeprefix(HINT).removesuffix(" shows the answer."))
    assert words in again
    assert WHOLE in again
    assert page.run(OTHER) == "hello", "the hint is there once"


def test_a_page_that_was_cut_off_comes_back_with_the_answer_and_saves_without_a_question(
    lab: HeadlessLab, page: LabPage
) -> None:
    port = urlsplit(lab.url).port
    assert port is not None
    with cuttable(port) as proxy:
        page.load(url=f"http://127.0.0.1:{proxy.port}/")
        words = begin(page)
        page.type_in_cell(OTHER, "\n# not saved")
        before = page.notebook.read_bytes()
        proxy.cut()
        eventually(lambda: WHOLE in saved_text(page), "the end is in the file, as no page is connected")
        page.dismiss_connection_errors()
        proxy.join()
        page.wait_for_text(1, WHOLE)
        eventually(lambda: page.notebook.read_bytes() == before, "the file is as the page knows it")
        assert page.source(OTHER).endswith("# not saved")
        saved = page.saved()
    shown = saved.cells[1].outputs[0].data["text/plain"]
    assert shown.startswith(words)
    assert WHOLE in shown
    assert saved.cells[OTHER].source.endswith("# not saved")
