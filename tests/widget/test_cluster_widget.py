"""The cluster widget: controls that make sense, layouts foreseen and then applied, small messages, no leaks."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comm
import ipywidgets
import pytest
from IPython.core.events import EventManager
from ipywidgets.widgets import widget as widget_module

from sollol_nb import hybrid_router
from sollol_nb.cluster.data import patched
from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.workers.discovery import FoundWorker
from sollol_nb.runtime.events import EventKind
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from sollol_nb.widget.cluster_widget import SNAPSHOTS_KEPT, ClusterWidget, cluster_widget
from tests.support.engines import eventually, unused_port
from tests.support.simulated_cluster import SimulatedCluster, endpoint, node

pytestmark = pytest.mark.usefixtures("four_times_as_often")

OPEN, CLOSED = {"view": "first", "shown": True}, {"view": "first", "shown": False}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """All that widgets send to front ends: comm id and data."""
    messages: list[tuple[str, dict[str, Any]]] = []

    def publish(self: Any, msg_type: str, data: Any = None, **_: Any) -> None:
        messages.append((self.comm_id, {"type": msg_type, **(data or {})}))

    monkeypatch.setattr(comm.DummyComm, "publish_msg", publish)
    return messages


@pytest.fixture
def cluster() -> SimulatedCluster:
    """Four workers; a model runs over the first three."""
    simulated = SimulatedCluster(4, [node(1)])
    simulated.run_model("big", [0, 1, 2])
    return simulated


@pytest.fixture
def widget(cluster: SimulatedCluster) -> Iterator[ClusterWidget]:
    shown = cluster_widget(cluster)  # type: ignore[arg-type]
    shown.bundle()
    eventually(lambda: shown.what_if.prediction.value.startswith("<b>"), "the first prediction is shown")
    yield shown
    shown.close()


@pytest.fixture
def router() -> Iterator[HybridRouter]:
    """A real router without workers."""
    with HybridRouter(auto_discover_rpc=False) as router:
        yield router


@pytest.fixture
def steered(router: HybridRouter) -> Iterator[ClusterWidget]:
    shown = router.widget()
    shown.bundle()
    yield shown
    shown.close()


def controls_are_set() -> None:
    """Wait until the step of the I/O loop is over that sets the controls one after the other."""
    run_blocking(asyncio.sleep(0))


def messages(router: HybridRouter) -> list[str]:
    return [event.message for event in router.events.recent()]


# --- shown ------------------------------------------------------------------------------------


def test_it_is_shown_as_a_widget_and_as_text_of_the_same_state(widget: ClusterWidget) -> None:
    bundle = widget.bundle()

    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.box.model_id
    assert "10.0.0.13:50052" in bundle["text/plain"]
    assert "28-39 + output" in bundle["text/plain"]


def test_a_router_has_one_widget_until_that_is_closed(router: HybridRouter) -> None:
    widget = router.widget()
    assert cluster_widget(router._async) is widget
    widget.close()
    renewed = router.widget()
    assert renewed is not widget
    renewed.close()


def test_without_anywidget_the_state_is_shown_as_html(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sollol_nb.widget.map", None)
    monkeypatch.setattr("sollol_nb.widget.cluster_widget.HTML_EVERY_S", 0.2)
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    shown = widget.box.children[0]

    cluster.change_worker(3, "down", "nothing listens there", EventKind.WORKER_LOST)

    assert widget.map is None
    assert isinstance(shown, ipywidgets.HTML)
    eventually(lambda: "nothing listens there" in shown.value, "the change is shown")
    widget.close()


def test_without_anywidget_a_gateway_that_does_not_answer_is_said(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sollol_nb.widget.map", None)
    monkeypatch.setattr("sollol_nb.widget.cluster_widget.HTML_EVERY_S", 0.0)
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    shown = widget.box.children[0]
    monkeypatch.setattr(cluster.state, "_send_changes", lambda: None)  # of this cluster, which has no gateway

    async def change(unreachable: str | None) -> None:
        patch = {"unreachable": unreachable}
        cluster.state._data = patched(cluster.state.data, patch)
        widget._on_patch(patch)

    run_blocking(change("no gateway answers at <there>"))
    eventually(lambda: "<p>no gateway answers at &lt;there&gt;</p>" in shown.value, "it is said")
    run_blocking(change(None))
    eventually(lambda: "no gateway" not in shown.value, "it is back")
    widget.close()


def test_closed_it_leaves_the_last_state_and_nothing_else(cluster: SimulatedCluster) -> None:
    open_before = len(_open_widgets())
    subscribers_before = list(cluster.events._subscribers)
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    assert len(_open_widgets()) > open_before + 10

    widget.close()
    widget.close()

    assert len(_open_widgets()) == open_before
    assert not cluster.state.is_watched
    assert cluster.events._subscribers == subscribers_before
    assert set(widget.bundle()) == {"text/html", "text/plain"}


def _open_widgets() -> dict[str, Any]:
    return dict(widget_module._instances)


def test_a_router_is_not_kept_alive_by_its_widget() -> None:
    router = hybrid_router.HybridRouter(auto_discover_rpc=False)
    kept = weakref.ref(router)
    widget = cluster_widget(router)
    widget.bundle()
    run_blocking(router.close())
    del router

    eventually(
        lambda: gc.collect() >= 0 and kept() is None, "nothing keeps it, once the I/O loop has ended its tasks"
    )
    widget.workers.discover.click()
    assert "no worker is known" in widget.bundle()["text/plain"]
    widget.close()


# --- messages ---------------------------------------------------------------------------------


def test_a_change_is_sent_as_a_small_patch(
    widget: ClusterWidget, cluster: SimulatedCluster, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    assert widget.map is not None
    cluster.change_worker(3, "down", "nothing listens there", EventKind.WORKER_LOST)
    eventually(lambda: "nothing listens" in json.dumps(sent), "it is sent")

    messages = to_map(sent, widget)
    assert {message["method"] for message in messages} == {"custom"}
    assert max(len(json.dumps(message)) for message in messages) < 1400, "with its row, its problem and its event"


def to_map(sent: list[tuple[str, dict[str, Any]]], widget: ClusterWidget) -> list[dict[str, Any]]:
    assert widget.map is not None
    return [message for comm_id, message in sent if comm_id == widget.map.model_id]


def test_a_page_that_opens_gets_the_state_as_it_is_now(widget: ClusterWidget, cluster: SimulatedCluster) -> None:
    assert widget.map is not None
    cluster.change_worker(3, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: cluster.state.data["workers"][endpoint(3)]["state"] == "down", "it is known")

    async def opened() -> tuple[dict[str, Any], dict[str, Any]]:
        assert widget.map is not None
        return widget.map.get_state(), cluster.state.data  # no patch comes in between on the I/O loop

    state, data = run_blocking(opened())

    assert state["state"] == data
    assert "function render" in state["_esm"]
    assert "http" not in state["_esm"].replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"


def test_it_watches_while_views_are_open_and_stops_when_the_last_one_closes(
    widget: ClusterWidget, cluster: SimulatedCluster
) -> None:
    assert widget.map is not None
    second = OPEN | {"view": "second"}
    for content in (OPEN, second, OPEN):
        widget.map._handle_custom_msg(content, [])
    widget.map._handle_custom_msg(CLOSED, [])
    assert cluster.state.is_watched
    widget.map._handle_custom_msg(second | {"shown": False}, [])
    eventually(lambda: not cluster.state.is_watched, "nobody watches any more")

    widget.map._handle_custom_msg(OPEN, [])
    eventually(lambda: cluster.state.is_watched, "somebody watches again")


def test_a_view_whose_page_is_gone_without_a_report_is_dropped(
    widget: ClusterWidget, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert widget.map is not None
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: None)
    widget.bundle()
    widget.map._handle_custom_msg(OPEN, [])
    monkeypatch.setattr("sollol_nb.widget.cluster_widget.VIEW_LEASE_S", -1.0)
    cluster.change_worker(3, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: not cluster.state.is_watched, "nobody watches any more")


def test_no_view_is_dropped_while_a_cell_runs_since_kernels_receive_no_reports_then(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    cells = EventManager(None, ("pre_run_cell", "post_run_cell"))  # type: ignore[arg-type]
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: SimpleNamespace(events=cells))
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    assert widget.map is not None
    cells.trigger("post_run_cell", None)
    cells.trigger("pre_run_cell", None)
    widget.map._handle_custom_msg(OPEN, [])
    monkeypatch.setattr("sollol_nb.widget.cluster_widget.VIEW_LEASE_S", -1.0)
    sent_before = len(to_map(sent, widget))
    cluster.change_worker(0, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: len(to_map(sent, widget)) > sent_before, "it is sent")
    sent_before = len(to_map(sent, widget))
    cluster.change_worker(1, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: len(to_map(sent, widget)) > sent_before, "this is sent too")
    assert cluster.state.is_watched

    cells.trigger("post_run_cell", None)
    cluster.change_worker(2, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: not cluster.state.is_watched, "now it is dropped")
    assert not any(cells.callbacks.values()), "and cells are not followed any more"
    widget.close()


def test_the_last_outputs_that_show_it_are_kept_up_to_date(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollol_nb.widget.cluster_widget.SNAPSHOT_EVERY_S", 3600.0)  # only when it is closed
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    handles: list[Any] = []

    def display(*_: Any, **options: Any) -> Any:
        if options.get("display_id"):
            handles.append(SimpleNamespace(updates=[]))
            handles[-1].update = lambda bundle, raw, handle=handles[-1]: handle.updates.append(bundle)
            return handles[-1]
        return None

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: SimpleNamespace(kernel=1, events=None))
    for _ in range(SNAPSHOTS_KEPT + 3):
        widget._ipython_display_()
    monkeypatch.undo()
    widget.close()
    assert [len(handle.updates) for handle in handles] == [0] * 3 + [1] * SNAPSHOTS_KEPT


# --- what if ----------------------------------------------------------------------------------


def units(widget: ClusterWidget) -> list[int]:
    return [slider.value for slider in widget.what_if.sliders]


def predicted(widget: ClusterWidget) -> str:
    value: str = widget.what_if.prediction.value
    return value


def test_there_is_a_slider_for_each_worker_of_the_model_and_each_free_one(widget: ClusterWidget) -> None:
    assert [slider.description for slider in widget.what_if.sliders] == ["this machine", *map(endpoint, range(4))]
    assert units(widget) == [0, 14, 14, 13, 0]
    assert widget.what_if.apply.disabled
    assert widget.what_if.reset.disabled
    assert "26.2 ms per token" in predicted(widget)


def test_a_moved_slider_moves_its_neighbours_and_the_prediction(widget: ClusterWidget) -> None:
    before = predicted(widget)
    widget.what_if.sliders[1].value = 20

    assert units(widget) == [0, 20, 8, 13, 0]
    eventually(lambda: predicted(widget) != before, "there is a new prediction")
    assert "<b>fits</b>" in predicted(widget)
    assert "0-19" in predicted(widget)
    eventually(lambda: not widget.what_if.apply.disabled, "it can be applied")


def test_a_worker_is_dropped_by_moving_its_slider_to_zero(widget: ClusterWidget) -> None:
    before = predicted(widget)
    widget.what_if.sliders[3].value = 0

    assert units(widget) == [0, 14, 27, 0, 0]
    eventually(lambda: predicted(widget) != before, "there is a new prediction")
    assert predicted(widget).count("no layers") == 3
    assert "25.8 ms per token" in predicted(widget), "a round trip less"


def test_a_layout_that_does_not_fit_cannot_be_applied(widget: ClusterWidget) -> None:
    widget.what_if.sliders[1].value = 41

    eventually(lambda: "does not fit" in predicted(widget), "it says so")
    assert widget.what_if.apply.disabled
    assert not widget.what_if.reset.disabled
    widget.what_if.reset.click()
    assert units(widget) == [0, 14, 14, 13, 0]


def test_an_applied_layout_is_the_running_one(widget: ClusterWidget, cluster: SimulatedCluster) -> None:
    widget.what_if.sliders[1].value = 20
    eventually(lambda: not widget.what_if.apply.disabled, "it can be applied")

    widget.what_if.apply.click()

    eventually(
        lambda: [running.plan.unit_counts for running in cluster.coordinators if running.plan] == [(20, 8, 13)],
        "it runs",
    )
    eventually(lambda: units(widget) == [0, 20, 8, 13, 0] and widget.what_if.reset.disabled, "and is the new base")


def test_sliders_that_were_moved_stay_while_other_things_change(
    widget: ClusterWidget, cluster: SimulatedCluster
) -> None:
    widget.what_if.sliders[1].value = 20
    cluster.change_worker(3, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: cluster.state.data["workers"][endpoint(3)]["state"] == "down", "it is known")
    controls_are_set()
    assert units(widget) == [0, 20, 8, 13, 0]


def test_sliders_that_were_moved_stay_when_another_model_starts_or_ends() -> None:
    cluster = SimulatedCluster(5)
    cluster.run_model("big", [0, 1, 2])
    widget = cluster_widget(cluster)  # type: ignore[arg-type]
    widget.bundle()
    eventually(lambda: units(widget) == [0, 14, 14, 13, 0, 0], "its layout is shown")
    widget.what_if.sliders[1].value = 20

    cluster.run_model("another", [3, 4])
    cluster.coordinators.reverse()  # it comes first
    cluster.events.publish(EventKind.WORKER_RETURNED, endpoint(0), "it is back")
    eventually(
        # New options select the first one for a moment.
        lambda: (widget.what_if.model.options, widget.what_if.model.value) == (("another", "big"), "big"),
        "it can be chosen",
    )
    assert units(widget) == [0, 20, 8, 13, 0, 0]
    cluster.end_model("another")
    eventually(lambda: widget.what_if.model.options == ("big",), "it is gone")
    controls_are_set()
    assert units(widget) == [0, 20, 8, 13, 0, 0]
    widget.close()


def test_layers_cannot_be_moved_to_a_worker_that_is_gone(widget: ClusterWidget, cluster: SimulatedCluster) -> None:
    widget.what_if.sliders[4].value = 5
    eventually(lambda: not widget.what_if.apply.disabled, "it can be applied")
    cluster.change_worker(3, "down", "gone", EventKind.WORKER_LOST)
    eventually(lambda: units(widget) == [0, 14, 14, 13], "its slider is gone, and the running layout is shown")
    eventually(lambda: widget.what_if.apply.disabled, "that cannot be applied")


# --- a suggested layout -------------------------------------------------------------------------

FASTER = "a new layout would be 1.6 times as fast"


def suggest(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch, layout: tuple[tuple[str, int], ...]
) -> None:
    """The router knows a better layout for each of its models from now on; () is none."""
    known = type(cluster.state).status

    def with_advice(state: Any) -> Any:
        status = known(state)
        advice = {"advice": FASTER if layout else "", "advised_layout": layout}
        return replace(status, coordinators=tuple(replace(each, **advice) for each in status.coordinators))

    monkeypatch.setattr(type(cluster.state), "status", with_advice)
    cluster.events.publish(EventKind.COORDINATOR_PLANNED, "big", FASTER)


def test_a_suggested_layout_is_shown_on_the_sliders_and_applied_with_one_click(
    widget: ClusterWidget, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert widget.suggestion.box.layout.display == "none"
    suggest(cluster, monkeypatch, ((endpoint(3), 25), (endpoint(1), 16)))

    order = [*map(endpoint, (3, 1)), "this machine", *map(endpoint, (0, 2))]
    eventually(lambda: [slider.description for slider in widget.what_if.sliders] == order, "it is on the sliders")
    assert widget.suggestion.box.layout.display == ""
    assert units(widget) == [25, 16, 0, 0, 0]
    eventually(lambda: predicted(widget).startswith("suggested layout: <b>fits</b>"), "it is predicted")
    assert FASTER in widget.bundle()["text/plain"]

    widget.what_if.reset.click()
    assert units(widget) == [0, 14, 14, 13, 0], "the running layout"
    widget.suggestion.compare.click()
    assert units(widget) == [25, 16, 0, 0, 0]
    assert widget._panels.selected_index == 1

    cluster.better = {endpoint(1): 16, endpoint(3): 25}
    widget.suggestion.apply.click()
    monkeypatch.undo()
    eventually(lambda: widget.suggestion.box.layout.display == "none", "there is nothing better")
    eventually(
        lambda: [running.rpc_backends for running in cluster.coordinators] == [[endpoint(1), endpoint(3)]],
        "it runs",
    )
    eventually(lambda: sorted(units(widget), reverse=True) == [25, 16, 0, 0, 0], "it runs")


def test_a_suggestion_leaves_moved_sliders_alone(
    widget: ClusterWidget, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget.what_if.sliders[1].value = 20
    suggest(cluster, monkeypatch, ((endpoint(3), 25), (endpoint(1), 16)))

    eventually(lambda: widget.suggestion.box.layout.display == "", "it is shown")
    controls_are_set()
    assert units(widget) == [0, 20, 8, 13, 0]


def test_without_a_sharded_model_there_is_nothing_to_move(steered: ClusterWidget) -> None:
    assert steered.what_if.sliders == []
    assert steered.what_if.apply.disabled
    assert steered.what_if.model.disabled
    assert predicted(steered) == "No model of this notebook runs on workers."


# --- controls ---------------------------------------------------------------------------------


def test_controls_are_enabled_only_while_they_make_sense(steered: ClusterWidget, router: HybridRouter) -> None:
    workers, models = steered.workers, steered.models
    typed: list[tuple[Any, Any, str, bool]] = [
        (workers.endpoint, workers.add, "", False),
        (workers.endpoint, workers.add, "10.0.0.5:port", False),
        (workers.endpoint, workers.add, "10.0.0.5", True),
        (models.model, models.load, "", False),
        (models.model, models.load, "demo", True),
        (models.keep_alive, models.keep, "soon", False),
        (models.keep_alive, models.keep, "1h30m", True),
    ]
    for text, button, value, is_enabled in typed:
        text.value = value
        assert button.disabled is not is_enabled, value
    assert workers.remove.disabled
    assert models.stop.disabled


@pytest.mark.parametrize("kind", ["add", "load"])
def test_what_is_typed_while_the_state_changes_enables_its_button(
    steered: ClusterWidget, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the I/O loop has read before it was typed is not set after it."""
    workers, models, is_unavailable = steered.workers, steered.models, steered._actions.is_unavailable
    text, typed, button = {
        "add": (workers.endpoint, "10.0.0.5", workers.add),
        "load": (models.model, "demo", models.load),
    }[kind]
    kernel = threading.Thread(target=setattr, args=(text, "value", typed))

    def type_meanwhile(asked: str) -> bool:
        if asked == kind and kernel.ident is None:
            kernel.start()
            kernel.join(0.5)  # it waits until the controls are set; if it does not, it is done by then
        return is_unavailable(asked)

    monkeypatch.setattr(steered._actions, "is_unavailable", type_meanwhile)
    run_blocking(refreshed(steered))
    kernel.join()
    assert not button.disabled


