"""Run a notebook in a real JupyterLab in headless Chromium and take a picture of it.

    python tools/screenshot.py notebooks/01_quickstart.ipynb notebooks/images/quickstart.png

Needs `pip install playwright jupyterlab` and a Chromium on PATH (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

TIMEOUT_MS = 180_000
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--clip", type=int, nargs=2, metavar=("TOP", "BOTTOM"), help="only these pixel rows")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if chromium is None:
        print("no Chromium on PATH; install it, e.g. `apt-get install chromium`", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(arguments.notebook, folder)
        settings = Path(folder, "settings", "@jupyterlab", "apputils-extension")
        settings.mkdir(parents=True)
        theme = f"JupyterLab {arguments.theme.capitalize()}"
        (settings / "themes.jupyterlab-settings").write_text(f'{{"theme": "{theme}"}}')
        token = secrets.token_hex(16)
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"],
            cwd=folder,
            env={
                **os.environ,
                "JUPYTER_TOKEN": token,
                "JUPYTERLAB_SETTINGS_DIR": f"{folder}/settings",
                "JUPYTERLAB_WORKSPACES_DIR": f"{folder}/workspaces",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert lab.stderr is not None
            url = next(match[0] for line in lab.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+/", line)))
            take(chromium, f"{url}lab/tree/{arguments.notebook.name}?token={token}&reset", arguments)
        finally:
            lab.terminate()
            lab.wait(30)
    return 0


def take(chromium: str, address: str, arguments: argparse.Namespace) -> None:
    """Open the notebook, run all cells, wait for the end, take the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1250, "height": arguments.height})
        page.goto(address, timeout=TIMEOUT_MS)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=TIMEOUT_MS)
        page.wait_for_timeout(2000)
        if page.get_by_role("button", name="Select", exact=True).count():
            page.get_by_role("button", name="Select", exact=True).click()
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=TIMEOUT_MS)
        for button in ("Select Kernel", "No", "Hide"):  # dialogs and news of a first start
            found = page.get_by_role("button", name=button, exact=True)
            if found.count():
                found.first.click()
        page.keyboard.press("Control+b")  # the file browser takes room
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_text("Restart Kernel and Run All Cells", exact=False).first.click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        page.wait_for_timeout(3000)
        page.wait_for_function(
            "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle' &&"
            " [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
            ".every(one => /\\[\\d+\\]/.test(one.textContent))",
            timeout=TIMEOUT_MS,
        )
        page.wait_for_timeout(1000)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        box = page.locator(".jp-NotebookPanel").first.bounding_box()
        assert box is not None
        top, bottom = arguments.clip or (0, box["height"])
        clip = {"x": box["x"], "y": box["y"] + top, "width": box["width"], "height": bottom - top}
        page.screenshot(path=arguments.picture, clip=clip)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
