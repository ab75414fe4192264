"""A notebook in a JupyterLab page, driven as a person does: keys, the toolbar, the menu.

Every wait is for something that the page shows. JupyterLab's class names and `data-` attributes stand in this
module only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Dialog, Locator, Page

from tests.lab.server import LabServer

LIMIT_MS = 120_000

CELLS = ".jp-NotebookPanel .jp-Cell"
READY = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']"
COMPLETIONS = ".jp-Completer:not(.lm-mod-hidden) .jp-Completer-item"

# In the page: the number of a cell's last run, "*" while it runs or waits for that, "" if it never ran.
PROMPT = """index => document.querySelectorAll('.jp-NotebookPanel .jp-Cell')[index]
    .querySelector('.jp-InputPrompt').textContent.replace(/[^\\d*]/g, '')"""
PROMPTS = """() => [...document.querySelectorAll('.jp-NotebookPanel .jp-CodeCell .jp-InputPrompt')]
    .map(prompt => prompt.textContent.replace(/[^\\d*]/g, ''))"""
# In the page: note the text of a cell's output whenever it changes.
WATCH = """index => {
    const cell = document.querySelectorAll('.jp-NotebookPanel .jp-Cell')[index];
    window.seenTexts = [];
    const look = () => {
        const text = cell.querySelector('.jp-Cell-outputArea').innerText;
        if (text !== window.seenTexts.at(-1)) window.seenTexts.push(text);
    };
    new MutationObserver(look).observe(cell, {subtree: true, childList: true, characterData: true});
}"""


class LabPage:
    """One open notebook. Cells are counted from 0, Markdown cells too.

    Attributes:
        notebook: its file.
        received_bytes: size of each message from the kernels, in the order they came.
    """

    def __init__(self, page: Page, server: LabServer, notebook: Path, pictures: Path) -> None:
        self.page = page
        self.received_bytes: list[int] = []
        self._server = server
        self.notebook = notebook
        self._pictures = pictures
        page.set_default_timeout(LIMIT_MS)
        page.on("websocket", lambda socket: socket.on("framereceived", self._received))

    def load(self, *, url: str = "") -> None:
        """Open the notebook and wait until its kernel is ready.

        Args:
            url: another address of the server.
        """
        with self._kernel_connected():
            self.page.goto((url or self._server.url) + self._server.page_of(self.notebook.name))
        self.page.wait_for_selector(CELLS)
        self.wait_idle()
        # The file browser takes room.
        if self.page.locator("#jp-left-stack").is_visible():
            self.page.keyboard.press("Control+b")
            self.page.locator("#jp-left-stack").wait_for(state="hidden")

    def close_page(self) -> None:
        """Close the page, and leave the kernel running."""
        self.page.close()

    def reload(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Load the page again, also with changes that are not saved, and wait until its kernel is ready.

        Args:
            meanwhile: called once the old page is gone.
        """
        leave = Dialog.accept
        self.page.on("dialog", leave)
        with self._kernel_connected():
            self.page.reload()
            self.page.remove_listener("dialog", leave)
            meanwhile()
        self.page.wait_for_selector(CELLS)
        self.wait_idle()

    def open_again(self) -> None:
        """Open the notebook in a new page, and wait until its kernel is ready."""
        size = self.page.viewport_size
        self.page = self.page.context.new_page()
        if size is not None:
            self.page.set_viewport_size(size)
        self.page.set_default_timeout(LIMIT_MS)
        self.load()

    def dismiss_connection_errors(self) -> None:
        """From now on dismiss the dialog that says that the server could not be reached."""
        dialog = self.page.locator(".jp-Dialog", has_text="Server Connection Error")
        self.page.add_locator_handler(dialog, lambda found: found.locator(".jp-Dialog-button").click())

    def close(self) -> None:
        """Close the page and end the notebook's kernel."""
        self.page.close()
        self._server.end_kernel(self.notebook.name)

    # --- cells --------------------------------------------------------------------------------

    def cell(self, index: int) -> Locator:
        return self.page.locator(CELLS).nth(index)

    def add(self, source: str = "") -> int:
        """Add a cell at the end; its index."""
        count = self.page.locator(CELLS).count()
        self.cell(count - 1).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("b")
        self.cell(count).wait_for()
        if source:
            self.type_in_cell(count, source)
        return count

    def type_in_cell(self, index: int, text: str) -> None:
        """Write at the end of a cell. Lines are typed as they stand: no bracket is closed by itself."""
        self._editor(index).click()
        self.page.keyboard.press("ControlOrMeta+End")
        self.page.keyboard.insert_text(text)

    def source(self, index: int) -> str:
        """What is in a cell's editor."""
        return "\n".join(self._editor(index).locator(".cm-line").all_inner_texts())

    # --- running ------------------------------------------------------------------------------

    def start(self, index: int) -> None:
        """Run a cell, and wait only until the page has taken notice."""
        before = self._prompt(index)
        self._editor(index).click()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(f"([index, before]) => ({PROMPT})(index) !== before", arg=[index, before])

    def wait_done(self, index: int) -> None:
        """Wait until a cell that was started has run."""
        self.page.wait_for_function(f"index => /^\\d+$/.test(({PROMPT})(index))", arg=index)

    def run(self, index: int) -> str:
        """Run a cell to its end; the text of its output."""
        self.start(index)
        self.wait_done(index)
        return self.output_text(index)

    def ask(self, source: str) -> str:
        """Run a new cell at the end; the text of its output."""
        return self.run(self.add(source))

    def run_all(self) -> None:
        """Run all cells of a freshly opened notebook by the menu, to the end.

        Raises:
            AssertionError: a cell failed, so that those below did not run; with what the cells show.
        """
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(f"() => {{ const all = ({PROMPTS})(); return all[0] && !all.includes('*'); }}")
        outputs = self.page.locator(f"{CELLS} .jp-Cell-outputArea").all_inner_texts()
        assert self.page.evaluate(PROMPTS)[-1], f"a cell failed: {outputs}"

    def is_idle(self) -> bool:
        """Whether the kernel has nothing to do."""
        return self.page.locator(READY).count() > 0

    def clear_output(self, index: int) -> None:
        """Take away what a cell shows, by the menu."""
        self.cell(index).locator(".jp-InputPrompt").click()
        self.page.get_by_role("menuitem", name="Edit", exact=True).click()
        self.page.get_by_role("menuitem", name="Clear Cell Output", exact=True).click()
        self.output(index).locator(".jp-OutputArea-output").first.wait_for(state="detached")

    def press_stop(self) -> None:
        """The stop button of the toolbar."""
        self.page.locator(".jp-NotebookPanel-toolbar [data-jp-item-name='interrupt']").click()

    def wait_idle(self) -> None:
        """Wait until the kernel has nothing to do."""
        self.page.wait_for_selector(READY)

    # --- what is shown ------------------------------------------------------------------------

    def output(self, index: int) -> Locator:
        return self.cell(index).locator(".jp-Cell-outputArea")

    def output_text(self, index: int) -> str:
        """A cell's output as a person reads it, prompts left out."""
        return "\n".join(self.output(index).locator(".jp-OutputArea-output").all_inner_texts()).strip()

    def output_html(self, index: int) -> str:
        """A cell's output as it stands in the page."""
        return self.output(index).inner_html()

    def wait_for_text(self, index: int, text: str | re.Pattern[str]) -> None:
        """Wait until a cell's output contains this text, or one that this pattern finds."""
        self.output(index).get_by_text(text).first.wait_for()

    def watch(self, index: int) -> None:
        """From now on note what a cell shows, at each change."""
        self.page.evaluate(WATCH, index)

    def seen(self) -> list[str]:
        """The texts that the watched cell has shown, each as long as it stood."""
        texts: list[str] = self.page.evaluate("window.seenTexts")
        return texts

    def press_tab_and_read_completions(self) -> list[str]:
        """Press Tab where the cursor is; what is offered. One that fits alone is put in and not offered: []."""
        line = "document.activeElement.innerText"
        before = self.page.evaluate(line)
        self.page.keyboard.press("Tab")
        self.page.wait_for_function(
            f"([items, before]) => document.querySelector(items) || {line} !== before", arg=[COMPLETIONS, before]
        )
        return self.page.locator(f"{COMPLETIONS} .jp-Completer-match").all_inner_texts()

    def choose_completion(self, text: str) -> None:
        """Go down to a completion that is offered, and take it with Enter."""
        chosen = self.page.locator(f"{COMPLETIONS}.jp-mod-active .jp-Completer-match")
        for _ in range(self.page.locator(COMPLETIONS).count()):
            if chosen.inner_text() == text:
                break
            self.page.keyboard.press("ArrowDown")
        self.page.keyboard.press("Enter")
        self.page.locator(COMPLETIONS).first.wait_for(state="detached")

    def screenshot(self, name: str, clip_rows: Sequence[int] | None = None) -> Path:
        """A picture of the notebook's panel, or of the pixel rows from the first to the last of `clip_rows`."""
        path = self._pictures / f"{name}.png"
        box = self.page.locator(".jp-NotebookPanel").bounding_box()
        assert box is not None
        top, bottom = clip_rows or (0, box["height"])
        clip: Any = {"x": box["x"], "y": box["y"] + top, "width": box["width"], "height": bottom - top}
        self.page.screenshot(path=path, clip=clip)
        return path

    # --- the file -----------------------------------------------------------------------------

    def save(self) -> Path:
        """Press the save button and wait until it is saved; the file."""
        self.page.locator(".jp-NotebookPanel-toolbar [data-jp-item-name='save']").click()
        self.page.locator(".lm-DockPanel-tabBar .jp-mod-dirty").wait_for(state="detached")
        return self.notebook

    def saved(self) -> nbformat.NotebookNode:
        """Save, and read the file."""
        return nbformat.read(self.save(), as_version=4)

    def _kernel_connected(self) -> AbstractContextManager[object]:
        """`with` it while the page loads: it ends once the page connects to a kernel. Before that, the page says
        that it is idle, too."""
        return self.page.expect_websocket(lambda socket: "/channels" in socket.url)

    def _editor(self, index: int) -> Locator:
        return self.cell(index).locator(".cm-content")

    def _prompt(self, index: int) -> str:
        self.cell(index).locator(".jp-InputPrompt").wait_for(state="attached")  # cells come one by one
        prompt: str = self.page.evaluate(PROMPT, index)
        return prompt

    def _received(self, payload: str | bytes) -> None:
        self.received_bytes.append(len(payload))
