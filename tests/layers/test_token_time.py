"""The time per token is predicted from measurements on other layouts, and before them from calibrations."""

from __future__ import annotations

import random

import pytest

from sollol_nb.layers.plan import LayerPlan, Shard
from sollol_nb.layers.token_time import (
    Measurement,
    TokenTime,
    WorkerPart,
    WorkerSpeeds,
    calibrate,
    predict,
    worker_parts,
)

MIB = 2**20


def parts(*units: int, round_trip_ms: float | None = 0.5) -> tuple[WorkerPart, ...]:
    """Workers `w0`, `w1`, ... that read so many MiB; those that read nothing take no part."""
    return tuple(
        WorkerPart(f"w{number}", count * MIB, round_trip_ms) for number, count in enumerate(units) if count
    )


def token_ms(speeds: dict[str, float], layout: tuple[WorkerPart, ...], hop_ms: float = 0.0) -> float:
    """The cost model itself, with ms per MiB."""
    return sum(
        part.read_bytes / MIB * speeds[part.endpoint] + (part.round_trip_ms or 0.0) + hop_ms for part in layout
    )


ALIKE = dict.fromkeys(("w0", "w1", "w2"), 0.4)
ONE_SLOW = {"w0": 0.2, "w1": 0.2, "w2": 0.7}


def measured(
    speeds: dict[str, float], *layouts: tuple[int, ...], hop_ms: float = 0.0, round_trip_ms: float = 0.5
) -> list[Measurement]:
    found = []
    for units in layouts:
        layout = parts(*units, round_trip_ms=round_trip_ms)
        found.append(Measurement(layout, token_ms(speeds, layout, hop_ms)))
    return found


# --- known ------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [(8, 8, 9), (25, 0, 0), (0, 12, 13), (23, 1, 1)])
def test_one_measurement_predicts_every_layout_of_equal_workers(units: tuple[int, ...]) -> None:
    speeds = calibrate(measured(ALIKE, (8, 8, 9)))

    assert predict(speeds, parts(*units)).token_ms == pytest.approx(token_ms(ALIKE, parts(*units)), rel=1e-3)


@pytest.mark.parametrize(
    ("round_trip_ms", "tokens_per_s"), [(10, (91, 45.6, 30.4)), (5, (145, 73, 49)), (1, (315, 182, 122))]
)
def test_a_round_trip_is_paid_once_for_each_worker(round_trip_ms: float, tokens_per_s: tuple[float, ...]) -> None:
    """A tiny model through a delay proxy, over one, two and three workers: two of these predict the third."""
    layouts = [parts(*units, round_trip_ms=round_trip_ms) for units in ((9, 0, 0), (4, 5, 0), (3, 3, 3))]
    over_one, over_two, over_three = (
        Measurement(*pair) for pair in zip(layouts, (1000 / n for n in tokens_per_s), strict=True)
    )

    predicted = predict(calibrate([over_one, over_two]), over_three.parts)

    assert predicted.token_ms == pytest.approx(over_three.token_ms, rel=0.06)


def test_a_slow_worker_is_found_from_two_layouts() -> None:
    speeds = calibrate(measured(ONE_SLOW, (8, 8, 9), (11, 11, 3)))

    assert speeds is not None
    assert speeds.ms_per_byte["w2"] > 2 * speeds.ms_per_byte["w0"]
    fewer = predict(speeds, parts(12, 13, 0)).token_ms
    assert fewer == pytest.approx(token_ms(ONE_SLOW, parts(12, 13, 0)), rel=0.15)


def test_a_slow_worker_is_found_from_one_layout_where_the_waits_for_each_were_measured() -> None:
    """And only that one: what is known of a worker that took no part stays as it was."""
    layout = parts(8, 8, 9)
    waits_ms = tuple(token_ms(ONE_SLOW, (part,)) for part in layout)
    known = WorkerSpeeds(dict.fromkeys(("w0", "w1", "w2", "w3"), 0.2 / MIB), None, 0.0, own_ms=5.0)

    speeds = calibrate([Measurement(layout, sum(waits_ms) + 0.25, waits_ms)], known)

    assert speeds is not None
    for units in ((12, 13, 0), (1, 1, 23)):
        predicted = predict(speeds, parts(*units))
        assert predicted.token_ms == pytest.approx(token_ms(ONE_SLOW, parts(*units)) + 0.25, rel=0.05)
    assert speeds.ms_per_byte["w3"] == pytest.approx(0.2 / MIB, rel=0.05)


