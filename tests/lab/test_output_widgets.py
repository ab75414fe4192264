"""An answer inside an Output of ipywidgets is seen whole and in its place, whoever asks: a cell, a callback of a
button, `interact`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.lab.lab import HeadlessLab
from tests.lab.page import LIMIT_MS, LabPage

pytestmark = [pytest.mark.engine, pytest.mark.lab]

CELLS = (
    "%load_ext sollol_nb\nimport ipywidgets",
    "out = ipywidgets.Output()\ndisplay(out)",
    "with out:\n    answer = %sollol demo --temperature 0 'What is a worker?'",
    "caught = ipywidgets.Output()\ndisplay(caught)",
    "@caught.capture(clear_output=True)\ndef asked(question):\n    %sollol demo --temperature 0 {{ question }}\n"
    "asked('What is a token?')\nasked('What is a coordinator?')",
    "button, below = ipywidgets.Button(description='Ask'), ipywidgets.Output()\n"
    "def clicked(_):\n    with below:\n        %sollol demo --temperature 0 'What is a worker?'\n"
    "button.on_click(clicked)\ndisplay(button, below)",
    "def ask(question):\n    %sollol demo --temperature 0 {{ question }}\n"
    "ipywidgets.interact(ask, question=['What is a layer plan?', 'What is a token?']);",
)
OF_WITH, WITH, OF_CAPTURE, CAPTURE, BUTTON, INTERACT = range(1, 7)


@pytest.fixture(scope="module")
def page(lab: HeadlessLab) -> Iterator[LabPage]:
    """The notebook, run once."""
    opened = lab.open(list(CELLS), viewport=(1200, 1400))
    opened.run_all()
    yield opened
    opened.close()


def expect_answer(page: LabPage, cell: int, begin: str) -> None:
    """Wait until a cell shows this answer, whole, and no other."""
    shown = page.output(cell).locator("[data-mime-type='text/markdown']")
    expect(shown).to_have_count(1, timeout=LIMIT_MS)
    expect(shown).to_contain_text(re.compile(rf"^\s*{begin}.*tokens/s", re.DOTALL), timeout=LIMIT_MS)


def test_in_the_output_of_another_cell(page: LabPage) -> None:
    expect_answer(page, OF_WITH, "A worker is a small server")
    assert page.output_text(WITH) == ""


def test_in_the_output_that_captures_a_function_which_clears_it(page: LabPage) -> None:
    expect_answer(page, OF_CAPTURE, "A coordinator is")
    assert page.output_text(CAPTURE) == ""


def test_in_the_output_of_a_buttons_callback(page: LabPage) -> None:
    page.output(BUTTON).get_by_role("button", name="Ask").click()
    expect_answer(page, BUTTON, "A worker is a small server")


def test_in_interact_after_each_choice(page: LabPage) -> None:
    expect_answer(page, INTERACT, "A layer plan")
    page.output(INTERACT).locator("select").select_option("What is a token?")
    expect_answer(page, INTERACT, "A token")
    page.screenshot("output-widgets")
