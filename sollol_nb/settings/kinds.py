"""Kinds of settings: which values are valid, how a variable's text is read, and the error for an invalid value.

A kind checks a value from any source (a variable, a file, `%config`), and returns it in the one form that the rest
of the package uses. The names of the settings and their sources are in `table.py` and `config.py`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.runtime.amounts import is_number, is_whole_number, parse_duration, shown
from sollol_nb.runtime.priority import is_priority, priority_named
from sollol_nb.settings.endpoints import gateway_url, worker_target

TYPING = "typing"
"""A value of the setting `preload`."""
LOCAL = "local"
"""Instead of the address of a gateway: own engines."""
CENTURY_S = 100 * 365 * 86400.0
"""What is kept as long stays for ever; clocks and Ollama's durations end somewhere after it."""
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value.

    Attributes:
        description: what a valid value is; it completes "must be ...".
        check: the value in its one form. It raises ValueError or TypeError for an invalid value, or ConfigError
            where its own message is better than `description`.
        from_text: a variable's text as a value to check; text that cannot be read is returned unchanged.
        anchor: makes a relative path in a checked value relative to the folder of the file that names it.
    """

    description: str
    check: Callable[[Any], Any]
    from_text: Callable[[str], Any] = str
    anchor: Callable[[Any, Path], Any] = lambda value, folder: value

    def checked(self, value: object, label: str) -> Any:
        """The value in its one form. `label` says in the error where the value is written.

        Raises:
            ConfigError: it is not of this kind.
        """
        try:
            return self.check(value)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(f"{label}={shown(value)} must be {self.description}") from None


def text(description: str) -> Kind:
    """A text that is not blank."""
    return Kind(description, _text)


def number(description: str, *, least: float = 0, above: bool = False, most: float = float("inf")) -> Kind:
    """A finite number from `least` (more than it if `above`) to `most`."""

    def check(value: Any) -> float:
        if not is_number(value):
            raise TypeError
        # A huge int, which no float can hold, is refused by `isfinite` itself.
        if not isfinite(value) or not (least < value if above else least <= value) or value > most:
            raise ValueError
        return value

    return Kind(description, check, _number_from_text)


def whole_number(description: str, *, least: int) -> Kind:
    """A whole number from `least` up to the largest of 64 bits."""

    def check(value: Any) -> int:
        if not is_whole_number(value):
            raise TypeError
        if not least <= value < 2**63:
            raise ValueError
        return value

    return Kind(description, check, _number_from_text)


def one_of(*names: str) -> Kind:
    """One of these names."""

    def check(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind(f"one of {', '.join(names)}", check)


def keep_alive_seconds(value: object) -> float | None:
    """Seconds of a keep_alive in Ollama's form: `300`, `"10m"`, `"1h30m"`; 0 ends an engine right after its
    request. Negative numbers, `"forever"` and a century or more give None: no end.

    Raises:
        ConfigError: it has another form.
    """
    seconds: float | None = None
    if is_number(value):
        with contextlib.suppress(OverflowError):
            seconds = float(value)
    elif isinstance(value, str):
        text = value.strip().lower()
        if text in ("forever", "inf"):
            return None
        if text.split() == [text] and "," not in text:  # Ollama does not accept spaces within
            seconds = parse_duration(text.removeprefix("-"))
        if seconds is not None:
            seconds = -seconds if text.startswith("-") else seconds
        else:
            with contextlib.suppress(ValueError):
                seconds = float(text)
    if seconds is None or seconds != seconds:
        raise ConfigError(f'keep_alive={shown(value)} is not a time; use seconds, "10m", 0, or "forever"')
    return seconds if 0 <= seconds < CENTURY_S else None


def _port(value: Any) -> int:
    if not is_whole_number(value):
        raise TypeError
    if not 0 <= value < 65536:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise ValueError
    return value


def _number_from_text(text: str) -> int | float | str:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _yes_or_no_from_text(text: str) -> bool | str:
    word = text.lower()
    return word in _YES if word in _YES + _NO else text


def _priority(value: Any) -> int:
    priority = priority_named(value) if isinstance(value, str) else value
    if not is_priority(priority):
        raise ValueError
    return int(priority)


def _keep_alive(value: Any) -> Any:
    """The value unchanged: users see what they set."""
    by_model = isinstance(value, Mapping)
    for model, duration in value.items() if by_model else [("*", value)]:
        _text(model)
        try:
            keep_alive_seconds(duration)
        except ConfigError:
            raise ValueError from None
    return dict(value) if by_model else value


def _strategy(value: Any) -> str:
    if value not in STRATEGIES:
        raise ConfigError(f"{value!r} is not a layer strategy; use one of {', '.join(STRATEGIES)}")
    return str(value)


def checked_gateway(value: str | None) -> str | None:
    """The URL of a gateway; None for `local` and for None: own engines.

    Raises:
        ConfigError: it is neither an address nor `local`.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() == LOCAL):
        return None
    if not isinstance(value, str):
        raise ConfigError(f"gateway={shown(value)} must be the address of a gateway, or {LOCAL}")
    return gateway_url(value)


