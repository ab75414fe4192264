"""Writing entries of `[models]` into `sollol_nb.toml`, without touching anything else in it.

A settings file is the user's own text, with comments, so it is not written anew: the lines of one entry are
replaced. The result is parsed before it is saved. Where it does not say exactly what it should (an unusual layout
of the file), nothing is saved, and the error has the line to write by hand.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError

SECTION = "models"
LOCK_TIMEOUT_S = 10.0
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"\s*\[[^\[]")


def save_entry(path: Path, model: str, changes: Mapping[str, Any], *, lock: Path) -> None:
    """Change the entry of a model in a settings file; other keys of it stay. The file is created if need be.

    Args:
        changes: by the keys of `models.KEYS`, with values in their one form.
        lock: a file that keeps two processes from writing at the same time.

    Raises:
        ConfigError: the file is not TOML, cannot be written, or has a layout in which the entry cannot be changed.
    """

    def changed(entry: Any) -> dict[str, Any]:
        before = {"gguf": entry} if isinstance(entry, str) else dict(entry or {})
        return before | {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}

    _rewrite(path, model, changed, lock)


def remove_entry(path: Path, model: str, *, lock: Path) -> None:
    """Remove the entry of a model from a settings file. Errors are those of `save_entry`."""
    _rewrite(path, model, lambda entry: None, lock)


def _rewrite(path: Path, model: str, change: Any, lock: Path) -> None:
    from filelock import FileLock, Timeout  # here, so that `%load_ext` is quick

    path = Path(os.path.realpath(path))  # a link to a file elsewhere stays a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            text = _read(path)
            wanted = _parsed(path, text)
            entries = copy.deepcopy(wanted.get(SECTION, {}))
            entry = change(entries.get(model))
            line = None if entry is None else f"{_key(model)} = {_inline_table(entry)}"
            entries.pop(model, None)
            wanted[SECTION] = entries if entry is None else entries | {model: entry}
            new = _with_line(text, model, line)
            if not _says(new, wanted):
                by_hand = f"remove {model}" if line is None else f"write {line}"
                raise ConfigError(f"cannot change [{SECTION}] in {path} because of its layout; {by_hand} there")
            _write(path, new)
    except Timeout:
        raise ConfigError(f"{path} is being written by another program ({lock}); try again") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    except UnicodeError:
        raise ConfigError(f"cannot write {model} to {path}: it has characters that UTF-8 cannot have") from None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # line ends are kept as they are
            return file.read()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _says(text: str, wanted: dict[str, Any]) -> bool:
    with contextlib.suppress(tomllib.TOMLDecodeError):
        found = tomllib.loads(text)
        return found | {SECTION: found.get(SECTION, {})} == wanted
    return False


def _with_line(text: str, model: str, line: str | None) -> str:
    """The text without the lines about a model, and with one new line for it in `[models]`."""
    end = "\r\n" if "\r\n" in text else "\n"
    kept: list[str] = []
    at, comment = None, ""
    section: tuple[str, ...] = ()
    for old in text.splitlines(keepends=True):
        is_header = _HEADER.match(old) is not None
        path = _path_in(old)
        if is_header and path is not None:
            section = full = path
        else:
            full = section + path if path is not None else ()
        if full[:2] == (SECTION, model):
            if section == (SECTION,) and not is_header:
                at, comment = len(kept), _comment_of(old)
            continue
        kept.append(old)
        if full == (SECTION,) and is_header and at is None:
            at = len(kept)
    if line is None:
        return "".join(kept)
    if kept and not kept[-1].endswith("\n"):
        kept[-1] += end
    line += f"  {comment}{end}" if comment else end
    if at is None:
        return "".join([*kept, end if kept and kept[-1].strip() else "", f"[{SECTION}]{end}", line])
    return "".join([*kept[:at], line, *kept[at:]])


def _path_in(line: str) -> tuple[str, ...] | None:
    """The keys of a line that is a table's header, or a key with its value; None for anything else."""
    try:
        value: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    is_header = _HEADER.match(line) is not None
    path: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        (key,) = value
        path.append(key)
        value = value[key]
        if not is_header and len(path) >= 2:
            break  # enough to know whose line it is; deeper levels may be an inline table
    return tuple(path) or None


def _comment_of(line: str) -> str:
    """The comment at the end of a line; "" without one."""
    for match in re.finditer("#", line):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(line[: match.start()]):
                return line[match.start() :].rstrip()
    return ""


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _inline_table(entry: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{_key(key)} = {_value(value)}" for key, value in entry.items()) + " }"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    """A text as TOML's basic string, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(path: Path, text: str) -> None:
    """Replace the file at once, with the mode that it has; a new one can be read by its owner only."""
    data = text.encode("utf-8")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        unfinished.chmod(mode)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
