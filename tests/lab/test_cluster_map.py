"""The map's JavaScript in a browser: plain state becomes SVG and tables, patch by patch, whatever it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page

from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.widget.drawing import SOURCE, STYLE
from tests.lab.lab import HeadlessLab
from tests.support.merge_patch import patched, random_state
from tests.support.simulated_cluster import SimulatedCluster, endpoint, node

pytestmark = [pytest.mark.engine, pytest.mark.lab]

# In the page: the module, and a model that does what a front end's model does.
LOAD = """async ([source, style]) => {
    document.head.append(Object.assign(document.createElement('style'), {textContent: style}));
    const url = URL.createObjectURL(new Blob([source], {type: 'text/javascript'}));
    window.map = await import(url);
    class Model {
        constructor(state) { this.values = {state}; this.listeners = []; this.sent = []; }
        get(name) { return this.values[name]; }
        set(name, value) { this.values[name] = value; this.emit(`change:${name}`); }
        on(event, listener) { this.listeners.push([event, listener]); }
        off(event, listener) {
            this.listeners = this.listeners.filter(([name, known]) => name !== event || known !== listener);
        }
        emit(event, ...values) {
            for (const [name, listener] of [...this.listeners]) if (name === event) listener(...values);
        }
        send(content) { this.sent.push(content); }
    }
    window.show = (state) => {
        document.body.innerHTML = '<div id="first" style="width: 900px"></div><div id="second"></div>';
        window.model = new Model(state);
        window.endModel = window.map.default.initialize({model: window.model});
        window.endViews = ['first', 'second'].map(
            id => window.map.default.render({model: window.model, el: document.getElementById(id)}));
    };
    window.change = (patch) => new Promise((done) => {
        window.model.emit('msg:custom', {patch});
        requestAnimationFrame(() => requestAnimationFrame(done));
    });
}"""


@pytest.fixture(scope="module")
def page(lab: HeadlessLab) -> Iterator[Page]:
    """A page with the module loaded, and no notebook."""
    opened = lab.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.evaluate(LOAD, [SOURCE.read_text("utf-8"), STYLE])
    yield opened
    opened.close()
    assert errors == []


def state_of(cluster: SimulatedCluster) -> dict[str, Any]:
    def nobody(_: object) -> None:
        pass

    state: dict[str, Any] = run_blocking(cluster.state.watch(nobody))
    run_blocking(cluster.state.unwatch(nobody))
    return state


def three_workers() -> SimulatedCluster:
    cluster = SimulatedCluster(4, [node(1), node(2, "absent")])
    cluster.run_model("big", [0, 1, 2], counts=[20, 15, 6])
    return cluster


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(f"#first {selector}").all_inner_texts()


# --- state ------------------------------------------------------------------------------------


def test_the_page_applies_patches_as_python_does(page: Page) -> None:
    chance = random.Random(4)
    pairs = [(random_state(chance, 3), random_state(chance, 3)) for _ in range(100)]
    for _, patch in pairs[::2]:
        patch["a"] = None
    in_page = page.evaluate("pairs => pairs.map(([state, patch]) => window.map.patched(state, patch))", pairs)
    assert in_page == [patched(state, patch) for state, patch in pairs]


# --- drawing ----------------------------------------------------------------------------------


def test_layers_are_boxes_as_wide_as_their_share(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(three_workers()))

    widths = page.evaluate(
        "() => [...document.querySelectorAll('#first .sollol-row-planned .sollol-box')]"
        ".map(box => parseFloat(box.getAttribute('width')))"
    )
    assert widths == pytest.approx([100 * units / 41 for units in (20, 15, 6)], abs=0.01)
    planned = [box.splitlines() for box in page.locator("#first .sollol-row-planned text").all_text_contents()]
    assert [line for (line,) in planned] == [
        "0-19", endpoint(0), "20-34", endpoint(1), "35-39 + output", endpoint(2)
    ]  # fmt: skip
    assert page.locator("#first .sollol-row-actual text").all_text_contents() == ["20", "15", "6"]
    time = page.locator("#first .sollol-row-time text").all_text_contents()
    assert [float(share.removesuffix(" %")) for share in time] == pytest.approx([48, 36, 17], abs=1)


def test_each_worker_and_node_shows_its_state_as_mark_word_and_reason(page: Page) -> None:
    cluster = three_workers()
    cluster.change_worker(3, "down", "nothing listens there; start it", "worker.lost")
    page.evaluate("state => window.show(state)", state_of(cluster))

    row = page.locator(f"#first tr[data-endpoint='{endpoint(3)}']")
    assert row.get_attribute("data-state") == "down"
    assert row.inner_text().split("\t")[:2] == [endpoint(3), "✕ down"]
    assert row.inner_text().endswith("nothing listens there; start it")
    held = page.locator(f"#first tr[data-endpoint='{endpoint(0)}']").inner_text()
    for fact in ("● held", "29.4 GiB free of 32.0 GiB", "RPC 7.0.0", "held by the coordinator of big"):
        assert fact in held
    assert "○ ready" in page.locator("#first tr[data-endpoint='http://10.0.1.1:11434']").inner_text()
    assert texts(page, ".sollol-log > div")[0].endswith("nothing listens there; start it")


def test_hostile_names_are_text(page: Page) -> None:
    hostile = '"><script>window.hit = 1</script><img src=x onerror="window.hit = 1"> ${1}'
    cluster = SimulatedCluster(3, [node(1, "absent", last_error=hostile, url=hostile)])
    cluster.run_model(hostile, [0, 1])
    cluster.change_worker(0, "down", hostile, hostile)
    page.evaluate("state => window.show(state)", state_of(cluster))

    assert page.evaluate("() => window.hit") is None
    assert page.locator("#first img, #first script").count() == 0
    assert hostile in page.locator("#first").inner_text()


def test_sixty_four_workers_fit_into_one_line_and_the_lost_one_is_first(page: Page) -> None:
    cluster = SimulatedCluster(64)
    cluster.run_model("big", range(15))
    cluster.change_worker(50, "down", "gone", "worker.lost")
    page.evaluate("state => window.show(state)", state_of(cluster))

    assert "64 workers: 15 held, 48 free, 1 down" in page.locator("#first").inner_text()
    assert page.locator("#first .sollol-mark[title]").count() == 64
    assert page.locator("#first tbody tr[data-endpoint]").first.get_attribute("data-endpoint") == endpoint(50)
    overflowing = page.evaluate(
        """() => [...document.querySelectorAll('#first .sollol-box text')].filter(label =>
            label.getComputedTextLength() + 6 > label.parentNode.width.baseVal.value)
            .map(label => label.textContent)"""
    )
    assert overflowing == []


def test_an_empty_cluster_says_so(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(SimulatedCluster(0)))
    assert page.locator("#first [data-empty]").get_attribute("data-empty") == "no coordinator is running"
    assert "0 workers" in page.locator("#first").inner_text()
    assert "Ollama" not in page.locator("#first").inner_text()


# --- patches ----------------------------------------------------------------------------------


def test_a_patch_is_drawn_in_all_views_and_touches_only_what_it_changes(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(three_workers()))
    page.evaluate("() => document.querySelectorAll('tr, section').forEach(row => { row.seen = true; })")
    patch = {"workers": {endpoint(1): {"state": "down", "description": "gone", "free": None, "used": None}}}
    page.evaluate("patch => window.change(patch)", patch)

    for view in ("first", "second"):
        row = page.locator(f"#{view} tr[data-endpoint='{endpoint(1)}']")
        assert row.get_attribute("data-state") == "down"
        assert "GiB" not in row.inner_text()
        redrawn = page.evaluate(
            f"() => [...document.querySelectorAll('#{view} tr[data-endpoint], #{view} section')]"
            ".filter(row => !row.seen).map(row => row.dataset.endpoint)"
        )
        assert redrawn == [endpoint(1)]
    order = page.locator("#first tr[data-endpoint^='10.']").evaluate_all(
        "rows => rows.map(row => row.dataset.endpoint)"
    )
    assert order == [endpoint(number) for number in range(4)]


def test_a_lost_gateway_and_the_end_of_the_router_are_shown(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(three_workers()))
    reason = "no gateway answers at http://head:11440; trying again"
    page.evaluate("patch => window.change(patch)", {"unreachable": reason})
    assert f"· {reason}" in page.locator("#first .sollol-bad").first.inner_text()
    page.evaluate("patch => window.change(patch)", {"unreachable": None})
    assert reason not in page.locator("#first").inner_text()
    page.evaluate("patch => window.change(patch)", {"closed": True})
    assert "the router was closed; this is its last state" in page.locator("#first").inner_text()


def test_a_model_is_shown_loading_and_then_running(page: Page) -> None:
    page.evaluate(
        "state => window.show(state)", {"starting": {"big": {"description": "1 of 4 GiB", "share": 0.25}}}
    )
    assert page.locator("#first progress").get_attribute("value") == "0.25"
    page.evaluate(
        "patch => window.change(patch)", {"starting": {"big": {"description": "2 of 4 GiB", "share": 0.5}}}
    )
    assert page.locator("#first progress").get_attribute("value") == "0.5"
    coordinators = state_of(three_workers())["coordinators"]
    page.evaluate("patch => window.change(patch)", {"starting": {"big": None}, "coordinators": coordinators})
    assert page.locator("#first progress").count() == 0
    assert page.locator("#first section").count() == 1


def test_folded_details_stay_folded(page: Page) -> None:
    state = state_of(three_workers())
    page.evaluate("state => window.show(state)", state)
    assert page.locator("#first details[open]").count() == 1
    page.locator("#first summary").click()
    (url,) = state["coordinators"]
    reasons = ["over 3 of 4 workers", "left out: gpu4"]
    page.evaluate("patch => window.change(patch)", {"coordinators": {url: {"running": 1, "reasons": reasons}}})
    assert "1/4 slots busy" in page.locator("#first section").inner_text()
    assert page.locator("#first details[open]").count() == 0
    page.locator("#first summary", has_text="why: over 3 of 4 workers").click()
    page.evaluate("patch => window.change(patch)", {"coordinators": {url: {"running": 2}}})
    assert page.locator("#first details[open]").inner_text().splitlines()[1:] == ["left out: gpu4"]


def test_a_view_drawn_before_it_is_in_the_page_is_complete(page: Page) -> None:
    state = state_of(three_workers())
    rows = page.evaluate(
        """state => {
            window.show({});
            const el = document.createElement('div');
            const end = window.map.default.render({model: {...window.model, get: () => state,
                on: () => {}, off: () => {}, send: () => {}}, el});
            end();
            return el.querySelectorAll('tr[data-endpoint]').length;
        }""",
        state,
    )
    assert rows == 6


def test_views_report_when_they_open_and_close_and_leave_nothing(page: Page) -> None:
    page.evaluate("state => window.show(state)", {})
    page.evaluate("() => { window.endViews.forEach(end => end()); window.endModel(); }")
    sent = page.evaluate("() => window.model.sent")
    assert [report["shown"] for report in sent] == [True, True, False, False]
    assert len({report["view"] for report in sent}) == 2
    assert page.evaluate("() => window.model.listeners") == []
