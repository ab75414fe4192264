"""Where settings come from: the only room that reads environment variables and knows folders.

`default(name)` is the value of a setting of `settings.py` where the caller gives none: its environment variable's,
else that of `sollol_nb.toml` in the working folder or in the nearest folder above that has one, else that of the
one in the user's config folder, else the built-in one. It is read when it is asked for, so a change (`%env`,
`os.environ`, an edit of the file) takes effect at once. Folders follow the platform's conventions (platformdirs).

Variables that are no setting:

| variable | meaning |
|---|---|
| `SOLLOL_CONFIG` | the one settings file to read, or `0`: none |
| `VULKAN_SDK`, `CXX` | as every C++ build reads them: the Vulkan SDK's folder, the C++ compiler |
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from sollol_nb.settings.file import find_nearest, is_file, read_settings
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.table import FILE_NAME, SETTINGS

APP_NAME = "sollol_nb"

BUILT_IN = "built-in default"


@dataclass(frozen=True, slots=True)
class Found:
    """The value of a setting, and where it comes from: a variable's name, a file's path, or `BUILT_IN`."""

    value: Any
    source: str


def find(name: str) -> Found:
    """The value that holds for a setting where the caller gives none, and where it comes from.

    Raises:
        ConfigError: a variable or file has a value that cannot be used; the message names it.
    """
    setting = SETTINGS[name]
    written = _variable(setting.variable)
    if written is not None:
        return Found(setting.kind.checked(setting.kind.from_text(written), setting.variable), setting.variable)
    for path in settings_files():
        values = read_settings(path)
        if name in values:
            return Found(copy.copy(values[name]), str(path))
    return Found(copy.copy(setting.default), BUILT_IN)


def default(name: str) -> Any:
    """The value of `find`, without where it comes from."""
    return find(name).value


def or_default(given: Any, name: str) -> Any:
    """What a caller gave, or the value of `default` where that is None."""
    return default(name) if given is None else given


def settings_files() -> list[Path]:
    """The settings files that are read, the one that wins first.

    Raises:
        ConfigError: the nearest one was put there by someone else; see `file.find_nearest`.
    """
    chosen = _variable("SOLLOL_CONFIG")
    if chosen is not None:
        return [] if chosen == "0" else [Path(chosen).expanduser().absolute()]
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the working folder was deleted
        found += find_nearest(Path.cwd())
    users = user_settings_file()
    return [*found, users] if users not in found and is_file(users) else found


def user_settings_file() -> Path:
    """Where the user's own settings file is, if there is one."""
    return platformdirs.user_config_path(APP_NAME, appauthor=False) / FILE_NAME


def _variable(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def cache_dir() -> Path:
    """Folder for engine builds; safe to delete. Not created here."""
    return default("cache_dir") or platformdirs.user_cache_path(APP_NAME, appauthor=False)


def state_dir() -> Path:
    """Folder for the latency log, engine logs and the registry, created with mode 0700."""
    path: Path = default("state_dir") or platformdirs.user_state_path(APP_NAME, appauthor=False)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def log_dir() -> Path:
    """Folder for the logs of engine processes, created with mode 0700 (debug logs may hold prompts)."""
    path = state_dir() / "logs"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def registry_dir() -> Path:
    """Folder for the entries and keys of running engines, created with mode 0700."""
    path = state_dir() / "registry"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def default_keep_alive_s() -> float | None:
    """How long an engine lives without a request, in seconds; None is for ever."""
    value = default("keep_alive")
    if isinstance(value, Mapping):
        value = value.get("*", SETTINGS["keep_alive"].default)
    return keep_alive_seconds(value)


def vulkan_sdk() -> Path | None:
    """Folder of the Vulkan SDK (`VULKAN_SDK`), if set."""
    value = _variable("VULKAN_SDK")
    return Path(value) if value else None


def cxx_compiler() -> str | None:
    """The C++ compiler the user chose (`CXX`), if set; CMake reads the same variable."""
    return _variable("CXX")


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for programs this package starts: ours, plus `extra`.

    llama.cpp reads every option from `LLAMA_ARG_*` too; a variable left over from other work must not change
    what an engine of ours does. Its crash handler would run a debugger: switched off.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    return ours | {"GGML_NO_BACKTRACE": "1"} | extra
