"""The live state: sent completely once, then as small patches; nothing runs while nobody watches."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import psutil
import pytest

from sollol_nb.cluster import state
from sollol_nb.cluster.live_figures import EVENTS_KEPT, ROUND_TRIPS_KEPT, LiveFigures, describe_answer
from sollol_nb.hybrid_router import HybridRouter as AsyncHybridRouter
from sollol_nb.runtime.events import KEPT_EVENTS, Event, EventKind
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import engine_on, eventually, run
from tests.support.merge_patch import patched
from tests.support.simulated_cluster import GIB, SimulatedCluster, endpoint, node

pytestmark = pytest.mark.usefixtures("four_times_as_often")


class Watcher:
    """What a view would hold: the state, kept up to date by patches alone."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.patches: list[Mapping[str, Any]] = []

    def __call__(self, patch: Mapping[str, Any]) -> None:
        self.patches.append(patch)
        self.state = patched(self.state, patch)

    @property
    def sizes_bytes(self) -> list[int]:
        return [len(json.dumps(patch)) for patch in self.patches]


def is_down(watcher: Watcher, number: int) -> Callable[[], bool]:
    return lambda: watcher.state["workers"][endpoint(number)]["state"] == "down"


@contextmanager
def watching(cluster: SimulatedCluster | HybridRouter) -> Iterator[Watcher]:
    watcher = Watcher()
    state = cluster.state

    async def begin() -> None:
        watcher.state = await state.watch(watcher)
        watcher.patches.clear()

    run_blocking(begin())
    try:
        yield watcher
    finally:
        run_blocking(state.unwatch(watcher))


# --- the whole state --------------------------------------------------------------------------


def test_the_state_has_workers_coordinators_nodes_and_events() -> None:
    cluster = SimulatedCluster(3, [node(1), node(2, "absent")])
    cluster.run_model("llama3.1:70b", [0, 1])

    with watching(cluster) as watcher:
        state = watcher.state

    held, free = state["workers"][endpoint(0)], state["workers"][endpoint(2)]
    assert (held["state"], held["held_by"]) == ("held", "llama3.1:70b")
    assert (free["state"], free["used"]) == ("free", 0.08)
    (coordinator,) = state["coordinators"].values()
    assert [segment["layers"] for segment in coordinator["segments"].values()] == ["0-20", "21-39 + output"]
    assert [segment["units"] for segment in coordinator["segments"].values()] == [21, 20]
    assert coordinator["token_ms"] == 26.3
    ready, absent = state["nodes"].values()
    assert (ready["state"], ready["running"], ready["slots"]) == ("ready", 0, 1)
    assert absent["state"] == "absent"
    assert [event["kind"] for event in state["events"].values()] == ["coordinator.ready"]


def test_the_state_is_plain_data_without_none() -> None:
    cluster = SimulatedCluster(2, [node(1, "absent", last_error=None)])
    cluster.workers[endpoint(1)] = replace(cluster.workers[endpoint(1)], probe=None, state="down", detail="gone")

    with watching(cluster) as watcher:
        state = watcher.state

    text = json.dumps(state)
    assert "null" not in text
    assert json.loads(text) == state


# --- snapshots --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_snapshot_has_the_events_and_the_loads_under_way(is_watched: bool) -> None:
    cluster = SimulatedCluster(2)
    with watching(cluster) if is_watched else nullcontext():
        cluster.events.publish(EventKind.COORDINATOR_FAILED, "small", "small could not be started: no memory")
        cluster.events.publish(EventKind.COORDINATOR_STARTING, "big", "starting big over 2 workers")
        eventually(lambda: "big" in cluster.state.status().live.starting, "the events are recorded")
        status = cluster.state.status()

    assert list(status.live.events.values()) == cluster.events.recent()
    assert status.problems == ["small could not be started: no memory"]
    for view in (str(status), status._repr_html_()):
        assert "loading" in view
        assert "✕ small could not be started: no memory" in view
        assert "starting big over 2 workers" in view


@pytest.mark.parametrize("is_named", [True, False])
def test_an_ollama_that_nobody_named_is_no_event(is_named: bool) -> None:
    cluster = SimulatedCluster(1)
    cluster.events.publish(EventKind.NODE_ABSENT, "http://a:11434", "Ollama is not running", is_named=is_named)

    assert len(cluster.state.status().live.events) == is_named


