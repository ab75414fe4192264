"""Replaces each `{{ expression }}` in a text by its value, as text that a model can read.

The expressions are Jinja's, with the given variables and Python's built-in functions. Only double braces have a
meaning: single braces (JSON, code), `{% %}` and `{# #}` stay unchanged, as does `}}` without an opening before
it. `{{ '{{' }}` yields two braces. Braces in a value are not expanded again. The expressions are the user's own
code in the user's own process, so nothing is sandboxed.

Jinja's lexer splits the text, since it knows that the braces of `{{ {"a": {"b": 1}} }}` belong together. Each
expression is then compiled and run separately, so that an error can name it.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError
from sollol_nb.text.insertions import Insertions
from sollol_nb.text.nearest import nearest, nearest_variable
from sollol_nb.text.readable import GivenText, readable
from sollol_nb.text.tables import shortened

if TYPE_CHECKING:
    from jinja2 import Environment


def _given(value: object, *, limit_chars: int | None = None) -> GivenText:
    return GivenText(readable(value, limit_chars=limit_chars))


_BUILTINS = {name: value for name, value in vars(builtins).items() if name[0] != "_"} | {"readable": _given}
"""The names that expressions may use besides variables."""
BUILTIN_NAMES = tuple(_BUILTINS)
_PATH = re.compile(r"\s*\w+(?:\.\w+|\[[^\[\]()]*\])*\s*")
_SELF = "_sollol_self"
"""The name of the variable `self` in compiled expressions: in Jinja `self` is always the template."""
_NEVER = "\0never in a text {}\0"  # for Jinja's delimiters that must not occur in a text


def expand(
    text: str, namespace: Mapping[str, object], *, hint: str = "", insertions: Insertions | None = None
) -> str:
    """The text with each `{{ expression }}` replaced by its value (see `sollol_nb.text.readable`).

    A text without expressions is returned unchanged; in others line ends become `\\n`.

    Args:
        insertions: get the images, whose marks the text then has; without them, images are described.
        namespace: the variables. Other names are looked up among Python's built-in functions, to which `readable`
            is added: `{{ readable(df, limit_chars=50_000) }}`.
        hint: added to each error line: how to send braces unchanged.

    Raises:
        ConfigError: an expression is not closed or invalid, names an unknown variable (the message suggests the
            nearest one), or failed.
    """
    return Template(text, hint=hint).fill(namespace, insertions=insertions)


def filter_names() -> list[str]:
    """The names of Jinja's filters."""
    return list(_environment().filters)


