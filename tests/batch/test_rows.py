"""The rows of a batch: what they may be held by, and how they are filled into a template."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow
import pytest

from sollol_nb.batch.rows import RowTable, questions
from sollol_nb.errors import ConfigError

FRAME = pd.DataFrame({"name": ["a", "b"], "n": [1, 2], "x": [0.5, 1.5]}, index=["r", "s"])


def said(messages: list[list[dict[str, Any]] | None]) -> list[str]:
    return [row[-1]["content"] for row in messages if row is not None]


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "items", "columns"),
    [
        (FRAME, [{"name": "a", "n": 1, "x": 0.5}, {"name": "b", "n": 2, "x": 1.5}], ["name", "n", "x"]),
        (FRAME.name, ["a", "b"], ["name"]),
        (pd.Series([1, 2]), [1, 2], ["item"]),
        (["a", "b"], ["a", "b"], ["item"]),
        ((n for n in (1, 2)), [1, 2], ["item"]),
        ({7}, [7], ["item"]),
        ([{"a": 1}, {"b": 2}], [{"a": 1}, {"b": 2}], ["a", "b"]),
        ([{"a": 1}, 2], [{"a": 1}, 2], ["item"]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], ["item"]),
        ([], [], ["item"]),
        (FRAME.iloc[:0], [], ["name", "n", "x"]),
        (FRAME[[]], [{}, {}], []),
        (pd.DataFrame({("k", "a"): [1]}), [{("k", "a"): 1}], [("k", "a")]),
    ],
)
def test_rows_may_be_in_many_containers(rows: Any, items: list[Any], columns: list[str]) -> None:
    table = RowTable.read(rows)
    assert table.items == items
    assert list(table.frame.columns) == columns
    assert len(table.frame) == len(items)


def test_a_frame_and_a_series_keep_their_index() -> None:
    assert RowTable.read(FRAME).frame is FRAME
    assert list(RowTable.read(FRAME.name).frame.index) == ["r", "s"]


def test_integers_stay_integers_beside_floats() -> None:
    assert [type(value) for value in RowTable.read(FRAME).items[0].values()] == [str, int, float]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a text", "rows must be a DataFrame, a Series, or a list of dicts or values, not 'a text'"),
        (b"bytes", "rows must be a DataFrame"),
        ({"a": [1, 2]}, "not {'a': [1, 2]}"),
        (7, "not 7"),
        (None, "not None"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns named 'a'; rename one of them"),
    ],
)
def test_other_things_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RowTable.read(rows)
    assert message in str(caught.value)


# --- filling in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "template", "texts"),
    [
        (RowTable.read(FRAME).items, "{{ name }} {{ n + 1 }}", ["a 2", "b 3"]),
        (RowTable.read(FRAME).items, "{{ row.name }} {{ row['x'] }}", ["a 0.5", "b 1.5"]),
        ([{"two words": 1}], "{{ row['two words'] }}", ["1"]),
        ([{("k", "a"): 1, 0: 2}], "{{ row['k', 'a'] }}{{ row[0] }}", ["12"]),
        ([{"row": 1, "len": 2}], "{{ row }} {{ len }}", ["1 2"]),
        ([{"a": 1, "b": [2]}], "{{ row }}", ['{"a": 1, "b": [2]}']),
        (["x", "y"], "{{ item }}{{ value }}{{ row }}", ["xxx", "yyy"]),
        (["{{ item }}"], "{{ item }}", ["{{ item }}"]),
        (["x"], '{"json": {"of": "{{ item }}"}}', ['{"json": {"of": "x"}}']),
        (["x"], "no column, one row", ["no column, one row"]),
        (["x", "y"], lambda item: item * 2, ["xx", "yy"]),
        (RowTable.read(FRAME).items, lambda row: f"{row['name']}!", ["a!", "b!"]),
        (["x"], lambda item: [{"role": "user", "content": item}], ["x"]),
        ([], "{{ anything }}", []),
    ],
)
def test_each_row_fills_the_template(items: list[Any], template: Any, texts: list[str]) -> None:
    assert said(questions(items, template, None)) == texts


def test_a_system_message_comes_first_and_is_not_filled_in() -> None:
    (messages,) = questions(["x"], "{{ item }}", "Be {{ brief }}.")
    assert messages == [{"role": "system", "content": "Be {{ brief }}."}, {"role": "user", "content": "x"}]


def test_images_of_rows_are_sent_and_long_texts_are_whole() -> None:
    image, text = PIL.Image.new("RGB", (2, 3)), "x" * 200_000
    messages = questions(
        [{"photo": image, "note": text}, {"photo": None}], "What is on {{ photo }}? {{ note }}", None
    )
    assert messages[0] is not None
    (asked,) = messages[0]

    assert asked["content"] == f"What is on [image 1]? {text}"
    assert asked["without_images"] == f"What is on [an image that you cannot see: image, 2 x 3 pixels]? {text}"
    assert len(asked["images"]) == 1
    assert messages[1] is None


def fails(_: Any) -> str:
    raise KeyError("text")


@pytest.mark.parametrize(
    ("items", "template", "message"),
    [
        ([{"a": 1}, {"b": 1}], "{{ a }}", "row 1: {{ a }}: there is no variable a"),
        ([{"text": 1}], "{{ texts }}", "row 0: {{ texts }}: there is no variable texts (did you mean text?)"),
        (
            [{"text": 1}],
            "{{ input }}",
            "row 0: {{ input }}: this is Python's built-in function, not a variable",
        ),
        ([1, 0], "{{ 1 / item }}", "row 1: {{ 1 / item }}: ZeroDivisionError"),
        ([1], "{{ item", "{{ at line 1, column 1 is never closed by }}"),
        ([1, 2], "Say {item}", "the template has no {{ column }} in it, so all rows would ask the same"),
        ([1], fails, "row 0: the template function failed with KeyError: 'text'"),
        ([1], lambda _: 7, "row 0: messages must be a list such as"),
        ([1], lambda _: [], "row 0: messages must be a list such as"),
        ([1], 7, "the template must be a text or a function of a row, not int"),
    ],
)
def test_an_error_of_filling_in_names_its_row(items: list[Any], template: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        questions(items, template, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- nothing to ask ---------------------------------------------------------------------------

MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("NaN"), "", " \n\t"]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
@pytest.mark.parametrize(
    "template", ["About {{ text }}:", "{{row.text}}", "{{ row['text'] }}", "{{ n }}, {{ text }}"]
)
def test_a_row_whose_value_is_missing_is_not_asked(missing: Any, template: str) -> None:
    asked = questions([{"text": missing, "n": 1}, {"text": "x", "n": 2}], template, "Be brief.")
    assert asked[0] is None
    assert asked[1] is not None


@pytest.mark.parametrize("missing", MISSING, ids=repr)
@pytest.mark.parametrize("template", ["About {{ item }}:", lambda item: item.strip()])
def test_a_missing_value_is_not_asked(missing: Any, template: Any) -> None:
    asked = questions([missing, "x"], template, None)
    assert [messages is None for messages in asked] == [True, False]


@pytest.mark.parametrize(
    "value", [0, 0.0, False, [], "0", "nan", "None", np.int64(0), Decimal(0), np.array([1, 2])]
)
def test_other_values_are_asked(value: Any) -> None:
    assert questions([{"text": value}], "{{ text }}!", None)[0] is not None


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ n }}", "1"),
        ("{{ text or 'nothing' }}", "nothing"),
        ("{{ n }}{{ text or '' }}", "1"),
        (lambda row: f"{row['n']}: {row['text']}", "1: None"),
    ],
)
def test_a_missing_value_that_is_not_inserted_does_not_matter(template: Any, text: str) -> None:
    assert said(questions([{"text": None, "n": 1}], template, None)) == [text]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT])
def test_a_missing_value_can_be_replaced_in_the_template(missing: Any) -> None:
    frame = pd.DataFrame({"text": ["a"], "note": pd.Series([missing], dtype=object)})
    items = RowTable.read(frame).items
    filled = questions(items, "{{ text }} {{ note or 'no note' }} {{ row.note or 'none' }}", None)
    assert filled == [[{"role": "user", "content": "a no note none"}]]


@pytest.mark.parametrize("nothing", [*MISSING, "", " "])
def test_a_function_can_say_that_there_is_nothing_to_ask(nothing: Any) -> None:
    assert questions(["a", "b"], lambda item: nothing if item == "a" else item, None)[0] is None


@pytest.mark.parametrize("template", ["{{ text }}\r\n!", lambda row: row["text"] + "\r\n!"])
def test_line_ends_of_other_systems_become_line_feeds(template: Any) -> None:
    assert said(questions([{"text": "a\r\nb\rc\n"}], template, None)) == ["a\nb\nc\n\n!"]


# --- tables of other libraries ----------------------------------------------------------------

RECORDS = [{"name": "a", "n": 1}, {"name": "b", "n": None}]


class LikePolars:
    """Iterates and names its rows as a DataFrame of polars does."""

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([["a", "b"], [1, None]])

    def iter_rows(self, *, named: bool = False) -> Iterator[Any]:
        return iter(RECORDS if named else [tuple(record.values()) for record in RECORDS])


class LikeLazyPolars:
    def collect_schema(self) -> dict[str, type]:
        return {"name": str, "n": int}

    def collect(self) -> LikePolars:
        return LikePolars()


@pytest.mark.parametrize("table", [LikePolars(), LikeLazyPolars(), pyarrow.Table.from_pylist(RECORDS)])
def test_a_table_of_another_library_is_its_rows(table: Any) -> None:
    read = RowTable.read(table)
    assert read.items == RECORDS
    assert list(read.frame.columns) == ["name", "n"]
    assert said(questions(read.items, "{{ name }}", None)) == ["a", "b"]


def test_an_array_of_pyarrow_is_its_values() -> None:
    assert RowTable.read(pyarrow.array(["a", None])).items == ["a", None]
