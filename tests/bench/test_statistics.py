"""Medians and their bootstrap intervals."""

from __future__ import annotations

import math
import random

import pytest

from sollol_nb.bench.statistics import Estimate, estimate, paired_ratio


def test_the_median_lies_in_its_interval_and_the_interval_in_the_values() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0, 5.0, 2.5]
    found = estimate(values)
    assert found.median == 3.0
    assert found.n == 7
    assert min(values) <= found.lower < found.median < found.upper <= max(values)


def test_the_same_values_always_give_the_same_interval() -> None:
    values = [random.random() for _ in range(20)]
    assert estimate(values) == estimate(list(values))


def test_values_that_do_not_differ_have_an_interval_of_one_point() -> None:
    assert estimate([2.0] * 5) == Estimate(2.0, 2.0, 2.0, 5)


@pytest.mark.parametrize("values", [[], [None], [math.nan, None]])
def test_without_values_nothing_is_known(values: list[float | None]) -> None:
    found = estimate(values)
    assert found.n == 0
    assert math.isnan(found.median)
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)


def test_one_value_has_no_interval() -> None:
    found = estimate([None, 7.0])
    assert (found.median, found.n) == (7.0, 1)
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)


def test_few_values_have_their_range() -> None:
    assert estimate([24.8, 32.7]) == Estimate(28.75, 24.8, 32.7, 2)
    assert estimate([3.0, 1.0, 2.0, 10.0]) == Estimate(2.5, 1.0, 10.0, 4)


def test_more_values_narrow_the_interval() -> None:
    draws = random.Random(1)
    few, many = ([draws.gauss(100, 10) for _ in range(count)] for count in (10, 1000))
    assert estimate(many).upper - estimate(many).lower < estimate(few).upper - estimate(few).lower


def test_about_95_of_100_intervals_contain_the_true_median() -> None:
    draws = random.Random(7)
    estimates = [estimate(draws.expovariate(1.0) for _ in range(40)) for _ in range(200)]
    hits = sum(found.lower <= math.log(2) <= found.upper for found in estimates)
    assert 180 <= hits <= 200


def test_drift_that_affects_both_cancels_in_the_ratio_of_pairs() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 5.0]
    found = paired_ratio([20.0 * factor for factor in drift], [10.0 * factor for factor in drift])
    assert found == Estimate(2.0, 2.0, 2.0, 5)


def test_incomplete_pairs_are_left_out_of_the_ratio() -> None:
    found = paired_ratio([4.0, None, 6.0, math.nan, 8.0], [2.0, 2.0, None, 2.0, 0.0])
    assert (found.median, found.n) == (2.0, 1)
