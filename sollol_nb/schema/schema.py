"""Structured answers: the argument `schema` becomes a JSON schema, and the answer becomes values.

A schema is a pydantic model class, a dataclass, another type made of these (`list[Person]`, a TypedDict, an
Enum), a JSON schema as a dict, or a DataFrame as an example. The engine is constrained by the JSON schema while
it generates (llama-server makes a grammar of it, Ollama takes it as `format`). Mismatches remain possible: an
answer may be stopped early, and an engine supports only a part of JSON schema. So the answer is checked again
here.

The more open a schema is, the less it constrains the engine: an answer to a bare `list`, a `dict` or
`{"type": "object"}` without properties may continue until `max_tokens`. llama-server refuses a `pattern` that is
not anchored by `^` and `$`.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

from sollol_nb.errors import ConfigError, StructureError
from sollol_nb.runtime.amounts import shown
from sollol_nb.schema.checks import SchemaMismatch, checked_schema, json_in, plain, validate
from sollol_nb.schema.frames import frame_like, schema_of_frame
from sollol_nb.schema.types import built, is_type, schema_of_type
from sollol_nb.text.readable_frames import is_instance_of


def json_schema_of(schema: object) -> dict[str, Any]:
    """The JSON schema for the argument `schema`.

    A pydantic model class provides its own. A dataclass, NamedTuple or TypedDict becomes an object with its
    fields; fields with a default are optional, all others required, and no further ones are allowed. A
    DataFrame becomes an object whose `rows` are objects with its columns, typed by its dtypes (an object,
    because engines and models do better with one at the top). A dict is checked and copied.

    Raises:
        ConfigError: something else, a dict that is not a JSON schema, or a type that JSON cannot represent.
    """
    if isinstance(schema, Mapping):
        return checked_schema(schema)
    if is_instance_of(schema, "pandas.DataFrame"):
        return schema_of_frame(schema)
    if is_type(schema):
        return schema_of_type(schema)
    is_object = dataclasses.is_dataclass(schema) or is_instance_of(schema, "pydantic.BaseModel")
    raise ConfigError(
        "a schema is a pydantic model class, a dataclass, a type such as list[str], a JSON schema as a dict, or a "
        f"DataFrame as an example, not {shown(schema)}"
        + (f" (give the class {type(schema).__name__}, not an object of it)" if is_object else "")
    )


class PickledSchema:
    """A schema inside of a pickle: a class is found again by its name, as it is defined then.

    Python itself refuses to write a class that was defined again since, as a cell that runs twice does, and to
    read one that is not defined (yet). In place of a class that cannot be found, there is its JSON schema.
    """

    def __init__(self, schema: object) -> None:
        self.schema = schema

    def __deepcopy__(self, memo: object) -> PickledSchema:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        schema = self.schema
        if not is_type(schema):
            return PickledSchema, (schema,)
        if isinstance(schema, type):
            found: Any = (schema.__module__, schema.__qualname__)
        else:  # such as list[Person]
            try:
                found = pickle.dumps(schema)
            except Exception:
                found = None
        return _found_again, (found, json_schema_of(schema))


def _found_again(found: Any, json_schema: dict[str, Any]) -> PickledSchema:
    try:
        if isinstance(found, bytes):
            return PickledSchema(pickle.loads(found))  # noqa: S301 - a part of the pickle that is being read
        module, qualified_name = found
        schema = attrgetter(qualified_name)(sys.modules.get(module) or import_module(module))
        return PickledSchema(schema if is_type(schema) else json_schema)
    except Exception:
        return PickledSchema(json_schema)


def field_names(schema: object) -> tuple[str, ...]:
    """The names of the fields that a value of this schema has; () if it is not an object.

    () also for a DataFrame as an example: its columns belong to many rows.

    Raises:
        ConfigError: see `json_schema_of`.
    """
    json_schema = json_schema_of(schema)
    if is_instance_of(schema, "pandas.DataFrame"):
        return ()
    if is_type(schema) and hasattr(schema, "model_fields"):  # pydantic's own schema has aliases
        return tuple(schema.model_fields)
    reference = str(json_schema.get("$ref", ""))
    if reference.startswith("#/$defs/"):  # of a class that refers to itself
        json_schema = json_schema["$defs"][reference.removeprefix("#/$defs/")]
    return tuple(json_schema.get("properties", ()))


def parse_structured(text: str, schema: object) -> Any:
    """The answer's text as the value that the schema describes, checked.

    A Markdown fence around the JSON is allowed.

    Returns:
        For a class an instance of it (in lists and dicts where the type says so), for a dict plain data, for a
        DataFrame one with the same columns and dtypes.

    Raises:
        StructureError: the text is not JSON, or does not match the schema; the message names the field.
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
            return plain(data) if isinstance(schema, Mapping) else frame_like(schema, data["rows"])
        except SchemaMismatch as mismatch:
            raise StructureError(
                f"the answer does not match the schema: {mismatch.reason} (the text is in .text)",
                text=text,
            ) from None

    return parse
