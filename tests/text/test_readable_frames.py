"""Frames and series of polars and pyarrow become text as those of pandas do (see test_readable.py)."""

from __future__ import annotations

from typing import Any

import polars
import pyarrow
import pytest

from sollol_nb.text.readable import readable

DATA = {"a|b": ["x\ny", None], "n": [1, 20_000_000], "f": [1.23456789, float("nan")], "l": [[1], []]}
ROWS = (
    "| a\\|b | n | f | l |\n| --- | --- | --- | --- |\n"
    "| x<br>y | 1 | 1.23457 | [1] |\n| None | 20000000 | NaN | [] |"
)


@pytest.mark.parametrize(
    ("value", "begin"),
    [
        (
            polars.DataFrame(DATA),
            "DataFrame: 2 rows x 4 columns\nColumns: a|b (String), n (Int64), f (Float64)",
        ),
        (polars.DataFrame(DATA).lazy(), "LazyFrame: 2 rows x 4 columns\nColumns: a|b (String), n (Int64)"),
        (pyarrow.table(DATA), "Table: 2 rows x 4 columns\nColumns: a|b (string), n (int64), f (double), l (list<"),
        (pyarrow.table(DATA).to_batches()[0], "RecordBatch: 2 rows x 4 columns\nColumns: a|b (string)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_small_frame_is_whole(value: Any, begin: str) -> None:
    text = readable(value)
    assert text.startswith(begin)
    assert text.endswith(f"\n\n{ROWS}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (polars.Series("v", [1, None]), "Series v: 2 values, Int64\n\n| v |\n| --- |\n| 1 |\n| None |"),
        (polars.Series([True]), "Series: 1 value, Boolean\n\n| value |\n| --- |\n| True |"),
        (polars.Series([], dtype=polars.String), "Series: 0 values, String"),
        (pyarrow.array([1, None]), "Int64Array: 2 values, int64\n[1, None]"),
        (pyarrow.chunked_array([[1], [2]]), "ChunkedArray: 2 values, int64\n[1, 2]"),
        (polars.DataFrame(), "DataFrame: 0 rows x 0 columns"),
        (polars.DataFrame({"a": []}), "DataFrame: 0 rows x 1 column\nColumns: a (Null)"),
        (polars.LazyFrame(), "LazyFrame: 0 rows x 0 columns"),
        (pyarrow.table({}), "Table: 0 rows x 0 columns"),
        ([polars.DataFrame({"a": [1]})], '["DataFrame: 1 row x 1 column"]'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_series_arrays_and_empty_frames(value: Any, text: str) -> None:
    assert readable(value) == text


@pytest.mark.parametrize(
    ("value", "notice"),
    [
        (polars.DataFrame({"n": range(100_000)}), " of 100,000 rows shown]"),
        (polars.DataFrame({"n": range(100_000)}).lazy(), "[cut: only the first "),
        (pyarrow.table({"n": list(range(100_000))}), " of 100,000 rows shown]"),
        (polars.Series("n", range(100_000)), " of 100,000 rows shown]"),
        (pyarrow.array(range(100_000)), " of 100,000 values shown]"),
        (polars.DataFrame({f"c{n}": [] for n in range(50)}), "x 50 columns"),
        (pyarrow.table({"t": ["x" * 100_000] * 3}), "long cells end in …]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_large_one_shows_its_head_and_says_so(value: Any, notice: str) -> None:
    text = readable(value, limit_chars=1000)
    assert notice in text
    assert len(text) <= 1000


def test_of_a_query_only_the_head_is_computed() -> None:
    computed: list[int] = []

    def note(number: int) -> int:
        computed.append(number)
        return number

    query = polars.LazyFrame({"n": range(100_000)}).select(
        polars.col("n").map_elements(note, return_dtype=polars.Int64)
    )
    assert "more rows than shown" in readable(query.head(50), limit_chars=200)
    assert 0 < len(computed) <= 50
