"""The magics as a person meets them: JupyterLab in a browser, on real engines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from sollol_nb.chat.completion_view import LIVE_CHARS
from tests.lab.lab import HeadlessLab
from tests.lab.page import LabPage
from tests.support.gguf_files import write_llama
from tests.support.held_answers import holding

pytestmark = [pytest.mark.engine, pytest.mark.lab]

STORY = "Tell me everything about sharding."
STORY_BEGINS = "Once there was a model"
FOOTER = re.compile(r"^demo:sharded · llama\.cpp-distributed · layers 4/4/5 · .* tokens/s", re.MULTILINE)
LONG_TOKENS = 10_000
LONG_CHARS = 30_000  # so many tokens are more than that


@pytest.fixture(scope="module")
def notebook(lab: HeadlessLab) -> Iterator[LabPage]:
    """A notebook with the extension loaded, room for long answers, and three workers started."""
    room = "from sollol_nb.notebook import router\nrouter(context_tokens=32_768);"
    opened = lab.open(["%load_ext sollol_nb", room, "%sollol_cluster start 3"], viewport=(1200, 1000))
    opened.run_all()
    yield opened
    opened.close()


@pytest.fixture
def page(notebook: LabPage) -> Iterator[LabPage]:
    """The notebook; what a failed test has left running is stopped."""
    yield notebook
    if not notebook.is_idle():
        notebook.press_stop()
        notebook.wait_idle()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, quick model whose greedy answer ends only at `max_tokens`."""
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    return write_llama(path, blocks=1, feed_forward=64, vocabulary=1000, context=32_768)


@pytest.fixture
def goes_on(tmp_path: Path) -> Iterator[Path]:
    """Once this file exists, a held answer continues."""
    path = tmp_path / "goes-on"
    yield path
    path.touch()


def test_an_answer_is_seen_to_grow_and_ends_as_markdown_with_a_footer(page: LabPage, tmp_path: Path) -> None:
    # The answer waits twice until the page has shown it so far, however slow the page and quick the engine.
    beginning, plan = tmp_path / "beginning", tmp_path / "plan"
    page.ask(holding(100, until=beginning))
    page.ask(holding(400, until=plan))
    cell = page.add(f"%%sollol demo:sharded --temperature 0 --out answer\n{STORY}")
    page.watch(cell)
    page.start(cell)
    try:
        page.wait_for_text(cell, STORY_BEGINS)
        beginning.touch()
        page.wait_for_text(cell, "So the people of the house made a plan")
    finally:
        beginning.touch()
        plan.touch()
    page.wait_done(cell)
    page.wait_for_text(cell, FOOTER)
    growing = [text for text in page.seen() if text.startswith(STORY_BEGINS)]
    assert len({len(text) for text in growing}) >= 3
    assert all(later.startswith(earlier.rstrip()) for earlier, later in pairwise(growing))
    assert page.output(cell).locator("[data-mime-type='text/markdown'] > p").count() > 1, "its paragraphs"
    shown = page.output_text(cell)
    assert FOOTER.search(shown)
    page.screenshot("answer")


def test_the_stop_button_keeps_the_text_and_the_next_cell_runs(
    page: LabPage, endless: Path, goes_on: Path
) -> None:
    page.ask(holding(100, until=goes_on))
    cell = page.add(f"%%sollol {endless} --temperature 0 --max-tokens 30000 --out cut\ngo")
    page.start(cell)
    page.wait_for_text(cell, re.compile(r"w\d+ w\d+"))
    page.press_stop()
    page.wait_done(cell)
    shown = page.output_text(cell)
    assert f"RequestCancelledError: {endless.stem}: stopped; the partial answer is kept" in shown.splitlines()
    assert " · stopped" in shown, "the footer says so too"
    assert page.ask("print(cut.finish_reason, len(cut.text) > 0, _ is cut)") == "cancelled True True"
    page.screenshot("stopped")


def test_a_model_name_is_offered_by_tab_and_taken_with_enter(page: LabPage) -> None:
    cell = page.add("%%sollol de")
    assert page.press_tab_and_read_completions() == ["demo", "demo:sharded"]
    page.screenshot("completions")
    page.choose_completion("demo:sharded")
    assert page.source(cell) == "%%sollol demo:sharded"


def test_a_model_name_is_completed_after_its_colon(page: LabPage) -> None:
    cell = page.add("%%sollol demo:s")
    page.press_tab_and_read_completions()  # JupyterLab itself offers words of the notebook, too
    page.choose_completion("demo:sharded")
    assert page.source(cell) == "%%sollol demo:sharded"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("%%sollol nosuchmodel\nHello", "ModelNotFoundError: nosuchmodel is not available"),
        ("%sollol_route", "UsageError: %sollol_route: model is missing"),
    ],
)
def test_an_error_is_one_line(page: LabPage, source: str, words: str) -> None:
    lines = page.ask(source).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(words)


def test_a_very_long_answer_is_light_while_it_streams_and_whole_in_the_end(
    page: LabPage, endless: Path, goes_on: Path
) -> None:
    page.ask(holding(LONG_CHARS, until=goes_on))
    cell = page.add(f"%%sollol {endless} --temperature 0 --max-tokens {LONG_TOKENS} --out long\ngo")
    below = page.add()
    page.watch(cell)
    already = len(page.received_bytes)
    page.start(cell)
    page.wait_for_text(cell, "characters above")
    page.type_in_cell(below, "the page takes keys meanwhile")
    for digit in ("[1-9]", "[2-9]"):  # in two steps, since each wait has a limit
        page.wait_for_text(cell, re.compile(digit + r"\d,\d{3} characters above"))
    assert max(page.received_bytes[already:]) < 4 * LIVE_CHARS, "no message holds the whole answer"
    assert page.source(below) == "the page takes keys meanwhile"
    page.screenshot("long")
    goes_on.touch()
    page.wait_done(cell)
    *live, last = page.seen()
    assert max(map(len, live)) < LIVE_CHARS + 200
    assert f"{LONG_TOKENS:,} tokens" in last
    assert len(last) > LONG_CHARS


def test_the_saved_notebook_holds_each_answer_once_as_markdown(page: LabPage, endless: Path) -> None:
    cell = page.add(f"%%sollol {endless} --temperature 0 --max-tokens 2000 --out saved\ngo")
    page.run(cell)
    length = int(page.ask("print(len(saved.text))"))
    notebook = page.saved()
    (output,) = notebook.cells[cell].outputs
    assert output.output_type == "display_data"
    assert set(output.data) == {"text/markdown", "text/plain"}
    for form in output.data.values():
        assert 0 < len(form) - length < 2000, "the text and the footer"
    assert "widgets" not in notebook.metadata
