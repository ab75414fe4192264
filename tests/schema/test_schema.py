"""What is given as a schema becomes a JSON schema; answers become what it describes, or say where they do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NotRequired, Required, TypedDict
from uuid import UUID

import jsonschema
import numpy as np
import pandas as pd
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, RequestError, StructureError
from sollol_nb.schema.frames import frame_from_text, frame_of
from sollol_nb.schema.schema import json_schema_of, parse_structured
from sollol_nb.text.readable import readable


class Kind(Enum):
    CAT = "cat"
    DOG = "dog"


@dataclass
class Pet:
    name: str
    kind: Kind
    age: float | None = None


@dataclass
class Node:
    value: int
    children: list[Node] = field(default_factory=list)


class Place(NamedTuple):
    x: int
    y: int = 0


class Loose(TypedDict, total=False):
    a: Required[int]
    b: str


class Tight(TypedDict):
    a: int
    b: NotRequired[str]


@dataclass(frozen=True)
class Positive:
    number: int

    def __post_init__(self) -> None:
        if self.number <= 0:
            raise ValueError("must be positive")


# --- schemas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (set[str], {"type": "array", "items": {"type": "string"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (
            tuple[int, str],
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "minItems": 2,
                "maxItems": 2,
            },
        ),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (Annotated[int, "positive"], {"type": "integer"}),
        (Kind, {"enum": ["cat", "dog"]}),
        (datetime, {"type": "string", "format": "date-time"}),
        (date, {"type": "string", "format": "date"}),
        (time, {"type": "string", "format": "time"}),
        (UUID, {"type": "string", "format": "uuid"}),
        (Decimal, {"type": "number"}),
        (Path, {"type": "string"}),
        (
            list[Any],
            {"type": "array", "items": {"type": ["string", "number", "boolean", "object", "array", "null"]}},
        ),
        (
            Place,
            {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        ),
        *(
            (
                typed_dict,
                {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            )
            for typed_dict in (Loose, Tight)
        ),
    ],
    ids=str,
)
def test_types_become_schemas(hint: object, schema: dict[str, Any]) -> None:
    assert json_schema_of(hint) == schema


def test_a_dataclass_becomes_an_object() -> None:
    @dataclass
    class Visit:
        pet: Pet
        others: list[Pet]
        cost: float = 1.5
        computed: int = field(default=0, init=False)
        shared: ClassVar[int] = 3

    Visit.__annotations__ |= {"pet": Pet, "others": list[Pet]}
    assert json_schema_of(Visit) == {
        "type": "object",
        "properties": {
            "pet": {"$ref": "#/$defs/Pet"},
            "others": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
            "cost": {"type": "number"},
        },
        "required": ["pet", "others"],
        "additionalProperties": False,
        "$defs": {
            "Pet": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "kind": {"enum": ["cat", "dog"]},
                    "age": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
                "required": ["name", "kind"],
                "additionalProperties": False,
            }
        },
    }


@pytest.mark.parametrize(
    "schema",
    [
        Pet,
        Node,
        list[Node],
        Place,
        Loose,
        Node | None,
        pd.DataFrame({"a": [1], "b": ["x"]}),
        {"$ref": "#/$defs/P", "$defs": {"P": {"type": "integer"}}},
    ],
    ids=str,
)
def test_schemas_are_valid_plain_and_refer_only_to_themselves(schema: object) -> None:
    made = json_schema_of(schema)
    jsonschema.Draft202012Validator.check_schema(made)
    text = json.dumps(made)
    for name in {part.split('"')[0] for part in text.split("#/$defs/")[1:]}:
        assert made["$defs"][name]
    # llama.cpp takes `items` for a schema or a list of them, and an empty schema for an object.
    assert '"items": false' not in text
    assert ": {}" not in text.replace('"properties": {}', "")


def test_a_frame_becomes_rows() -> None:
    frame = pd.DataFrame(
        {"name": ["é"], "n": [1], "f": [0.5], "ok": [True], "day": pd.to_datetime(["2024-01-01"])}
    )
    assert json_schema_of(frame) == {
        "type": "object",
        "properties": {
            "rows": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "n": {"type": "integer"},
                        "f": {"type": "number"},
                        "ok": {"type": "boolean"},
                        "day": {"type": "string", "format": "date"},
                    },
                    "required": ["name", "n", "f", "ok", "day"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["rows"],
        "additionalProperties": False,
    }


ANYTHING = ["string", "number", "boolean", "object", "array", "null"]


@pytest.mark.parametrize(
    ("column", "schema"),
    [
        (pd.Series(["a", None]), {"type": ["string", "null"]}),
        (pd.Series([1.5, np.nan]), {"type": ["number", "null"]}),
        (pd.Series([1, None], dtype="Int64"), {"type": ["integer", "null"]}),
        (pd.Series([1], dtype="Int64"), {"type": ["integer", "null"]}),
        (pd.Series([1], dtype="uint8"), {"type": "integer", "minimum": 0, "maximum": 255}),
        (pd.Series([1], dtype="int16"), {"type": "integer", "minimum": -32768, "maximum": 32767}),
        (pd.Series([1], dtype="uint64"), {"type": "integer", "minimum": 0}),
        (pd.Series([True], dtype="boolean"), {"type": ["boolean", "null"]}),
        (pd.Series(["a"], dtype="string"), {"type": "string"}),
        (pd.Series(["b", "a"], dtype="category"), {"enum": ["a", "b"]}),
        (pd.Series([True, None], dtype="category"), {"enum": [True, None]}),
        (pd.Series(pd.to_datetime(["2024-01-01 10:00"])), {"type": "string", "format": "date-time"}),
        (
            pd.Series(pd.to_datetime(["2024-01-01"])).dt.tz_localize("UTC"),
            {"type": "string", "format": "date-time"},
        ),
        (pd.Series([date(2024, 1, 1)]), {"type": "string", "format": "date"}),
        (pd.Series(["a"], dtype=object), {"type": "string"}),
        (pd.Series([], dtype=object), {"type": "string"}),
        (pd.Series([1, 2], dtype=object), {"type": "integer"}),
        (pd.Series([[1], [2]]), {"type": "array"}),
        (pd.Series([{"a": 1}]), {"type": "object"}),
        (pd.Series([1, "a"], dtype=object), {"type": ANYTHING}),
        (pd.Series([1, None, "a"], dtype=object), {"type": ANYTHING}),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, pd.Series) else "",
)
def test_columns_become_schemas_by_dtype(column: pd.Series[Any], schema: dict[str, Any]) -> None:
    row = json_schema_of(pd.DataFrame({"c": column}))["properties"]["rows"]["items"]
    assert row["properties"]["c"] == schema


def _endless() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"self": schema}
    return schema


def _stranger() -> object:
    return dataclasses.make_dataclass("Stranger", [("who", "Nobody")])


def _twins() -> object:
    other = dataclasses.make_dataclass("Pet", [("name", str)])
    return tuple[Pet, other]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (3, "a schema is a pydantic model class, a dataclass, a type such as list[str], a JSON schema"),
        (None, "not None"),
        ("Pet", "not 'Pet'"),
        ([Pet], "not [<class"),
        (len, "not <built-in"),
        (pd.Series([1]), "a DataFrame as an example"),
        (Pet("a", Kind.CAT), "(give the class Pet, not an object of it)"),
        (complex, "JSON has no type for complex"),
        (object(), "not <object"),
        (list[complex], "JSON has no type for complex"),
        (
            dataclasses.make_dataclass("Wave", [("phase", list[complex])]),
            "Wave.phase: JSON has no type for complex",
        ),
        (_stranger(), "Stranger has a type that cannot be found"),
        (_twins(), "two classes in the schema are named Pet"),
        (dict[int, str], "the keys of a JSON object are texts"),
        (Literal[b"a"], "the choices must be"),
        ({}, "a dict with the keys (none) is not a JSON schema; an example of one"),
        ({"name": "Ann", "age": 3}, "a dict with the keys name, age is not a JSON schema"),
        ({"name": str}, "cannot be written as JSON"),
        ({"type": "number", "maximum": float("nan")}, "cannot be written as JSON"),
        (_endless(), "cannot be written as JSON"),
        ({"type": "fruit"}, "not a JSON schema (at type): 'fruit'"),
        ({"type": "object", "properties": {"a": {"type": 3}}}, "not a JSON schema (at properties.a.type)"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"type": "array", "items": {"$ref": "#/$defs/nothing"}}, "#/$defs/nothing"),
        (pd.DataFrame(), "needs columns"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "columns with distinct names"),
        (pd.DataFrame({"a": pd.to_timedelta([1])}), "column a: JSON has no type for timedelta64"),
        (pd.DataFrame({"a": pd.Categorical([])}), "column a: the categories"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_invalid_schema_is_refused_with_what_can_be_given(schema: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        json_schema_of(schema)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schema_given_as_a_dict_is_not_changed_by_its_user() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    made = json_schema_of(schema)
    assert made == schema
    made["properties"].clear()
    assert schema["properties"]


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (int, "3", 3),
        (int, "3.0", 3),
        (float, "3", 3.0),
        (Decimal, "1.10", Decimal("1.1")),
        (str, '"é"', "é"),
        (list[str], '["a"]', ["a"]),
        (set[int], "[1, 1]", {1}),
        (tuple[int, str], '[1, "a"]', (1, "a")),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (dict[str, tuple[int, ...]], '{"a": [1]}', {"a": (1,)}),
        (list, "[1, [2]]", [1, [2]]),
        (Literal["a", 1], "1", 1),
        (Literal[Kind.DOG], '"dog"', Kind.DOG),
        (Kind, '"cat"', Kind.CAT),
        (int | None, "null", None),
        (date | str, '"2024-01-02"', date(2024, 1, 2)),
        (date | str, '"soon"', "soon"),
        (Pet | Node, '{"value": 1}', Node(1)),
        (datetime, '"2024-01-02T03:04:05Z"', datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (time, '"03:04:05+00:00"', time(3, 4, 5, tzinfo=UTC)),
        (UUID, f'"{UUID(int=5)}"', UUID(int=5)),
        (Path, '"a/b"', Path("a/b")),
        (Pet, '{"name": "Zoë", "kind": "dog"}', Pet("Zoë", Kind.DOG)),
        (list[Pet], '[{"name": "a", "kind": "cat", "age": 2}]', [Pet("a", Kind.CAT, 2.0)]),
        (Node, '{"value": 1, "children": [{"value": 2}]}', Node(1, [Node(2)])),
        (Place, '{"x": 1}', Place(1, 0)),
        (Loose, '{"a": 1}', {"a": 1}),
        (Positive, '{"number": 1}', Positive(1)),
        ({"type": "object"}, '{"a": [1.5, null]}', {"a": [1.5, None]}),
        ({"enum": ["yes", "no"]}, '\n```json\n"yes"\n```\n', "yes"),
        ({"$ref": "#/$defs/N", "$defs": {"N": {"type": "integer"}}}, "4", 4),
    ],
    ids=str,
)
def test_answers_become_values(schema: object, text: str, value: object) -> None:
    parsed = parse_structured(text, schema)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (int, "", "it is empty"),
        (int, "Sure! Here it is: 3", "it is not JSON: Expecting value at character 0"),
        (int, "3 and more", "it is not JSON: Extra data at character 2"),
        (Pet, '{"name": "a', "its JSON ends early, after 11 characters (stopped at max_tokens?)"),
        (Pet, '{"name": "a", "kind": ', "its JSON ends early"),
        (list, "[" * 100_000, "recursion"),
        (list, "[" + "9" * 5000 + "]", "its JSON cannot be read"),
        (list[float], "[NaN]", "NaN is not a number"),
        (int, "1e999", "is not of type 'integer'"),
        (int, "true", "True is not of type 'integer'"),
        (int, '"3"', "'3' is not of type 'integer'"),
        (Pet, '{"kind": "cat"}', "'name' is a required property"),
        (Pet, '{"name": "a", "kind": "cow"}', "kind: 'cow' is not one of ['cat', 'dog']"),
        (Pet, '{"name": "a", "kind": "cat", "tail": 1}', "'tail' was unexpected"),
        (list[Pet], '[{"name": "a", "kind": "cat"}, {"name": 2, "kind": "cat"}]', "[1].name: 2 is not"),
        (Node, '{"value": 1, "children": [{"value": "é"}]}', "children[0].value: 'é' is not"),
        (Pet, "[" + '"x", ' * 10_000 + "1]", "does not match type"),
        (date, '"2024-13-01"', "ValueError: month must be in 1..12"),
        (dict[str, date], '{"born": "long ago"}', "born: ValueError: Invalid isoformat"),
        (tuple[int, str], "[1]", "[1] is too short"),
        (Positive, '{"number": 0}', "ValueError: must be positive"),
        (list[date | int], '["soon"]', "[0]: ValueError: Invalid isoformat string: 'soon'; or [0]: 'soon' is not"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, '{"a": 1}', "a: 1 is not of type 'string'"),
        ({"type": "string", "pattern": "^a+$"}, '"b"', "'b' does not match '^a+$'"),
        (pd.DataFrame({"n": [1]}), '{"rows": [{"n": 1}, {"n": 1.5}]}', "rows[1].n: 1.5 is not"),
        (pd.DataFrame({"n": [1]}), "[]", "[] is not of type 'object'"),
        (pd.DataFrame({"n": [1]}), f'{{"rows": [{{"n": {2**70}}}]}}', "rows.n: OverflowError"),
        (
            pd.DataFrame({"d": pd.to_datetime(["2024-01-01"])}),
            '{"rows": [{"d": "2024-99-01"}]}',
            "rows.d: ValueError",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else str(value)[:30],
)
def test_mismatches_say_where_and_keep_the_text(schema: object, text: str, expected: str) -> None:
    with pytest.raises(StructureError) as caught:
        parse_structured(text, schema)
    message = str(caught.value)
    assert message.startswith("the answer does not match the schema: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 500
    assert caught.value.text == text
    assert isinstance(caught.value, RequestError)


# --- pydantic ---------------------------------------------------------------------------------


@pytest.fixture
def models() -> SimpleNamespace:
    """Models of pydantic, and types with models in them."""
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        years: int = pydantic.Field(ge=0, alias="age")
        friends: list[Person] = []

    class Team(pydantic.BaseModel):
        lead: Person

    class Callback(pydantic.BaseModel):
        call: Callable[[], None]

    owner = dataclasses.make_dataclass("Owner", [("lead", Person), ("pet", Pet)])
    return SimpleNamespace(Person=Person, Team=Team, Callback=Callback, Owner=owner)


def test_a_model_gives_its_own_schema(models: SimpleNamespace) -> None:
    assert json_schema_of(models.Team) == models.Team.model_json_schema()


def test_schemas_with_models_in_them_are_closed(models: SimpleNamespace) -> None:
    for hint in (models.Person, list[models.Person], dict[str, models.Team], models.Owner):
        made = json_schema_of(hint)
        jsonschema.Draft202012Validator.check_schema(made)
        for name in {part.split('"')[0] for part in json.dumps(made).split("#/$defs/")[1:]}:
            assert made["$defs"][name]["type"] == "object"


def test_answers_become_models(models: SimpleNamespace) -> None:
    ann = models.Person(name="Ann", age=5)
    text = '{"name": "Ann", "age": 5}'
    assert parse_structured(text, models.Person) == ann
    assert parse_structured('{"name": "Ann", "age": "5"}', models.Person) == ann  # as lenient as pydantic
    assert parse_structured(f'[{{"lead": {text}}}]', list[models.Team]) == [models.Team(lead=ann)]
    pet = '{"name": "b", "kind": "cat"}'
    assert parse_structured(f'{{"lead": {text}, "pet": {pet}}}', models.Owner) == models.Owner(
        ann, Pet("b", Kind.CAT)
    )


@pytest.mark.parametrize(
    ("within_list", "text", "expected"),
    [
        (False, '{"name": "a"}', "age: Field required"),
        (False, '{"name": "a", "age": -1}', "age: Input should be greater than or equal to 0"),
        (False, '{"name": "a", "age": 1, "friends": [{"name": "b"}]}', "friends[0].age: Field required"),
        (False, '{"name": "a", ', "its JSON ends early"),
        (True, '[{"name": "a", "age": "old"}]', "[0].age: 'old' is not of type 'integer'"),
    ],
)
def test_data_that_a_model_refuses_is_a_mismatch(
    models: SimpleNamespace, within_list: bool, text: str, expected: str
) -> None:
    with pytest.raises(StructureError) as caught:
        parse_structured(text, list[models.Person] if within_list else models.Person)
    assert expected in str(caught.value)
    assert caught.value.text == text


def test_a_model_whose_own_check_fails_refuses_the_answer() -> None:
    pydantic = pytest.importorskip("pydantic")

    def divided(value: int) -> int:
        return 1 // value

    checked = Annotated[int, pydantic.AfterValidator(divided)]
    model = pydantic.create_model("Divided", number=(checked, ...))
    with pytest.raises(StructureError, match="ZeroDivisionError"):
        parse_structured('{"number": 0}', model)
    with pytest.raises(StructureError, match=r"\[0\]: ZeroDivisionError"):
        parse_structured('[{"number": 0}]', list[model])  # type: ignore[valid-type]


def test_models_without_a_json_schema_say_so(models: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="give the class Person, not an object of it"):
        json_schema_of(models.Person(name="a", age=1))
    with pytest.raises(ConfigError, match="Callback has no JSON schema"):
        json_schema_of(models.Callback)


def test_models_become_rows_and_json(models: SimpleNamespace) -> None:
    ann = models.Person(name="Ann", age=1)
    assert frame_of([ann]).to_dict("list") == {"name": ["Ann"], "years": [1], "friends": [[]]}
    assert readable({"who": ann}) == '{"who": {"name": "Ann", "years": 1, "friends": []}}'


# --- frames as schemas ------------------------------------------------------------------------


@pytest.fixture
def example() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": ["é", None],
            "count": [1, 2],
            "share": [0.5, np.nan],
            "ok": [True, False],
            "day": pd.to_datetime(["2024-01-01", "2024-02-01"]),
            "when": pd.to_datetime(["2024-01-01 10:00", "2024-02-01 11:00"]).tz_localize("Europe/Berlin"),
            "kind": pd.Categorical(["x", "y"]),
            "small": np.array([1, 2], "uint8"),
            "maybe": pd.array([1, None], "Int64"),
            "born": [date(2024, 1, 1), None],
            "list": [[1], [2]],
            5: [1, 2],
        },
        index=["p", "q"],
    )


def test_an_answer_becomes_a_frame_like_the_example(example: pd.DataFrame) -> None:
    row = {
        "text": "ß",
        "count": 3.0,
        "share": None,
        "ok": True,
        "day": "2024-03-01",
        "when": "2024-03-01T10:00:00Z",
        "kind": "y",
        "small": 255,
        "maybe": None,
        "born": "2024-01-05",
        "list": [5],
        "5": 7,
    }
    frame = parse_structured(json.dumps({"rows": [row, row]}), example)

    assert list(frame.columns) == list(example.columns)
    assert frame.dtypes.equals(example.dtypes)
    assert len(frame) == 2
    assert frame["count"].tolist() == [3, 3]
    assert frame["share"].isna().all()
    assert frame["day"].tolist() == [pd.Timestamp("2024-03-01")] * 2
    assert frame["when"].tolist() == [pd.Timestamp("2024-03-01 11:00", tz="Europe/Berlin")] * 2
    assert frame["born"].tolist() == [date(2024, 1, 5)] * 2
    assert frame[5].tolist() == [7, 7]


def test_no_rows_give_an_empty_frame_like_the_example(example: pd.DataFrame) -> None:
    frame = parse_structured('{"rows": []}', example)
    assert len(frame) == 0
    assert frame.dtypes.equals(example.dtypes)


def test_times_without_a_zone_in_the_example_are_utc() -> None:
    example = pd.DataFrame({"t": pd.to_datetime(["2024-01-01 10:00"])})
    frame = parse_structured('{"rows": [{"t": "2024-01-01T10:00:00+02:00"}]}', example)
    assert frame["t"].tolist() == [pd.Timestamp("2024-01-01 08:00")]


def test_sparse_columns_have_the_type_of_their_values() -> None:
    example = pd.DataFrame({"n": pd.arrays.SparseArray([0, 0, 1]), "x": pd.arrays.SparseArray([0.0, 0.5, 0.0])})
    row = json_schema_of(example)["properties"]["rows"]["items"]["properties"]
    assert (row["n"]["type"], row["x"]["type"]) == ("integer", "number")
    frame = parse_structured('{"rows": [{"n": 2, "x": 0.5}]}', example)
    assert frame.to_dict("list") == {"n": [2], "x": [0.5]}
    assert list(frame.dtypes) == list(example.dtypes)


# --- frames of anything -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ([Pet("a", Kind.CAT)], {"name": ["a"], "kind": [Kind.CAT], "age": [None]}),
        (Pet("a", Kind.CAT, 2), {"name": ["a"], "kind": [Kind.CAT], "age": [2]}),
        ([Place(1, 2), Place(3)], {"x": [1, 3], "y": [2, 0]}),
        ({"rows": [{"a": 1}, {"a": 2}]}, {"a": [1, 2]}),
        (Node(1, [Node(2)]), {"value": [1], "children": [[Node(2)]]}),
        ({"tags": ["a", "b"]}, {"tags": ["a", "b"]}),
        ({"a": 1, "b": [2]}, {"a": [1], "b": [[2]]}),
        ([1, 2], {"value": [1, 2]}),
        ([], {}),
        ({"people": []}, {}),
        ("a,b\n1,2", {"a": [1], "b": [2]}),
        (Completion(message={"content": "| a |\n|---|\n| 1 |"}), {"a": [1]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_become_frames(value: object, columns: dict[str, list[Any]]) -> None:
    frame = frame_of(value)
    assert {name: frame[name].tolist() for name in frame.columns} == columns


def test_objects_with_different_fields_leave_gaps() -> None:
    frame = frame_of([{"a": 1}, {"b": "é"}])
    assert list(frame.columns) == ["a", "b"]
    assert frame.isna().sum().tolist() == [1, 1]


def test_a_frame_is_itself(example: pd.DataFrame) -> None:
    assert frame_of(example) is example


@pytest.mark.parametrize("value", [3, None, True, [1, {"a": 2}]], ids=repr)
def test_a_value_without_rows_is_refused(value: object) -> None:
    with pytest.raises(StructureError, match="cannot make a DataFrame of"):
        frame_of(value)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (
            "Here:\n\n| a | b\\|c |\n|---|:-:|\n| **x** | 1,234 |\n| __init__ | 5 |\n\nDone | so.",
            {"a": ["x", "__init__"], "b|c": [1234, 5]},
        ),
        ("a | b\n--|--\n1 | 2.5\n2 | 3\n", {"a": [1, 2], "b": [2.5, 3.0]}),
        ("| a | b |\n|---|---|\n| 1 |\n| 2 | 3 | 4 |", {"a": [1, 2], "b": [None, 3]}),
        ("```\n| a |\n|---|\n| 1 |\n```", {"a": [1]}),
        ("| a | b |\n|---|---|", {"a": [], "b": []}),
        ("```csv\nname;zip\nA;007\nB;010\n```\nThat's it, all.", {"name": ["A", "B"], "zip": ["007", "010"]}),
        ("Sure, here\n\na,b\n1,true\n-2,False\n\nBye!", {"a": [1, -2], "b": [True, False]}),
        ('a,b\n"x, y\n\nz",1e3\n', {"a": ["x, y\n\nz"], "b": [1000.0]}),
        ("a\tb\n1\té", {"a": [1], "b": ["é"]}),
        ("n,t\n1,a\n-,b\nN/A,-", {"n": [1, None, None], "t": ["a", "b", "-"]}),
        ("n,m\n1.5,1\n,2", {"n": [1.5, None], "m": [1, 2]}),
        ("n,t\n12,1-2\n34,3.4.5", {"n": [12, 34], "t": ["1-2", "3.4.5"]}),
        ('```json\n[{"a": 1}, {"a": 2}]\n```', {"a": [1, 2]}),
        ('{"rows": [{"a": "é"}]}', {"a": ["é"]}),
        ("```json\n{broken\n```\n```csv\na,b\n1,2\n```", {"a": [1], "b": [2]}),
    ],
)
def test_tables_in_texts_become_frames(text: str, columns: dict[str, list[Any]]) -> None:
    frame = frame_from_text(text)
    found = {name: [None if pd.isna(cell) else cell for cell in frame[name]] for name in frame.columns}
    assert found == columns


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello.",
        "one\ntwo",
        "a,b\n1",
        "a,b",
        '"a,b\n1,2',
        "| a |\nno table",
        "3",
        "[1, {}]",
        "```\n\n```",
        "{",
        ",\n,",
    ],
)
def test_a_text_without_a_table_says_so_and_is_kept(text: str) -> None:
    with pytest.raises(StructureError, match="the answer has no Markdown table") as caught:
        frame_from_text(text)
    assert caught.value.text == text
