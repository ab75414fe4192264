"""Consent to the settings file of a folder: what it may change unasked, and what only after a yes of the user.

A folder may come from anybody: a clone, an attachment, an archive. The `sollol_nb.toml` in it must not run a
program, send prompts elsewhere, add to what is asked, or move or delete state. Such settings (`Setting.guarded`)
of a file that was found, not chosen, count after the user has allowed this file with this content: `sollol-nb
trust --yes` or `%sollol_trust --yes`. An edit needs a new yes, except one by this package
(`config.keeping_consent`). The user's own file, and the one that `SOLLOL_CONFIG` names, need none.

Each consent is a private file in the user's state; its name is the hash of the path and the content of the file.
The path is where the file was found, not where a link there leads: relative paths in it begin there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sollol_nb.runtime.private_files import private_folder, read_private, write_private
from sollol_nb.settings.file import SettingsFile
from sollol_nb.settings.table import SETTINGS

_GUARDED = frozenset(setting.name for setting in SETTINGS.values() if setting.guarded)


def split(values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that need no consent, and those that do, by name (`system` of a model: models.smol.system)."""
    free: dict[str, Any] = {}
    guarded: dict[str, Any] = {}
    for name, value in values.items():
        if name in _GUARDED:
            guarded[prefix + name] = value
        elif isinstance(value, Mapping):
            free[name], inner = split(value, f"{prefix}{name}.")
            guarded |= inner
        else:
            free[name] = value
    return free, guarded


def has_consent(file: SettingsFile, folder: Path) -> bool:
    """Whether the user has allowed this file with this content. `folder` has the consents; it need not exist.

    Raises:
        ConfigError: others could have written into the folder.
    """
    return folder.is_dir() and read_private(_checked(folder) / _hash(file)) is not None


def give(file: SettingsFile, folder: Path) -> None:
    """Allow this file with this content.

    Raises:
        ConfigError: the folder cannot be used.
    """
    write_private(_checked(folder) / _hash(file), _place(file.path))


def withdraw(path: Path, folder: Path) -> None:
    """Take back every consent to a file, whatever its content was."""
    with contextlib.suppress(OSError):
        for consent in folder.iterdir():
            if read_private(consent) == _place(path):
                consent.unlink(missing_ok=True)


def _checked(folder: Path) -> Path:
    private_folder(folder.parent, shared_parent=True)
    return private_folder(folder)


def _place(path: Path) -> str:
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118


def _hash(file: SettingsFile) -> str:
    return hashlib.sha256(f"{_place(file.path)}\0{file.text}".encode()).hexdigest()
