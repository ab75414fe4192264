"""The cluster widget as a person meets it: JupyterLab in a browser, workers that die, sliders that are moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Locator, expect

from tests.lab.lab import HeadlessLab
from tests.lab.page import LIMIT_MS, LabPage
from tests.support.axe import assert_accessible
from tests.support.engines import suspended
from tests.support.held_answers import PATIENT

pytestmark = [pytest.mark.engine, pytest.mark.lab]

REPOSITORY = Path(__file__).parents[2]
SHOW = "from sollol_nb.notebook import router\nwidget = router().widget()\nwidget"
KILL = """
import psutil
from sollol_nb.llama_cpp.processes import registry
killed = held[0]
(entry,) = [worker for worker in registry.entries("worker") if worker.about["endpoint"] == killed]
psutil.Process(entry.pid).kill()
print(killed)
"""
SIMULATED = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.support.simulated_cluster import SimulatedCluster, endpoint, node
from sollol_nb.widget.cluster_widget import cluster_widget
"""

expect.set_options(timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def page(lab: HeadlessLab) -> Iterator[LabPage]:
    """A notebook over four workers, three of which run the demo model, and the widget shown below."""
    three = "from sollol_nb.notebook import router\nrouter(num_rpc_backends=3, context_tokens=4096);"
    ask = '%sollol demo:sharded "What is a worker?" --max-tokens 5'
    cells = ["%load_ext sollol_nb", three, "%sollol_cluster start 4", ask, SHOW]
    opened = lab.open(cells, viewport=(1250, 1500))
    opened.run_all()
    yield opened
    opened.close()


def expect_layers(page: LabPage, cell: int, *ranges: str) -> None:
    """Wait until the map shows these layer ranges, in order: the kernel may send its last state a moment later."""
    expect(page.output(cell).locator(".sollol-row-planned .sollol-strong")).to_have_text(ranges)


def row(page: LabPage, cell: int, endpoint: str) -> Locator:
    return page.output(cell).locator(f"tr[data-endpoint='{endpoint}']")


def test_it_shows_layers_workers_and_events(page: LabPage) -> None:
    expect(page.output(4).locator("section")).to_have_count(1)
    expect_layers(page, 4, "0-3", "4-7", "8-11 + output")
    expect(page.output(4).locator("tr[data-state='held']")).to_have_count(3)
    expect(page.output(4).locator("tr[data-state='free']")).to_have_count(1)
    expect(page.output(4).locator(".sollol-log")).to_contain_text("demo:sharded is ready at")
    expect(page.output(4).locator("section", has_text="ms per token")).to_have_count(1)
    page.screenshot("cluster-widget")


def test_a_moved_slider_changes_the_prediction_and_the_applied_layout_the_map(page: LabPage) -> None:
    output = page.output(4)
    output.get_by_text("What if", exact=True).click()
    prediction = output.locator(".jupyter-widget-Collapse-contents .widget-html").last
    expect(prediction).to_contain_text("fits")
    before = prediction.inner_text()
    sliders = output.get_by_role("slider")
    expect(sliders).to_have_count(5)
    apply = output.get_by_role("button", name="Apply", exact=True)
    expect(apply).to_be_disabled()

    sliders.nth(3).focus()
    page.page.keyboard.press("Home")

    expect(prediction).not_to_have_text(before, use_inner_text=True)
    expect(prediction).to_contain_text("no layers")
    page.screenshot("cluster-what-if")
    expect(apply).to_be_enabled()
    apply.click()
    expect(output.locator(".sollol-log")).to_contain_text("new layout for demo:sharded: 4/9 over 2 workers: fits")
    expect(output.locator(".sollol-row-planned .sollol-box")).to_have_count(2)
    expect_layers(page, 4, "0-3", "4-11 + output")
    expect(output.locator("section", has_text="as given")).to_have_count(1)
    expect(output.locator("tr[data-state='held']")).to_have_count(2)
    assert "4/9" in page.ask('%sollol demo:sharded "What is a worker?" --max-tokens 5')
    expect(output.locator("section", has_text="tokens/s")).to_have_count(1)


def test_requests_are_shown_while_their_cell_runs(page: LabPage) -> None:
    asking = page.add('%sollol demo:sharded "Tell me everything about sharding." --max-tokens 2000')
    page.page.evaluate(
        """() => {
            window.totals = [];
            const map = document.querySelector('.sollol-cluster');
            const record = () => window.totals.push(map.innerText.split('\\n')[0]);
            new MutationObserver(record).observe(map, {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.ask(PATIENT)
    with suspended(psutil.Process(int(page.ask("print(router().coordinator.pid)")))):
        page.start(asking)
        page.page.wait_for_function("() => window.totals.some(text => text.includes('1 running'))")
    page.wait_done(asking)


def test_a_killed_worker_is_shown_as_down_and_the_model_is_planned_again(page: LabPage) -> None:
    page.ask("held = router().coordinator.rpc_backends")
    killed = page.ask(KILL)
    expect(row(page, 4, killed)).to_have_attribute("data-state", "down")
    # There may be another problem that names it, such as a faster layout over the others.
    problems = page.output(4).get_by_role("listitem")
    expect(problems.filter(has_text=f"{killed}: killed (signal 9)")).to_have_count(1)
    expect(page.output(4).locator(".sollol-log")).to_contain_text(f"lost worker {killed}")
    page.screenshot("cluster-lost")

    page.ask('%sollol demo:sharded "What is a worker?" --max-tokens 5')
    # Until the last state is shown, there is also a card of the lost coordinator, or one of the new one's start.
    expect(page.output(4).locator("section", has_text="memory_aware")).to_have_count(1)
    expect(page.output(4).locator("section")).to_have_count(1)
    expect(page.output(4).locator("tr[data-state='held']")).to_have_count(3)
    expect_layers(page, 4, "0-3", "4-7", "8-11 + output")


def test_two_views_show_the_same_and_closed_outputs_end_the_watch(page: LabPage) -> None:
    again = page.add("widget")
    page.run(again)
    expect(page.output(again).locator("section")).to_have_count(1)
    page.ask('router().add_worker("127.0.0.1:9");')
    for cell in (4, again):
        expect(row(page, cell, "127.0.0.1:9")).to_have_attribute("data-state", "down")
    assert page.ask("router().state.is_watched") == "True"

    for cell in (4, again):
        page.clear_output(cell)
    waiting = "import time\nwhile router().state.is_watched: time.sleep(0.05)\n"
    assert page.ask(waiting + "widget") != ""
    shown = page.page.locator(".jp-Cell").count() - 1
    expect(row(page, shown, "127.0.0.1:9")).to_have_attribute("data-state", "down")


def test_a_saved_notebook_shows_the_last_state_without_a_kernel(lab: HeadlessLab) -> None:
    page = lab.open(
        [SIMULATED + "cluster = SimulatedCluster(3, [node(1)])\ncluster_widget(cluster)"], viewport=(1250, 900)
    )
    page.run_all()
    expect(page.output(0).locator("tr[data-endpoint]")).to_have_count(4)
    expect(page.output(0).locator(".sollol-snapshot")).to_be_hidden()
    page.ask('cluster.change_worker(1, "down", "nothing listens there", "worker.lost")')
    expect(row(page, 0, "10.0.0.11:50052")).to_have_attribute("data-state", "down")
    expect(page.output(0).locator(".sollol-snapshot")).to_contain_text("nothing listens there")
    path = page.save()
    page.close()

    reopened = lab.open(path, viewport=(1250, 900))
    snapshot = reopened.output(0).locator("[data-mime-type='text/html']")
    expect(snapshot).to_be_visible()
    expect(snapshot).to_contain_text("nothing listens there")
    reopened.screenshot("cluster-saved")
    reopened.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("count", [3, 64])
def test_it_is_readable_in_each_theme_and_size(lab: HeadlessLab, theme: str, count: int) -> None:
    held = min(count, 15)
    source = SIMULATED + (
        f"cluster = SimulatedCluster({count}, [node(1), node(2, 'absent')])\n"
        f"cluster.run_model('llama3.1:70b', range({held}))\n"
        f"cluster.change_worker({count - 1}, 'down', 'nothing listens there; start it there', 'worker.lost')\n"
        "cluster_widget(cluster)"
    )
    page = lab.open([source], theme=theme, viewport=(1250, 1400))  # type: ignore[arg-type]
    page.run_all()
    expect(page.output(0).locator("tr[data-endpoint^='10.']")).to_have_count(count)
    page.screenshot(f"cluster-{count}-{theme}")
    panel = page.output(0).get_by_role("button", name="Controls", exact=True)
    expect(panel).to_have_attribute("aria-expanded", "false")
    panel.focus()
    page.page.keyboard.press("Enter")
    expect(panel).to_have_attribute("aria-expanded", "true")
    dropdown = page.output(0).locator(".widget-dropdown select").first
    arrow = dropdown.evaluate("select => getComputedStyle(select).backgroundImage")
    page.screenshot(f"cluster-{count}-{theme}-controls")
    assert_accessible(page.page, ".sollol-widget")
    page.close()
    assert "%238c8c8c" in arrow, "the arrow is visible on white and on black"


def test_the_button_of_a_problem_runs_its_fix(lab: HeadlessLab) -> None:
    source = SIMULATED + (
        "cluster = SimulatedCluster(3)\n"
        "cluster.change_worker(2, 'down', 'nothing listens there', 'worker.lost')\n"
        "async def remove_worker(endpoint):\n"
        "    del cluster.workers[endpoint]\n"
        "    cluster.events.publish('worker.removed', endpoint, f'removed worker {endpoint}')\n"
        "cluster.remove_worker = remove_worker\n"
        "cluster_widget(cluster)"
    )
    page = lab.open([source], viewport=(1250, 900))
    page.run_all()
    output = page.output(0)
    output.get_by_role("listitem").get_by_role("button", name="Remove").focus()
    page.page.keyboard.press("Enter")
    expect(output.locator(".sollol-log")).to_contain_text("removed worker 10.0.0.12:50052")
    expect(output.locator(".sollol-problem")).to_have_count(0)
    expect(output.locator("tr[data-endpoint]")).to_have_count(2)
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_in_a_narrow_window(lab: HeadlessLab, theme: str) -> None:
    source = SIMULATED + (
        "cluster = SimulatedCluster(4, [node(1)])\ncluster.run_model('llama3.1:70b', range(3))\n"
        "cluster.change_worker(3, 'down', 'nothing listens there; start it there', 'worker.lost')\n"
        "cluster_widget(cluster)"
    )
    page = lab.open([source], theme=theme, viewport=(1000, 1800))  # type: ignore[arg-type]
    page.run_all()
    page.page.set_viewport_size({"width": 480, "height": 1800})
    output = page.output(0)
    for panel, button in (("Controls", "Stop"), ("What if", "Reset")):
        output.get_by_role("button", name=panel, exact=True).click()
        expect(output.get_by_role("button", name=button, exact=True)).to_be_visible()
        page.screenshot(f"cluster-narrow-{theme}-{panel.lower().replace(' ', '-')}")
        cut = output.evaluate(
            """output => {
                const right = output.getBoundingClientRect().right + 1;
                return [...output.querySelectorAll('.sollol-widget *')]
                    .filter(part => part.getBoundingClientRect().right > right)
                    .map(part => part.outerHTML.slice(0, 200));
            }"""
        )
        assert cut == [], panel
        assert_accessible(page.page, ".sollol-widget")
    page.close()
