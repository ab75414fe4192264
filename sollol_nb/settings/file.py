"""`sollol_nb.toml`: found, read, and checked as a whole, so that a typing error is reported immediately.

Each key is a setting of `table.py`; relative paths in a file are relative to its folder. A file is read at each
reading of a setting, so an edit takes effect immediately; it is parsed again only if its text has changed.
"""

from __future__ import annotations

import os
import stat
import sys
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.settings.table import FILE_NAME, setting_of


def find_nearest(start: Path) -> list[Path]:
    """The settings file in a folder, or in the nearest folder above it that has one; an empty list if none has.

    Raises:
        ConfigError: it belongs to another user, in a folder where anyone can write (such as `/tmp`).
    """
    folder, above = "", str(start)
    while folder != above:
        folder, above = above, os.path.dirname(above)  # noqa: PTH120 - see is_file
        path = os.path.join(folder, FILE_NAME)  # noqa: PTH118
        if is_file(path):
            found = Path(path)
            _refuse_planted(found)
            return [found]
    return []


def is_file(path: str | Path) -> bool:
    """Whether a file exists, as far as this process may see.

    This is called for each folder above, at each reading of a setting, so without pathlib, which takes far longer.
    """
    return os.path.isfile(path)  # noqa: PTH113


def read_settings(path: Path) -> Mapping[str, Any]:
    """The checked settings of a file, by name.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has an unknown key or an invalid value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors may put a byte order mark first
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"cannot read {path} ({why}); fix that, or set SOLLOL_CONFIG to another file") from None
    return _parsed(path, text)


@lru_cache(maxsize=8)
def _parsed(path: Path, text: str) -> Mapping[str, Any]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    values: dict[str, Any] = {}
    for name, value in document.items():
        setting = setting_of(name, str(path))
        checked = setting.kind.checked(value, f"{path}: {name}")
        values[name] = setting.kind.anchor(checked, path.parent)
    return MappingProxyType(values)


def _refuse_planted(path: Path) -> None:
    """A file can name programs to run, so a file of another user must not be read just because it is above the
    working folder."""
    if sys.platform == "win32":
        return
    owner = path.stat().st_uid
    if path.parent.stat().st_mode & stat.S_IWOTH and owner not in (os.getuid(), 0):
        raise ConfigError(
            f"{path} belongs to another user, in a folder where anyone can write; set SOLLOL_CONFIG to this path "
            "to use it, or to 0 to use no file"
        )
