"""Values become text that a model can read: tables, words and JSON, never longer than allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.text.readable import readable
from sollol_nb.text.tables import parse_markdown_table

mpl.use("agg")
import matplotlib.pyplot as plt


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


@dataclass
class Person:
    name: str
    friend: object = None


class Note(dict[str, str]):
    def _prompt_text_(self) -> str:
        return self["text"]


Point = namedtuple("Point", "x y")


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    yield
    plt.close("all")


# --- plain values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\n", "as it is\n"),
        ("", ""),
        (Completion(message={"content": "the answer"}, model="demo"), "the answer"),
        (Note(text="its own text"), "its own text"),
        (Note, 'class Note(dict[str, str]):\n    def _prompt_text_(self) -> str:\n        return self["text"]'),
        (Note._prompt_text_, 'def _prompt_text_(self) -> str:\n    return self["text"]'),
        (Note(text="")._prompt_text_, 'def _prompt_text_(self) -> str:\n    return self["text"]'),
        (int, "<class 'int'>"),
        (3, "3"),
        (0.1, "0.1"),
        (float("nan"), "nan"),
        (True, "True"),
        (None, "None"),
        (10**20, "1" + "0" * 20),
        (10**6000, "integer of 19,932 bits"),
        (np.float32(0.1), "0.1"),
        (np.int64(-4), "-4"),
        (np.bool_(False), "False"),
        (np.longdouble(1.5), "1.5"),
        (np.str_("é"), "é"),
        (np.datetime64("2024-01-02"), "2024-01-02"),
        (pd.Timestamp("2024-01-02 03:04"), "2024-01-02 03:04:00"),
        (pd.NaT, "NaT"),
        (pd.NA, "<NA>"),
        (Path("folder") / "file.txt", str(Path("folder/file.txt"))),
        (Decimal("1.50"), "1.50"),
        (Colour.RED, "red"),
        (Level.LOW, "1"),
        (b"", "bytes: 0 bytes"),
        (b"\x00ab", "bytes: 3 bytes, beginning with b'\\x00ab'"),
        (bytearray(1000), f"bytearray: 1,000 bytes, beginning with {bytes(32)!r}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_single_values_are_plain(value: object, text: str) -> None:
    assert readable(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": 1, "b": [True, None]}, '{"a": 1, "b": [true, null]}'),
        ({}, "{}"),
        ((), "[]"),
        ({"ü": "ß\n"}, '{"ü": "ß\\n"}'),
        ({3, 1, 2}, "[1, 2, 3]"),
        (deque([1]), "[1]"),
        ({"k": 1}.keys(), '["k"]'),
        ({(1, 2): 3}, '{"(1, 2)": 3}'),
        ({1: "number", "1": "text"}, '{"1": "number", "\'1\'": "text"}'),
        ({"x": np.int64(3), "y": np.float32(0.5), "z": np.arange(2)}, '{"x": 3, "y": 0.5, "z": [0, 1]}'),
        ([Colour.RED, Path("p"), datetime(2024, 1, 2)], '["red", "p", "2024-01-02 00:00:00"]'),
        ([Completion(message={"content": "said"})], '["said"]'),
        ({"note": Note(text="its own text")}, '{"note": "its own text"}'),
        (Person("Zoë", Person("Al")), '{"name": "Zoë", "friend": {"name": "Al", "friend": null}}'),
        (Point(1, 2), '{"x": 1, "y": 2}'),
        ([float("nan")], "[NaN]"),
        ([10**6000], '["integer of 19,932 bits"]'),
        ([b"ab"], "[\"bytes: 2 bytes, beginning with b'ab'\"]"),
        ({"f": pd.DataFrame({"a": [1, 2]})}, '{"f": "DataFrame: 2 rows x 1 column"}'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_are_json(value: object, text: str) -> None:
    assert readable(value) == text


def test_sets_of_mixed_types_are_json_in_any_order() -> None:
    assert sorted(map(str, json.loads(readable({1, "a"})))) == ["1", "a"]


def test_what_contains_itself_ends() -> None:
    loop: dict[str, Any] = {"a": 1}
    loop["self"] = loop
    person = Person("Narcissus")
    person.friend = person
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]

    assert readable(loop) == '{"a": 1, "self": "…"}'
    assert readable(person) == '{"name": "Narcissus", "friend": "…"}'
    assert readable([loop, loop]).count('"a": 1') == 2  # twice is no cycle
    assert "…" in readable(nested)


def test_large_json_shows_its_head_and_says_so() -> None:
    text = readable(list(range(1_000_000)), limit_chars=500)
    head, _, notice = text.partition("\n")
    shown = json.loads(head)

    assert shown == list(range(len(shown)))
    assert len(shown) > 50
    assert notice.startswith(f"[cut: {len(shown)} of 1,000,000 items shown")


def test_large_parts_of_json_leave_room_for_the_others() -> None:
    text = readable({"data": list(range(10_000)), "text": "x" * 100_000, "name": "last"})
    data = json.loads(text.partition("\n")[0])

    assert data["data"][:3] == [0, 1, 2]
    assert data["data"][-1] == "… 9,980 more"
    assert data["text"].endswith("x…")
    assert data["name"] == "last"
    assert "[cut: " in text


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"text": ["word " * 50_000] * 20, "n": range(20)}),
        pd.DataFrame(np.random.default_rng(1).random((5000, 300))),
        pd.DataFrame([["x"] * 100], columns=["long name " * 100] * 100),
        pd.DataFrame({"pipes": ["|" * 10_000] * 10_000}),
        pd.DataFrame({"frames": [pd.DataFrame({"a": range(100)})] * 100}),
        pd.Series(["é\n" * 10_000] * 1000),
        pd.date_range("1900", periods=100_000),
        np.zeros((2,) * 16),
        np.array([["x" * 10_000] * 50] * 50),
        ['\n"\\' * 5000] * 100,
        {f"{number}" * 100: {"deep": [[["y" * 1000] * 100] * 100]} for number in range(1000)},
        {"k" * 100_000: 1},
        [[list(range(1000))] * 1000] * 1000,
        b"x" * 1_000_000,
        "x".join(map(str, range(100))).split("x"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("limit_chars", [200, 1000, 8000])
def test_nothing_is_longer_than_allowed(value: object, limit_chars: int) -> None:
    assert len(readable(value, limit_chars=limit_chars)) <= limit_chars


def test_texts_are_never_cut() -> None:
    assert readable("x" * 100_000) == "x" * 100_000
    assert readable(Completion(message={"content": "y" * 100_000})) == "y" * 100_000


# --- frames -----------------------------------------------------------------------------------


def test_a_small_frame_is_whole() -> None:
    frame = pd.DataFrame(
        {
            "a|b": ["x\ny", "p|q"],
            "n": [1, 20_000_000],
            "f": [1.23456789, np.nan],
            "day": pd.to_datetime(["2024-01-01", "2024-02-01"]),
        }
    )
    text_dtype, day_dtype = frame.dtypes["a|b"], frame.dtypes["day"]
    assert readable(frame) == (
        "DataFrame: 2 rows x 4 columns\n"
        f"Columns: a|b ({text_dtype}), n (int64), f (float64), day ({day_dtype})\n"
        "\n"
        "| a\\|b | n | f | day |\n"
        "| --- | --- | --- | --- |\n"
        "| x<br>y | 1 | 1.23457 | 2024-01-01 |\n"
        "| p\\|q | 20000000 | NaN | 2024-02-01 |"
    )


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    table = parse_markdown_table(text)
    assert table is not None
    return table


def test_a_frame_with_many_rows_shows_its_head() -> None:
    count = 1_000_000
    text = readable(pd.DataFrame({"a": np.arange(count), "b": np.arange(count) / 2}))
    _, rows = _table(text)

    assert text.startswith("DataFrame: 1,000,000 rows x 2 columns\nColumns: a (int64), b (float64)\n")
    assert rows[:2] == [["0", "0"], ["1", "0.5"]]
    assert len(rows) > 100
    assert text.endswith(f"\n[cut: {len(rows)} of 1,000,000 rows shown]")


def test_a_frame_with_many_columns_shows_the_first() -> None:
    text = readable(pd.DataFrame(np.zeros((2, 5000))))
    header, rows = _table(text)

    assert header == [str(number) for number in range(30)]
    assert len(rows) == 2
    assert "and 4,970 more" in text
    assert text.endswith("[cut: 30 of 5,000 columns shown]")


def test_long_cells_are_cut_when_there_are_many_but_have_the_room_there_is() -> None:
    text = readable(pd.DataFrame({"t": ["x" * 3000, "y" * 3000]}))
    assert "x" * 3000 in text
    assert "cut" not in text

    text = readable(pd.DataFrame({"t": ["x" * 3000] * 100}))
    assert "x" * 3000 not in text
    assert "x… |" in text
    assert text.endswith("long cells end in …]")


@pytest.mark.parametrize(
    ("frame", "header", "first_row"),
    [
        (pd.DataFrame([[1, 2]], columns=["x", "x"]), ["x", "x"], ["1", "2"]),
        (pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", 2024)])), ["a / 2024"], ["1"]),
        (pd.DataFrame({"v": [1]}, index=["r"]), ["index", "v"], ["r", "1"]),
        (pd.DataFrame({"v": [1]}, index=pd.Index([7], name="id")), ["id", "v"], ["7", "1"]),
        (
            pd.DataFrame({"v": [1]}, index=pd.MultiIndex.from_tuples([("p", 1)], names=["k", None])),
            ["k", "index", "v"],
            ["p", "1", "1"],
        ),
        (pd.DataFrame({None: [1]}), ["None"], ["1"]),
        (pd.DataFrame({"o": [{"a": [1]}]}), ["o"], ['{"a": [1]}']),
        (pd.DataFrame({"o": [None]}, dtype=object), ["o"], ["None"]),
        (pd.DataFrame({"i": pd.array([None], dtype="Int64")}), ["i"], ["<NA>"]),
        (pd.DataFrame({"c": pd.Categorical(["ü"])}), ["c"], ["ü"]),
        (pd.DataFrame({"v": range(5)}).loc[[3]], ["index", "v"], ["3", "3"]),
    ],
    ids=lambda value: "" if isinstance(value, pd.DataFrame) else str(value),
)
def test_columns_and_index_of_any_kind_survive(
    frame: pd.DataFrame, header: list[str], first_row: list[str]
) -> None:
    assert _table(readable(frame)) == (header, [first_row])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pd.DataFrame(), "DataFrame: 0 rows x 0 columns"),
        (pd.DataFrame({"a": np.zeros(0)}), "DataFrame: 0 rows x 1 column\nColumns: a (float64)"),
        (pd.DataFrame(index=range(5)), "DataFrame: 5 rows x 0 columns"),
        (pd.Series([], dtype=float), "Series: 0 values, float64"),
        (pd.Series([1], name="v"), "Series v: 1 value, int64\n\n| v |\n| --- |\n| 1 |"),
        (
            pd.Series([0.5], index=["a"]),
            "Series: 1 value, float64\n\n| index | value |\n| --- | --- |\n| a | 0.5 |",
        ),
        (pd.Index([1, 2], name="id"), "Index id: 2 values, int64\n[1, 2]"),
        (pd.RangeIndex(2), "RangeIndex: 2 values, int64\n[0, 1]"),
        (pd.MultiIndex.from_tuples([("a", 1)], names=["p", "q"]), 'MultiIndex p, q: 1 value\n[["a", 1]]'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_empty_frames_series_and_indexes(value: object, text: str) -> None:
    assert readable(value) == text


def test_a_long_series_shows_its_head() -> None:
    text = readable(pd.Series(range(100_000), name="v"), limit_chars=500)
    assert text.endswith(f"[cut: {len(_table(text)[1])} of 100,000 rows shown]")


# --- arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array(3.5), "Array: shape (), float64, min 3.5, max 3.5, mean 3.5\nvalue: 3.5"),
        (np.array(None), "Array: shape (), object\nvalue: None"),
        (np.zeros((0, 3)), "Array: shape (0, 3), float64"),
        (np.array([1, 2, 6]), "Array: shape (3,), int64, min 1, max 6, mean 3\n[1, 2, 6]"),
        (
            np.array([[1, 2], [3, 4]]),
            "Array: shape (2, 2), int64, min 1, max 4, mean 2.5\n\n| 0 | 1 |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
        ),
        (np.array([np.nan, np.nan]), "Array: shape (2,), float64, no finite values\n[NaN, NaN]"),
        (
            np.array([1, np.nan, np.inf, 3]),
            "Array: shape (4,), float64, min 1, max 3, mean 2, 2 values not finite\n[1, NaN, inf, 3]",
        ),
        (np.array([True, False, True]), "Array: shape (3,), bool, 2 values true\n[True, False, True]"),
        (np.array(["a", "é"]), "Array: shape (2,), <U1\n[a, é]"),
        (np.array([1 + 2j]), "Array: shape (1,), complex128\n[(1+2j)]"),
        (np.ma.masked_array([1, 9], [False, True]), "Array: shape (2,), int64, min 1, max 1, mean 1\n[1, None]"),
        (np.ma.masked_array([1.0], [True]), "Array: shape (1,), float64, no finite values\n[None]"),
        (
            np.array([(1, 2.5)], dtype=[("a", "<i8"), ("b", "<f8")]),
            "Array: shape (1,), [('a', '<i8'), ('b', '<f8')]\n[[1, 2.5]]",
        ),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, np.ndarray) else "",
)
def test_arrays_are_described(array: np.ndarray[Any, Any], text: str) -> None:
    assert readable(array) == text


def test_of_many_dimensions_the_first_part_is_shown() -> None:
    text = readable(np.arange(24).reshape(2, 3, 4))
    assert "The part [0, :, :] of it:" in text
    assert _table(text)[1] == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10", "11"]]


def test_of_a_huge_array_a_sample_is_counted() -> None:
    text = readable(np.ones(10_000_001, dtype=np.int8))
    assert text.startswith("Array: shape (10000001,), int8, min 1, max 1, mean 1 (of a sample)\n[1, 1, ")
    assert text.endswith(" of 10,000,001 values shown]")


# --- figures ----------------------------------------------------------------------------------


def test_lines_are_described_and_sampled_in_one_table() -> None:
    figure, axes = plt.subplots()
    figure.suptitle("Training")
    axes.set(title="Loss", xlabel="epoch", ylabel="loss", yscale="log")
    axes.plot(range(100), range(1, 101), label="train")
    axes.plot(range(100), range(101, 201))
    text = readable(figure)
    header, rows = _table(text)

    assert text.startswith(
        "Figure with 1 axes: Training\n\nAxes 1: title 'Loss', x axis 'epoch', y axis 'loss' (log"
    )
    assert "- line 'train': 100 points, x 0 to 99, y 1 to 100" in text
    assert "- line 2: 100 points, x 0 to 99, y 101 to 200" in text
    assert header == ["epoch", "train", "line 2"]
    assert [rows[0], rows[-1]] == [["0", "1", "101"], ["99", "100", "200"]]
    assert text.endswith("[cut: 10 of 100 points shown]")


def test_bars_are_named_by_their_categories() -> None:
    _, axes = plt.subplots(2, 2)
    axes[0, 0].bar(["é", "b"], [1, 2.5], label="upright")
    axes[0, 1].barh(["c", "d"], [3, 4])
    axes[1, 0].hist([0, 0, 1], bins=2)
    axes[1, 1].bar([2020, 2030], [5, 6])
    axes[1, 1].set_xticks([2020, 2030], ["then", "later"])
    text = readable(axes)

    assert "- bars 'upright': 2 bars; é: 1, b: 2.5" in text
    assert "- bars 1: 2 bars; c: 3, d: 4" in text
    assert "- bars 1: 2 bars; 0 to 0.5: 2, 0.5 to 1: 1" in text
    assert "- bars 1: 2 bars; then: 5, later: 6" in text


def test_bars_of_pandas_are_named_too() -> None:
    axes = pd.DataFrame({"u": [1, 2], "v": [3, 4]}, index=["p", "q"]).plot.bar()
    assert "- bars 'u': 2 bars; p: 1, q: 2\n- bars 'v': 2 bars; p: 3, q: 4" in readable(axes)


@pytest.mark.parametrize("with_pandas", [True, False])
def test_dates_of_lines_are_dates(with_pandas: bool) -> None:
    days = pd.date_range("2024-01-01", periods=3)
    _, axes = plt.subplots()
    if with_pandas:
        pd.Series([1.0, 2, 3], index=days).plot(ax=axes)
    else:
        axes.plot(days, [1, 2, 3])
    text = readable(axes)

    assert "x 2024-01-01 to 2024-01-03, y 1 to 3" in text
    assert _table(text)[1][1] == ["2024-01-02", "2"]


def test_scatters_images_and_texts_are_described() -> None:
    _, axes = plt.subplots()
    axes.scatter([1, 2, np.nan], [5, 7, 6], label="cloud")
    axes.imshow([[0, 1, 2], [3, 4, 9]])
    axes.text(0, 0, "note")
    axes.fill_between([0, 1], [1, 2])
    text = readable(axes)

    assert "- scatter 'cloud': 3 points, x 1 to 2, y 5 to 7" in text
    assert "- image: 2 x 3, values 0 to 9" in text
    assert "- texts: 'note'" in text
    assert "PolyCollection: 1" in text


def _odd_axes() -> Any:
    _, axes = plt.subplots()
    axes.axhline(3)
    axes.boxplot([[1, 2, 3]])
    axes.plot([], [])
    axes.plot([1, 2], [np.nan, np.nan])
    axes.plot([1, 2], [None, 3])
    axes.scatter([], [])
    axes.bar([], [])
    axes.contour(np.eye(3))
    return axes


def _deep_axes() -> Any:
    axes: Any = plt.figure().add_subplot(projection="3d")
    axes.plot([1, 2], [3, 4], [5, 6])
    axes.scatter([1], [2], [3])
    return axes


@pytest.mark.parametrize("make", [plt.figure, _odd_axes, _deep_axes], ids=["empty", "odd", "3d"])
def test_any_figure_can_be_described(make: Any) -> None:
    assert readable(make()).startswith(("Figure with 0 axes", "Axes\n- line 1"))


def test_of_many_lines_the_first_are_shown() -> None:
    _, axes = plt.subplots()
    for number in range(50):
        axes.plot([0, 1], [number, number])
    text = readable(axes)
    assert "- line 20:" in text
    assert "- line 21:" not in text
    assert "[cut: 20 of 50 lines shown]" in text


# --- the rest ---------------------------------------------------------------------------------


def test_libraries_are_not_imported_for_values_that_are_not_theirs() -> None:
    code = (
        "import sys; from sollol_nb.text.readable import readable\n"
        "from sollol_nb.schema.schema import json_schema_of\n"
        "from sollol_nb.text.expansion import expand\n"
        "readable([1, {'a': object()}]); readable(3.5); json_schema_of(list[int]); expand('no braces', {})\n"
        "print(sorted({'pandas', 'numpy', 'matplotlib', 'pydantic', 'jinja2', 'jsonschema'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
