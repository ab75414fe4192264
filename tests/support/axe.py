"""What axe-core finds in a page: whether people can read it and use it by keyboard and with a screen reader."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page


def assert_accessible(page: Page, selector: str) -> None:
    """Check a part of a page by all rules of axe-core, those of WCAG 2.2 AA and of good practice.

    Raises:
        AssertionError: it breaks one; with the report.
    """
    results = Axe().run(page, selector, {"resultTypes": ["violations"]})
    assert results.response["passes"], f"nothing was checked: {selector}"
    assert results.violations_count == 0, results.generate_report()