def test_the_end_of_an_ollama_that_nobody_named_is_an_event_if_it_ran() -> None:
    cluster = SimulatedCluster(1)
    cluster.events.publish(EventKind.NODE_READY, "http://a:11434", "Ollama is ready")
    cluster.events.publish(EventKind.NODE_ABSENT, "http://a:11434", "Ollama is not running", is_named=False)

    assert len(cluster.state.status().live.events) == 2


def test_a_snapshot_stays_as_it_is() -> None:
    cluster = SimulatedCluster(1)
    with watching(cluster) as watcher:
        before = cluster.state.status()
        cluster.change_worker(0, "down", "gone", EventKind.WORKER_LOST)
        eventually(is_down(watcher, 0), "the loss is sent")
        after = cluster.state.status()

    assert (before.live.events, before.live.last_error) == ({}, {})
    assert after.live.last_error == {endpoint(0): "gone"}


def test_a_load_at_a_gateway_that_was_lost_is_not_under_way() -> None:
    starting = Event(EventKind.COORDINATOR_STARTING, "big", "starting big")
    lost = Event(EventKind.GATEWAY_LOST, "http://a:11440", "the gateway http://a:11440 does not answer")

    assert list(LiveFigures.of([starting]).starting) == ["big"]
    assert LiveFigures.of([starting, lost]).starting == {}


# --- patches ----------------------------------------------------------------------------------


def test_patches_alone_keep_a_watcher_up_to_date() -> None:
    cluster = SimulatedCluster(8, [node(1)])
    with watching(cluster) as watcher:
        cluster.run_model("big", [0, 1, 2])
        eventually(lambda: watcher.state["coordinators"], "the coordinator is sent")
        cluster.change_worker(5, "down", "nothing listens there; start it", EventKind.WORKER_LOST)
        cluster.end_model("big")
        cluster.nodes[0] = node(1, "absent")
        cluster.events.publish(EventKind.NODE_ABSENT, cluster.nodes[0].url, "Ollama is absent")
        eventually(lambda: not watcher.state["coordinators"], "its end is sent")
        eventually(lambda: watcher.state["workers"][endpoint(5)]["state"] == "down", "the loss is sent")
        eventually(
            lambda: "node.absent" in [event["kind"] for event in watcher.state["events"].values()],
            "the last event is sent",
        )
        eventually(lambda: watcher.state == cluster.state.data, "everything is sent")

    assert watcher.state["workers"][endpoint(5)]["last_error"] == "nothing listens there; start it"
    kinds = [event["kind"] for event in watcher.state["events"].values()]
    assert kinds == ["coordinator.ready", "worker.lost", "coordinator.stopped", "node.absent"]


def test_two_watchers_get_the_same_patches() -> None:
    cluster = SimulatedCluster(3)
    with watching(cluster) as first, watching(cluster) as second:
        cluster.change_worker(1, "down", "gone", EventKind.WORKER_LOST)
        eventually(lambda: second.state["workers"][endpoint(1)]["state"] == "down", "sent to both")

        async def have_the_same() -> bool:
            return first.state == second.state  # no patch comes in between on the I/O loop

        assert run(have_the_same())
    assert first.state["workers"][endpoint(1)]["state"] == "down"


def test_a_storm_of_events_makes_few_patches() -> None:
    cluster, began = SimulatedCluster(3), time.monotonic()
    with watching(cluster) as watcher:
        for number in range(1000):
            cluster.events.publish(EventKind.WORKER_RETURNED, endpoint(0), f"event {number}")
        eventually(
            lambda: "event 999" in [event["message"] for event in watcher.state["events"].values()],
            "everything is sent",
        )

    assert len(watcher.patches) <= 1 + (time.monotonic() - began) * state.PATCHES_PER_S
    assert [event["message"] for event in watcher.state["events"].values()] == [
        f"event {number}" for number in range(1000 - EVENTS_KEPT, 1000)
    ]


def test_a_watcher_that_fails_does_not_affect_the_others(caplog: pytest.LogCaptureFixture) -> None:
    cluster = SimulatedCluster(3)

    def failing(patch: Mapping[str, Any]) -> None:
        raise ValueError(f"cannot draw {sorted(patch)}")

    run_blocking(cluster.state.watch(failing))
    with watching(cluster) as watcher:
        for number in range(2):
            cluster.change_worker(number, "down", "gone", EventKind.WORKER_LOST)
            eventually(is_down(watcher, number), "it is sent")
    run_blocking(cluster.state.unwatch(failing))
    assert "a view of the cluster failed to apply a change" in caplog.text


