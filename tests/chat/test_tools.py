"""Python functions as tools: their schemas, and calls that match them or are refused."""

from __future__ import annotations

import functools
import json
import math
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from sollol_nb.chat.tools import CallRefused, Tool, Toolbox, has_functions
from sollol_nb.errors import ConfigError


@dataclass
class Point:
    x: int
    y: float = 0.5


class Person(BaseModel):
    name: str
    age: int = Field(ge=0)


class Unit(Enum):
    METRIC, IMPERIAL = "metric", "imperial"


def weather(  # type: ignore[no-untyped-def]
    city: str,
    unit: Literal["C", "F"] = "C",
    at: Point | None = None,
    days: Annotated[int, "how far ahead"] = 1,
    *,
    full=False,
) -> Any:
    """The weather of a city.

    Args:
        city: its name, in English
        days: overridden by the annotation
    """
    return city, unit, at, days, full


def test_hints_docstring_and_defaults_become_a_schema() -> None:
    spec = Tool.of(weather).spec
    assert spec["type"] == "function"
    assert (spec["function"]["name"], spec["function"]["description"]) == ("weather", "The weather of a city.")
    parameters = spec["function"]["parameters"]
    Draft202012Validator.check_schema(parameters)
    assert parameters["required"] == ["city"]
    assert parameters["additionalProperties"] is False
    properties = parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "its name, in English"}
    assert properties["unit"] == {"enum": ["C", "F"], "default": "C"}
    assert properties["days"] == {"type": "integer", "description": "how far ahead", "default": 1}
    assert properties["full"] == {"type": "boolean", "default": False}
    assert properties["at"]["anyOf"] == [{"$ref": "#/$defs/Point"}, {"type": "null"}]
    assert parameters["$defs"]["Point"]["required"] == ["x"]


def test_arguments_become_objects_of_their_types() -> None:
    def f(when: date, unit: Unit, points: list[Point], person: Person, pair: tuple[int, str], n: int, /) -> Any:
        return when, unit, points, person, pair, n

    f.__annotations__ = {
        "when": date,
        "unit": Unit,
        "points": list[Point],
        "person": Person,
        "pair": tuple[int, str],
        "n": int,
    }
    given = {
        "n": 3,
        "when": "2026-01-02",
        "unit": "metric",
        "points": [{"x": 1}],
        "person": {"name": "Ada", "age": 36},
        "pair": [1, "a"],
    }
    made = Tool.of(f).bound(given)()
    assert made == (date(2026, 1, 2), Unit.METRIC, [Point(1)], Person(name="Ada", age=36), (1, "a"), 3)
    assert Tool.of(weather).bound({"city": "Rome", "at": {"x": 1}})() == ("Rome", "C", Point(1), 1, False)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "missing argument city"),
        ({"city": 3}, "argument city: 3 is not of type 'string'"),
        ({"city": "Rome", "town": "x"}, "unknown argument town .arguments of weather: city, unit, at, days, full"),
        ({"city": "Rome", "unit": "K"}, "argument unit: 'K' is not one of"),
        ({"city": "Rome", "at": {"x": "far"}}, "argument at: .*'far' is not of type 'integer'"),
        ({"city": "Rome", "days": "3"}, "argument days: '3' is not of type 'integer'"),
        (["Rome"], "not a JSON object"),
        (None, "not a JSON object"),
    ],
)
def test_arguments_that_do_not_match_are_refused(arguments: Any, why: str) -> None:
    with pytest.raises(CallRefused, match=why):
        Tool.of(weather).bound(arguments)


def test_a_pydantic_model_checks_its_own_rules() -> None:
    def greet(person: Person) -> str:
        return person.name

    greet.__annotations__ = {"person": Person}
    with pytest.raises(CallRefused, match=r"argument person: age: .*greater than or equal to 0"):
        Tool.of(greet).bound({"person": {"name": "Ada", "age": -1}})


