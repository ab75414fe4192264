"""The result of a batch as a frame: types, names that are taken, rows without an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest

from sollol_nb.batch.frame import CACHED, ERROR, OK, RowResult, check_columns, joined
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError


@dataclass
class Found:
    name: str | None
    count: int | None
    sure: bool | None
    share: float | None
    tags: list[str] | None


def result(*values: Any, status: str = OK) -> RowResult:
    completion = Completion(message={"content": "said"}, done_reason="stop", eval_count=3, _routing={"ttft_ms": 1})
    return RowResult(status, completion, Found(*values) if values else None)


def frame_of(*results: RowResult, schema: object = Found, prefix: str = "", **columns: Any) -> pd.DataFrame:
    rows = pd.DataFrame(columns or {"x": range(len(results))})
    return joined(rows, results, model="demo", schema=schema, prefix=prefix)


def test_fields_keep_their_types_beside_missing_values() -> None:
    full = frame_of(result("a", 1, True, 0.5, ["x"]), result("b", 2, False, 1, ["y"]))
    part = frame_of(result("a", 1, True, 0.5, ["x"]), result(None, None, None, None, None), RowResult(ERROR))
    assert [str(full[name].dtype) for name in ("count", "sure")] == ["int64", "bool"]
    assert [str(part[name].dtype) for name in ("count", "sure", "share")] == ["Int64", "boolean", "float64"]
    assert list(full.tags) == [["x"], ["y"]]
    assert part.tags[0] == ["x"]
    assert part.name[0] == "a"
    assert list(part.share.isna()) == [False, True, True]


def test_rows_without_an_answer_have_no_figures() -> None:
    frame = frame_of(result("a", 1, True, 0.5, []), RowResult(ERROR, error="why"), RowResult())
    assert list(frame.status) == ["ok", "error", "cancelled"]
    assert list(frame.error) == ["", "why", ""]
    assert list(frame.answer.isna()) == [False, True, True]
    assert list(frame.finish_reason) == ["stop", "", ""]
    assert (frame.ttft_ms[0], frame.completion_tokens[0]) == (1, 3)
    assert frame[["ttft_ms", "total_ms", "tokens_per_s", "completion_tokens"]][1:].isna().all(axis=None)
    assert frame.attrs["sollol"] == {"model": "demo", "ok": 1, "cached": 0, "error": 1, "cancelled": 1}


@pytest.mark.parametrize(
    ("columns", "prefix", "names"),
    [
        ({"x": [1]}, "", ["name", "count"]),
        ({"name": [1]}, "", ["answer_name", "count"]),
        ({"name": [1], "answer_name": [2]}, "", ["answer_answer_name", "count"]),
        ({"name": [1]}, "new_", ["new_name", "new_count"]),
        ({"new_name": [1]}, "new_", ["new_answer_name", "new_count"]),
    ],
)
def test_a_field_whose_name_is_taken_gets_another(columns: dict[str, Any], prefix: str, names: list[str]) -> None:
    frame = frame_of(result("a", 1, True, 0.5, [], status=CACHED), prefix=prefix, **columns)
    after_the_answer = list(frame.columns)[len(columns) + 1 :]
    assert after_the_answer[:2] == names
    assert frame[names[0]][0] == "a"
    for name, values in columns.items():
        assert list(frame[name]) == values, "the input's own is kept"


def test_a_field_with_the_name_of_a_result_column_gets_another() -> None:
    schema = {"type": "object", "properties": {"status": {"type": "string"}}}
    result = RowResult(OK, Completion(message={"content": "{}"}), {"status": "open"})
    frame = frame_of(result, schema=schema)
    assert (frame.status[0], frame.answer_status[0]) == ("ok", "open")


def test_rows_that_have_columns_of_the_result_are_refused() -> None:
    rows = pd.DataFrame({"value": [1], "error": [2]})
    with pytest.raises(ConfigError, match="the rows have value, error already; give the new columns a prefix"):
        check_columns(rows, "", Found)
    with pytest.raises(ConfigError, match="the rows have error already"):
        check_columns(rows, "", None)
    check_columns(rows, "new_", Found)


def test_the_index_is_kept_also_with_repeated_labels() -> None:
    rows = pd.DataFrame({"x": [1, 2]}, index=["a", "a"])
    frame = joined(rows, [RowResult(), RowResult()], model="demo", schema=None, prefix="")
    assert list(frame.index) == ["a", "a"]
    assert list(rows.columns) == ["x"], "the input is as it was"


def test_numbers_too_large_for_any_dtype_are_kept_unchanged() -> None:
    frame = frame_of(result(None, 2**70, True, 10**400, None), result(None, 1, True, 0.5, None), RowResult(ERROR))
    assert list(frame["count"][:2]) == [2**70, 1]
    assert list(frame.share[:2]) == [10**400, 0.5]


@pytest.mark.parametrize(
    "columns",
    [
        pd.MultiIndex.from_tuples([("x", "a"), ("x", "b")], names=["k", "l"]),
        pd.CategoricalIndex(["a", "b"]),
        pd.DatetimeIndex(["2024-01-01", "2024-01-02"]),
        pd.Index([0, 1]),
    ],
    ids=["levels", "categories", "dates", "numbers"],
)
def test_columns_of_any_index_are_kept_and_the_new_ones_found_by_their_names(columns: pd.Index[Any]) -> None:
    rows = pd.DataFrame([[1, 2]], columns=columns)
    frame = joined(rows, [result("a", 1, True, 0.5, [])], model="demo", schema=Found, prefix="")
    assert (frame["answer"][0], frame["status"][0], frame["name"][0]) == ("said", OK, "a")
    assert frame.columns.nlevels == columns.nlevels
    assert list(frame[list(columns)].iloc[0]) == [1, 2]
    with pytest.raises(ConfigError, match="the rows have answer, value, status"):
        check_columns(frame, "", Found)


def test_a_field_is_not_put_among_columns_of_several_levels_by_the_same_name() -> None:
    rows = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("name", "a"), ("name", "b")]))
    frame = joined(rows, [result("a", 1, True, 0.5, [])], model="demo", schema=Found, prefix="")
    assert list(frame["name"].columns) == ["a", "b"]
    assert frame["answer_name"][0] == "a"


def test_attributes_of_the_frame_are_kept() -> None:
    rows = pd.DataFrame({"x": [1]})
    rows.attrs["source"] = "here"
    frame = joined(rows, [RowResult()], model="demo", schema=None, prefix="")
    assert frame.attrs["source"] == "here"
    assert frame.attrs["sollol"]["cancelled"] == 1
    assert "sollol" not in rows.attrs
