"""Python functions as tools: what a model reads about them, and its calls, checked. Calls nothing.

A function's type hints become a JSON schema of its arguments, its docstring the descriptions. Arguments may be
dataclasses, pydantic models and all other types that a `schema` may have (see `schema/types.py`); the function
gets them as objects of these types.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from sollol_nb.chat.docstrings import described
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown
from sollol_nb.schema.checks import SchemaMismatch
from sollol_nb.schema.types import built, schema_of_arguments
from sollol_nb.text.tables import shortened

_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")
_FROM_DEFAULT = (bool, int, float, str)
"""Where an argument has no hint, its type is that of its default, if it is one of these."""
DESCRIPTION_CHARS = 2000


class CallRefused(Exception):
    """A call that cannot be made as the model wrote it; the message is for the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function that a model may call.

    Attributes:
        name: as the model knows it.
        description: from its docstring.
        parameters: the JSON schema of its arguments.
        function: it is called with arguments that match.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    _signature: inspect.Signature
    _hints: Mapping[str, Any]

    @classmethod
    def of(cls, function: Any) -> Tool:
        """The tool that a function is.

        Raises:
            ConfigError: no model could call it; the message says what to change.
        """
        name = _name_of(function)
        whole = function.func if isinstance(function, functools.partial) else function
        plain = whole if inspect.isroutine(whole) else type(whole).__call__
        if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
            raise ConfigError(f"the tool {name} yields values; let it return them, as a list for example")
        try:
            signature = _open_signature(function)
        except (TypeError, ValueError):
            raise ConfigError(f"the tool {name} has no signature; wrap it in a function with type hints") from None
        try:
            found = typing.get_type_hints(plain, include_extras=True)
        except Exception as error:  # annotations are code
            raise ConfigError(f"the tool {name} has a type hint that cannot be found: {error}") from None
        text, about = described(inspect.getdoc(whole))
        hints = {argument: _hint(name, parameter, found) for argument, parameter in signature.parameters.items()}
        required = {argument: each.default is each.empty for argument, each in signature.parameters.items()}
        schema = schema_of_arguments(name, {argument: (hints[argument], required[argument]) for argument in hints})
        for argument, parameter in signature.parameters.items():
            description = _annotation(hints[argument]) or about.get(argument)
            if description:
                schema["properties"][argument]["description"] = shortened(description, DESCRIPTION_CHARS)
            default = parameter.default
            in_json = not isinstance(default, float) or math.isfinite(default)
            if isinstance(default, _FROM_DEFAULT) and in_json:
                schema["properties"][argument]["default"] = default
        return cls(name, shortened(text, DESCRIPTION_CHARS), schema, function, signature, hints)

    @property
    def spec(self) -> dict[str, Any]:
        """The tool as both backends take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def bound(self, arguments: Any) -> Callable[[], Any]:
        """The call with these arguments, which match.

        Args:
            arguments: of a model's call.

        Raises:
            CallRefused: they do not match.
        """
        if not isinstance(arguments, Mapping):
            raise CallRefused("the arguments are not a JSON object")
        known = self._signature.parameters
        unknown = [shortened(str(name), 60) for name in arguments if name not in known]
        if unknown:
            names = ", ".join(known) or "it takes none"
            raise CallRefused(f"unknown argument {unknown[0]} (arguments of {self.name}: {names})")
        missing = [name for name in self.parameters["required"] if name not in arguments]
        if missing:
            raise CallRefused(f"missing argument {missing[0]}")
        values, definitions = {}, {"$defs": self.parameters.get("$defs", {})}
        for name, given in arguments.items():
            try:
                values[name] = built(
                    self._hints[name], given, {**self.parameters["properties"][name], **definitions}
                )
            except SchemaMismatch as mismatch:
                raise CallRefused(f"argument {name}: {mismatch.reason}") from None
        positional = [name for name, parameter in known.items() if parameter.kind is parameter.POSITIONAL_ONLY]
        while positional and positional[-1] not in values:
            positional.pop()
        by_position = [values.pop(name) if name in values else known[name].default for name in positional]
        return functools.partial(self.function, *by_position, **values)


class Toolbox:
    """The functions that a model may call in one answer, by name."""

    def __init__(self, functions: Sequence[Any]) -> None:
        """Raises ConfigError: one of them cannot be a tool, or two have the same name."""
        self._tools: dict[str, Tool] = {}
        for position, function in enumerate(functions):
            if not callable(function):
                raise ConfigError(
                    f"tools[{position}] is {shown(function)}, not a function; give either Python functions or "
                    "dicts that describe functions, not both"
                )
            tool = Tool.of(function)
            if tool.name in self._tools:
                raise ConfigError(
                    f"two tools are named {tool.name}; give each function once, and each another name"
                )
            self._tools[tool.name] = tool

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The tools as both backends take them."""
        return [tool.spec for tool in self._tools.values()]

    def bound(self, name: str, arguments: Any) -> Callable[[], Any]:
        """A call of a model, ready to be made.

        Raises:
            CallRefused: there is no such function, or the arguments do not match.
        """
        if name not in self._tools:
            raise CallRefused(f"there is no function {shortened(name, 60)}; call one of: {', '.join(self._tools)}")
        if isinstance(arguments, str):
            raise CallRefused("the arguments are not valid JSON")
        return self._tools[name].bound(arguments)


def has_functions(tools: Any) -> bool:
    """Whether the option `tools` names Python functions."""
    return isinstance(tools, list | tuple) and any(map(callable, tools))


def _name_of(function: Any) -> str:
    whole = function.func if isinstance(function, functools.partial) else function
    name = getattr(whole, "__name__", None)
    if isinstance(whole, type) or not isinstance(name, str):
        raise ConfigError(f"{shown(function)} cannot be a tool; write a function that uses it")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"a function named {shortened(name, 80)} cannot be a tool; define it with def and a plain name"
        )
    return name


def _open_signature(function: Any) -> inspect.Signature:
    """The signature without what a partial function sets: a model neither sees nor changes that."""
    signature = inspect.signature(function)
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in fixed]
    return signature.replace(parameters=parameters)


def _hint(tool: str, parameter: inspect.Parameter, found: Mapping[str, Any]) -> Any:
    """The type of an argument."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigError(
            f"the tool {tool} takes {parameter}; a model needs its arguments by name, each with a type"
        )
    if parameter.name in found:
        return found[parameter.name]
    if isinstance(parameter.default, _FROM_DEFAULT):
        return type(parameter.default)
    raise ConfigError(
        f"argument {parameter.name} of the tool {tool} has no type hint; write for example {parameter.name}: str"
    )


def _annotation(hint: Any) -> str:
    """The description in `Annotated[type, "description"]`, or that of pydantic's `Field` there; "" without one."""
    if typing.get_origin(hint) is not Annotated:
        return ""
    for part in hint.__metadata__:
        description = part if isinstance(part, str) else getattr(part, "description", None)
        if isinstance(description, str):
            return description
    return ""
