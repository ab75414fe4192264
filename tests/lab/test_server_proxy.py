"""The tile in JupyterLab's launcher: it starts a gateway, whose page comes through Jupyter's own port."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import expect

from tests.lab.lab import HeadlessLab
from tests.lab.page import LIMIT_MS
from tests.support.engines import HANG_GUARD_S

pytestmark = [pytest.mark.engine, pytest.mark.lab]


def test_a_tile_of_the_launcher_opens_the_clusters_map(lab: HeadlessLab) -> None:
    launcher = lab.open_launcher()
    launcher.set_default_timeout(LIMIT_MS)
    tile = launcher.locator(".jp-LauncherCard", has_text="sollol cluster")
    expect(tile.locator("img").first).to_be_visible(timeout=LIMIT_MS)
    launcher.screenshot(path=lab.pictures / "launcher.png")
    with launcher.context.expect_page() as opened:
        tile.click()
    page = opened.value
    requested: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    expect(page.locator("#connection")).to_have_text("live", timeout=LIMIT_MS)
    page.reload()  # with all of its requests seen
    expect(page.locator("#connection")).to_have_text("live", timeout=LIMIT_MS)
    address = page.locator("#address").inner_text()
    body = {"model": "demo", "messages": [{"role": "user", "content": "What is a worker?"}]}
    httpx.post(f"{address}/v1/chat/completions", json=body, timeout=HANG_GUARD_S).raise_for_status()
    # Other tests may have left coordinators, which are shown, too.
    expect(page.locator("section.sollol-card", has_text="demo").first).to_be_visible(timeout=LIMIT_MS)
    page.screenshot(path=lab.pictures / "status-page-in-jupyter.png")

    below = page.url
    assert below.endswith("/sollol/")
    assert {url for url in requested if not url.startswith(below)} == set()
    assert complaints == []
    assert address.startswith("http://127.0.0.1:")
    assert not below.startswith(f"{address}/"), "the address is the gateway's, for clients on this machine"
    page.close()
    launcher.close()
