"""Kinds of settings: which values are good, how a variable's text is read, and what a bad one is told.

A kind checks a value wherever it comes from (a variable, a file, `%config`), and gives it in the one form that the
rest of the package uses. It knows neither names nor places of settings; `settings.py` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.runtime.amounts import is_number, is_whole_number, parse_duration
from sollol_nb.runtime.priority import is_priority, priority_named
from sollol_nb.settings.endpoints import format_endpoint, parse_endpoint

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_LONGEST_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value.

    Attributes:
        words: what a good value is; it completes "must be ...".
        check: the value in its one form. It raises ValueError or TypeError for a bad one, or ConfigError where it
            has better words than `words`.
        from_text: a variable's text as a value to check; text that cannot be read is given on as it is.
        anchor: a relative path in a checked value, seen from the folder of the file that names it.
    """

    words: str
    check: Callable[[Any], Any]
    from_text: Callable[[str], Any] = str
    anchor: Callable[[Any, Path], Any] = lambda value, folder: value

    def checked(self, value: object, label: str) -> Any:
        """The value in its one form. `label` names its place in the error.

        Raises:
            ConfigError: it is not of this kind.
        """
        try:
            return self.check(value)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        except (ValueError, TypeError, OverflowError):
            shown = " ".join(repr(value).split())
            if len(shown) > _LONGEST_SHOWN_CHARS:
                shown = shown[: _LONGEST_SHOWN_CHARS - 1] + "…"
            raise ConfigError(f"{label}={shown} must be {self.words}") from None


def text(words: str) -> Kind:
    """A text that is not blank."""
    return Kind(words, _text)


def number(words: str, *, least: float = 0, above: bool = False, most: float = float("inf")) -> Kind:
    """A finite number from `least` (more than it if `above`) to `most`."""

    def check(value: Any) -> float:
        if not is_number(value):
            raise TypeError
        # Written so that NaN fails too.
        if not (least < value if above else least <= value) or not value <= most or value == float("inf"):
            raise ValueError
        return value

    return Kind(words, check, _number_from_text)


def whole_number(words: str, *, least: int) -> Kind:
    """A whole number from `least` up."""

    def check(value: Any) -> int:
        if not is_whole_number(value):
            raise TypeError
        if value < least:
            raise ValueError
        return value

    return Kind(words, check, _number_from_text)


def one_of(*names: str) -> Kind:
    """One of these names."""

    def check(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind(f"one of {', '.join(names)}", check)


def keep_alive_seconds(value: object) -> float | None:
    """Seconds of a keep_alive as Ollama writes it: `300`, `"10m"`, `"1h30m"`; 0 ends an engine right after its
    request. Negative numbers and `"forever"` give None: for ever.

    Raises:
        ConfigError: it is none of these.
    """
    seconds: float | None = None
    if is_number(value):
        with contextlib.suppress(OverflowError):
            seconds = float(value)
    elif isinstance(value, str):
        written = value.strip().lower()
        if written in ("forever", "inf"):
            return None
        if written.split() == [written] and "," not in written:  # Ollama takes no spaces within
            seconds = parse_duration(written.removeprefix("-"))
        if seconds is not None:
            seconds = -seconds if written.startswith("-") else seconds
        else:
            with contextlib.suppress(ValueError):
                seconds = float(written)
    if seconds is None or seconds != seconds:
        raise ConfigError(f'keep_alive={value!r} is no time; write seconds, "10m", 0, or "forever"')
    return None if seconds < 0 or seconds == float("inf") else seconds


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise ValueError
    return value


def _number_from_text(written: str) -> int | float | str:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(written)
    return written


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _yes_or_no_from_text(written: str) -> bool | str:
    word = written.lower()
    return word in _YES if word in _YES + _NO else written


def _priority(value: Any) -> int:
    priority = priority_named(value) if isinstance(value, str) else value
    if not is_priority(priority):
        raise ValueError
    return int(priority)


def _keep_alive(value: Any) -> Any:
    """The value as it was written: what is shown should be what was set."""
    by_model = isinstance(value, Mapping)
    for model, time in value.items() if by_model else [("*", value)]:
        _text(model)
        try:
            keep_alive_seconds(time)
        except ConfigError:
            raise ValueError from None
    return dict(value) if by_model else value


def _strategy(value: Any) -> str:
    if value not in STRATEGIES:
        raise ConfigError(f"{value!r} is no layer strategy; write one of {', '.join(STRATEGIES)}")
    return str(value)


def _entries(value: Any) -> list[str]:
    """The entries of a list, or of a text with commas."""
    if isinstance(value, str):
        return [entry.strip() for entry in value.split(",") if entry.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise TypeError
    return [entry.strip() for entry in value]


def _endpoints(value: Any) -> list[str]:
    return [format_endpoint(*parse_endpoint(entry)) for entry in _entries(value)]


def _ollama_hosts(value: Any) -> list[str]:
    entries = [_text(entry) for entry in _entries(value)]
    if any("@" in entry for entry in entries):
        raise ConfigError("the URL of an Ollama node must not carry a password; it would show in logs")
    return entries


def _folder(value: Any) -> Path:
    if not isinstance(value, Path):
        value = Path(_text(value))
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        value = value.expanduser()
    assert isinstance(value, Path)
    return value


def _anchored_model(model: str, folder: Path) -> str:
    return str(folder / _folder(model)) if model.endswith(".gguf") else model


YES_OR_NO = Kind("true or false (1 or 0 in a variable)", _yes_or_no, _yes_or_no_from_text)
PRIORITY = Kind("a number from 1 (batch) to 10 (critical), or a name such as high", _priority, _number_from_text)
KEEP_ALIVE = Kind('a time: seconds, "10m", 0, or "forever"; or such by model', _keep_alive)
STRATEGY = Kind("the name of a layer strategy", _strategy)
ENDPOINTS = Kind("a list of host:port", _endpoints)
OLLAMA_HOSTS = Kind("a list of host:port or URLs", _ollama_hosts)
FOLDER = Kind("the path of a folder", _folder, anchor=lambda path, folder: folder / path)
MODEL = Kind("a model's name, such as llama3.1:70b", _text, anchor=_anchored_model)
