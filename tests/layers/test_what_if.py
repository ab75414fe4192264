"""What if: the forecast of memory and time per token for another layout."""

from __future__ import annotations

import random

import pytest

from sollol_nb.errors import ConfigError, WorkersUnavailableError
from sollol_nb.layers.plan import CPU, own_endpoint
from sollol_nb.layers.planner import model_load, plan_from_counts, plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import Measurement, WorkerSpeeds, calibrate, worker_parts
from sollol_nb.layers.what_if import (
    Forecast,
    describe_memory,
    describe_token_time,
    forecast,
    rebalance,
    without_layout,
)
from tests.support.layer_plans import GB, TWELVE, workers

MEASURED = WorkerSpeeds({"w0:1": 1e-9, "w1:1": 1e-9, "w2:1": 4e-9}, 1e-9, 0.5)


def forecast_of(
    *counts: int, free: tuple[int, ...] = (20 * GB, 20 * GB, 20 * GB), speeds: WorkerSpeeds | None = MEASURED
) -> Forecast:
    capacities = [
        WorkerCapacity(worker.endpoint, worker.free_bytes, worker.total_bytes, round_trip_ms=1.0)
        for worker in workers(*free)
    ]
    return forecast(TWELVE, capacities, counts, context_tokens=4096, speeds=speeds)


# --- what a layout needs ----------------------------------------------------------------------


def test_the_forecast_has_layers_and_memory_of_each_worker() -> None:
    first, second, third = forecast_of(6, 0, 7).workers
    load = model_load(TWELVE, 4096)

    assert (first.layers, first.unit_count, first.needed_bytes) == ("0-5", 6, 6 * GB + load.reserve_bytes)
    assert (second.layers, second.unit_count, second.needed_bytes, second.token_ms) == ("", 0, 0, None)
    assert third.layers == "6-11 + output"
    assert describe_memory(second) == "nothing"
    assert describe_memory(first) == "5.6 GiB of 18.6 GiB"


def test_the_forecast_has_the_plan_that_would_be_made() -> None:
    assert forecast_of(6, 4, 3).plan == plan_from_counts(TWELVE, workers(*[20 * GB] * 3), (6, 4, 3))


