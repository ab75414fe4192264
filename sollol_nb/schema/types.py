"""Python types as JSON schemas, and JSON that matches them as values of these types.

The schemas use only what llama.cpp can turn into a grammar (`common/json-schema-to-grammar.cpp`): local `$ref`s,
`anyOf`, `enum`, `prefixItems` without `items`, and the formats date, time, date-time (with a time zone) and uuid.
For llama.cpp an empty schema means an object, not anything, so `Any` lists all types. pydantic is never imported
here: a class can only be a pydantic model if pydantic has been imported already.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, Union
from uuid import UUID

from sollol_nb.errors import ConfigError
from sollol_nb.schema.checks import DataPath, Number, SchemaMismatch, decimal_of, plain, validate
from sollol_nb.text.tables import shortened

_ANYTHING = {"type": ["string", "number", "boolean", "object", "array", "null"]}
# type -> (its JSON schema, how its values are made from JSON's)
_SIMPLE: dict[Any, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    Any: (_ANYTHING, plain),
    object: (_ANYTHING, plain),
    type(None): ({"type": "null"}, lambda data: data),
    bool: ({"type": "boolean"}, bool),
    int: ({"type": "integer"}, int),
    float: ({"type": "number"}, float),
    str: ({"type": "string"}, str),
    Decimal: ({"type": "number"}, decimal_of),
    datetime: ({"type": "string", "format": "date-time"}, datetime.fromisoformat),
    date: ({"type": "string", "format": "date"}, date.fromisoformat),
    time: ({"type": "string", "format": "time"}, time.fromisoformat),
    UUID: ({"type": "string", "format": "uuid"}, UUID),
    Path: ({"type": "string"}, Path),
}
_LISTS: dict[Any, Callable[[Iterable[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    Sequence: list,
    Collection: list,
    Iterable: list,
}
_MAPPINGS = (dict, Mapping, MutableMapping)


def is_type(schema: Any) -> bool:
    """Whether this is a class or another type, such as `list[int]` or `int | None`."""
    return isinstance(schema, type) or typing.get_origin(schema) is not None


def schema_of_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type, with the definitions that it refers to.

    Raises:
        ConfigError: a type that JSON cannot represent.
    """
    return _SchemaOfType().whole(hint)