def test_with_a_hundred_workers_a_change_takes_a_few_hundred_bytes() -> None:
    cluster = SimulatedCluster(100)
    with watching(cluster) as watcher:
        whole_bytes = len(json.dumps(watcher.state))
        cluster.change_worker(40, "down", "nothing listens there", EventKind.WORKER_LOST)
        eventually(lambda: watcher.state["workers"][endpoint(40)]["state"] == "down", "it is sent")
        eventually(lambda: len(watcher.patches) >= 3, "probe results are sent too")

    assert whole_bytes > 10_000
    assert max(watcher.sizes_bytes) < 1000


def test_nothing_is_sent_if_nothing_has_changed() -> None:
    cluster = SimulatedCluster(0)
    with watching(cluster) as watcher:
        cluster.events.report(EventKind.PROBE_DONE, "10.9.9.9:50052", "free")
        cluster.events.publish(EventKind.REQUEST_STARTED, "demo", "asking demo")
        eventually(lambda: watcher.patches, "the request is sent")
    assert watcher.patches[0] == {"totals": {"total": 1}, "cards": {"summary": "1 request so far"}}


# --- what events report -----------------------------------------------------------------------


def test_requests_are_counted_and_their_server_keeps_the_last_answer() -> None:
    cluster = SimulatedCluster(2)
    coordinator = cluster.run_model("big", [0, 1])
    with watching(cluster) as watcher:
        cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")
        facts = {"place": coordinator.base_url, "tokens_per_s": 38.04, "ttft_ms": 120.4}
        cluster.events.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", status="ok", **facts)
        cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")
        cluster.events.publish(EventKind.REQUEST_FINISHED, "big", "big: error", status="error")
        eventually(lambda: watcher.state["totals"].get("failed"), "both are counted")

        def figures() -> list[str]:
            return list(watcher.state["cards"]["models"][coordinator.base_url]["figures"])

        answer = "last answer: 38 tokens/s, first token after 120 ms"
        eventually(lambda: answer in figures(), "the answer's figures may come after the counts")

    assert watcher.state["totals"] == {"running": 0, "waiting": 0, "total": 2, "failed": 1}
    assert [event["kind"] for event in watcher.state["events"].values()] == ["coordinator.ready"]


def test_requests_at_a_gate_are_shown_while_they_run() -> None:
    cluster = SimulatedCluster(2)
    coordinator = cluster.run_model("big", [0, 1])

    async def ask() -> None:
        async with coordinator.gate.slot():
            await asked.wait()

    with watching(cluster) as watcher:
        asked = asyncio.Event()
        cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")
        request = asyncio.run_coroutine_threadsafe(ask(), asyncio_loop())
        eventually(lambda: watcher.state["totals"]["running"] == 1, "it is shown without an event of the gate")
        asyncio_loop().call_soon_threadsafe(asked.set)
        request.result()
        eventually(lambda: watcher.state["totals"]["running"] == 0, "its end too")


def test_requests_are_followed_also_if_the_watch_starts_during_another_one() -> None:
    cluster = SimulatedCluster(2)
    coordinator = cluster.run_model("big", [0, 1])
    cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")

    async def ask() -> None:
        async with coordinator.gate.slot():
            await asked.wait()

    with watching(cluster) as watcher:
        asked = asyncio.Event()
        cluster.events.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", status="ok")
        cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")
        eventually(lambda: watcher.state["totals"]["total"] == 2, "the next one is sent")
        request = asyncio.run_coroutine_threadsafe(ask(), asyncio_loop())
        eventually(lambda: watcher.state["totals"]["running"] == 1, "it is shown without an event of the gate")
        asyncio_loop().call_soon_threadsafe(asked.set)
        request.result()


def test_all_requests_count_regardless_of_their_number_and_of_watchers() -> None:
    cluster = SimulatedCluster(0)
    for number in range(KEPT_EVENTS):
        cluster.events.publish(EventKind.REQUEST_STARTED, "big", "asking big")
        status = "error" if number == 0 else "ok"
        cluster.events.publish(EventKind.REQUEST_FINISHED, "big", f"big: {status}", status=status)
    with watching(cluster) as watcher:
        totals = watcher.state["totals"]
    with watching(cluster) as again:
        assert again.state["totals"] == totals == {"running": 0, "waiting": 0, "total": KEPT_EVENTS, "failed": 1}


def asyncio_loop() -> asyncio.AbstractEventLoop:
    from sollol_nb.runtime.io_loop import io_loop

    return io_loop()


