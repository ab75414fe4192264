"""What a model writes runs nothing in JupyterLab, whose Markdown runs what it is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.lab import HeadlessLab
from tests.lab.page import LabPage
from tests.support.hostile_answers import ADDRESSES, IMAGE, SCRIPTS, TAGS

pytestmark = [pytest.mark.engine, pytest.mark.lab]

LIVE = """output => [...output.querySelectorAll('*')].filter(one =>
    one.tagName === 'IMG' || (one.protocol || '').startsWith('javascript')
    || [...one.attributes].some(attribute => attribute.name.startsWith('on'))
).map(one => one.outerHTML)"""
"""Elements that run something, or fetch it."""


@pytest.fixture(scope="module")
def page(lab: HeadlessLab) -> Iterator[LabPage]:
    opened = lab.open(["from sollol_nb.text import safe_markdown\nfrom IPython.display import Markdown"])
    opened.run_all()
    yield opened
    opened.close()


def live_elements(page: LabPage, texts: tuple[str, ...], make: str) -> list[str]:
    """What runs in Markdown that an expression makes of the `text` of each answer."""
    source = f"for text in {json.dumps(texts)}:\n    display(Markdown({make}))\ndisplay(Markdown('that was all'))"
    cell = page.add(source)
    page.start(cell)
    page.wait_done(cell)
    page.wait_for_text(cell, "that was all")
    found: Any = page.output(cell).evaluate(LIVE)
    return list(found)


@pytest.mark.parametrize("texts", [TAGS, ADDRESSES, SCRIPTS], ids=["tags", "addresses", "scripts"])
def test_nothing_of_a_hostile_answer_runs(page: LabPage, texts: tuple[str, ...]) -> None:
    assert live_elements(page, texts, "text") != [], "JupyterLab would run them"
    assert live_elements(page, texts, "safe_markdown.safe_markdown(text)") == []


def test_a_hostile_language_of_code_runs_nothing(page: LabPage) -> None:
    text = f"~~~a`b{IMAGE}\nx\n~~~"
    assert live_elements(page, (text,), "safe_markdown.fenced(*reversed(safe_markdown.code_in(text)))") == []


def test_amounts_of_money_are_no_formulas(page: LabPage) -> None:
    cell = page.add("display(Markdown(safe_markdown.safe_markdown('It costs $5 and $10, where $x$ is.')))")
    page.start(cell)
    page.wait_done(cell)
    formula = page.output(cell).locator("mjx-container")
    formula.first.wait_for(state="attached")
    assert formula.count() == 1
    page.wait_for_text(cell, "It costs $5 and $10, where")
