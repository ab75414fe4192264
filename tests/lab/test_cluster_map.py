"""The map's JavaScript in a browser: plain state becomes cards and rows, patch by patch, whatever it holds."""

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
        constructor(state) { this.values = {state, can_fix: true}; this.listeners = []; this.sent = []; }
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
    opened.evaluate(LOAD, [SOURCE, STYLE])
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
        ".map(box => box.getBoundingClientRect().width)"
    )
    assert [width / sum(widths) for width in widths] == pytest.approx(
        [units / 41 for units in (20, 15, 6)], abs=0.01
    )
    assert page.locator("#first .sollol-row-planned bdi").all_text_contents() == [
        "0-19", "10.0.0.10", "20-34", "10.0.0.11", "35-39 + output", "10.0.0.12"
    ]  # fmt: skip
    assert page.locator("#first .sollol-row-actual").count() == 0, "they are as planned"
    time = page.locator("#first .sollol-row-time bdi").all_text_contents()
    assert [float(share.removesuffix(" %")) for share in time] == pytest.approx([48, 36, 17], abs=1)
    said = page.locator("#first .sollol-row-planned").get_attribute("aria-label")
    assert said is not None
    assert said.startswith(f"layers: {endpoint(0)}, layers 0-19, ")


def test_each_worker_and_node_is_one_line_with_its_state(page: Page) -> None:
    cluster = three_workers()
    cluster.change_worker(3, "down", "nothing listens there; start it", "worker.lost")
    page.evaluate("state => window.show(state)", state_of(cluster))

    row = page.locator(f"#first tr[data-endpoint='{endpoint(3)}']")
    assert row.get_attribute("data-state") == "down"
    assert [cell.strip() for cell in row.inner_text().split("\t")[:2]] == [endpoint(3), "down"]
    assert f"{endpoint(3)}: nothing listens there; start it" in texts(page, ".sollol-problem-text")[0]
    held = page.locator(f"#first tr[data-endpoint='{endpoint(0)}']").inner_text()
    for fact in ("held", "29.4 of 32.0 GiB free", "0.4 ms", "big"):
        assert fact in held
    assert "ready" in page.locator("#first tr[data-endpoint='http://10.0.1.1:11434']").inner_text()
    assert texts(page, ".sollol-event-text")[0].endswith("nothing listens there; start it")
    heights = page.locator("#first .sollol-workers tbody tr").evaluate_all(
        "rows => rows.map(row => row.clientHeight)"
    )
    assert max(heights) - min(heights) <= 1, "each row is one line"


def test_columns_without_any_content_are_left_out(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(SimulatedCluster(2)))
    shown = page.locator("#first .sollol-workers thead th:visible").all_inner_texts()
    assert shown == ["Worker", "State", "Memory", "Round trip"]


def test_hostile_names_are_text(page: Page) -> None:
    hostile = '"><script>window.hit = 1</script><img src=x onerror="window.hit = 1"> ${1}'
    cluster = SimulatedCluster(3, [node(1, "absent", last_error=hostile, url=hostile)])
    cluster.run_model(hostile, [0, 1])
    cluster.change_worker(0, "down", hostile, hostile)
    page.evaluate("state => window.show(state)", state_of(cluster))

    assert page.evaluate("() => window.hit") is None
    assert page.locator("#first img, #first script").count() == 0
    assert hostile in page.locator("#first").inner_text()


def test_sixty_four_workers_have_a_mark_each_and_the_dead_ones_unfold(page: Page) -> None:
    cluster = SimulatedCluster(64)
    cluster.run_model("big", range(15))
    for number in range(50, 60):
        cluster.change_worker(number, "down", "gone", "worker.lost")
    page.evaluate("state => window.show(state)", state_of(cluster))

    heading = texts(page, ".sollol-workers .sollol-heading")[0].split()
    assert heading[:2] == ["64", "workers"]
    assert page.locator("#first .sollol-mark[title]").count() == 64
    dead = page.locator("#first .sollol-fold", has_text="10 workers")
    assert dead.locator("tr").count() == 10
    assert not dead.locator("tr").first.is_visible()
    dead.locator("summary").focus()
    page.keyboard.press("Enter")
    assert dead.locator("tr").first.is_visible()
    (problem,) = texts(page, ".sollol-problem-text")
    assert problem.startswith(f"10 workers do not answer: {endpoint(50)}")
    overflowing = page.evaluate(
        """() => [...document.querySelectorAll('#first .sollol-box')]
            .filter(box => box.scrollHeight > box.clientHeight).map(box => box.textContent)"""
    )
    assert overflowing == []


def test_an_empty_cluster_says_what_to_do_and_has_no_empty_parts(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(SimulatedCluster(0)))
    (problem, button) = page.locator("#first").inner_text().split("\n")
    assert problem == texts(page, ".sollol-problem-text")[0]
    assert button == "Start 3 workers"


