"""Markdown tables, and numbers and units as people read them."""

from __future__ import annotations

import pytest

from sollol_nb.text.tables import (
    compact_number,
    format_age,
    format_bytes,
    format_ms,
    markdown_table,
    parse_markdown_table,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (-0.000123456789, "-0.000123457"),
        (123456.789, "123457"),
        (1234567.891, "1234568"),
        (1e15, "1e+15"),
        (float("inf"), "inf"),
        (float("nan"), "NaN"),
    ],
)
def test_numbers_are_compact(number: float, text: str) -> None:
    assert compact_number(number) == text


def test_a_table_that_was_written_is_parsed_back() -> None:
    header, rows = ["a|b", "ü"], [["1", ""], ["x | y", "z"]]
    assert parse_markdown_table(f"Here:\n\n{markdown_table(header, rows)}\n\nDone.") == (header, rows)


@pytest.mark.parametrize(
    "text", ["", "| a | b |", "a | b\n1 | 2", "| a | b |\n|---|\n| 1 | 2 |", "title\n---\ntext", "|\n|"]
)
def test_a_text_without_a_table_is_none(text: str) -> None:
    assert parse_markdown_table(text) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (14_173_392_077, "13.2 GiB"),
        (2**60, "1024.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_have_the_largest_unit_that_leaves_1_or_more(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (0.0, "0.0 ms"),
        (1.24, "1.2 ms"),
        (9.94, "9.9 ms"),
        (9.96, "10 ms"),
        (347.5, "348 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (1548.8, "1.5 s"),
        (99_900, "99.9 s"),
        (123_456, "123 s"),
        (4_000_000, "4,000 s"),
    ],
)
def test_durations_are_in_seconds_from_one_second_on(duration_ms: float, text: str) -> None:
    assert format_ms(duration_ms) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599.9, "59 min"),
        (3600, "1 h"),
        (86399, "23 h"),
        (1e7, "115 d"),
    ],
)
def test_an_age_has_the_largest_unit_and_is_rounded_down(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