def test_a_hop_is_separated_from_bytes_once_the_number_of_workers_has_changed() -> None:
    alone = calibrate(measured(ALIKE, (8, 8, 9), hop_ms=2.0))
    both = calibrate(measured(ALIKE, (8, 8, 9), (25, 0, 0), hop_ms=2.0))

    assert alone is not None
    assert both is not None
    assert alone.hop_ms == pytest.approx(0, abs=1e-3)
    assert both.hop_ms == pytest.approx(2, rel=0.05)


def test_an_unmeasured_worker_is_assumed_to_have_the_usual_speed() -> None:
    speeds = calibrate(measured(ALIKE, (12, 13, 0)))

    assert speeds is not None
    assert "w2" not in speeds.ms_per_byte
    assert predict(speeds, parts(0, 0, 25)).token_ms == pytest.approx(25 * 0.4 + 0.5, rel=1e-3)


def test_measurements_that_vary_do_not_make_workers_differ() -> None:
    chance = random.Random(7)
    noisy = [
        Measurement(exact.parts, exact.token_ms * chance.uniform(0.97, 1.03))
        for exact in measured(ALIKE, *[(8, 8, 9)] * 10)
    ]
    speeds = calibrate(noisy)

    assert speeds is not None
    assert max(speeds.ms_per_byte.values()) == pytest.approx(min(speeds.ms_per_byte.values()), rel=1e-3)


def test_shares_of_a_token_sum_to_one_and_follow_the_bytes() -> None:
    shares = predict(calibrate(measured(ALIKE, (10, 10, 5))), parts(20, 4, 1)).shares

    assert sum(shares) == pytest.approx(1)
    assert list(shares) == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    "layouts",
    [((5, 5, 5), (5, 5, 5)), ((1, 24, 0), (24, 1, 0)), ((1, 1, 1), (30, 30, 30)), ((1, 0, 0), (0, 0, 90))],
)
def test_no_speed_is_below_zero_whatever_was_measured(layouts: tuple[tuple[int, ...], ...]) -> None:
    chance = random.Random(3)
    for _ in range(50):
        absurd = [Measurement(parts(*units), chance.uniform(0.1, 100)) for units in layouts]
        speeds = calibrate(absurd)
        assert speeds is not None
        assert min(*speeds.ms_per_byte.values(), speeds.usual_ms_per_byte, speeds.hop_ms) >= 0


# --- unknown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measurements",
    [
        [],
        [Measurement(parts(5, 5, round_trip_ms=None), 10.0)],
        [Measurement(parts(5, 5), 0.0)],
        [Measurement((), 10.0)],
    ],
)
def test_unusable_measurements_give_no_speeds(measurements: list[Measurement]) -> None:
    assert calibrate(measurements) is None


def test_an_unmeasured_model_has_no_token_time_and_says_why() -> None:
    predicted = predict(None, parts(5, 5))

    assert predicted == TokenTime((), "no token of this model was measured yet")
    assert (predicted.token_ms, predicted.tokens_per_s, predicted.shares) == (None, None, ())


def test_a_worker_that_was_never_probed_leaves_the_token_time_unknown_and_is_named() -> None:
    layout = (*parts(5), WorkerPart("10.0.0.9:50052", 5 * MIB, None))

    predicted = predict(calibrate(measured(ALIKE, (8, 8, 9))), layout)

    assert predicted.token_ms is None
    assert predicted.unknown == "the round trip to 10.0.0.9:50052 was not measured yet"