async def refreshed(widget: ClusterWidget) -> None:
    """What a change of the state does, on the I/O loop."""
    widget._refresh()


def test_a_worker_is_added_and_removed_and_events_say_so(steered: ClusterWidget, router: HybridRouter) -> None:
    name = f"127.0.0.1:{unused_port()}"
    steered.workers.endpoint.value = name
    steered.workers.add.click()
    eventually(lambda: steered.workers.known.value == name, "it can be removed")
    eventually(lambda: not steered.workers.endpoint.value, "the field is empty again")
    assert f"added worker {name}" in messages(router)

    steered.workers.endpoint.value = name
    assert steered.workers.add.disabled, "it is known"
    steered.workers.remove.click()
    eventually(lambda: f"removed worker {name}" in messages(router), "an event says so")
    eventually(lambda: steered.workers.remove.disabled, "there is none to remove")


def test_a_failure_is_reported_by_an_event(steered: ClusterWidget, router: HybridRouter) -> None:
    steered.models.model.value = "/no/such/file.gguf"
    steered.models.load.click()
    eventually(
        lambda: any(text.startswith("loading /no/such/file.gguf failed") for text in messages(router)), "reported"
    )
    eventually(lambda: not steered.models.load.disabled, "it can be tried again")
    eventually(
        lambda: steered.progress.value.startswith("⚠ loading /no/such/file.gguf failed"),
        "it is said beside the controls, too",
    )


