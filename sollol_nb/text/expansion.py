"""`{{ expression }}` in a text is replaced by its value, as text that a model can read.

The expressions are Jinja's, over the variables given and Python's built-in functions. Only double braces mean
something: single ones (JSON, code), `{% %}` and `{# #}` stay as they are, and so does `}}` without an opening
before it. `{{ '{{' }}` gives two braces. What a value brings in is not expanded again. The expressions are the
user's own code in the user's own process, so nothing is sandboxed.

The text is taken apart by Jinja's own lexer, which knows that the braces of `{{ {"a": {"b": 1}} }}` belong
together; each expression is then compiled and run by itself, so that an error can name it.
"""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError
from sollol_nb.text.readable import readable
from sollol_nb.text.tables import shortened

if TYPE_CHECKING:
    from jinja2 import Environment

_PYTHONS = {name: value for name, value in vars(builtins).items() if name[0] != "_"} | {"readable": readable}
"""What expressions may name besides variables."""
_NEVER = "\0never in a text {}\0"  # stands where Jinja wants delimiters that nobody is to use


def expand(text: str, namespace: Mapping[str, object], *, way_out: str = "") -> str:
    """The text with each `{{ expression }}` replaced by its value (see `sollol_nb.text.readable`).

    Text without one is given back as it is; in others line ends become `\\n`.

    Args:
        namespace: the variables; names that it lacks are looked for among Python's built-in functions, and
            `readable` is one of these: `{{ readable(df, limit_chars=50_000) }}`.
        way_out: said at the end of each error: how to have braces left alone.

    Raises:
        ConfigError: in one line, an expression that is not closed or not one, a variable that does not exist (with
            the nearest that does), or what went wrong inside an expression.
    """
    return Template(text, way_out=way_out).fill(namespace)


class Template:
    """A text with expressions, compiled once to be filled many times.

    Args and errors are those of `expand`.
    """

    def __init__(self, text: str, *, way_out: str = "") -> None:
        self._way_out = f"; {way_out}" if way_out else ""
        self._parts: list[str | _Expression] = [text]
        if "{{" in text:
            parts = list(self._taken_apart(text))  # nothing is compiled if a later expression is not closed
            self._parts = [part if is_text else self._compiled(part, place) for is_text, part, place in parts]

    def fill(self, namespace: Mapping[str, object]) -> str:
        """The text with the values of its expressions."""
        return "".join(
            part if isinstance(part, str) else part.value(namespace, self._way_out) for part in self._parts
        )

    def _taken_apart(self, text: str) -> Iterator[tuple[bool, str, str]]:
        """(is it text, text or expression, where) of each part in order."""
        from jinja2 import TemplateSyntaxError

        position, place, expression = 0, "", ""
        inside = False
        source = text.replace("\r\n", "\n").replace("\r", "\n")  # as the lexer does
        try:
            for _, kind, token in _environment().lexer.tokeniter(source, None):
                if kind == "variable_begin":
                    at = source.index("{{", position)
                    place = f"line {source.count(chr(10), 0, at) + 1}, column {at - source.rfind(chr(10), 0, at)}"
                    inside, expression = True, ""
                elif kind == "variable_end":
                    inside = False
                    yield False, expression, place
                elif inside:
                    expression += token
                else:
                    yield True, token, ""
                position += len(token)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{{{{ at {place}: {error.message}{self._way_out}") from None
        if inside:
            raise ConfigError(f"{{{{ at {place} is never closed by }}}}{self._way_out}")

    def _compiled(self, expression: str, place: str) -> _Expression:
        from jinja2 import TemplateSyntaxError

        try:
            return _Expression(expression)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{_shown(expression)} at {place}: {error.message} (put what is more than a Jinja expression into "
                f"a variable){self._way_out}"
            ) from None
        except RecursionError:
            raise ConfigError(f"{_shown(expression)} at {place}: it is too long{self._way_out}") from None


class _Expression:
    """One compiled expression. Raises jinja2.TemplateSyntaxError if it is none."""

    def __init__(self, source: str) -> None:
        from jinja2 import meta

        environment = _environment()
        self._source = source
        self._names = meta.find_undeclared_variables(environment.parse(f"{{{{ {source} }}}}"))
        # Only those of Python that it names: Jinja copies them at each run.
        self._pythons = {name: _PYTHONS[name] for name in self._names if name in _PYTHONS}
        self._compute: Callable[[dict[str, object]], Any] = environment.compile_expression(
            source, undefined_to_none=False
        )

    def value(self, namespace: Mapping[str, object], way_out: str) -> str:
        """Its value as text. Raises ConfigError, which ends with `way_out`."""
        from jinja2 import Undefined, UndefinedError

        shown = _shown(self._source)
        try:
            value = self._compute({**self._pythons, **namespace})
            if isinstance(value, Undefined):
                str(value)  # raises UndefinedError
            name = self._source.strip()
            if callable(value) and name in self._pythons and name not in namespace:
                raise ConfigError(
                    f"{shown}: there is no such variable, only Python's own function"
                    f"{_near_words(name, namespace)}{way_out}"
                )
            return readable(value)
        except ConfigError:
            raise
        except UndefinedError as error:
            raise ConfigError(f"{shown}: {self._undefined_words(namespace, error)}{way_out}") from None
        except Exception as error:  # the user's own code can raise anything
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{shown}: {shortened(words, 300)}") from error

    def _undefined_words(self, namespace: Mapping[str, object], error: Exception) -> str:
        """Which variable does not exist, and which was perhaps meant; else which attribute or item."""
        missing = sorted(self._names - set(namespace) - set(self._pythons))
        if not missing:
            return str(error).replace("has no attribute", "has no attribute or item")
        return f"there is no variable {missing[0]}{_near_words(missing[0], namespace)}"


def _shown(expression: str) -> str:
    return f"{{{{ {shortened(' '.join(expression.split()), 60)} }}}}"


def _near_words(name: str, namespace: Mapping[str, object]) -> str:
    known = [one for one in namespace if isinstance(one, str) and not one.startswith("_")]
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


@cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(  # noqa: S701  (the text is for a model, not for a page)
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        block_start_string=_NEVER.format(1),
        block_end_string=_NEVER.format(2),
        comment_start_string=_NEVER.format(3),
        comment_end_string=_NEVER.format(4),
    )
    environment.globals.clear()
    return environment
