"""Answers in JupyterLab: copy buttons, code for the next cell, pages in a frame, conversations, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Route, expect

from tests.lab.lab import HeadlessLab
from tests.lab.page import LabPage
from tests.support.axe import assert_accessible
from tests.support.coder_model import ANSWER, CODE, write_coder
from tests.support.hostile_answers import PAGES

pytestmark = [pytest.mark.engine, pytest.mark.lab]

COPY_ANSWER, COPY_CODE = "Copy answer", "Copy code"
MAKE = """
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat

def made(text, shown_as="markdown", **more):
    answer = Completion(model="/m/Some-Model.gguf", message={"role": "assistant", "content": text}, **more)
    answer.shown_as = shown_as
    return answer
"""
COLOURFUL = """Read [this](https://example.com), then `call` it:

```python
# a comment
@decorated
class Thing(Base):
    def sum(self, numbers: list[int]) -> float:
        return 3.14 if None in numbers else {"one": [1, True]}[f"{numbers!r}"]
```

```json
{"name": "value", "counts": [1, 2.5, null, true]}
```

| left | right |
|---|---|
| 1 | 2 |
"""
CHAT = f"""
chat = Chat("tour", system="Be brief.")
chat.add({{"role": "user", "content": "What is a worker?"}}, made({ANSWER!r}))
chat.add({{"role": "user", "content": "And then?"}}, made("It ends in the", done_reason="length"))
chat
"""


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coder(tmp_path_factory.mktemp("models") / "coder.gguf")


@pytest.fixture(scope="module")
def page(lab: HeadlessLab) -> Iterator[LabPage]:
    opened = lab.open(["%load_ext sollol_nb", MAKE])
    opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.run_all()
    yield opened
    opened.close()


def ask(page: LabPage, coder: Path) -> int:
    """Let the model answer in a new cell; its index."""
    cell = page.add(f"%sollol {coder} --temperature 0 --out answer go")
    page.run(cell)
    page.wait_for_text(cell, "That is all.")
    return cell


def button(page: LabPage, cell: int, label: str) -> Locator:
    return page.output(cell).get_by_role("button", name=label)


def copied(page: LabPage, pressed: Locator) -> str:
    """What is in the clipboard once the button says so."""
    name = pressed.get_attribute("aria-label") or ""
    pressed.focus()
    page.page.keyboard.press("Enter")
    page.page.get_by_role("button", name=name.replace("Copy", "Copied")).wait_for()
    text: str = page.page.evaluate("(window.itsClipboard ?? navigator.clipboard).readText()")
    page.page.get_by_role("button", name=name.replace("Copy", "Copied")).wait_for(state="detached")
    return text


def test_an_answer_and_its_code_blocks_are_copied_as_the_model_wrote_them(page: LabPage, coder: Path) -> None:
    cell = ask(page, coder)
    button(page, cell, COPY_ANSWER).wait_for()
    page.screenshot("copy-buttons")
    assert copied(page, button(page, cell, COPY_ANSWER)) == ANSWER
    assert button(page, cell, COPY_CODE).count() == len(CODE)
    for place, (code, _) in enumerate(CODE):
        assert copied(page, button(page, cell, COPY_CODE).nth(place)) == code


def test_a_page_without_https_copies_too(page: LabPage, coder: Path) -> None:
    cell = ask(page, coder)
    page.page.evaluate(
        "() => { window.itsClipboard = navigator.clipboard;"
        " Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true}); }"
    )
    try:
        assert copied(page, button(page, cell, COPY_ANSWER)) == ANSWER
    finally:
        page.page.evaluate("() => { delete navigator.clipboard; delete window.itsClipboard; }")


def test_the_buttons_are_not_saved_and_come_back_with_the_next_answer(page: LabPage, coder: Path) -> None:
    cell = ask(page, coder)
    button(page, cell, COPY_ANSWER).wait_for()
    page.wait_idle()
    saved = page.saved()
    (output,) = saved.cells[cell].outputs
    assert set(output.data) == {"text/markdown", "text/plain"}
    assert "button" not in output.data["text/markdown"]
    assert "widgets" not in saved.metadata

    page.reload()
    page.wait_for_text(cell, "That is all.")
    assert button(page, cell, COPY_ANSWER).count() == 0
    later = ask(page, coder)
    button(page, later, COPY_ANSWER).wait_for()
    assert copied(page, button(page, cell, COPY_CODE).first) == CODE[0][0]
    assert copied(page, button(page, cell, COPY_ANSWER)) == ANSWER, "the same text as that of the later one"


def test_of_an_answer_that_is_not_known_in_the_page_the_shown_text_is_copied(page: LabPage, coder: Path) -> None:
    ask(page, coder)
    cell = page.add("made('One **word**.\\n\\n```py\\nx = 1\\n```\\n\\n- a\\n- b')")
    page.run(cell)
    button(page, cell, COPY_ANSWER).wait_for()
    assert copied(page, button(page, cell, COPY_ANSWER)) == "One word.\n\nx = 1\n\na\nb"


def test_the_code_of_an_answer_comes_into_a_new_cell_below(page: LabPage, coder: Path) -> None:
    ask(page, coder)
    cell = page.add("%sollol_insert")
    page.run(cell)
    page.cell(cell + 1).wait_for()
    assert page.source(cell + 1).split() == ["total", "=", "40", "total", "+=", "2"]
    assert page.ask("print('not run:', 'total' not in globals())") == "not run: True"


# --- pages in a frame -----------------------------------------------------------------------------


def show_pages(page: LabPage, texts: Sequence[str]) -> int:
    """Show these pages in frames of a new cell; its index."""
    cell = page.add(f"for text in {json.dumps(texts)}:\n    display(made(text, 'html'))\nprint('all are shown')")
    page.run(cell)
    page.wait_for_text(cell, "all are shown")
    return cell


def heights(page: LabPage, texts: Sequence[str]) -> list[float]:
    """The heights of the frames of these pages, once they have taken them."""
    cell = show_pages(page, texts)
    frames = page.output(cell).locator("iframe")
    page.page.wait_for_function(
        "([index, count]) => { const frames = document.querySelectorAll('.jp-NotebookPanel .jp-Cell')[index]"
        ".querySelectorAll('iframe'); return frames.length === count"
        " && [...frames].every(frame => frame.style.height.endsWith('px') && frame.style.height !== '400px'); }",
        arg=[cell, len(texts)],
    )
    found = [frames.nth(place).bounding_box() for place in range(len(texts))]
    return [box["height"] for box in found if box is not None]


def test_a_frame_is_as_high_as_its_page_within_bounds(page: LabPage) -> None:
    rows = "<p style='height: 40px; margin: 0'>x</p>"
    texts = ["x", f"<body style='margin: 0'>{rows * 5}", rows * 100, "<body style='height: 100vh'>x"]
    least, five, most, full = heights(page, texts)
    assert (least, most, full) == (60, 720, 60)
    assert five == pytest.approx(202, abs=4)
    page.screenshot("frames")


def test_what_a_link_in_a_page_opens_does_not_get_the_origin_of_the_notebook(lab: HeadlessLab) -> None:
    opened = lab.open([MAKE])
    try:
        opened.run_all()
        cell = show_pages(opened, ["<p><a href='/api'>x</a></p>"])
        frame = opened.output(cell).locator("iframe")
        frame.content_frame.locator("a").click()
        frame.content_frame.get_by_text('"version"').wait_for()
        height, origin = frame.evaluate("one => [one.style.height, one.contentDocument]")
        assert origin is None
        assert height == "60px"
    finally:
        opened.close()


def test_nothing_of_a_hostile_page_runs_or_is_fetched(lab: HeadlessLab) -> None:
    opened = lab.open([MAKE])  # a separate page: clicks leave the focus in a frame
    fetched: list[str] = []

    def refuse(route: Route) -> None:  # what the browser itself refuses does not come here
        fetched.append(route.request.url)
        route.abort()

    try:
        opened.run_all()
        opened.page.context.route("https://hostile.invalid/**", refuse)
        address = opened.page.url
        cell = show_pages(opened, PAGES)
        assert opened.output(cell).locator("iframe").count() == len(PAGES)
        clicked = 0
        for frame in opened.page.frames[1:]:
            frame.wait_for_load_state()
            for link in frame.locator("a").all():
                link.click(force=True)
                clicked += 1
        assert clicked >= 6
        assert opened.page.evaluate("[window.hacked ?? null, document.title.includes('hacked')]") == [None, False]
        assert opened.page.url == address
        assert fetched == []
    finally:
        opened.page.context.unroute("https://hostile.invalid/**")
        opened.close()


# --- conversations and errors ---------------------------------------------------------------------


def test_a_conversation_shows_answers_as_their_cells_do(page: LabPage, coder: Path) -> None:
    ask(page, coder)
    cell = page.add(CHAT)
    page.run(cell)
    page.wait_for_text(cell, "stopped at max_tokens")
    output = page.output(cell)
    assert output.locator("pre").count() == len(CODE)
    button(page, cell, COPY_CODE).first.wait_for(state="attached")
    assert button(page, cell, COPY_CODE).count() == len(CODE)
    assert button(page, cell, COPY_ANSWER).count() == 0
    question, answer = (output.get_by_text(text, exact=True) for text in ("What is a worker?", "Use this:"))
    boxes: Any = (question.bounding_box(), answer.bounding_box())
    assert boxes[0]["x"] > boxes[1]["x"], "questions stand to the right"
    page.screenshot("conversation")


def test_what_mends_an_error_is_shown_as_code(page: LabPage) -> None:
    cell = page.add("%sollol nosuchmodel hi")
    page.run(cell)
    (line,) = page.output_text(cell).splitlines()
    assert line.startswith("ModelNotFoundError: nosuchmodel is not available")
    assert "`" not in line
    code = page.output(cell).get_by_text("ollama pull nosuchmodel", exact=True)
    colours: Any = code.evaluate("one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]")
    assert colours == ["rgb(28, 28, 28)", "rgb(236, 236, 236)"]
    page.cell(cell).scroll_into_view_if_needed()
    page.screenshot("error")


@pytest.mark.parametrize(("theme", "width"), [("dark", 1200), ("light", 480)])
def test_answers_fit_other_themes_and_narrow_pages(lab: HeadlessLab, coder: Path, theme: Any, width: int) -> None:
    sources = ["%load_ext sollol_nb", f"%sollol {coder} --temperature 0 go", MAKE + CHAT]
    opened = lab.open(sources, theme=theme, viewport=(1200, 1300))
    try:
        opened.run_all()
        opened.page.set_viewport_size({"width": width, "height": 1300})
        button(opened, 1, COPY_ANSWER).wait_for()
        opened.wait_for_text(2, "stopped at max_tokens")
        opened.screenshot(f"answers-{theme}-{width}")
        for cell in (1, 2):
            too_wide = opened.output(cell).evaluate("one => one.scrollWidth - one.clientWidth")
            assert too_wide <= 1, f"cell {cell}"
    finally:
        opened.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_read_and_use_answers(lab: HeadlessLab, coder: Path, theme: Any) -> None:
    shown = [f"made({COLOURFUL!r})", CHAT, "%sollol nosuchmodel hi"]
    sources = ["%load_ext sollol_nb", MAKE, f"%sollol {coder} --temperature 0 go", *shown]
    opened = lab.open(sources, theme=theme, viewport=(1200, 3000))
    try:
        opened.run_all()
        opened.wait_for_text(5, "ollama pull nosuchmodel")
        for width in (1200, 480):
            opened.page.set_viewport_size({"width": width, "height": 3000})
            for cell, count in ((2, len(CODE)), (3, 2), (4, len(CODE))):
                buttons = opened.output(cell).get_by_role("button")
                expect(button(opened, cell, COPY_CODE)).to_have_count(count)
                for place in range(count):
                    if place:
                        opened.page.keyboard.press("Tab")
                    else:
                        buttons.first.focus()
                    expect(buttons.nth(place)).to_be_focused()
                    expect(buttons.nth(place)).to_have_css("opacity", "1")
                    expect(buttons.nth(place)).to_have_css("outline-style", "solid")
                opened.screenshot(f"answers-{theme}-{width}-focus-{cell}")
                assert_accessible(opened.page, ".jp-RenderedMarkdown")
            # What is styled in the error. The links that JupyterLab makes of addresses in it are not underlined.
            assert_accessible(opened.page, ".jp-RenderedText span")
    finally:
        opened.close()
