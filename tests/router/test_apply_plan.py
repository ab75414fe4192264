"""Another layout for a running model: answers continue, what does not fit changes nothing, times are predicted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers import workers as workers_room
from sollol_nb.llama_cpp.workers.probe import Probe, probe_all
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import QUESTION, engine_on, eventually, run
from tests.support.moved_answers import read_and_move
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.engine


MODEL = "demo:sharded"
LONG_QUESTION = "Tell me everything about sharding."  # the answer is still under way after its first chunks


@pytest.fixture(scope="module")
def sharding(engine: Engine) -> Iterator[HybridRouter]:
    """A router over three workers of its own."""
    # With more slots than the coordinators of other tests, which it would share.
    settings: dict[str, Any] = {"distributed_threshold_params": 1e-6, "context_tokens": 1024, "slots": 5}
    with HybridRouter(auto_discover_rpc=False, **settings) as mine:
        mine.start_workers(3)
        yield mine


def layout(router: HybridRouter, *counts: int) -> dict[str, int]:
    return dict(zip(router.worker_endpoints, counts, strict=True))


def states(router: HybridRouter) -> dict[str, str]:
    return {worker.endpoint: worker.state for worker in router.status().workers}


def running_layout(router: HybridRouter) -> tuple[int, ...]:
    assert router.coordinator is not None
    assert router.coordinator.plan is not None
    assert router.coordinator.placement_differences == []
    return router.coordinator.plan.unit_counts


def test_a_layer_plan_is_known_before_anything_is_started(sharding: HybridRouter, endless: str) -> None:
    sharding.check_workers()
    foreseen = sharding.plan(endless)
    assert (sharding.coordinators, set(states(sharding).values())) == ([], {"free"})

    answer = sharding.route_request(endless, QUESTION, max_tokens=2)

    assert foreseen is not None
    shards = [(shard["endpoint"], shard["layers"]) for shard in answer.routing["plan"]["shards"]]
    assert [(shard.endpoint, shard.layers) for shard in foreseen.shards] == shards
    assert sharding.coordinator is not None
    assert sharding.plan(endless) == sharding.coordinator.plan
    assert sharding.plan(endless, backend="local") is None


def test_a_running_model_gets_another_layout(sharding: HybridRouter, endless: str) -> None:
    whole = sharding.route_request(endless, QUESTION, temperature=0, max_tokens=60)
    before = running_layout(sharding)

    sharding.apply_plan(endless, layout(sharding, 0, 4, 1))

    assert running_layout(sharding) == (4, 1) != before
    again = sharding.route_request(endless, QUESTION, temperature=0, max_tokens=60)
    assert (again.text, again.routing["plan"]["strategy"]) == (whole.text, "as given")
    events = {event.kind: event.message for event in sharding.events.recent()}
    assert "new layout for endless: 4/1 over 2 workers: fits" in events["coordinator.planned"]


def test_its_token_time_was_predicted_from_the_layouts_before_it(
    sharding: HybridRouter, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steady(endpoints: Iterable[str], **settings: Any) -> list[Probe]:
        return [replace(probe, round_trip_ms=0.05) for probe in await probe_all(endpoints, **settings)]

    # Real workers and a real measurement, which does not change between forecast and start.
    monkeypatch.setattr(workers_room, "probe_all", steady)
    sharding.stop_coordinator()
    sharding.cluster()
    sharding.route_request(endless, QUESTION, temperature=0, max_tokens=20)
    pool = sharding._async._engines._coordinators
    measurements = pool._measurements
    speeds = measurements.speeds(Path(endless), pool.coordinators, pool._workers.round_trips_ms)
    assert speeds is not None
    monkeypatch.setattr(measurements, "speeds", lambda *_, **__: speeds)

    foreseen = sharding.what_if(endless, layout(sharding, 5, 0, 0)).token.token_ms
    sharding.apply_plan(endless, layout(sharding, 5, 0, 0))
    answer = sharding.route_request(endless, QUESTION, temperature=0, max_tokens=20)

    assert foreseen is not None
    assert foreseen > 0
    predicted = answer.routing["plan"]["predicted_token_ms"]
    assert predicted == pytest.approx(foreseen)
    assert sharding.latency.frame(model=endless, last=1)["predicted_ms_per_token"].tolist() == [predicted]
    # A coordinator of an earlier test may still run the same model.
    (status,) = [seen for seen in sharding.cluster().coordinators if seen.url == answer.routing["coordinator_url"]]
    assert status.model == "endless"
    assert status.predicted_token_ms == pytest.approx(predicted)
    assert status.token_ms is not None


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((1, 1, 1), r"1/1/1 does not place the model's 5 units"),
        ((5, 1, -1), r"give whole numbers that sum to 5"),
    ],
)
def test_counts_that_are_not_a_layout_change_nothing(
    sharding: HybridRouter, endless: str, counts: tuple[int, ...], message: str
) -> None:
    sharding.route_request(endless, QUESTION, max_tokens=2)
    before = sharding.coordinator
    with pytest.raises(ConfigError, match=message):
        sharding.apply_plan(endless, layout(sharding, *counts))
    assert sharding.coordinator is before


def test_an_unknown_worker_or_model_is_named(sharding: HybridRouter, endless: str) -> None:
    sharding.route_request(endless, QUESTION, max_tokens=2)
    with pytest.raises(ConfigError, match=r"10.9.9.9:50052 is not a known worker; known workers: 127"):
        sharding.what_if(endless, {"10.9.9.9:50052": 5})
    with pytest.raises(ConfigError, match=r"demo is not running sharded in this router; running sharded: endless"):
        sharding.apply_plan("demo", layout(sharding, 5, 0, 0))


def test_a_layout_that_does_not_fit_is_refused_and_the_running_coordinator_continues(
    sharding: HybridRouter, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding.route_request(endless, QUESTION, max_tokens=2)
    coordinator = sharding.coordinator
    assert coordinator is not None
    assert coordinator.plan is not None
    tiny = tuple(replace(shard, free_bytes=1000) for shard in coordinator.plan.shards)
    settings = replace(coordinator.settings, plan=replace(coordinator.plan, shards=tiny))
    monkeypatch.setattr(coordinator, "settings", settings)
    small = property(lambda self: WorkerCapacity(self.endpoint, free_bytes=1000, total_bytes=1000))
    monkeypatch.setattr(WorkerStatus, "capacity", small)

    foreseen = sharding.what_if(endless, layout(sharding, 1, 2, 2))
    with pytest.raises(ModelDoesNotFitError, match=r"the given layout needs .*; move layers to a worker"):
        sharding.apply_plan(endless, layout(sharding, 1, 2, 2))

    assert not foreseen.fits
    assert sharding.coordinator is coordinator


def test_a_layout_over_a_worker_that_is_gone_is_refused_and_the_running_coordinator_continues(
    sharding: HybridRouter, endless: str
) -> None:
    sharding.route_request(endless, QUESTION, max_tokens=2)
    coordinator = sharding.coordinator
    (gone,) = sharding.start_workers(1)
    try:
        engine_on(int(gone.rpartition(":")[2])).kill()
        eventually(lambda: states(sharding)[gone] == "down", "it is gone")
        with pytest.raises(
            WorkersUnavailableError,
            match=rf"cannot use this layout for .*: {gone}: killed .*; choose other",
        ):
            sharding.apply_plan(endless, {gone: 5})
    finally:
        sharding.remove_worker(gone)
    assert sharding.coordinator is coordinator
    assert sharding.route_request(endless, QUESTION, max_tokens=2)["eval_count"] == 2


def test_two_layouts_at_the_same_time_are_made_one_after_the_other(sharding: HybridRouter, endless: str) -> None:
    sharding.route_request(endless, QUESTION, max_tokens=2)
    layouts = [layout(sharding, 3, 1, 1), layout(sharding, 1, 1, 3)]

    async def both() -> None:
        await asyncio.gather(*(sharding._async.apply_plan(endless, layout) for layout in layouts))

    run(both())
    assert running_layout(sharding) == (1, 1, 3)
    assert [coordinator.model for coordinator in sharding.coordinators].count("endless") == 1
    assert sharding.route_request(endless, QUESTION, max_tokens=2)["eval_count"] == 2


def test_the_next_start_uses_the_strategy_again(sharding: HybridRouter, endless: str) -> None:
    sharding.apply_plan(endless, layout(sharding, 5, 0, 0))
    sharding.stop_coordinator(endless)
    answer = sharding.route_request(endless, QUESTION, max_tokens=2)
    assert answer.routing["plan"]["strategy"] == "memory_aware"
    assert len(running_layout(sharding)) == 3


def test_preloading_starts_the_coordinator_that_a_request_then_uses(sharding: HybridRouter) -> None:
    sharding.stop_coordinator()
    said = sharding.preload("demo:sharded")
    assert sharding.coordinator is not None
    assert said == f"at {sharding.coordinator.base_url}"
    assert sharding.route_request("demo:sharded", QUESTION, max_tokens=2).routing["load_ms"] is None


@pytest.mark.ollama
def test_preloading_a_model_of_ollama_has_its_node_load_it(ollama: OllamaServer) -> None:
    pool = OllamaPool([f"127.0.0.1:{ollama.port}"])
    with HybridRouter(pool, auto_discover_rpc=False, enable_distributed=False) as mine:
        assert mine.preload("llama3.1:70b") == "in Ollama"
        (node,) = pool.nodes
        assert "llama3.1:70b" in node.loaded_models


def test_an_answer_continues_on_the_new_layout(sharding: HybridRouter) -> None:
    sharding.stop_coordinator()
    whole = sharding.route_request(MODEL, LONG_QUESTION, temperature=0)
    before = running_layout(sharding)

    answer = Completion.from_chunks(read_and_move(sharding, MODEL, LONG_QUESTION, 3, layout(sharding, 0, 9, 4)))

    assert (answer.text, answer["eval_count"]) == (whole.text, whole["eval_count"])
    assert running_layout(sharding) == (9, 4) != before
    assert answer.routing["plan"]["strategy"] == "as given"
    events = {event.kind: event.message for event in sharding.events.recent()}
    assert f"new layout for {MODEL}: 9/4 over 2 workers: fits" in events["coordinator.planned"]
    assert events["answer.continued"].startswith(f"resumed an answer from {MODEL} at token ")