def test_the_parts_of_a_plan_have_its_weights_and_the_given_round_trips() -> None:
    shards = tuple(
        Shard(
            endpoint=endpoint,
            first_layer=0,
            layer_count=3,
            has_output=False,
            weight_bytes=7,
            kv_bytes=1,
            reserve_bytes=1,
            free_bytes=9,
        )
        for endpoint in ("a:1", "b:2")
    )

    assert worker_parts(
        LayerPlan(strategy="even", layer_count=5, context_tokens=4096, shards=shards), {"a:1": 0.3}
    ) == (
        WorkerPart("a:1", 7, 0.3, block_count=3),
        WorkerPart("b:2", 7, None, block_count=3),
    )


# --- calibrated -------------------------------------------------------------------------------

CALIBRATED = WorkerSpeeds(
    {"w0": 0.2 / MIB, "w1": 0.2 / MIB, "w2": 0.8 / MIB},
    None,
    0.0,
    hops_ms={"w0": 0.1, "w1": 0.1, "w2": 0.3},
    bytes_per_s={"w2": MIB},
    own_ms=0.25,
)


def test_calibrations_predict_the_first_token() -> None:
    assert calibrate([], CALIBRATED) == CALIBRATED
    token = predict(CALIBRATED, parts(8, 0, 9))

    assert token.part_ms == pytest.approx((8 * 0.2 + 0.1 + 0.5, 9 * 0.8 + 0.3 + 0.5))
    assert token.own_ms == 0.25
    assert token.token_ms == pytest.approx(sum(token.part_ms) + 0.25)


def test_values_take_their_time_on_the_wire() -> None:
    (part,) = parts(0, 0, 9)
    with_logits = WorkerPart(part.endpoint, part.read_bytes, part.round_trip_ms, wire_bytes=MIB // 100)

    (before_ms,), (after_ms,) = (predict(CALIBRATED, [each]).part_ms for each in (part, with_logits))
    assert after_ms - before_ms == pytest.approx(10, rel=1e-3)


def test_a_worker_that_was_not_calibrated_makes_the_time_unknown_until_a_token_was_measured() -> None:
    layout = (*parts(8, 8), WorkerPart("w3", 9 * MIB, 0.5))

    token = predict(CALIBRATED, layout)
    assert token.token_ms is None
    assert token.unknown == "no token of this model was measured yet, and w3 was not calibrated"
    assert predict(calibrate(measured(ALIKE, (8, 8, 9)), CALIBRATED), layout).token_ms is not None


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_one_measurement_keeps_the_calibrated_differences(factor: float) -> None:
    """A model may be slower for its bytes than the one that calibrates, or read only a part of them."""

    def true_ms(layout: tuple[WorkerPart, ...]) -> float:
        expected = predict(CALIBRATED, layout)
        assert expected.token_ms is not None
        wire_ms = sum(part.round_trip_ms or 0.0 for part in layout)
        return (expected.token_ms - wire_ms) * factor + wire_ms

    speeds = calibrate([Measurement(parts(8, 8, 9), true_ms(parts(8, 8, 9)))], CALIBRATED)

    for units in ((11, 11, 3), (12, 13, 0), (0, 5, 20)):
        assert predict(speeds, parts(*units)).token_ms == pytest.approx(true_ms(parts(*units)), rel=0.02)


def test_measurements_win_over_wrong_calibrations() -> None:
    speeds = calibrate(measured(ALIKE, (8, 8, 9), (20, 3, 2), (2, 3, 20), (2, 20, 3)), CALIBRATED)

    assert predict(speeds, parts(5, 15, 5)).token_ms == pytest.approx(token_ms(ALIKE, parts(5, 15, 5)), rel=0.05)


def test_the_output_layer_may_take_less_than_its_bytes_let_expect() -> None:
    speeds = WorkerSpeeds({"w0": 0.2 / MIB}, None, 0.0, output_ms={"w0": -0.5})
    blocks, output = WorkerPart("w0", 8 * MIB, 0.5), WorkerPart("w0", 8 * MIB, 0.5, has_output=True)

    assert [predict(speeds, [part]).token_ms for part in (blocks, output)] == pytest.approx([2.1, 1.6])

    measured_twice = [Measurement((output,), 2 * (1.6 - 0.5) + 0.5)]
    twice = calibrate(measured_twice, speeds)
    assert twice is not None
    assert twice.output_ms["w0"] == pytest.approx(-1.0, rel=0.02)