def test_a_loading_model_is_shown_until_it_is_ready() -> None:
    cluster = SimulatedCluster(2)
    with watching(cluster) as watcher:
        cluster.events.publish(EventKind.COORDINATOR_STARTING, "big", "starting big over 2 workers")
        cluster.events.publish(EventKind.COORDINATOR_LOADING, "big", "1.2 GiB of 4.0 GiB", share=0.3)
        eventually(lambda: watcher.state["starting"].get("big", {}).get("share") == 0.3, "progress is sent")
        cluster.run_model("big", [0, 1])
        eventually(lambda: not watcher.state["starting"], "it is ready")
    assert "coordinator.loading" not in [event["kind"] for event in watcher.state["events"].values()]


def test_a_late_watcher_finds_what_happened_before() -> None:
    cluster = SimulatedCluster(2)
    cluster.change_worker(1, "down", "lost the worker", EventKind.WORKER_LOST)
    with watching(cluster) as watcher:
        assert watcher.state["workers"][endpoint(1)]["last_error"] == "lost the worker"
        assert [event["message"] for event in watcher.state["events"].values()] == ["lost the worker"]


@pytest.mark.parametrize(
    ("facts", "description"),
    [
        ({"tokens_per_s": 9.0, "ttft_ms": 9470.1}, "9 tokens/s, first token after 9.5 s"),
        ({"tokens_per_s": 245.2, "ttft_ms": 34.21}, "245 tokens/s, first token after 34 ms"),
        ({"tokens_per_s": None, "ttft_ms": 0.5}, "first token after 0.5 ms"),
        ({}, None),
    ],
)
def test_an_answer_is_described_as_far_as_it_is_known(facts: dict[str, Any], description: str | None) -> None:
    assert describe_answer(facts) == description


# --- polling ----------------------------------------------------------------------------------


def test_workers_are_probed_in_turn_and_their_round_trips_kept() -> None:
    cluster = SimulatedCluster(25)
    with watching(cluster):
        eventually(lambda: len(set(cluster.probed)) == 25, "each has its turn")
    assert cluster.probed[:25] == list(cluster.workers)


def test_memory_that_changes_for_all_workers_is_sent_for_a_few_at_a_time() -> None:
    cluster = SimulatedCluster(30)
    with watching(cluster) as watcher:
        for name, worker in cluster.workers.items():
            assert worker.probe is not None
            cluster.workers[name] = replace(worker, probe=replace(worker.probe, device_free_bytes=(20 * GIB,)))
        eventually(
            lambda: {worker["used"] for worker in watcher.state["workers"].values()} == {0.38},
            "it is sent for all",
        )
    assert max(watcher.sizes_bytes) < 1000


def test_round_trips_of_ollama_nodes_are_kept_too() -> None:
    cluster = SimulatedCluster(1, [node(1, round_trip_ms=1.234, loaded_bytes=2 * 2**30), node(2, "absent")])
    with watching(cluster) as watcher:
        ready, absent = (node.url for node in cluster.nodes)
        eventually(lambda: watcher.state["nodes"][ready].get("rtt"), "it is probed")
        assert set(watcher.state["nodes"][ready]["rtt"].values()) == {1.2}
        assert "rtt" not in watcher.state["nodes"][absent]


def test_polling_continues_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = SimulatedCluster(40)  # many, so that the next attempt comes soon
    probe = cluster.state._workers.probe
    failures = [ValueError("a strange answer"), PermissionError("no entry")]

    async def failing_first(endpoints: Iterable[str], *, timeout_s: float) -> None:
        if failures:
            raise failures.pop(0)
        await probe(endpoints, timeout_s=timeout_s)

    monkeypatch.setattr(cluster.state._workers, "probe", failing_first)
    with watching(cluster):
        eventually(lambda: cluster.probed, "it is probed")
    assert caplog.text.count("could not check the cluster") == 2


def test_of_the_round_trips_the_last_ones_are_kept() -> None:
    cluster = SimulatedCluster(1)
    with watching(cluster) as watcher:
        for number in range(ROUND_TRIPS_KEPT + 10):
            cluster.events.report(EventKind.PROBE_DONE, endpoint(0), "free", round_trip_ms=number + 0.123)
        last = float(f"{ROUND_TRIPS_KEPT + 9.123:.2g}")
        eventually(lambda: last in watcher.state["workers"][endpoint(0)].get("rtt", {}).values(), "it is sent")
        assert len(watcher.state["workers"][endpoint(0)]["rtt"]) == ROUND_TRIPS_KEPT