def schema_of_arguments(name: str, arguments: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
    """The JSON schema of an object with one property for each argument of a function.

    Args:
        name: of the function, for errors.
        arguments: the type of each, and whether it is required.

    Raises:
        ConfigError: a type that JSON cannot represent.
    """
    return _SchemaOfType().of_arguments(name, arguments)


def built(hint: Any, data: Any, schema: Mapping[str, Any]) -> Any:
    """A value of a type, from JSON.

    Args:
        schema: the type's JSON schema.

    Raises:
        SchemaMismatch: the data does not match, or a class refuses it.
    """
    if not _is_model(hint):  # models check the data themselves, and are more lenient
        validate(data, schema)
    return _built(hint, data, ())


def _is_model(schema: Any) -> bool:
    """Whether this is a pydantic model class; never, if pydantic has not been imported."""
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return base is not None and isinstance(schema, type) and issubclass(schema, base)


def _model(model: Any, data: Any, path: DataPath) -> Any:
    pydantic: Any = sys.modules["pydantic"]
    try:
        return model.model_validate_json(json.dumps(_with_decimals_as_texts(model, data)))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SchemaMismatch((*path, *first["loc"]), first["msg"]) from None
    except Exception as error:  # from a validator that the user wrote
        raise _refused(error, path) from None


def _with_decimals_as_texts(model: Any, data: Any) -> Any:
    """The data for a pydantic model, which reads a decimal exactly only from a text.

    A field is a decimal where the model takes a number, but writes only texts.
    """

    def converted(data: Any, taken: list[Any], written: list[Any]) -> Any:
        taken, written = _alternatives(taken, read), _alternatives(written, write)
        if isinstance(data, Number):
            is_decimal = "number" in _types(taken) and {"string"} <= _types(written) <= {"string", "null"}
            return data.text if is_decimal else data
        if isinstance(data, dict):
            return {
                name: converted(item, _of_property(taken, name), _of_property(written, name))
                for name, item in data.items()
            }
        if isinstance(data, list):
            return [converted(item, _of_item(taken, at), _of_item(written, at)) for at, item in enumerate(data)]
        return data

    read, write = _schemas_of_model(model)
    return converted(data, [read], [write])


@functools.lru_cache(maxsize=32)
def _schemas_of_model(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schemas of what a model takes and of what it writes; empty ones if there is none."""
    try:
        return model.model_json_schema(), model.model_json_schema(mode="serialization")
    except Exception:  # a serializer that the user wrote
        return {}, {}


def _alternatives(schemas: Iterable[Any], whole: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas with those that they refer to or choose from; `whole` has the definitions."""
    found: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    left = list(schemas)
    while left:
        schema = left.pop()
        if not isinstance(schema, Mapping):
            continue
        if reference := schema.get("$ref"):
            if reference not in seen:
                seen.add(reference)
                left.append(whole.get("$defs", {}).get(str(reference).removeprefix("#/$defs/")))
            continue
        found.append(schema)
        left += [choice for key in ("anyOf", "oneOf", "allOf") for choice in schema.get(key, ())]
    return found


def _types(schemas: Iterable[Mapping[str, Any]]) -> set[str]:
    return {schema["type"] for schema in schemas if isinstance(schema.get("type"), str)}


def _of_property(schemas: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    return [schema.get("properties", {}).get(name, schema.get("additionalProperties")) for schema in schemas]


def _of_item(schemas: Iterable[Mapping[str, Any]], at: int) -> list[Any]:
    return [
        schema["prefixItems"][at] if at < len(schema.get("prefixItems", ())) else schema.get("items")
        for schema in schemas
    ]


def _refused(error: Exception, path: DataPath) -> SchemaMismatch:
    return SchemaMismatch(path, f"{type(error).__name__}: {shortened(str(error), 200)}")


def _fields(hint: Any) -> dict[str, tuple[Any, bool]] | None:
    """name -> (type, whether it is required) for a dataclass, NamedTuple or TypedDict; None for other types."""
    if not isinstance(hint, type):
        return None
    if dataclasses.is_dataclass(hint):
        missing = dataclasses.MISSING
        required = {
            field.name: field.default is missing and field.default_factory is missing
            for field in dataclasses.fields(hint)
            if field.init
        }
    elif typing.is_typeddict(hint):
        required = {name: name in hint.__required_keys__ for name in hint.__annotations__}  # type: ignore[attr-defined]
    elif issubclass(hint, tuple) and hasattr(hint, "_field_defaults"):
        required = {name: name not in hint._field_defaults for name in hint._fields}  # type: ignore[attr-defined]
    else:
        return None
    try:
        hints = typing.get_type_hints(hint, localns={hint.__name__: hint}, include_extras=True)
    except Exception as error:  # annotations are code
        raise ConfigError(f"{hint.__name__} has a type that cannot be found: {error}") from None
    for name, kind in hints.items():  # a TypedDict's own account is wrong where annotations are texts
        if typing.get_origin(kind) in (Required, NotRequired):
            required[name] = typing.get_origin(kind) is Required
    return {name: (hints.get(name, Any), must) for name, must in required.items()}


def _bare(hint: Any) -> Any:
    """The type without annotations around it."""
    while typing.get_origin(hint) in (Annotated, Required, NotRequired):
        hint = typing.get_args(hint)[0]
    return type(None) if hint is None else hint


class _SchemaOfType:
    """Builds the JSON schema of a type; classes inside it become definitions."""

    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._classes: dict[str, Any] = {}

    def whole(self, hint: Any) -> dict[str, Any]:
        """The schema of a type with the definitions that it refers to."""
        if _is_model(hint):
            return self._of_model(hint)
        schema = self._of(hint, getattr(hint, "__name__", "the type"))
        name = schema.get("$ref", "").removeprefix("#/$defs/")
        if name and json.dumps(schema)[1:-1] not in json.dumps(self._definitions):
            schema = self._definitions.pop(name)  # nothing else refers to it
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def of_arguments(self, name: str, arguments: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
        """The schema of an object with these properties, with the definitions that it refers to."""
        schema = self._of_fields(name, arguments)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _of(self, hint: Any, where: str) -> dict[str, Any]:
        hint = _bare(hint)
        origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        if origin in _SIMPLE:
            return dict(_SIMPLE[origin][0])
        if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
            given = arguments if origin is Literal else tuple(hint)
            values = [choice.value if isinstance(choice, Enum) else choice for choice in given]
            if not values or not all(value is None or isinstance(value, str | int | float) for value in values):
                raise ConfigError(f"{where}: the choices must be texts, numbers, booleans or None")
            return {"enum": values}
        if origin in (Union, types.UnionType):
            return {"anyOf": [self._of(argument, where) for argument in arguments]}
        if (fields := _fields(hint)) is not None:
            return self._defined(hint, lambda: self._of_fields(hint.__name__, fields))
        if _is_model(hint):
            return self._defined(hint, lambda: self._of_model(hint))
        if origin is tuple and arguments and arguments[-1] is not ...:
            items = [self._of(argument, where) for argument in arguments]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        if origin in _LISTS:
            return {"type": "array", **({"items": self._of(arguments[0], where)} if arguments else {})}
        if origin in _MAPPINGS:
            if arguments and _bare(arguments[0]) not in (str, Any):
                raise ConfigError(f"{where}: the keys of a JSON object are texts; use dict[str, ...]")
            return {
                "type": "object",
                **({"additionalProperties": self._of(arguments[1], where)} if arguments else {}),
            }
        name = getattr(hint, "__name__", None) or shortened(repr(hint), 60)
        raise ConfigError(f"{where}: JSON has no type for {name}; use a dataclass for objects")

    def _of_fields(self, of: str, fields: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: self._of(hint, f"{of}.{name}") for name, (hint, _) in fields.items()},
            "required": [name for name, (_, is_required) in fields.items() if is_required],
            "additionalProperties": False,
        }

    def _of_model(self, model: Any) -> dict[str, Any]:
        pydantic: Any = sys.modules["pydantic"]
        try:
            schema: dict[str, Any] = model.model_json_schema()
        except pydantic.errors.PydanticUserError as error:
            raise ConfigError(f"{model.__name__} has no JSON schema: {str(error).splitlines()[0]}") from None
        return schema

    def _defined(self, cls: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A reference to the schema of a class, which is built once."""
        name = cls.__name__
        if self._classes.setdefault(name, cls) is not cls:
            raise ConfigError(f"two classes in the schema are named {name}")
        if name not in self._definitions:
            self._definitions[name] = {}  # placeholder: the class may refer to itself
            made = make()
            for inner, definition in made.pop("$defs", {}).items():
                if self._definitions.get(inner, {}) not in ({}, definition):
                    raise ConfigError(f"two classes in the schema are named {inner}")
                self._definitions[inner] = definition
            if made != {"$ref": f"#/$defs/{name}"}:  # a recursive model defines itself
                self._definitions[name] = made
        return {"$ref": f"#/$defs/{name}"}


def _built(hint: Any, data: Any, path: DataPath) -> Any:
    """A value of a type, from validated data."""
    hint = _bare(hint)
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Union, types.UnionType):
        reasons = []
        for argument in arguments:
            try:
                validate(data, schema_of_type(argument), path)
                return _built(argument, data, path)
            except SchemaMismatch as mismatch:
                reasons.append(mismatch.reason)
        raise SchemaMismatch((), "; or ".join(reasons))
    if _is_model(hint):
        return _model(hint, data, path)
    try:
        if origin in _SIMPLE:
            return _SIMPLE[origin][1](data)
        if origin is Literal:
            return next(
                value for value in arguments if (value.value if isinstance(value, Enum) else value) == data
            )
        if isinstance(hint, type) and issubclass(hint, Enum):
            return hint(data)
        if (fields := _fields(hint)) is not None:
            return hint(**{name: _built(fields[name][0], value, (*path, name)) for name, value in data.items()})
        if origin in _LISTS:
            kinds: Iterable[Any] = arguments[:1] * len(data) if arguments else [Any] * len(data)
            if origin is tuple and arguments and arguments[-1] is not ...:
                kinds = arguments
            steps = enumerate(zip(kinds, data, strict=True))
            return _LISTS[origin](_built(kind, item, (*path, at)) for at, (kind, item) in steps)
        kind = arguments[1] if arguments else Any
        return {name: _built(kind, item, (*path, name)) for name, item in data.items()}
    except SchemaMismatch:
        raise
    except Exception as error:  # from classes that check their values, and texts that are not dates
        raise _refused(error, path) from None
