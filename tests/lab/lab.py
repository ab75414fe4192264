"""One JupyterLab and one headless Chromium, and notebooks opened in them.

Used by the tests (`lab` in conftest.py) and by `tools/screenshot.py`::

    with headless_lab(chromium, folder, pictures, SOLLOL_STATE_DIR=...) as lab:
        page = lab.open(["%load_ext sollol_nb", "%sollol_cluster"], theme="dark")
        page.run_all()
        page.screenshot("cluster")

Playwright's blocking API leaves the main thread's event loop running while it is open, so `asyncio.run` cannot be
used meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import nbformat
from playwright.sync_api import BrowserContext, Page, sync_playwright

from tests.lab.page import LabPage
from tests.lab.server import LabServer

NO_CHROMIUM = "no Chromium to test with: install one (`apt-get install chromium`), or set SOLLOL_TEST_CHROMIUM"

_ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
_KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def find_chromium() -> Path | None:
    """The browser: `SOLLOL_TEST_CHROMIUM`, else one on PATH, else where macOS and Windows keep theirs."""
    chosen = os.environ.get("SOLLOL_TEST_CHROMIUM")
    if chosen:
        return Path(chosen)
    if on_path := next(filter(None, map(shutil.which, _ON_PATH)), None):
        return Path(on_path)
    return next((path for path in map(Path, _ELSEWHERE) if path.exists()), None)


class HeadlessLab:
    """A running JupyterLab with a browser in front of it."""

    def __init__(self, server: LabServer, browser: BrowserContext, pictures: Path) -> None:
        self._server = server
        self._browser = browser
        self.pictures = pictures
        self._opened = 0

    @property
    def url(self) -> str:
        """The server's address."""
        return self._server.url

    def open(
        self,
        notebook: Sequence[str] | Path,
        *,
        theme: Literal["light", "dark"] = "light",
        viewport: tuple[int, int] = (1200, 900),
    ) -> LabPage:
        """Open a notebook in a page of its own, with a fresh kernel.

        Args:
            notebook: the sources of its code cells, or a file, which is copied.
            theme: of JupyterLab.
            viewport: width and height of the page in CSS pixels.
        """
        self._opened += 1
        if isinstance(notebook, Path):
            path = self._server.notebooks / f"{self._opened}-{notebook.name}"
            shutil.copy(notebook, path)
        else:
            path = self._server.notebooks / f"{self._opened}.ipynb"
            cells = [nbformat.v4.new_code_cell(source) for source in notebook]
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=_KERNEL), path)
        width, height = viewport
        page = self._browser.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=theme)
        opened = LabPage(page, self._server, path, self.pictures)
        opened.load()
        return opened

    @contextmanager
    def beside(self, server: LabServer) -> Iterator[HeadlessLab]:
        """Another server in front of the same browser, which is started and stopped here."""
        server.start()
        try:
            yield HeadlessLab(server, self._browser, self.pictures)
        finally:
            server.stop()

    def open_launcher(self) -> Page:
        """JupyterLab's launcher in a separate page."""
        page = self.new_page()
        page.goto(f"{self._server.url}lab?token={self._server.token}&reset")
        return page

    def new_page(self) -> Page:
        """An empty page of the browser, for what needs no notebook."""
        return self._browser.new_page()


@contextmanager
def headless_lab(
    chromium: Path, folder: Path, pictures: Path, *, scale: float = 1, **environment: str
) -> Iterator[HeadlessLab]:
    """Start both; end both, with all pages and kernels, on leaving.

    Args:
        chromium: the browser, of `find_chromium`.
        folder: for the server's own files; a fresh one.
        pictures: folder of the screenshots.
        scale: pixels of a picture for each CSS pixel of the page.
        environment: more environment variables for the kernels.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    server = LabServer(folder, **environment)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        try:
            server.start()
            yield HeadlessLab(server, browser.new_context(device_scale_factor=scale), pictures)
        finally:
            browser.close()
            server.stop()
