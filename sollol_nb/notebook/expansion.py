"""`{{ expression }}` in a cell's text is replaced by its value, as text that a model can read.

The expressions are Jinja's, over the variables of the notebook and Python's built-in functions. Only double
braces mean something: single ones (JSON, code), `{% %}` and `{# #}` stay as they are, and so does `}}` without an
opening before it. `{{ '{{' }}` gives two braces. What a value brings in is not expanded again. The expressions are
the user's own code in the user's own kernel, so nothing is sandboxed.

The text is taken apart by Jinja's own lexer, which knows that the braces of `{{ {"a": {"b": 1}} }}` belong
together; each expression is then compiled and run by itself, so that an error can name it.
"""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from sollol_nb.errors import ConfigError
from sollol_nb.markdown_tables import shortened
from sollol_nb.readable import readable

if TYPE_CHECKING:
    from jinja2 import Environment

_SWITCH_OFF = "--no-expand sends braces as they are"
_NEVER = "\0never in a text {}\0"  # stands where Jinja wants delimiters that nobody is to use


def expand(text: str, namespace: Mapping[str, object]) -> str:
    """The text with each `{{ expression }}` replaced by its value (see `sollol_nb.readable`).

    Text without one is given back as it is; in others line ends become `\\n`.

    Args:
        namespace: the variables; names that it lacks are looked for among Python's built-in functions, and
            `readable` is one of these: `{{ readable(df, limit_chars=50_000) }}`.

    Raises:
        ConfigError: in one line, an expression that is not closed or not one, a variable that does not exist (with
            the nearest that does), or what went wrong inside an expression.
    """
    if "{{" not in text:
        return text
    return "".join(
        part if is_text else _value_of(part, namespace, place) for is_text, part, place in list(_parts(text))
    )


def _parts(text: str) -> Iterator[tuple[bool, str, str]]:
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
        raise ConfigError(f"{{{{ at {place}: {error.message}; {_SWITCH_OFF}") from None
    if inside:
        raise ConfigError(f"{{{{ at {place} is never closed by }}}}; {_SWITCH_OFF}")


def _value_of(expression: str, namespace: Mapping[str, object], place: str) -> str:
    from jinja2 import TemplateSyntaxError, Undefined, UndefinedError

    shown = f"{{{{ {shortened(' '.join(expression.split()), 60)} }}}}"
    try:
        compute = _environment().compile_expression(expression, undefined_to_none=False)
        value = compute(dict(namespace))
        if isinstance(value, Undefined):
            str(value)  # raises UndefinedError
        return readable(value)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{shown} at {place}: {error.message} (put what is more than a Jinja expression into a variable); "
            f"{_SWITCH_OFF}"
        ) from None
    except UndefinedError as error:
        raise ConfigError(f"{shown}: {_undefined_words(expression, namespace, error)}; {_SWITCH_OFF}") from None
    except Exception as error:  # the user's own code can raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{shown}: {shortened(words, 300)}") from error


def _undefined_words(expression: str, namespace: Mapping[str, object], error: Exception) -> str:
    """Which variable does not exist, and which was perhaps meant; else which attribute or item."""
    from jinja2 import meta

    environment = _environment()
    names = meta.find_undeclared_variables(environment.parse(f"{{{{ {expression} }}}}"))
    missing = sorted(names - set(namespace) - set(environment.globals))
    if not missing:
        return str(error).replace("has no attribute", "has no attribute or item")
    known = [name for name in namespace if isinstance(name, str) and not name.startswith("_")]
    near = difflib.get_close_matches(missing[0], known, 1)
    return f"there is no variable {missing[0]}" + (f" (did you mean {near[0]}?)" if near else "")


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
    environment.globals.update({name: value for name, value in vars(builtins).items() if name[0] != "_"})
    environment.globals["readable"] = readable
    return environment
