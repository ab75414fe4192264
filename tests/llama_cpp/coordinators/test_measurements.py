"""What tokens took is remembered by layout, from answers that ran alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sollol_nb.layers.planner import plan_from_counts, plan_layers
from sollol_nb.layers.token_time import predict, worker_parts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import LAYOUTS_KEPT, TokenMeasurements
from sollol_nb.llama_cpp.coordinators.speculation import DRAFT, NGRAM, NO_SPECULATION, Speculation
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.runtime.events import EventBus, EventKind
from tests.support.layer_plans import GB, TWELVE, workers

PATH = Path("model.gguf")
ROUND_TRIPS = dict.fromkeys(("w0:1", "w1:1", "w2:1"), 0.5)


def coordinator(*counts: int, seconds_per_token: float | None = None, port: int = 18080) -> Coordinator:
    values: dict[str, Any] = {
        "base_url": f"http://127.0.0.1:{port}",
        "plan": plan_from_counts(TWELVE, workers(*[20 * GB] * len(counts)), counts),
        "pace": SimpleNamespace(seconds_per_token=seconds_per_token, streams=0),
        "first_seconds_per_token": None,
        "settings": SimpleNamespace(model_path=PATH, facts=TWELVE, speculation=NO_SPECULATION),
    }
    return cast(Coordinator, SimpleNamespace(**values))


def answer(bus: EventBus, tokens_per_s: float | None, place: str = "http://127.0.0.1:18080") -> None:
    bus.publish(EventKind.REQUEST_STARTED, "big", "asking big")
    token_ms = 1000 / tokens_per_s if tokens_per_s else None
    bus.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", status="ok", place=place, token_ms=token_ms)


def test_the_pace_stands_in_until_an_answer_was_measured() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, seconds_per_token=0.04)

    assert measured.token_ms(coordinator(7, 6)) is None
    assert measured.token_ms(running) == 40
    for tokens_per_s in (50, 20, 40, None):
        answer(bus, tokens_per_s)
    assert measured.token_ms(running) == 25, "the median of the answers"


def test_with_drafts_the_first_tokens_stand_in_instead_of_the_pace() -> None:
    running = coordinator(7, 6, seconds_per_token=0.04)
    running.settings.speculation = Speculation(kind=NGRAM)

    assert TokenMeasurements(EventBus()).token_ms(running) is None
    running.first_seconds_per_token = 0.01
    assert TokenMeasurements(EventBus()).token_ms(running) == 10
    running.settings.speculation = Speculation(kind=DRAFT)
    assert TokenMeasurements(EventBus()).token_ms(running) is None, "these were drafted, too"


def test_how_far_the_prediction_is_off_is_known_after_five_answers() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6)
    assert running.plan is not None
    running.plan = replace(running.plan, predicted_token_ms=10.0)

    drifts = []
    for tokens_per_s in (50, 50, 20, 50, 50):
        answer(bus, tokens_per_s)
        drifts.append(measured.drift(running))

    assert drifts == [None] * 4 + [2.0]
    running.plan = replace(running.plan, predicted_token_ms=None)
    assert measured.drift(running) is None


def test_the_waits_for_workers_are_measured_after_two_answers_and_again_when_tokens_take_another_time() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6)

    wanted = []
    for tokens_per_s in (50, 50, 50, 52, 30):
        answer(bus, tokens_per_s)
        wanted.append(measured.wants_waits(running))
        if len(wanted) == 3:
            measured.set_waits(running, {"w0:1": 0.5, "w1:1": 0.4})

    assert wanted == [False, True, True, False, True]
    assert measured.part_ms(running) == pytest.approx({"w0:1": 10.0, "w1:1": 8.0})


def test_the_worker_that_has_become_slow_is_named() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(4, 4, 5)
    for tokens_per_s, shares in ((50, (0.3, 0.3, 0.3)), (25, (0.15, 0.65, 0.15))):
        for _ in range(5):
            answer(bus, tokens_per_s)
        measured.set_waits(running, dict(zip(ROUND_TRIPS, shares, strict=True)))
        slow = measured.slow_workers(running)
        assert [worker.endpoint for worker in slow] == (["w1:1"] if tokens_per_s == 25 else [])

    assert slow[0].factor == pytest.approx(26 / 6)
    assert slow[0].token_ms == pytest.approx(26)
    speeds = measured.speeds(PATH, [running], ROUND_TRIPS)
    assert speeds is not None
    assert speeds.ms_per_byte["w1:1"] > 3 * speeds.ms_per_byte["w0:1"]


def test_what_was_measured_of_a_worker_does_not_count_once_it_was_calibrated_again() -> None:
    """A worker that was slow, and left for that, would never be used again."""
    calibrations = {endpoint: calibrated(1.0) for endpoint in ROUND_TRIPS}
    bus = EventBus()
    measured, running = TokenMeasurements(bus, calibrations.get), coordinator(4, 4, 5)
    for _ in range(5):
        answer(bus, 20)
    measured.set_waits(running, {"w0:1": 0.1, "w1:1": 0.8, "w2:1": 0.1})
    measured.keep(running, ROUND_TRIPS)

    def slowness() -> float:
        speeds = measured.speeds(PATH, [], ROUND_TRIPS, facts=TWELVE, endpoints=ROUND_TRIPS)
        assert speeds is not None
        return speeds.ms_per_byte["w1:1"] / speeds.ms_per_byte["w0:1"]

    assert slowness() > 5
    calibrations["w1:1"] = replace(calibrations["w1:1"], measured_at=time.time() + 1)
    assert slowness() < 5


def test_the_time_of_a_worker_that_was_calibrated_again_is_not_counted_as_the_coordinators() -> None:
    calibrations = {endpoint: calibrated(1.0) for endpoint in ROUND_TRIPS}
    bus = EventBus()
    measured, running = TokenMeasurements(bus, calibrations.get), coordinator(4, 4, 5)
    for _ in range(5):
        answer(bus, 20)
    measured.set_waits(running, {"w0:1": 0.1, "w1:1": 0.7, "w2:1": 0.1})
    measured.keep(running, ROUND_TRIPS)
    calibrations["w1:1"] = replace(calibrations["w1:1"], measured_at=time.time() + 1)

    speeds = measured.speeds(PATH, [], ROUND_TRIPS, facts=TWELVE, endpoints=ROUND_TRIPS)
    assert speeds is not None
    assert speeds.own_ms == pytest.approx(5.0)


def test_answers_count_towards_one_correction_and_only_on_one_coordinator() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6)
    taken = []
    for _ in range(4):
        answer(bus, 50)
        taken.append(measured.take_answers(running, 2))
    answer(bus, 50)
    measured.keep(running, ROUND_TRIPS)  # it ends; the next one has the same port
    answer(bus, 50)

    assert taken == [False, True, False, True]
    assert not measured.take_answers(running, 2)


def test_answers_that_ran_side_by_side_measure_nothing() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, seconds_per_token=0.04)
    bus.publish(EventKind.REQUEST_STARTED, "big", "asking big")
    answer(bus, 10)
    bus.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", place=running.base_url, token_ms=100)
    assert measured.token_ms(running) == 40

    answer(bus, 50)
    assert measured.token_ms(running) == 20, "alone again"


def test_a_layout_that_has_ended_helps_to_predict_the_next() -> None:
    bus = EventBus()
    measured, before = TokenMeasurements(bus), coordinator(7, 6, 0)
    assert measured.speeds(PATH, [], ROUND_TRIPS) is None
    answer(bus, 40)
    measured.keep(before, ROUND_TRIPS)

    new_parts = worker_parts(coordinator(5, 4, 4).plan, ROUND_TRIPS)  # type: ignore[arg-type]
    assert predict(measured.speeds(PATH, [], ROUND_TRIPS), new_parts).token_ms == pytest.approx(25.5, rel=0.01)
    assert measured.speeds(Path("other.gguf"), [], ROUND_TRIPS) is None, "of that model only"
    assert measured.token_ms(coordinator(5, 4, 4)) is None, "another at its address is unmeasured"


def test_the_running_layout_counts_with_its_time_now() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, 0)
    answer(bus, 10)
    measured.keep(running, ROUND_TRIPS)
    answer(bus, 40)

    parts = worker_parts(running.plan, ROUND_TRIPS)  # type: ignore[arg-type]
    assert predict(measured.speeds(PATH, [running], ROUND_TRIPS), parts).token_ms == pytest.approx(25, rel=0.01)


def test_only_the_last_layouts_are_kept() -> None:
    bus = EventBus()
    measured = TokenMeasurements(bus)
    for first in range(13):
        for second in range(13 - first + 1):
            counts = (first, second, 13 - first - second)
            if min(counts) >= 0:
                answer(bus, 40)
                measured.keep(coordinator(*counts), ROUND_TRIPS)
    assert len(measured._kept[PATH]) == LAYOUTS_KEPT


# --- calibrations -----------------------------------------------------------------------------


def calibrated(ms_per_gb: float) -> Calibration:
    return Calibration(
        identity="",
        engine="",
        endpoint="",
        name="",
        measured_at=0.0,
        round_trip_ms=0.5,
        bytes_per_s=None,
        hop_ms=0.1,
        block_ms=0.0,
        ms_per_byte=ms_per_gb / GB,
        prompt_ms_per_byte=0.0,
    )


SPEEDS = {"w0:1": calibrated(1.0), "w1:1": calibrated(1.0), "w2:1": calibrated(4.0)}


def test_before_the_first_token_calibrations_predict() -> None:
    measured, over_three = TokenMeasurements(EventBus(), SPEEDS.get), coordinator(5, 4, 4)
    assert over_three.plan is not None

    token = measured.predict(PATH, over_three.plan, [], {}, TWELVE)

    expected = [shard.weight_bytes * SPEEDS[shard.endpoint].ms_per_byte + 0.6 for shard in over_three.plan.shards]
    assert token.part_ms == pytest.approx(expected), "with the round trips of the calibrations"


def test_the_cost_of_a_block_counts_in_addition_to_its_bytes() -> None:
    whole = coordinator(13).plan
    assert whole is not None
    without, with_blocks = (
        TokenMeasurements(EventBus(), {"w0:1": found}.get).predict(PATH, whole, [], {}, TWELVE).token_ms
        for found in (calibrated(1.0), replace(calibrated(1.0), block_ms=0.5))
    )
    assert with_blocks == pytest.approx((without or 0.0) + 0.5 * TWELVE.layer_count)


@pytest.mark.parametrize(
    ("weight_share", "block_factor", "output_factor"), [(0.0, 1.0, 1.0), (1.0, 0.9, 0.529), (0.5, 0.95, 0.765)]
)
def test_a_processor_that_computes_takes_less_for_bytes_that_hold_fewer_weights(
    weight_share: float, block_factor: float, output_factor: float
) -> None:
    """Blocks in Q4_1 (1.6 weights in a byte), the output layer in Q8_0 (32 in 34 bytes); Q4_K has 256 in 144."""
    facts = replace(
        TWELVE,
        block_weights=round(sum(TWELVE.layer_bytes) * 1.6),
        output_weights=round(TWELVE.output_bytes * 32 / 34),
    )
    known = {name: replace(found, weight_share=weight_share) for name, found in SPEEDS.items()}
    plan = coordinator(7, 5, 1).plan
    assert plan is not None

    token = TokenMeasurements(EventBus(), known.get).predict(PATH, plan, [], ROUND_TRIPS, facts)

    bytes_ms = [shard.weight_bytes * SPEEDS[shard.endpoint].ms_per_byte for shard in plan.shards]
    factors = (block_factor, block_factor, output_factor)
    expected = [ms * factor + 0.6 for ms, factor in zip(bytes_ms, factors, strict=True)]
    assert token.part_ms == pytest.approx(expected, rel=1e-3)


def test_a_planner_counts_the_output_layer_as_a_prediction_does() -> None:
    """Two workers, of which one reads the output layer much faster than its type lets expect: it gets that one."""
    facts = replace(
        TWELVE, output_weights=TWELVE.output_bytes // 4, block_weights=sum(TWELVE.layer_bytes) * 16 // 9
    )
    for computing in ("w0:1", "w1:1"):
        known = {
            name: replace(calibrated(1.0), weight_share=float(name == computing)) for name in ("w0:1", "w1:1")
        }
        speeds = TokenMeasurements(EventBus(), known.get).calibrated(facts, known)
        capacities = [replace(worker, round_trip_ms=0.5) for worker in workers(8 * GB, 8 * GB)]
        plan = plan_layers(facts, capacities, strategy="auto", speeds=speeds)

        assert plan.shards[-1].endpoint == computing
        parts = worker_parts(plan, dict.fromkeys(known, 0.5), facts)
        assert plan.predicted_token_ms == pytest.approx(predict(speeds, parts).token_ms)


@pytest.mark.parametrize("context_tokens", [10, 128, 1000])
def test_long_contexts_make_no_worker_slow(context_tokens: int) -> None:
    """Tokens behind a long context take longer, whatever the workers."""
    known = {name: replace(found, context_ms_per_byte=1e-5) for name, found in SPEEDS.items()}
    bus = EventBus()
    measured, running = TokenMeasurements(bus, known.get), coordinator(5, 4, 4)
    facts = replace(TWELVE, layer_kv_bytes_per_token=(1000,) * TWELVE.layer_count)
    cast(Any, running.settings).facts = facts
    assert running.plan is not None
    measured.expect(running, ROUND_TRIPS)
    expected_ms = measured.predict(PATH, running.plan, [], ROUND_TRIPS, facts).token_ms
    assert expected_ms is not None
    each_ms = 1e-5 * sum(facts.layer_kv_bytes_per_token)

    bus.publish(EventKind.REQUEST_STARTED, "big", "asking big")
    token_ms = expected_ms + (context_tokens - 128) * each_ms
    values = {"place": running.base_url, "token_ms": token_ms, "context_tokens": context_tokens}
    bus.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", **values)

    assert measured.token_ms(running) == pytest.approx(expected_ms)
    assert list(measured.corrections(running, [running], ROUND_TRIPS).values()) == pytest.approx(
        [1.0] * 3, rel=1e-3
    )


def measured_at(bus: EventBus, *counts: int, factors: dict[str, float]) -> Coordinator:
    """A coordinator on which tokens took what workers need that are slower than calibrated by these factors."""
    running = coordinator(*counts, port=18000 + sum(n * count for n, count in enumerate(counts)))
    assert running.plan is not None
    token_ms = sum(
        shard.weight_bytes * SPEEDS[shard.endpoint].ms_per_byte * factors.get(shard.endpoint, 1.0) + 0.6
        for shard in running.plan.shards
    )
    answer(bus, 1000 / token_ms, running.base_url)
    return running


def test_a_worker_that_became_slow_is_found_from_the_answers_of_two_layouts() -> None:
    bus = EventBus()
    measured = TokenMeasurements(bus, SPEEDS.get)
    slow = {"w1:1": 4.0}
    running = [measured_at(bus, *counts, factors=slow) for counts in ((5, 4, 4), (1, 10, 2))]

    found = measured.corrections(running[1], running, ROUND_TRIPS)

    assert found["w1:1"] > 2.5 * max(found["w0:1"], found["w2:1"])


def test_a_model_that_reads_a_part_of_its_weights_makes_no_worker_faster() -> None:
    bus = EventBus()
    measured = TokenMeasurements(bus, SPEEDS.get)
    running = measured_at(bus, 5, 4, 4, factors=dict.fromkeys(SPEEDS, 0.1))

    assert list(measured.corrections(running, [running], ROUND_TRIPS).values()) == pytest.approx(
        [1.0] * 3, rel=0.1
    )


def test_without_calibrations_nothing_is_corrected() -> None:
    bus = EventBus()
    measured = TokenMeasurements(bus)
    running = measured_at(bus, 5, 4, 4, factors={})

    assert measured.corrections(running, [running], ROUND_TRIPS) == {}
