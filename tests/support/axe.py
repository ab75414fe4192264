"""What axe-core finds in a page: whether people can read it and use it by keyboard and with a screen reader."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

# JupyterLab's body has no height and clips, and all of the page is positioned in it. To a browser that is visible;
# axe-core would take all texts for clipped, and skip what concerns those that can be seen.
GIVE_BODY_HEIGHT = (
    "() => { const { style } = document.body; const before = style.minHeight;"
    " style.minHeight = '100vh'; return before; }"
)


def assert_accessible(page: Page, selector: str) -> None:
    """Check a part of a page by all rules of axe-core, those of WCAG 2.2 AA and of good practice. What is not in
    the window is not checked for contrast.

    Raises:
        AssertionError: it breaks one; with the report.
    """
    before = page.evaluate(GIVE_BODY_HEIGHT)
    results = Axe().run(
        page, selector, {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
    )
    page.evaluate("before => { document.body.style.minHeight = before; }", before)
    assert results.violations_count == 0, results.generate_report()
    passed = {rule["id"] for rule in results.response["passes"]}
    assert "color-contrast" in passed, f"no visible text was checked: {selector}"