def test_only_named_functions_can_be_called() -> None:
    box = Toolbox([weather])
    for name in ("eval", "weather ", "__import__", ""):
        with pytest.raises(CallRefused, match=r"there is no function .*; call one of: weather"):
            box.bound(name, {"city": "Rome"})
    with pytest.raises(CallRefused, match="not valid JSON"):
        box.bound("weather", '{"city": "Ro')


class Shop:
    def price(self, item: str) -> float:
        """The price of an item."""
        return 3.0 if item == "pen" else 0.0

    def __call__(self, item: str) -> float:
        return self.price(item)


def test_methods_and_partial_functions_are_tools() -> None:
    tool = Tool.of(Shop().price)
    assert (tool.name, tool.description, list(tool.parameters["properties"])) == (
        "price",
        "The price of an item.",
        ["item"],
    )
    assert tool.bound({"item": "pen"})() == 3.0
    in_rome = functools.partial(weather, "Rome", days=3)
    assert list(Tool.of(in_rome).parameters["properties"]) == ["unit", "at", "full"]
    assert Tool.of(in_rome).bound({})() == ("Rome", "C", None, 3, False)


def search(query: str, key: str) -> str:
    return f"{query} with {key}"


def test_a_model_neither_sees_nor_changes_what_a_partial_sets() -> None:
    tool = Tool.of(functools.partial(search, key="a secret"))
    assert "secret" not in str(tool.spec)
    assert tool.bound({"query": "pens"})() == "pens with a secret"
    with pytest.raises(CallRefused, match="unknown argument key"):
        tool.bound({"query": "pens", "key": "another"})


def limited(amount: float, most: float = math.inf, least: float = 0.5) -> float:
    return min(amount, most)


def test_a_default_that_json_cannot_represent_is_left_out() -> None:
    tool = Tool.of(limited)
    assert json.dumps(tool.spec, allow_nan=False)
    assert "default" not in tool.parameters["properties"]["most"]
    assert tool.parameters["properties"]["least"]["default"] == 0.5
    assert tool.bound({"amount": 3})() == 3


def untyped(x):  # type: ignore[no-untyped-def]
    return x


def many(*values: int) -> int:
    return sum(values)


def numbers() -> Iterator[int]:
    yield 1


def unknown(x: "Missing") -> None:  # type: ignore[name-defined]  # noqa: F821, UP037
    del x


def odd(x: time.struct_time | complex) -> None:
    del x


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (untyped, "argument x of the tool untyped has no type hint; write for example x: str"),
        (many, r"the tool many takes \*values"),
        (numbers, "the tool numbers yields values"),
        (unknown, "the tool unknown has a type hint that cannot be found"),
        (odd, r"odd\.x: JSON has no type for"),
        (lambda x=1: x, "a function named <lambda> cannot be a tool"),
        (Point, "cannot be a tool; write a function that uses it"),
        (Shop(), "cannot be a tool; write a function that uses it"),
        (operator.add, "argument a of the tool add has no type hint"),
    ],
)
def test_functions_that_no_model_could_call_are_refused_in_one_line(function: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        Tool.of(function)
    assert "\n" not in str(refused.value)


def test_names_are_given_once_and_forms_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="two tools are named weather"):
        Toolbox([weather, weather])
    with pytest.raises(ConfigError, match=r"tools\[1\] is .*not a function"):
        Toolbox([weather, {"type": "function", "function": {"name": "f"}}])


def test_plain_descriptions_are_no_functions() -> None:
    assert not has_functions([{"type": "function", "function": {"name": "f"}}])
    assert not has_functions(None)
    assert has_functions([weather])


def test_arguments_that_are_only_given_by_position_keep_their_places() -> None:
    def f(a: int = 1, b: int = 2, c: int = 3, /) -> tuple[int, int, int]:
        return a, b, c

    assert Tool.of(f).bound({"b": 9})() == (1, 9, 3)
