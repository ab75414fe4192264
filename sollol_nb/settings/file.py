"""`sollol_nb.toml`: found, read, and checked as a whole, so that a typing error is reported immediately.

A file that was found in a folder is the user's or the administrator's; of another user's, none is read. What such
a file may set is in `consent.py`.

Each key is a setting of `table.py`; relative paths in a file are relative to its folder. A file is read at each
reading of a setting, so an edit takes effect immediately; it is parsed again only if its text has changed.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.settings.table import FILE_NAME, setting_of

FILE_LIMIT_BYTES = 1024 * 1024
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){64}""")
"""A key of very many parts, which takes tomllib time with the square of their number."""


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A settings file as it was read: its text, and its checked values by name."""

    path: Path
    text: str
    values: Mapping[str, Any]


def find_nearest(start: Path) -> list[Path]:
    """The settings file in a folder, or in the nearest folder above it that has one; an empty list if none has.

    Raises:
        ConfigError: it belongs to another user.
    """
    folder, above = "", str(start)
    while folder != above:
        folder, above = above, os.path.dirname(above)  # noqa: PTH120 - see is_file
        path = os.path.join(folder, FILE_NAME)  # noqa: PTH118
        if is_file(path):
            found = Path(path)
            _refuse_of_another_user(found)
            return [found]
    return []


def is_file(path: str | Path) -> bool:
    """Whether a file exists, as far as this process may see.

    This is called for each folder above, at each reading of a setting, so without pathlib, which takes far longer.
    """
    return os.path.isfile(path)  # noqa: PTH113


def read_settings(path: Path) -> SettingsFile:
    """The settings of a file, checked.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has an unknown key or an invalid value.
    """
    if path.is_fifo():  # reading would wait for a writer
        raise ConfigError(f"{path} is not a regular file; set SOLLOL_CONFIG to a settings file")
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
        text = data.decode("utf-8-sig")  # Windows editors may put a byte order mark first
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"cannot read {path} ({why}); fix that, or set SOLLOL_CONFIG to another file") from None
    if len(data) > FILE_LIMIT_BYTES:
        raise ConfigError(f"{path} is larger than {FILE_LIMIT_BYTES:,} bytes; is it a settings file?")
    return SettingsFile(path, text, _parsed(path, text))


@lru_cache(maxsize=8)
def _parsed(path: Path, text: str) -> Mapping[str, Any]:
    if _DEEP_KEY.search(text):
        raise ConfigError(f"{path} has a key of more than 64 parts; is it a settings file?")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from None
    values: dict[str, Any] = {}
    for name, value in document.items():
        setting = setting_of(name, str(path))
        checked = setting.kind.checked(value, f"{path}: {name}")
        values[name] = setting.kind.anchor(checked, path.parent)
    return MappingProxyType(values)


def _refuse_of_another_user(path: Path) -> None:
    """As git does with repositories: what lies in the folder of somebody else speaks for somebody else."""
    if sys.platform == "win32":
        return
    ours = {os.getuid(), 0}
    if os.getuid() == 0 and (caller := os.environ.get("SUDO_UID", "")).isdecimal():
        ours.add(int(caller))
    for owner in (path.lstat().st_uid, path.stat().st_uid):  # a link, and what it leads to
        if owner not in ours:
            raise ConfigError(
                f"{path} belongs to another user (uid {owner}), so it is not used; set SOLLOL_CONFIG to this path "
                "to use it, or to 0 to use no file"
            )
