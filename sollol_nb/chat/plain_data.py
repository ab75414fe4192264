"""Values as plain data for JSON, copied and checked; what cannot be sent is named. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import is_number, shown

MAX_DEPTH = 64
"""How deep lists and dicts may be nested; the parsers of the engines have limits of their own."""
_MAX_DIGITS_BITS = 64
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


def plain_data(value: Any, where: str, *, depth: int = 0) -> Any:
    """A copy of the value made of dicts, lists, texts, finite numbers, True, False and None.

    Args:
        where: where the value is, for the message, such as `messages[0]`.

    Raises:
        ConfigError: it contains something else, a number that JSON does not have, or text that is not Unicode.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where} is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, str):
        return checked_text(value, where)
    if value is None or isinstance(value, bool):
        return value
    if is_number(value):
        return _checked_number(value, where)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{where} has the key {shown(name)}, but keys must be text")
            checked_text(name, where)
        return {name: plain_data(item, f"{where}[{name!r}]", depth=depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{where}[{at}]", depth=depth + 1) for at, item in enumerate(value)]
    raise ConfigError(
        f"{where} is of type {type(value).__name__}, which JSON does not have; convert it to text, a number, "
        "a list or a dict"
    )


def checked_text(text: str, where: str) -> str:
    """The text, if it is Unicode.

    Raises:
        ConfigError: it contains half of a surrogate pair: bytes that were not UTF-8 when they were read.
    """
    half = None if text.isascii() else _HALF_OF_A_PAIR.search(text)
    if half is not None:
        raise ConfigError(
            f"{where} contains {half[0]!r} at position {half.start()}, which is not a character; read the text "
            'with the right encoding, or drop such characters: text.encode("utf-8", "ignore").decode()'
        )
    return text


def _checked_number(value: int | float, where: str) -> int | float:
    if isinstance(value, int):
        if value.bit_length() > _MAX_DIGITS_BITS:
            raise ConfigError(f"{where} is a number of more than {_MAX_DIGITS_BITS} bits; write it as text")
    elif not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}, which JSON does not have; use a finite number, or None")
    return value