# --- problems and events ----------------------------------------------------------------------


def test_the_button_of_a_problem_asks_the_kernel_for_its_fix(page: Page) -> None:
    cluster = three_workers()
    cluster.change_worker(3, "down", "gone", "worker.lost")
    state = state_of(cluster)
    page.evaluate("state => window.show(state)", state)

    (key,) = (key for key in state["cards"]["problems"] if endpoint(3) in key)
    button = page.locator("#first .sollol-problem", has_text=endpoint(3)).get_by_role("button", name="Remove")
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => window.model.sent.filter(sent => sent.fix)") == [{"fix": key}]
    assert button.is_disabled(), "until the state changes"


def test_without_a_kernel_a_problem_shows_what_to_type(page: Page) -> None:
    cluster = three_workers()
    cluster.change_worker(3, "down", "gone", "worker.lost")
    page.evaluate(
        """state => {
            window.show({});
            window.endViews.forEach(end => end());
            const model = Object.assign(Object.create(window.model), {get: name => ({state})[name]});
            const el = document.getElementById('first');
            el.replaceChildren();
            window.map.default.render({model, el});
        }""",
        state_of(cluster),
    )
    problem = page.locator("#first .sollol-problem", has_text=endpoint(3))
    assert problem.locator("code").inner_text() == f"%sollol_cluster remove {endpoint(3)}"
    assert problem.get_by_role("button").all_inner_texts() == ["Copy"]

    page.evaluate(
        """() => {  // as in a page without HTTPS
            Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true});
            addEventListener('copy', (event) => { window.copied = event.target.value; }, {once: true});
        }"""
    )
    problem.get_by_role("button").click()
    problem.get_by_text("Copied").wait_for()
    page.evaluate("() => { delete navigator.clipboard; }")
    assert page.evaluate("window.copied") == f"%sollol_cluster remove {endpoint(3)}"


def test_repeated_events_are_one_line_that_unfolds(page: Page) -> None:
    cluster = SimulatedCluster(3)
    for number in range(3):
        cluster.change_worker(number, "free", f"started worker {endpoint(number)}", "worker.started")
    page.evaluate("state => window.show(state)", state_of(cluster))

    line = page.locator("#first .sollol-event")
    assert line.count() == 1
    assert line.locator("summary").inner_text().splitlines()[0].endswith("\u00d73")
    assert line.locator("time").inner_text() == "now"
    line.locator("summary").click()
    assert f"started worker {endpoint(0)}" in line.inner_text().splitlines()


# --- patches ----------------------------------------------------------------------------------


def test_a_patch_is_drawn_in_all_views_and_touches_only_what_it_changes(page: Page) -> None:
    page.evaluate("state => window.show(state)", state_of(three_workers()))
    page.evaluate("() => document.querySelectorAll('tr, section').forEach(row => { row.seen = true; })")
    down = {"pill": {"text": "down", "role": "bad"}, "detail": "gone", "memory": None, "used": None}
    page.evaluate("patch => window.change(patch)", {"cards": {"workers": {endpoint(1): down}}})

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
    assert reason in page.locator("#first .sollol-bad").first.inner_text()
    page.evaluate("patch => window.change(patch)", {"unreachable": None})
    assert reason not in page.locator("#first").inner_text()
    page.evaluate("patch => window.change(patch)", {"closed": True})
    assert "the router was closed; this is its last state" in page.locator("#first").inner_text()


def test_a_model_is_shown_loading_and_then_running(page: Page) -> None:
    def loading(share: float) -> dict[str, Any]:
        pill = {"text": f"loading {share:.0%}", "role": "busy"}
        return {"cards": {"models": {"big": {"n": 0, "title": "big", "pill": pill, "progress": share}}}}

    page.evaluate("state => window.show(state)", loading(0.25))
    assert page.locator("#first progress").get_attribute("value") == "0.25"
    page.evaluate("patch => window.change(patch)", loading(0.5))
    assert page.locator("#first progress").get_attribute("value") == "0.5"
    running = state_of(three_workers())["cards"]["models"]
    page.evaluate("patch => window.change(patch)", {"cards": {"models": {"big": None} | running}})
    assert page.locator("#first progress").count() == 0
    assert page.locator("#first section").count() == 1


def test_folded_details_stay_as_they_are(page: Page) -> None:
    state = state_of(three_workers())
    page.evaluate("state => window.show(state)", state)
    assert page.locator("#first section details[open]").count() == 0
    page.locator("#first section summary").click()
    (url,) = state["cards"]["models"]
    busy = {"pill": {"text": "answering 1 of 4", "role": "busy"}, "why": ["over 3 of 4 workers", "left out: gpu4"]}
    page.evaluate("patch => window.change(patch)", {"cards": {"models": {url: busy}}})
    assert "answering 1 of 4" in page.locator("#first section").inner_text()
    assert "left out: gpu4" in page.locator("#first section details[open]").inner_text()


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