def test_when_nobody_watches_nothing_runs() -> None:
    cluster = SimulatedCluster(3)

    def tasks() -> int:
        async def count() -> int:
            return sum(1 for task in asyncio.all_tasks() if "ClusterState" in repr(task.get_coro()))

        return run(count())

    assert tasks() == 0
    counting = list(cluster.events._subscribers)
    with watching(cluster):
        assert tasks() == 2
        assert len(cluster.events._subscribers) == len(counting) + 1
        with watching(cluster):
            assert tasks() == 2
        assert cluster.state.is_watched
    assert tasks() == 0
    assert cluster.events._subscribers == counting
    assert not cluster.state.is_watched


def test_a_returning_watcher_gets_what_has_changed_meanwhile() -> None:
    cluster = SimulatedCluster(3)
    with watching(cluster) as watcher:
        known = dict(watcher.state)
    cluster.change_worker(2, "down", "gone", EventKind.WORKER_LOST)

    patches: list[Mapping[str, Any]] = []
    run_blocking(cluster.state.watch(patches.append))
    run_blocking(cluster.state.unwatch(patches.append))

    assert patched(known, patches[0])["workers"][endpoint(2)]["state"] == "down"


def test_the_end_of_a_router_is_sent_once_and_its_state_stays() -> None:
    cluster = SimulatedCluster(1)
    with watching(cluster) as watcher:
        run(cluster.state.close())
        run(cluster.state.close())
        cluster.change_worker(0, "down", "gone", EventKind.WORKER_LOST)
        assert watcher.patches[-1] == {"closed": True}
    assert watcher.state["workers"][endpoint(0)]["state"] == "free"
    with watching(cluster) as late:
        assert late.state == watcher.state
        assert not cluster.state.is_watched


def test_a_router_that_lets_its_engines_run_on_or_is_forgotten_is_closed_for_watchers_too() -> None:
    kept = HybridRouter(auto_discover_rpc=False)
    with watching(kept) as watcher:
        kept.close(keep=True)
        assert watcher.patches[-1] == {"closed": True}
        assert not kept.state.is_watched

    forgotten = AsyncHybridRouter(auto_discover_rpc=False)
    state, watcher = forgotten.state, Watcher()
    run_blocking(state.watch(watcher))
    del forgotten
    gc.collect()
    eventually(lambda: watcher.patches and watcher.patches[-1] == {"closed": True}, "its end is sent")
    assert not state.is_watched


# --- on real engines --------------------------------------------------------------------------


@pytest.mark.engine
def test_a_real_cluster_is_shown_from_its_workers_to_its_layers(router: HybridRouter) -> None:
    with watching(router) as watcher:
        router.stop_coordinator()  # all: another name of the same file may have begun it
        router.route_request("demo:sharded", "What is a worker?", max_tokens=20, temperature=0)

        def own() -> list[dict[str, Any]]:
            known = watcher.state["coordinators"].values()
            return [
                found
                for found in known
                if found.get("own") and found["model"] == "demo:sharded" and found.get("token_ms")
            ]

        (coordinator,) = eventually(own, "its coordinator is sent, with the times of its tokens")
        assert sum(segment["units"] for segment in coordinator["segments"].values()) == 13
        assert [segment["units"] for segment in coordinator["segments"].values()] == [
            segment["actual"] for segment in coordinator["segments"].values()
        ]

        def held() -> list[dict[str, Any]]:
            return [worker for worker in watcher.state["workers"].values() if worker["state"] == "held"]

        eventually(lambda: len(held()) == 3, "they are shown as held")
        assert all(0 < worker["used"] <= 1 for worker in held())


@pytest.mark.engine
def test_the_end_of_an_idle_worker_is_reported_by_its_supervisor(engine: Any) -> None:
    with HybridRouter(auto_discover_rpc=False) as router:
        (name,) = router.start_workers(1)
        with watching(router) as watcher:
            assert watcher.state["workers"][name]["state"] == "free"
            killed: psutil.Process = engine_on(int(name.rpartition(":")[2]))
            killed.kill()
            eventually(lambda: watcher.state["workers"][name]["state"] == "down", "its end is sent")
            message = f"lost worker {name}: killed (signal 9)"
            eventually(lambda: message in [event.message for event in router.events.recent()], "with its reason")
        assert [event.kind for event in router.events.recent()].count("worker.lost") == 1
