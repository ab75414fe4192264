"""What counts as a number, and how durations are read."""

from __future__ import annotations

import time

import pytest

from sollol_nb.runtime.amounts import is_number, is_positive, is_whole_number, parse_duration

INFINITE, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("value", "number", "whole", "positive"),
    [
        (0, True, True, False),
        (3, True, True, True),
        (-1, True, True, False),
        (0.5, True, False, True),
        (10**400, True, True, True),
        (INFINITE, True, False, True),
        (NAN, True, False, False),
        (True, False, False, False),
        ("3", False, False, False),
        (None, False, False, False),
    ],
)
def test_numbers(value: object, number: bool, whole: bool, positive: bool) -> None:
    assert (is_number(value), is_whole_number(value), is_positive(value)) == (number, whole, positive)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("2m3s500ms", 123.5),
        ("2 h, 5 m", 7500.0),
        *((bad, None) for bad in ("", "10", "m", "1..5m", "5m3", "10m;", "-5m", "10d", "10M")),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


def test_many_digits_without_a_unit_are_refused_quickly() -> None:
    began_s = time.thread_time()  # other processes do not count
    assert parse_duration("9" * 3000) is None
    assert time.thread_time() - began_s < 5


def test_the_units_of_a_duration_can_be_chosen() -> None:
    assert parse_duration("2 days", {"days": 86400.0}) == 172_800.0
    assert parse_duration("2h", {"days": 86400.0}) is None
