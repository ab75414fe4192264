"""Tab completion inside `{{ }}`: variables, attributes, keys and columns, and Jinja's filters.

IPython completes Python, and a prompt is none: after an apostrophe in it, all that follows is the inside of a
text. So only the expression at the cursor is looked at here. No code of a value runs for it, except for the names
that it offers itself: values are read as far as IPython's own guarded evaluation reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from IPython.core.guarded_eval import EvaluationContext, guarded_eval

from sollol_nb.text.expansion import BUILTIN_NAMES, filter_names
from sollol_nb.text.readable_frames import is_instance_of

MOST_KEYS = 10_000
"""Of a dict or an index; completing more would take long."""
_PATH = r"[A-Za-z_]\w*(?:\.\w+|\[[^\[\]]*\])*"
_FILTER = re.compile(r"\|\s*(\w*)$")
_KEY = re.compile(rf"({_PATH})\[\s*((['\"])[^'\"]*)$")
_ATTRIBUTE = re.compile(rf"({_PATH})\.(\w*)$")
_NAME = re.compile(r"(?<![\w.\"'])([A-Za-z_]\w*)?$")
_STEP = re.compile(r"\.\w+|\[[^\[\]]*\]")


@dataclass(frozen=True, slots=True)
class Offer:
    """Completions for the end of a text.

    Attributes:
        fragment: the end that they replace.
        texts: what may stand there.
    """

    fragment: str
    texts: tuple[str, ...]


def open_expression(text: str) -> str | None:
    """The expression that is open at the end of a text; None outside of `{{ }}`."""
    _, braces, expression = text.rpartition("{{")
    return expression if braces and "}}" not in expression else None


def offers(expression: str, namespace: Mapping[str, Any]) -> Offer | None:
    """What may stand at the end of an unfinished expression; None where that is not known."""
    if match := _FILTER.search(expression):
        return _offer(match[1], filter_names())
    if match := _KEY.search(expression):
        quote = match[3]
        return _offer(match[2], [f"{quote}{key}{quote}" for key in _keys(_value(match[1], namespace))])
    if match := _ATTRIBUTE.search(expression):
        value = _value(match[1], namespace)
        keys = [key for key in _keys(value) if key.isidentifier()] if isinstance(value, Mapping) else []
        names: list[str] = []
        if value is not _UNKNOWN:
            with suppress(Exception):  # as for keys
                names = dir(value)
        return _offer(match[2], [*keys, *(name for name in names if match[2][:1] == "_" or name[0] != "_")])
    if match := _NAME.search(expression):
        fragment = match[1] or ""
        names = [name for name in namespace if fragment[:1] == "_" or name[:1] != "_"]
        return _offer(fragment, [*names, *BUILTIN_NAMES] if fragment else names)
    return None


def _offer(fragment: str, texts: Iterable[str]) -> Offer | None:
    matching = {text for text in texts if text.startswith(fragment)}
    in_order = sorted(matching, key=lambda text: (text.casefold(), text))
    return Offer(fragment, tuple(in_order)) if matching else None


_UNKNOWN = object()


def _value(path: str, namespace: Mapping[str, Any]) -> Any:
    """The value of a path such as `a.b['c']`; `_UNKNOWN` if reading it would run code, or fails."""
    name = re.split(r"[.\[]", path, maxsplit=1)[0]
    value = namespace.get(name, _UNKNOWN)
    for step in _STEP.findall(path[len(name) :]):
        if value is _UNKNOWN:
            return value
        if step[0] == "." and isinstance(value, dict) and step[1:] in value:  # as Jinja reads it
            value = value[step[1:]]
            continue
        found = _UNKNOWN
        with suppress(Exception):  # what IPython does not evaluate, it refuses in many ways
            context = EvaluationContext(globals={}, locals={"value": value}, evaluation="limited")
            found = guarded_eval(f"value{step}", context)
        value = found
    return value


def _keys(value: Any) -> list[str]:
    """The texts that the value takes as keys."""
    with suppress(Exception):  # the object's own code can raise anything
        own = getattr(type(value), "_ipython_key_completions_", None)
        if callable(own):
            keys: Iterable[Any] = own(value)
        elif isinstance(value, dict) or is_instance_of(value, "pandas.DataFrame", "pandas.Series"):
            keys = islice(value.keys(), MOST_KEYS)
        else:
            keys = value.column_names if is_instance_of(value, "pyarrow.Table") else ()
        return [key for key in keys if isinstance(key, str)]
    return []
