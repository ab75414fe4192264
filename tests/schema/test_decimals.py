"""Decimals in answers keep their digits; all other numbers stay Python's own."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd
import pyarrow
import pytest
from pydantic import BaseModel

from sollol_nb.errors import StructureError
from sollol_nb.schema.schema import parse_structured

LONG = "0.12345678901234567890123"


class Item(BaseModel):
    price: Decimal


class Model(BaseModel):
    price: Decimal
    rate: Decimal | None
    ratio: float
    mixed: float | str
    items: list[Item]
    by_name: dict[str, Decimal]


@dataclass
class Plain:
    price: Decimal
    rate: Decimal | None
    ratio: float
    mixed: float | str
    items: list[Item]
    by_name: dict[str, Decimal]


TEXT = (
    f'{{"price": 19.90, "rate": {LONG}, "ratio": 1.50, "mixed": 2.50, "items": [{{"price": 3.10}}], '
    '"by_name": {"a": 1e2, "b": 7}}'
)


@pytest.mark.parametrize("schema", [Model, Plain])
def test_decimals_keep_their_digits(schema: type[Any]) -> None:
    value = parse_structured(TEXT, schema)
    assert [str(value.price), str(value.rate), str(value.items[0].price)] == ["19.90", LONG, "3.10"]
    assert {name: str(number) for name, number in value.by_name.items()} == {"a": "1E+2", "b": "7"}
    assert (type(value.ratio), value.ratio, type(value.mixed), value.mixed) == (float, 1.5, float, 2.5)


def test_a_column_of_decimals_keeps_them() -> None:
    frame = parse_structured('{"rows": [{"p": 19.90}, {"p": 2}]}', pd.DataFrame({"p": [Decimal("1.50")]}))
    assert [str(value) for value in frame.p] == ["19.90", "2"]


def test_a_column_of_decimals_of_pyarrow_keeps_them() -> None:
    example = pd.DataFrame({"p": pd.Series([Decimal("1.50")], dtype=pd.ArrowDtype(pyarrow.decimal128(10, 2)))})
    frame = parse_structured('{"rows": [{"p": 19.90}, {"p": 2}]}', example)
    assert [str(value) for value in frame.p] == ["19.90", "2.00"]
    with pytest.raises(StructureError, match="p"):
        parse_structured('{"rows": [{"p": 1.999}]}', example)


@pytest.mark.parametrize(
    "schema",
    [{"type": "object", "properties": {"x": {"type": "number"}}}, object, dict[str, Any], dict[str, float]],
    ids=str,
)
def test_other_numbers_are_floats(schema: Any) -> None:
    number = parse_structured('{"x": 1.50}', schema)["x"]
    assert type(number) is float
    assert number == 1.5


def test_a_number_is_no_text_for_a_field_of_texts() -> None:
    class Named(BaseModel):
        name: str

    with pytest.raises(StructureError, match="name: Input should be a valid string"):
        parse_structured('{"name": 1.50}', Named)