class Secret(str):
    """A text that is not shown by `repr`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "(hidden)"


def _secret(value: Any) -> Secret:
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ConfigError("the key must be a text, as `sollol-nb key add` prints it")  # without what it is
    if not text.isascii() or not text.isprintable():
        raise ConfigError("the key contains characters that no key has; copy it again")
    return Secret(text)


def entries(value: Any) -> list[str]:
    """The entries of a list, or of a text separated by commas."""
    if isinstance(value, str):
        return [entry.strip() for entry in value.split(",") if entry.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise TypeError
    return [entry.strip() for entry in value]


def _workers(value: Any) -> list[str]:
    return [worker_target(entry) for entry in entries(value)]


def _ollama_hosts(value: Any) -> list[str]:
    # Ollama ignores quotes around the value of its variable.
    hosts = [host for host in (_text(entry).strip("\"' ") for entry in entries(value)) if host]
    if any("@" in host for host in hosts):
        raise ConfigError("the URL of an Ollama node must not contain a password, since logs would show it")
    return hosts


def split_command(text: str, *, is_windows: bool = os.name == "nt") -> list[str]:
    """A program and its options, split as a shell does; on Windows a backslash separates folders.

    Raises:
        ValueError: a quotation mark is missing.
    """
    return shlex.split(text.replace("\\", "\\\\") if is_windows else text)


def _command(value: Any) -> str:
    if not split_command(_text(value)):
        raise ValueError
    return str(value)


def _folder(value: Any) -> Path:
    if not isinstance(value, Path):
        value = Path(_text(value))
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        value = value.expanduser()
    assert isinstance(value, Path)
    return value


def _anchored_model(model: str, folder: Path) -> str:
    return str(folder / _folder(model)) if model.lower().endswith(".gguf") else model


YES_OR_NO = Kind("true or false (1 or 0 in a variable)", _yes_or_no, _yes_or_no_from_text)
PRELOAD = Kind(
    f'true, false (1 or 0 in a variable) or "{TYPING}"',
    lambda value: value if value == TYPING else _yes_or_no(value),
    _yes_or_no_from_text,
)
PRIORITY = Kind("a number from 1 (batch) to 10 (critical), or a name such as high", _priority, _number_from_text)
KEEP_ALIVE = Kind('a time (seconds, "10m", 0, or "forever"), or a dict of these by model', _keep_alive)
STRATEGY = Kind("the name of a layer strategy", _strategy)
WORKERS = Kind("a list of host:port or ssh://host", _workers)
OLLAMA_HOSTS = Kind("a list of host:port or URLs", _ollama_hosts)
COMMAND = Kind("a program with its options, such as ssh -F config", _command)
FOLDERS = Kind(
    "a list of folders",
    lambda value: [_folder(entry) for entry in ([value] if isinstance(value, Path) else entries(value))],
    anchor=lambda paths, folder: [folder / path for path in paths],
)
FOLDER = Kind("the path of a folder", _folder, anchor=lambda path, folder: folder / path)
TEMPERATURE = number("a number of 0 or more, such as 0.7")
TOP_P = number("a number above 0, at most 1, such as 0.9", above=True, most=1)
MAX_TOKENS = whole_number("a whole number of 1 or more, such as 512", least=1)
SEED = whole_number("a whole number of 0 or more, such as 42", least=0)
SYSTEM = text("a text")
PORT = Kind("a port from 1 to 65535, or 0 for any free one", _port, _number_from_text)
MODEL = Kind("a model's name, such as llama3.1:70b", _text, anchor=_anchored_model)
GATEWAY = Kind(
    f"the address of a gateway, such as http://head:11440, or {LOCAL}",
    lambda value: checked_gateway(_text(value)) or LOCAL,
)
SECRET = Kind("a key, as `sollol-nb key add` prints it", _secret)
