"""JupyterLab in headless Chromium for the tests of this folder.

The pictures that they take, and one of what a failed test saw, are in `artifacts/lab`. Without a Chromium they are
skipped, and the end of the run says how many; where `CI` is set that is a failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.lab import NO_CHROMIUM, HeadlessLab, find_chromium, headless_lab
from tests.lab.page import LabPage

PICTURES = Path(__file__).parents[2] / "artifacts" / "lab"


@pytest.fixture(scope="package")
def lab(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadlessLab]:
    """One JupyterLab for all tests here, whose kernels have a state folder of their own."""
    chromium = find_chromium()
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail(NO_CHROMIUM)
        pytest.skip(NO_CHROMIUM)
    folder = tmp_path_factory.mktemp("lab")
    # One thread: a small model is quicker so, and threads that wait for each other crawl on a busy machine.
    own = {"SOLLOL_STATE_DIR": str(folder / "state"), "LLAMA_ARG_THREADS": "1"}
    try:
        with headless_lab(chromium, folder, PICTURES, **own) as running:
            yield running
    finally:
        stop = [sys.executable, "-m", "sollol_nb", "stop", "--all"]
        subprocess.run(stop, env=os.environ | own, check=True, capture_output=True, timeout=60)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Take a picture of what a failed test saw."""
    report = yield
    page = getattr(item, "funcargs", {}).get("page")
    if report.when == "call" and report.failed and isinstance(page, LabPage) and not page.page.is_closed():
        page.screenshot("failed-" + re.sub(r"\W+", "-", item.name))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly how many tests wanted a Chromium and had none."""
    skipped = sum(NO_CHROMIUM in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.write_line(f"{skipped} TESTS WERE SKIPPED: {NO_CHROMIUM}", yellow=True, bold=True)
