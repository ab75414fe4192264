"""The page is closed, loaded again or cut off while an answer streams, in a browser and on a real engine."""

from __future__ import annotations

import json
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
from tests.support.held_answers import holding

pytestmark = [pytest.mark.engine, pytest.mark.lab]

PROMPT = "Tell me everything about sharding."
BEGINNING = "Once there was a model that was too big for any machine in the house. It had many layers"
"""What a held answer shows: nothing more comes, so that a page can be saved meanwhile."""
WHOLE = "always remember what you have already said."
"""The end of the answer."""
HINT = "The page was opened again while demo answered; this shows the answer:"
OTHER = 2
"""The cell below the one that asks."""

SOON, NEVER = 1, 1_000_000
"""After how many seconds without a page the file is changed; a page may load for longer than usual. NEVER is also
when an answer settles: a server may say late that its page is gone."""


@pytest.fixture
def may_end(tmp_path: Path) -> Path:
    """Once this file exists, a held answer continues to its end."""
    return tmp_path / "may_end"


@pytest.fixture(params=[("", SOON)])
def page(request: pytest.FixtureRequest, lab: HeadlessLab, may_end: Path) -> Iterator[LabPage]:
    """A notebook with the cell that asks, with these options, and another one."""
    options, closed_s = request.param
    load = f"%load_ext sollol_nb\nfrom sollol_nb.notebook.pages import watch\nwatch.CLOSED_S = {closed_s}\n"
    load += f"watch.SETTLE_S = {NEVER}"
    load += holding(len(BEGINNING), until=may_end)
    asking = f"%%sollol demo --temperature 0 {options}\n{PROMPT}"
    opened = lab.open([load, asking, "print('hello')"], viewport=(1000, 800))
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


def whole_text(page: LabPage) -> str:
    """The same once the end of the answer is there; "" until then."""
    text = saved_text(page)
    return text if WHOLE in text else ""


def begin(page: LabPage) -> None:
    """Ask, and wait for the first words."""
    page.start(1)
    page.wait_for_text(1, BEGINNING)


@pytest.mark.parametrize("page", [("", SOON), ("--background", SOON)], indirect=True)
def test_an_answer_whose_page_is_closed_is_whole_in_the_notebook(page: LabPage, may_end: Path) -> None:
    begin(page)
    page.close_page()  # its file does not have the answer's display yet
    may_end.touch()
    assert eventually(lambda: whole_text(page), "the end is in the file").startswith(BEGINNING)
    eventually(lambda: time.time() - page.notebook.stat().st_mtime > DOUBT_S, "what opens now reads it like this")
    page.open_again()
    page.wait_for_text(1, WHOLE)
    assert page.run(OTHER) == "hello", "without a hint, since nothing is missing"
    page.save()  # without a question


@pytest.mark.parametrize("page", [("", NEVER)], indirect=True)
def test_a_page_that_is_loaded_again_says_how_to_see_what_it_has_missed(page: LabPage, may_end: Path) -> None:
    begin(page)
    page.save()
    page.reload(meanwhile=may_end.touch)
    hint, command, own = page.run(OTHER).splitlines()
    assert (hint, own) == (HINT, "hello")
    page.screenshot("opened-again")
    again = page.ask(command)
    assert BEGINNING in again
    assert WHOLE in again
    assert page.run(OTHER) == "hello", "the hint is there once"


def test_a_page_that_was_cut_off_comes_back_with_the_answer_and_saves_without_a_question(
    lab: HeadlessLab, page: LabPage, may_end: Path
) -> None:
    port = urlsplit(lab.url).port
    assert port is not None
    with cuttable(port) as proxy:
        page.load(url=f"http://127.0.0.1:{proxy.port}/")
        begin(page)
        page.type_in_cell(OTHER, "\n# not saved")
        before = page.notebook.read_bytes()
        proxy.cut()
        may_end.touch()
        eventually(lambda: whole_text(page), "the end is in the file, as no page is connected")
        page.dismiss_connection_errors()
        proxy.join()
        page.wait_for_text(1, WHOLE)
        eventually(lambda: page.notebook.read_bytes() == before, "the file is as the page knows it")
        assert page.source(OTHER).endswith("# not saved")
        saved = page.saved()
    shown = saved.cells[1].outputs[0].data["text/plain"]
    assert shown.startswith(BEGINNING)
    assert WHOLE in shown
    assert saved.cells[OTHER].source.endswith("# not saved")
