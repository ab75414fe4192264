"""JSON against its schema: is this dict a JSON schema, is this text JSON, does it match, and if not, where?

The `jsonschema` library does the checks. Nothing is ever fetched for a `$ref`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeAlias
from urllib.parse import unquote

from sollol_nb.errors import ConfigError
from sollol_nb.text.tables import shortened

FENCE = re.compile(r"```[^\n`]*\n(.*?)\n?```", re.DOTALL)
DataPath: TypeAlias = tuple[str | int, ...]
"""Names and positions that lead to a part of the data."""

_KEYWORDS = {"type", "properties", "additionalProperties", "items", "prefixItems", "enum", "const"} | {
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
}


class Number(float):
    """A number of a JSON text with a fraction or an exponent, which keeps its digits: `text`."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def plain(data: Any) -> Any:
    """JSON's data with Python's own numbers."""
    if isinstance(data, dict):
        return {name: plain(item) for name, item in data.items()}
    if isinstance(data, list):
        return [plain(item) for item in data]
    return float(data) if isinstance(data, Number) else data


def decimal_of(data: Any) -> Decimal:
    """A number of JSON as a decimal, with all its digits."""
    return Decimal(data.text if isinstance(data, Number) else str(data))


class SchemaMismatch(Exception):
    """Data that does not match its schema.

    Attributes:
        reason: where, and why; one line.
    """

    def __init__(self, path: Iterable[str | int], reason: str) -> None:
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
        self.reason = " ".join((f"{where}: {reason}" if where else reason).split())
        super().__init__(self.reason)


def json_in(text: str) -> Any:
    """The data in a text that is JSON, perhaps inside a Markdown fence. Its fractions are `Number`s.

    Raises:
        SchemaMismatch: it is not JSON, or ends early.
    """
    fenced = FENCE.fullmatch(text.strip())
    source = (fenced[1] if fenced else text).strip()
    if not source:
        raise SchemaMismatch((), "it is empty")
    try:
        return json.loads(source, parse_float=Number, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        if error.pos >= len(source) or error.msg.startswith("Unterminated string"):
            raise SchemaMismatch(
                (), f"its JSON ends early, after {len(source):,} characters (stopped at max_tokens?)"
            ) from None
        raise SchemaMismatch((), f"it is not JSON: {error.msg} at character {error.pos:,}") from None
    except (ValueError, RecursionError) as error:
        raise SchemaMismatch((), f"its JSON cannot be read: {shortened(str(error), 100)}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def checked_schema(schema: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy of the schema as plain data.

    Raises:
        ConfigError: it is not a JSON schema, or refers to something outside itself.
    """
    from jsonschema import SchemaError

    try:
        plain: dict[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema cannot be written as JSON: {error}") from None
    if _KEYWORDS.isdisjoint(plain):
        keys = shortened(", ".join(plain) or "(none)", 60)
        raise ConfigError(
            f"a dict with the keys {keys} is not a JSON schema; an example of one: "
            '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
        )
    try:
        _validator(plain).check_schema(plain)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        reason = shortened(error.message, 200)
        raise ConfigError(f"the dict is not a JSON schema{f' (at {where})' if where else ''}: {reason}") from None
    for reference in _references(plain):
        if not _has(plain, reference):
            raise ConfigError(f'"$ref": "{reference}" refers to nothing in the schema')
    return plain


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)


def _has(schema: Any, reference: str) -> bool:
    """Whether a JSON pointer such as `#/$defs/Person` leads to something."""
    if reference != "#" and not reference.startswith("#/"):
        return False
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        elif isinstance(schema, dict) and name in schema:
            schema = schema[name]
        else:
            return False
    return True


def validate(data: Any, schema: Mapping[str, Any], path: DataPath = ()) -> None:
    """Check data against a schema.

    Args:
        path: where this data is in the whole.

    Raises:
        SchemaMismatch: for the most relevant error.
    """
    from jsonschema.exceptions import best_match
    from referencing import Registry

    registry: Registry[Any] = Registry()  # otherwise jsonschema would fetch what a "$ref" names
    try:
        error = best_match(_validator(schema)(schema, registry=registry).iter_errors(data))
    except (RecursionError, re.error) as failed:
        raise SchemaMismatch(path, f"it cannot be checked: {failed}") from None
    if error is not None:
        reason = error.message
        if len(reason) > 200:  # it quotes the data
            rule = shortened(json.dumps(error.validator_value), 100)
            reason = f"{shortened(repr(error.instance), 60)} does not match {error.validator} {rule}"
        raise SchemaMismatch((*path, *error.absolute_path), reason)


def _validator(schema: Mapping[str, Any]) -> Any:
    """The class that checks data against this schema."""
    from jsonschema.validators import Draft202012Validator, validator_for

    return validator_for(schema, default=Draft202012Validator)