def test_a_layout_that_does_not_fit_names_the_worker_and_what_is_short() -> None:
    over = forecast_of(10, 2, 1, free=(8 * GB, 20 * GB, 20 * GB))

    assert not over.fits
    assert over.shortage.startswith(
        "the given layout needs 9.3 GiB on w0:1 (layers 0-9), but only 7.5 GiB are free"
    )
    assert "does not fit: the given layout" in over.describe()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((6, 4), "6/4 has 2 counts for 3 workers"),
        ((6, 4, 4), "6/4/4 does not place the model's 13 units (12 blocks and the output layer)"),
        ((14, -1, 0), "give whole numbers that sum to 13"),
        ((6.5, 6.5, 0), "give whole numbers"),
    ],
)
def test_counts_that_do_not_place_the_model_are_refused_in_one_line(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        forecast_of(*counts)
    assert message in str(failure.value)


def test_no_workers_make_no_layout() -> None:
    with pytest.raises(WorkersUnavailableError):
        forecast(TWELVE, [], [], context_tokens=4096)


# --- what it brings ---------------------------------------------------------------------------


def test_moving_layers_off_a_slow_worker_makes_a_token_quicker() -> None:
    times = [forecast_of(*counts).token.token_ms for counts in ((4, 4, 5), (5, 5, 3), (7, 6, 0))]

    assert None not in times
    assert times == sorted(times, reverse=True)  # type: ignore[type-var]


def test_a_dropped_worker_saves_its_round_trip_and_hop() -> None:
    alike = WorkerSpeeds({}, 1e-9, 0.5)

    three, two = (forecast_of(*counts, speeds=alike).token.token_ms for counts in ((5, 4, 4), (7, 6, 0)))

    assert three is not None
    assert two is not None
    assert three - two == pytest.approx(1.5)


def test_without_a_measurement_memory_is_known_and_time_is_not() -> None:
    unmeasured = forecast_of(6, 4, 3, speeds=None)

    assert unmeasured.fits
    assert unmeasured.token.token_ms is None
    assert unmeasured.describe() == (
        "6/4/3 over 3 workers: fits; time per token unknown: no token of this model was measured yet"
    )


def test_a_running_layout_is_predicted_as_measured() -> None:
    capacities = [WorkerCapacity(f"w{n}:1", 20 * GB, 20 * GB, round_trip_ms=0.4) for n in range(3)]
    plan = plan_layers(TWELVE, capacities)
    parts = worker_parts(plan, {worker.endpoint: worker.round_trip_ms for worker in capacities})
    speeds = calibrate([Measurement(parts, 25.0)])

    again = forecast(TWELVE, capacities, plan.unit_counts, context_tokens=4096, speeds=speeds)

    assert again.token.token_ms == pytest.approx(25.0, rel=1e-3)
    assert describe_token_time(again.token) == "25 ms per token (40 tokens/s)"


# --- memory without the running layout --------------------------------------------------------


def test_workers_of_the_running_layout_count_with_their_memory_before_it() -> None:
    plan = plan_layers(TWELVE, workers(20 * GB, 20 * GB))
    now = workers(3 * GB, 4 * GB, 9 * GB)

    assert [worker.free_bytes for worker in without_layout(plan, now)] == [20 * GB, 20 * GB, 9 * GB]


def test_a_free_worker_on_the_memory_of_a_held_one_gets_that_memory_back_too() -> None:
    plan = plan_layers(TWELVE, workers(20 * GB, 20 * GB, domains="a."))
    now = workers(3 * GB, 3 * GB, 3 * GB, domains="a.a")

    assert [worker.free_bytes for worker in without_layout(plan, now)] == [20 * GB, 20 * GB, 20 * GB]


# --- moving units -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "position", "unit_count", "after"),
    [
        ((5, 4, 4), 0, 6, [6, 3, 4]),
        ((5, 4, 4), 0, 4, [4, 5, 4]),
        ((5, 4, 4), 2, 5, [5, 3, 5]),
        ((5, 4, 4), 2, 0, [5, 8, 0]),
        ((5, 4, 4), 1, 0, [5, 0, 8]),
        ((5, 4, 4), 1, 12, [1, 12, 0]),
        ((5, 4, 4), 1, 99, [0, 13, 0]),
        ((5, 4, 4), 1, -3, [5, 0, 8]),
        ((5, 0, 8), 0, 3, [3, 0, 10]),
        ((13, 0, 0), 0, 5, [5, 8, 0]),
        ((13,), 0, 5, [13]),
    ],
)
def test_neighbours_compensate_for_a_changed_worker(
    counts: tuple[int, ...], position: int, unit_count: int, after: list[int]
) -> None:
    assert rebalance(counts, position, unit_count) == after


def test_moving_never_loses_a_unit() -> None:
    chance = random.Random(5)
    for _ in range(500):
        counts = [chance.randint(0, 9) for _ in range(chance.randint(1, 15))]
        position, wanted = chance.randrange(len(counts)), chance.randint(0, 40)
        after = rebalance(counts, position, wanted)
        assert sum(after) == sum(counts)
        assert min(after) >= 0
        if len(counts) > 1:
            assert after[position] == min(wanted, sum(counts))


def test_a_layout_may_use_own_devices_which_come_where_llama_cpp_has_them() -> None:
    own = [
        WorkerCapacity(own_endpoint("CUDA0"), 20 * GB, 20 * GB, device="CUDA0"),
        WorkerCapacity("w0:1", 20 * GB, 20 * GB, round_trip_ms=1.0),
        WorkerCapacity(own_endpoint(CPU), 20 * GB, 20 * GB, device=CPU),
    ]
    speeds = WorkerSpeeds({"w0:1": 1e-9, own_endpoint(CPU): 4e-9, own_endpoint("CUDA0"): 5e-10}, None, 0.5)
    predicted = forecast(TWELVE, own, (6, 4, 3), context_tokens=4096, speeds=speeds)

    assert predicted.plan.unit_counts == (3, 4, 6)
    assert [found.layers for found in predicted.workers] == ["7-11 + output", "3-6", "0-2"]
    assert [found.token_ms for found in predicted.workers] == pytest.approx([3, 4 + 1.5, 12])
    assert predicted.describe().startswith("3/4/6 over 1 worker and this machine: fits; ")
