"""Answers with a structure: what a person gives as `schema` becomes a JSON schema, and the answer becomes values.

A schema is a pydantic model class, a dataclass, another type made of these (`list[Person]`, a TypedDict, an Enum),
a JSON schema as a dict, or a DataFrame as an example. The engine is held to its JSON schema while it writes
(llama-server makes a grammar of it, Ollama takes it as `format`), which rules out most misfits, but not all: an
answer may be cut short, and an engine knows only a part of JSON schema. So the answer is checked here again.

The more open a schema is, the less the engine is held to: a bare `list`, a `dict` or `{"type": "object"}` without
properties may go on until `max_tokens`. llama-server refuses a `pattern` that is not anchored by `^` and `$`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sollol_nb.errors import ConfigError, StructureError
from sollol_nb.schema.checks import Misfit, checked_schema, json_in, validate
from sollol_nb.schema.frames import frame_from_text, frame_like, frame_of, schema_of_frame
from sollol_nb.schema.types import built, is_type, schema_of_type
from sollol_nb.text.readable import is_of
from sollol_nb.text.tables import shortened

__all__ = ["field_names", "frame_from_text", "frame_of", "json_schema_of", "parse_structured", "parser_of"]


def json_schema_of(schema: object) -> dict[str, Any]:
    """The JSON schema of what a person gives as one.

    A pydantic model class gives its own. A dataclass, NamedTuple or TypedDict becomes an object with its fields;
    those with a default may be left out, the others may not, and there are none besides. A DataFrame becomes an
    object whose `rows` are objects with its columns, typed by its dtypes (an object, because engines and models do
    better with one on top). A dict is checked and copied.

    Raises:
        ConfigError: something else, a dict that is no JSON schema, or a type that JSON cannot hold.
    """
    if isinstance(schema, Mapping):
        return checked_schema(schema)
    if is_of(schema, "pandas.DataFrame"):
        return schema_of_frame(schema)
    if is_type(schema):
        return schema_of_type(schema)
    is_object = dataclasses.is_dataclass(schema) or is_of(schema, "pydantic.BaseModel")
    raise ConfigError(
        "a schema is a pydantic model class, a dataclass, a type such as list[str], a JSON schema as a dict, or a "
        f"DataFrame as an example, not {shortened(' '.join(repr(schema).split()), 60)}"
        + (f" (give the class {type(schema).__name__}, not an object of it)" if is_object else "")
    )


def field_names(schema: object) -> tuple[str, ...]:
    """The names of the fields that a value of this schema has, if that is an object; else none.

    A DataFrame as an example has none: its columns are those of many rows.

    Raises:
        ConfigError: see `json_schema_of`.
    """
    json_schema = json_schema_of(schema)
    if is_of(schema, "pandas.DataFrame"):
        return ()
    if is_type(schema) and hasattr(schema, "model_fields"):  # pydantic's own schema has aliases
        return tuple(schema.model_fields)
    reference = str(json_schema.get("$ref", ""))
    if reference.startswith("#/$defs/"):  # of a class that refers to itself
        json_schema = json_schema["$defs"][reference.removeprefix("#/$defs/")]
    return tuple(json_schema.get("properties", ()))


def parse_structured(text: str, schema: object) -> Any:
    """The answer's text as what the schema describes, checked.

    A Markdown fence around the JSON is no misfit.

    Returns:
        For a class an instance of it (in lists and dicts where the type says so), for a dict plain data, for a
        DataFrame one with the same columns and dtypes.

    Raises:
        StructureError: the text is not JSON, or does not fit the schema; the message names the field.
        ConfigError: see `json_schema_of`.
    """
    return parser_of(schema)(text)


def parser_of(schema: object) -> Callable[[str], Any]:
    """`parse_structured` for many answers: the schema is read once, which takes longer than an answer does.

    Raises:
        ConfigError: see `json_schema_of`.
    """
    json_schema = json_schema_of(schema)

    def parse(text: str) -> Any:
        try:
            data = json_in(text)
            if is_type(schema):
                return built(schema, data, json_schema)
            validate(data, json_schema)
            return data if isinstance(schema, Mapping) else frame_like(schema, data["rows"])
        except Misfit as misfit:
            raise StructureError(
                "the answer does not have the structure that was asked for: "
                f"{misfit.words}; .text has it as it came",
                text=text,
            ) from None

    return parse
