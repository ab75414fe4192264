"""The status page in a browser: the widget's map, live, on a gateway whose machines die and which dies itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from sollol_nb.llama_cpp.engine.check import Engine
from tests.chaos.machines import Cluster
from tests.lab.conftest import PICTURES
from tests.lab.lab import NO_CHROMIUM, find_chromium
from tests.support.axe import assert_accessible
from tests.support.engines import HANG_GUARD_S, REPOSITORY, eventually, unused_ports, with_variable
from tests.support.gateway import GatewayProcess, end_engines, running_gateway

pytestmark = [pytest.mark.engine, pytest.mark.lab]

LIMIT_MS = HANG_GUARD_S * 1000


class Site:
    """A gateway over machines that can fail, at an address that stays the same when it is started again."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self.port = unused_ports(1)  # no other connection gets this port while the gateway is dead
        self.url = f"http://127.0.0.1:{self.port}"
        self._stack = stack
        self.start()

    def start(self) -> None:
        endpoints = ",".join(machine.endpoint for machine in self.cluster.machines)
        settings = {"RPC_BACKENDS": endpoints, "SOLLOL_KEEP_ALIVE": "600s"}  # however slow the page is
        running = running_gateway("--port", str(self.port), variables=settings)
        self.gateway: GatewayProcess = self._stack.enter_context(running)

    def ask(self) -> None:
        body = {"model": "demo:sharded", "messages": [{"role": "user", "content": "What is a worker?"}]}
        with self.gateway.client() as client:
            client.post("/v1/chat/completions", json=body).raise_for_status()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder in which only this module's gateways keep their engines."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLLOL_STATE_DIR", str(folder))
        yield folder
        end_engines(folder)
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(folder)), "no process is left")


@pytest.fixture(scope="module")
def site(engine: Engine, state: Path) -> Iterator[Site]:
    with Cluster(engine) as cluster, ExitStack() as stack:
        yield Site(cluster, stack)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail(NO_CHROMIUM)
        pytest.skip(NO_CHROMIUM)
    PICTURES.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=LIMIT_MS)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium)
        yield opened
        opened.close()


class Visit:
    """The page, what it requested and what it complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requested: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def row(self, endpoint: str) -> str:
        return f"tr[data-endpoint='{endpoint}']"


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visit]:
    site.cluster.make_well()
    site.ask()
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(LIMIT_MS)
    opened = Visit(page)
    page.goto(site.url)
    expect(page.locator("#connection")).to_have_text("live")
    yield opened
    page.close()


def test_it_shows_the_layers_the_machines_and_how_to_connect(visit: Visit, site: Site) -> None:
    page = visit.page
    expect(page.locator("section.sollol-card")).to_have_count(1)
    expect(page.locator(".sollol-row-planned .sollol-strong")).to_have_text(["0-3", "4-7", "8-11 + output"])
    expect(page.locator("tr[data-state='held']")).to_have_count(3)
    expect(page.locator("tr[data-state='free']")).to_have_count(1)
    colors = page.locator(".sollol-box").evaluate_all("boxes => boxes.map(box => box.style.backgroundColor)")
    assert all(colors), "the policy allows the layers their colours"
    assert_accessible(page, "html")
    expect(page.locator("header")).to_contain_text(site.url)
    expect(page.locator("#connect")).to_contain_text(f"OPENAI_BASE_URL={site.url}/v1")
    expect(page.locator("#connect")).to_contain_text(f"%sollol_connect {site.url}")
    page.screenshot(path=PICTURES / "status-page.png", full_page=True)

    assert visit.complaints == []
    elsewhere = [url for url in visit.requested if not url.startswith(f"{site.url}/")]
    assert elsewhere == []


def test_a_request_is_counted_on_the_page(visit: Visit, site: Site) -> None:
    summary = visit.page.locator("#cluster .sollol-summary")
    before = httpx.get(f"{site.url}/cluster").json()["totals"]["total"]
    expect(summary).to_contain_text(re.compile(rf"\b{before} requests? so far"))
    site.ask()
    expect(summary).to_contain_text(f"{before + 1} requests so far")


def test_a_killed_worker_is_shown_as_down(visit: Visit, site: Site) -> None:
    page = visit.page
    for state in ("free", "held"):
        endpoint = page.locator(f"tr[data-state='{state}']").first.get_attribute("data-endpoint")
        assert endpoint is not None
        site.cluster.machine(endpoint).kill()
        expect(page.locator(visit.row(endpoint))).to_have_attribute("data-state", "down")
        expect(page.get_by_role("listitem").filter(has_text=endpoint).first).to_be_visible()
    expect(page.locator(".sollol-log")).to_contain_text("lost worker")
    expect(page.get_by_role("button", name="Remove")).to_have_count(0)  # the page changes nothing
    page.screenshot(path=PICTURES / "status-page-lost.png", full_page=True)
    assert_accessible(page, "html")
    assert visit.complaints == []


def test_a_page_says_that_its_gateway_is_gone_and_is_live_with_the_next_one(visit: Visit, site: Site) -> None:
    page, notice = visit.page, visit.page.get_by_role("alert")
    expect(notice).to_be_hidden()
    site.gateway.process.kill()
    expect(notice).to_contain_text("The gateway does not answer; trying again.")
    expect(page.locator("#connection")).to_have_text("not connected")
    page.screenshot(path=PICTURES / "status-page-gone.png", full_page=True)

    site.gateway.wait()
    site.start()
    expect(page.locator("#connection")).to_have_text("live")
    expect(notice).to_be_hidden()
    site.ask()
    expect(page.locator("tr[data-state='held']")).to_have_count(3)
    assert not [text for text in visit.complaints if "ERR_" not in text], "only that nothing answered"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_a_narrow_window(visit: Visit, scheme: str) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 400, "height": 900})
    expect(page.locator("section.sollol-card")).to_have_count(1)
    page.locator("section.sollol-card summary").click()
    page.screenshot(path=PICTURES / f"status-page-narrow-{scheme}.png", full_page=True)
    wide = page.evaluate(
        """() => {
            if (document.documentElement.scrollWidth > document.documentElement.clientWidth) return ['the page'];
            const right = document.documentElement.clientWidth;
            return [...document.querySelectorAll('body *')]
                .filter(part => part.getBoundingClientRect().right > right + 1)
                .map(part => part.outerHTML.slice(0, 200));
        }"""
    )
    assert wide == []
    assert_accessible(page, "html")
    assert visit.complaints == []


def test_a_browser_gives_the_key_once_as_the_password(browser: Browser, tmp_path: Path) -> None:
    own = {"SOLLOL_STATE_DIR": str(tmp_path)}
    add = [sys.executable, "-m", "sollol_nb", "key", "add", "reader"]
    made = subprocess.run(add, env=os.environ | own, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    (key,) = re.findall(r"\bsnb-\S+", made.stdout)
    with running_gateway("--require-key", variables=own) as gateway:
        with gateway.client() as stranger:
            refused = stranger.get("/")
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith("Basic ")
        with browser.new_context(http_credentials={"username": "anybody", "password": key}) as reader:
            page = reader.new_page()
            page.set_default_timeout(LIMIT_MS)
            page.goto(gateway.url)
            expect(page.locator("#connection")).to_have_text("live")
            assert key not in page.content()
