"""Dataclasses and this package's errors as plain data for JSON, and back. Pure."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from sollol_nb import errors
from sollol_nb.errors import GatewayError, SollolError
from sollol_nb.runtime.http_client import one_line

LONGEST_MESSAGE_CHARS = 4000
"""Of an error; the longest have the last lines of an engine's log."""
_ATTRIBUTES: Mapping[type[SollolError], Mapping[str, Any]] = {
    errors.AnswerInterruptedError: {"state": dict[str, Any] | None},
    errors.CoordinatorStartError: {"may_pass": bool, "is_crash": bool},
    errors.ContextOverflowError: {"prompt_tokens": int | None, "context_tokens": int | None},
    errors.HttpStatusError: {"status": int, "reason": str},
    errors.OllamaResponseError: {"status": int | None},
    errors.GatewayBusyError: {"retry_after_s": float},
}
"""What errors say besides their message, and its types. Partial answers are left out: who reads an answer has its
text."""
_CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SollolError) and kind is not errors.StructureError
}
_OWN_ARGUMENTS = (errors.HttpStatusError, errors.ContextOverflowError, errors.OllamaResponseError)
"""Their `__init__` takes the attributes."""

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, paths as text, tuples as lists, enums as their values.

    Fields of dataclasses whose metadata have `sent` as False are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("sent", True)]
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [to_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def from_plain(hint: Any, data: Any, where: str = "it") -> Any:
    """The value of a type whose `to_plain` this is. Unknown fields of a newer version are ignored.

    Args:
        hint: a dataclass, an enum, `Path`, a simple type, or lists, tuples, mappings and unions of these.
        where: what the data are, for the error.

    Raises:
        ValueError: the data are not of this type.
    """
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any or hint is object:
        return data
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            try:
                return from_plain(argument, data, where)
            except ValueError:
                continue
        raise ValueError(f"{where} is of another type")
    if hint in (None, type(None)):
        return _checked(data is None, data, where)
    if hint is float:
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        try:
            return float(_checked(is_number, data, where))
        except OverflowError:
            raise ValueError(f"{where} is too large") from None
    if hint in (str, int, bool):
        return _checked(isinstance(data, hint) and (hint is bool or not isinstance(data, bool)), data, where)
    if hint is Path:
        return Path(_checked(isinstance(data, str), data, where))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(data)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _checked(isinstance(data, dict), data, where)
        try:
            return hint(
                **{
                    name: from_plain(kind, data[name], f"{where}.{name}")
                    for name, kind in _fields(hint).items()
                    if name in data
                }
            )
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _checked(isinstance(data, dict), data, where)
        kind = arguments[1] if arguments else Any
        return {name: from_plain(kind, item, f"{where}.{name}") for name, item in data.items()}
    _checked(isinstance(data, list), data, where)
    if origin is tuple and arguments[-1:] != (...,):
        _checked(len(data) == len(arguments), data, where)
        return tuple(from_plain(kind, item, where) for kind, item in zip(arguments, data, strict=True))
    items = [from_plain(arguments[0] if arguments else Any, item, where) for item in data]
    return tuple(items) if origin is tuple else items


def _checked(is_right: bool, data: Any, where: str) -> Any:
    if not is_right:
        raise ValueError(f"{where} is of another type")
    return data


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.init and field.metadata.get("sent", True)
    }


def error_data(error: Exception) -> dict[str, Any]:
    """An error of this package as plain data: its class, its message, and what else it says."""
    kind = next(kind for kind in type(error).__mro__ if kind.__name__ in _CLASSES)
    names: Mapping[str, Any] = next((hints for cls, hints in _ATTRIBUTES.items() if isinstance(error, cls)), {})
    return {
        "class": kind.__name__,
        "message": str(error),
        "attributes": {name: getattr(error, name) for name in names},
    }


def error_of(data: Mapping[str, Any]) -> SollolError:
    """The error whose `error_data` this is; a `GatewayError` where its class is not known here."""
    kind = _CLASSES.get(str(data.get("class")), GatewayError)
    message = one_line(str(data.get("message", "")), LONGEST_MESSAGE_CHARS) or "the gateway gave no reason"
    given = data.get("attributes")
    hints: Mapping[str, Any] = next((hints for cls, hints in _ATTRIBUTES.items() if issubclass(kind, cls)), {})
    said = given if isinstance(given, Mapping) else {}
    try:
        attributes = {name: from_plain(hint, said[name], name) for name, hint in hints.items() if name in said}
        if issubclass(kind, _OWN_ARGUMENTS):
            return kind(message, **attributes)
        error = kind(message)
    except (TypeError, ValueError):
        return GatewayError(message)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error