def test_an_unexpected_failure_is_reported_too(
    steered: ClusterWidget, router: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(_: Any) -> None:
        raise PermissionError("the state folder cannot be written")

    actions = steered.workers._actions
    actions.start("discover", "searching for workers", failing)
    message = "searching for workers failed: PermissionError: the state folder cannot be written"
    eventually(lambda: message in messages(router), "it is reported")
    eventually(lambda: not actions.is_unavailable("discover"), "it can be tried again")


def test_a_strategy_and_a_keep_alive_apply_from_now_on(steered: ClusterWidget, router: HybridRouter) -> None:
    steered.models.strategy.value = "even"
    steered.models.keep_alive.value = "1h"
    steered.models.keep.click()
    eventually(lambda: router.layer_strategy == "even", "the strategy is chosen")
    settings = router.settings
    eventually(lambda: router.settings.keep_alive_s == 3600.0, "keep_alive is set")
    assert settings.layer_strategy == "even"
    said = "models that start from now on are spread by strategy 'even'"
    eventually(lambda: said in messages(router), "an event says so")
    router.configure(layer_strategy="memory_aware")
    eventually(lambda: steered.models.strategy.value == "memory_aware", "chosen elsewhere, it is shown")
    assert router.layer_strategy == "memory_aware"


def test_a_search_without_new_workers_is_reported(
    steered: ClusterWidget, router: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> list[Any]:
        return []

    monkeypatch.setattr("sollol_nb.llama_cpp.workers.workers.discover", nothing)
    monkeypatch.setattr("sollol_nb.router.cluster_control.find_workers", lambda *_, **__: nothing())
    steered.workers.discover.click()
    eventually(lambda: "found no new workers" in messages(router), "reported")


def test_workers_are_measured_once_at_a_time(
    steered: ClusterWidget, router: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    async def measuring(*_: object) -> list[Any]:
        await asyncio.to_thread(may_end.wait)
        return []

    monkeypatch.setattr("sollol_nb.llama_cpp.coordinators.pool.CoordinatorPool.calibrate", measuring)
    assert not steered.workers.calibrate.disabled
    steered.workers.calibrate.click()
    eventually(lambda: "measuring this machine and the free workers" in steered.progress.value, "it is said")
    assert steered.workers.calibrate.disabled
    may_end.set()
    eventually(lambda: not steered.workers.calibrate.disabled, "it can be done again")


def test_workers_that_a_search_finds_elsewhere_are_offered(
    steered: ClusterWidget, router: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def found(_: object, *, mdns: bool, **__: Any) -> list[FoundWorker]:
        if mdns:
            raise ConfigError("mDNS needs the package zeroconf; run: pip install zeroconf")
        used = FoundWorker(name="127.0.0.1:9", sources=("used here",), state="down", is_known=True)
        return [used, FoundWorker(name="ssh://gpu1", sources=("link",), state="connected")]

    monkeypatch.setattr("sollol_nb.router.cluster_control.find_workers", found)
    steered.workers.discover.click()
    eventually(lambda: steered.workers.endpoint.options == ("ssh://gpu1",), "it is offered")
    eventually(
        lambda: "found ssh://gpu1; choose one beside Other workers to add it" in messages(router), "reported"
    )
    steered.workers.endpoint.value = "ssh://gpu1"
    assert not steered.workers.add.disabled


def test_when_its_router_is_closed_nothing_can_be_done_any_more(
    steered: ClusterWidget, router: HybridRouter
) -> None:
    steered.workers.endpoint.value = "10.0.0.5"
    steered.models.model.value = "demo"
    assert not steered.workers.add.disabled
    router.close()
    for button in (steered.workers.add, steered.workers.discover, steered.models.load, steered.what_if.apply):
        eventually(lambda button=button: button.disabled, f"{button.description} is disabled")
    assert "no worker is known" in steered.bundle()["text/plain"]


def test_an_action_runs_once_at_a_time(widget: ClusterWidget, cluster: SimulatedCluster) -> None:
    may_end = threading.Event()
    begun: list[int] = []

    async def wait(_: Any) -> None:
        begun.append(1)
        await asyncio.to_thread(may_end.wait, 60)

    actions = widget.workers._actions
    actions.start("add", "adding", wait)
    actions.start("add", "adding", wait)
    widget.workers.endpoint.value = "10.9.9.9"
    assert widget.workers.add.disabled
    eventually(lambda: widget.progress.value == "adding …", "what it does is shown")
    may_end.set()
    eventually(lambda: not actions.is_unavailable("add") and not widget.workers.add.disabled, "it is done")
    eventually(lambda: widget.progress.value == "adding: done", "that is shown")
    assert begun == [1]


# --- on real engines --------------------------------------------------------------------------


@pytest.mark.engine
def test_a_loaded_model_gets_a_new_layout_that_was_predicted_before(engine: object, alone: None) -> None:
    with HybridRouter(auto_discover_rpc=False, context_tokens=1024) as router:
        router.start_workers(2)
        widget = router.widget()
        widget.bundle()
        widget.models.model.value = "demo:sharded"
        widget.models.load.click()
        eventually(lambda: len(widget.what_if.sliders) == 3, "it is loaded")
        eventually(lambda: "ms per token" in predicted(widget), "its token time is shown")
        before = router.coordinator
        assert before is not None

        widget.what_if.sliders[1].value = 13
        eventually(
            lambda: "no layers" in predicted(widget) and not widget.what_if.apply.disabled, "it is predicted"
        )
        widget.what_if.apply.click()

        eventually(lambda: router.coordinator is not None and router.coordinator is not before, "it is restarted")
        after = router.coordinator
        assert after is not None
        assert after.plan is not None
        assert after.placement is not None
        assert (after.plan.unit_counts, after.plan.strategy) == ((13,), "as given")
        assert after.plan.predicted_token_ms is not None
        assert after.placement_differences == []
        answer = router.route_request("demo:sharded", "What is a worker?", temperature=0, max_tokens=10)
        assert answer["eval_count"] == 10
        assert answer.routing["plan"]["tensor_split"] == "13"
        widget.close()


def test_a_machine_that_cannot_be_reached_is_shown_with_the_reason_and_can_be_removed(
    steered: ClusterWidget, router: HybridRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    target = f"[::1]:{unused_port()}"
    steered.workers.endpoint.value = target
    assert not steered.workers.add.disabled
    steered.workers.add.click()
    eventually(lambda: steered.workers.known.value == target, "it can be removed")
    eventually(lambda: not steered.workers.add.disabled or not steered.workers.endpoint.value, "it was tried")

    def lost() -> dict[str, Any] | None:
        row: dict[str, Any] = steered._state.data["workers"][target]
        return row if row["state"] == "lost" else None

    row = eventually(lost, "it is shown as lost")
    assert row is not None
    assert row["name"] == target
    shown = steered._state.data["cards"]["workers"][target]["tooltip"]
    assert f"nothing listens on {target}; start a worker there: " in shown
    steered.workers.remove.click()
    eventually(lambda: not steered._state.data["workers"], "it is gone")


def test_workers_of_other_machines_have_their_names_everywhere(cluster: SimulatedCluster) -> None:
    first = endpoint(0)
    cluster.workers[first] = replace(cluster.workers[first], name="gpu1/CUDA0", target="ssh://gpu1")
    linked = endpoint(3)
    cluster.workers[linked] = replace(cluster.workers[linked], name="gpu2", target="ssh://gpu2")
    shown = cluster_widget(cluster)  # type: ignore[arg-type]
    shown.bundle()
    try:
        eventually(lambda: shown.what_if.sliders, "there is a layout to change")
        names = [slider.description for slider in shown.what_if.sliders]
        assert names == ["this machine", "gpu1/CUDA0", endpoint(1), endpoint(2), "gpu2"]
        assert set(shown.what_if.counts) == {"this machine", *cluster.workers}, "their endpoints are what counts"
        assert shown.workers.known.options == ("ssh://gpu2",), (
            "a machine is removed as a whole, once it is not held"
        )
        row = cluster.state.data["workers"][first]
        assert (row["name"], row["target"]) == ("gpu1/CUDA0", "ssh://gpu1")
    finally:
        shown.close()


# --- buttons of problems ----------------------------------------------------------------------


def press(widget: ClusterWidget, button: str, key: str) -> None:
    """What the front end sends when the button of a problem is pressed."""
    assert widget.map is not None
    widget.map._handle_custom_msg({button: key}, [])


def test_the_button_of_a_problem_does_only_what_the_state_offers(
    steered: ClusterWidget, router: HybridRouter
) -> None:
    name = f"127.0.0.1:{unused_port()}"
    router.add_worker(name)
    key = f"worker {name}"
    eventually(lambda: key in steered._state.data["cards"]["problems"], "it is a problem")

    press(steered, "fix", f"remove {name}")
    press(steered, "fix", "worker 10.9.9.9:50052")
    controls_are_set()
    assert router.worker_endpoints == [name]
    press(steered, "fix", key)
    eventually(lambda: f"removed worker {name}" in messages(router), "it is removed")
    eventually(lambda: key not in steered._state.data["cards"]["problems"], "nothing is wrong any more")
    eventually(lambda: steered.progress.value == f"removing {name}: done", "it is said")


def test_a_better_layout_is_compared_and_applied_from_its_problem(
    widget: ClusterWidget, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggest(cluster, monkeypatch, ((endpoint(3), 25), (endpoint(1), 16)))
    eventually(lambda: widget.suggestion.model == "big", "it is known")
    (key,) = (key for key in cluster.state.data["cards"]["problems"] if key.startswith("advice"))
    widget.what_if.reset.click()

    press(widget, "compare", key)
    assert units(widget) == [25, 16, 0, 0, 0]
    assert widget._panels.selected_index == 1

    cluster.better = {endpoint(1): 16, endpoint(3): 25}
    press(widget, "fix", key)
    eventually(
        lambda: [running.rpc_backends for running in cluster.coordinators] == [[endpoint(1), endpoint(3)]],
        "it runs",
    )