class Template:
    """A text with expressions, compiled once and filled many times.

    Arguments and errors are those of `expand`.
    """

    def __init__(self, text: str, *, hint: str = "") -> None:
        self._hint = f"; {hint}" if hint else ""
        self._parts: list[str | _Expression] = [text]
        if "{{" in text:
            parts = list(self._split(text))  # all of it: nothing is compiled if a later one is not closed
            self._parts = [part if is_text else self._compiled(part, where) for is_text, part, where in parts]

    def fill(
        self,
        namespace: Mapping[str, object],
        check: Callable[[Any, bool], object] | None = None,
        insertions: Insertions | None = None,
    ) -> str:
        """The text with the values of its expressions.

        Args:
            insertions: as for `expand`.
            check: called with each value, and whether its expression is only a name or a path, as in
                {{ row.text }}. What it raises is raised.
        """
        return "".join(
            part if isinstance(part, str) else part.value(namespace, self._hint, check, insertions)
            for part in self._parts
        )

    def _split(self, text: str) -> Iterator[tuple[bool, str, str]]:
        """(whether it is text, the text or expression, its position) of each part, in order."""
        from jinja2 import TemplateSyntaxError

        position, where, expression = 0, "", ""
        inside = False
        source = text.replace("\r\n", "\n").replace("\r", "\n")  # as Jinja's lexer does
        try:
            for _, kind, token in _environment().lexer.tokeniter(source, None):
                if kind == "variable_begin":
                    at = source.index("{{", position)
                    where = f"line {source.count(chr(10), 0, at) + 1}, column {at - source.rfind(chr(10), 0, at)}"
                    inside, expression = True, ""
                elif kind == "variable_end":
                    inside = False
                    yield False, expression, where
                elif inside:
                    expression += token
                else:
                    yield True, token, ""
                position += len(token)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{{{{ at {where}: {error.message}{self._hint}") from None
        if inside:
            raise ConfigError(f"{{{{ at {where} is never closed by }}}}{self._hint}")

    def _compiled(self, expression: str, where: str) -> _Expression:
        from jinja2 import TemplateSyntaxError

        try:
            return _Expression(expression)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{_shown(expression)} at {where}: {error.message} (only Jinja expressions work here; put other "
                f"code into a variable){self._hint}"
            ) from None
        except RecursionError:
            raise ConfigError(f"{_shown(expression)} at {where}: the expression is too long{self._hint}") from None


class _Expression:
    """One compiled expression. Raises jinja2.TemplateSyntaxError if it is invalid."""

    def __init__(self, source: str) -> None:
        from jinja2 import meta

        environment = _environment()
        self._source = source
        names = meta.find_undeclared_variables(environment.parse(f"{{{{ {source} }}}}"))
        self._names = {"self" if name == _SELF else name for name in names}
        # Only the built-in names that it uses: Jinja copies them at each run.
        self._builtins = {name: _BUILTINS[name] for name in self._names if name in _BUILTINS}
        self._compute: Callable[[dict[str, object]], Any] = environment.compile_expression(
            source, undefined_to_none=False
        )

    def value(
        self,
        namespace: Mapping[str, object],
        hint: str,
        check: Callable[[Any, bool], object] | None,
        insertions: Insertions | None,
    ) -> str:
        """Its value as text. Raises ConfigError, which ends with `hint`."""
        from jinja2 import Undefined, UndefinedError

        shown = _shown(self._source)
        try:
            own_self = {_SELF: namespace["self"]} if "self" in namespace else {}
            value = self._compute({**self._builtins, **namespace, **own_self})
            if isinstance(value, Undefined):
                missing = _describe_missing(value)
                if missing:
                    raise ConfigError(f"{shown}: {missing}{hint}")
                str(value)  # raises UndefinedError
            name = self._source.strip()
            if callable(value) and name in self._builtins and name not in namespace:
                raise ConfigError(
                    f"{shown}: this is Python's built-in function, not a variable"
                    f"{_describe_near(name, namespace)}{hint}"
                )
            hint_of_value = _cannot_insert(value, name)
            if hint_of_value:
                raise ConfigError(f"{shown}: {hint_of_value}")
            text = readable(value) if insertions is None else insertions.text_of(value, name)
        except ConfigError:
            raise
        except UndefinedError as error:
            raise ConfigError(f"{shown}: {self._describe_undefined(namespace, error)}{hint}") from None
        except Exception as error:  # the user's own code can raise anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{shown}: {shortened(message, 300)}") from error
        if check is not None:
            check(value, _PATH.fullmatch(self._source) is not None)
        return text

    def _describe_undefined(self, namespace: Mapping[str, object], error: Exception) -> str:
        """Which variable does not exist, and which was perhaps meant; otherwise which attribute or item."""
        missing = sorted(self._names - set(namespace) - set(self._builtins))
        if not missing:
            return str(error).replace("has no attribute", "has no attribute or item")
        return f"there is no variable {missing[0]}{_describe_near(missing[0], namespace)}"


def _shown(expression: str) -> str:
    return f"{{{{ {shortened(' '.join(expression.split()), 60)} }}}}"


def _describe_missing(undefined: Any) -> str:
    """Which attribute or item a value does not have, and which was perhaps meant; "" if no near one is known."""
    owner, name = undefined._undefined_obj, undefined._undefined_name
    if not isinstance(name, str) or type(owner).__name__ == "MissingType":
        return ""
    names = set[str]()
    with suppress(Exception):  # the object's own code can raise anything
        names.update(each for each in dir(owner) if each[:1] != "_")
        names.update(key for key in (owner if isinstance(owner, Mapping) else ()) if isinstance(key, str))
    near = nearest(name, names)
    return f"{type(owner).__name__} has no attribute or item {name!r} (did you mean {near}?)" if near else ""


def _cannot_insert(value: Any, source: str) -> str:
    """Why a value cannot be inserted, and what to write; "" if it can."""
    if isinstance(value, GeneratorType):
        return f"this is a generator, not its values; write {{{{ {source} | list }}}}"
    if isinstance(value, CoroutineType):
        value.close()  # it will never be awaited; Python would warn
        return "this is a coroutine, not its result; await it in another cell, and insert what it returns"
    return ""


def _describe_near(name: str, namespace: Mapping[str, object]) -> str:
    near = nearest_variable(name, namespace)
    return f" (did you mean {near}?)" if near else ""


@cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined
    from jinja2.ext import Extension
    from jinja2.lexer import Token, TokenStream

    class PlainSelf(Extension):
        """Makes `self` a variable as any other."""

        def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
            before = ""
            for token in stream:
                is_self = token.type == "name" and token.value == "self" and before != "dot"
                yield Token(token.lineno, "name", _SELF) if is_self else token
                before = token.type

    environment = Environment(  # noqa: S701  (the text is for a model, not for a page)
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        block_start_string=_NEVER.format(1),
        block_end_string=_NEVER.format(2),
        comment_start_string=_NEVER.format(3),
        comment_end_string=_NEVER.format(4),
        extensions=[PlainSelf],
    )
    environment.globals.clear()
    return environment
