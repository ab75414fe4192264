"""The values of settings, and the package's folders: the only module that reads environment variables.

`default(name)` is the value of a setting of `table.py` that the caller does not set: that of `%config Sollol` in a
notebook (see `use_notebook_settings`), else of its environment variable, else of `sollol_nb.toml` in the working
folder or in the nearest folder above that has one, else of the one in the user's config folder, else the built-in
default. It is read at each call, so a change (`%env`, `os.environ`, an edit of the file) takes effect immediately.
Folders follow the platform's conventions (platformdirs).

Variables that are not settings:

| variable | meaning |
|---|---|
| `SOLLOL_CONFIG` | the only settings file to read, or `0` for none |
| `SOLLOL_JOIN` | a join link for `sollol-nb worker`, where an argument could be seen by others |
| `HF_ENDPOINT` | a mirror of the Hugging Face Hub, as for all its clients |
| `HF_HUB_CACHE`, `HF_HOME` | the Hub's cache of files, as for all its clients |
| `LLAMA_CACHE` | llama.cpp's cache of models |
| `JPY_SESSION_NAME` | set by Jupyter's server: the path of the kernel's notebook |
| `VULKAN_SDK`, `CXX` | as in every C++ build: the folder of the Vulkan SDK, the C++ compiler |
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.private_files import check_private, private_folder
from sollol_nb.settings import consent, edit
from sollol_nb.settings.file import SettingsFile, find_nearest, is_file, read_settings
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.models import PATHS, SavedModel, checked_entry
from sollol_nb.settings.table import FILE_NAME, SETTINGS
from sollol_nb.text.short_names import is_file_name

APP_NAME = "sollol_nb"
logger = logging.getLogger(__name__)
_of_notebook: Callable[[str], Any] | None = None
_reported: set[tuple[Path, str]] = set()
"""Files with contents of which this process has reported what does not count."""

BUILT_IN, IN_NOTEBOOK = "built-in default", "%config"
LOGS = "logs"
"""Name of the folder of logs in the state folder."""

_KEPT_AWAY = re.compile(r"LLAMA_(?!CACHE$)|AIP_|MTMD_|GGML_\w*DEBUG")
"""Variables that llama.cpp's programs read (every `getenv` of its `common/`, `src/`, `tools/server/`,
`tools/mtmd/` and `ggml/src/`), without those that choose devices and how these work."""


@dataclass(frozen=True, slots=True)
class Found:
    """The value of a setting, and its source: `IN_NOTEBOOK`, a variable's name, a file's path, or `BUILT_IN`."""

    value: Any
    source: str


def find(name: str) -> Found:
    """The value of a setting that the caller does not set, and its source.

    Raises:
        ConfigError: a variable or file has an invalid value; the message names it.
    """
    setting = SETTINGS[name]
    value = _of_notebook(name) if _of_notebook is not None else None
    if value is not None:
        return Found(copy.copy(value), IN_NOTEBOOK)
    text = _variable(setting.variable)
    if text is not None:
        return Found(setting.kind.checked(setting.kind.from_text(text), setting.variable), setting.variable)
    for file in settings_in_use():
        if name in file.values:
            return Found(copy.copy(file.values[name]), str(file.path))
    return Found(copy.copy(setting.default), BUILT_IN)


def use_notebook_settings(own: Callable[[str], Any] | None) -> None:
    """Let the settings of a notebook (`%config Sollol`) win over variables and files in this process.

    Args:
        own: returns the value of a setting by its name, None if the notebook does not set it. None: no notebook.
    """
    global _of_notebook
    _of_notebook = own


def default(name: str) -> Any:
    """The value of `find`, without its source."""
    return find(name).value


def or_default(given: Any, name: str) -> Any:
    """The value that a caller gave, or that of `default` if it is None."""
    return default(name) if given is None else given


def settings_files() -> list[Path]:
    """The settings files that are read; a value in an earlier file wins.

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


def settings_in_use() -> Iterator[SettingsFile]:
    """The settings files that are read, one after the other, with the values that count: those of a folder's file
    that need the user's consent are left out until it is given, and reported once.

    Raises:
        ConfigError: a file is invalid, or the nearest one belongs to another user.
    """
    for path in settings_files():
        file = read_settings(path)
        withheld = withheld_values(file)
        if withheld:
            if (path, file.text) not in _reported:
                logger.warning("%s", withheld_message(file))
            file = replace(file, values=consent.split(file.values)[0])
        yield file


def withheld_values(file: SettingsFile) -> dict[str, Any]:
    """The values of a settings file that do not count, by name: they need the user's consent, and it is missing.

    Raises:
        ConfigError: the state folder cannot be trusted.
    """
    guarded = {} if is_chosen(file.path) else consent.split(file.values)[1]
    return {} if not guarded or consent.has_consent(file, consent_folder()) else guarded


def is_chosen(path: Path) -> bool:
    """Whether a settings file is the user's own, or the one of `SOLLOL_CONFIG`: no consent is needed."""
    return path in (user_settings_file(), *(settings_files() if _variable("SOLLOL_CONFIG") is not None else ()))


def is_of_user(source: str) -> bool:
    """Whether the source of a value (as in `Found`) is the user: anything but the settings file of a folder, and
    such a file if they have allowed it with this content.

    Raises:
        ConfigError: the file is invalid, or the state folder cannot be trusted.
    """
    path = Path(source)
    if not path.is_absolute() or is_chosen(path):
        return True
    return consent.has_consent(read_settings(path), consent_folder())


def withheld_message(file: SettingsFile, command: str = "sollol-nb trust") -> str:
    """What does not count of a settings file, and what to do, in one line. It is not logged again."""
    _reported.add((file.path, file.text))
    names = ", ".join(withheld_values(file))
    return f"{file.path} sets {names}: ignored, because you have not allowed this file yet; see `{command}`"


def consent_folder() -> Path:
    """The folder of the consents: in the state folder as the user has set it, whatever a folder's file says."""
    text = _variable(SETTINGS["state_dir"].variable)
    kind = SETTINGS["state_dir"].kind
    path = kind.checked(text, SETTINGS["state_dir"].variable) if text is not None else None
    if path is None and is_file(users := user_settings_file()):
        path = read_settings(users).values.get("state_dir")
    return (path or platformdirs.user_state_path(APP_NAME, appauthor=False)) / "trusted"


@contextlib.contextmanager
def keeping_consent(path: Path) -> Iterator[None]:
    """While this package writes a settings file for the user: consent to the new content is given if none was
    missing before, so that the user need not allow again what the user has just set.

    Raises:
        ConfigError: the file is invalid, before or after.
    """
    was_allowed = not is_file(path) or not withheld_values(read_settings(path))
    yield
    if was_allowed and withheld_values(after := read_settings(path)):
        consent.give(after, consent_folder())


def user_settings_file() -> Path:
    """The path of the user's own settings file, which need not exist."""
    return platformdirs.user_config_path(APP_NAME, appauthor=False) / FILE_NAME


# --- the setting `models` -----------------------------------------------------------------------

_of_this_process: dict[str, SavedModel] = {}
"""What `save_model` keeps where no settings file may be used."""


def saved_models() -> dict[str, SavedModel]:
    """What the settings say about models, by name: the variable, and all files. Where several speak of one model,
    each key of its entry comes from the first that has it.

    Raises:
        ConfigError: a variable or file has an invalid value.
    """
    merged: dict[str, SavedModel] = {}
    for models in reversed(_model_sources()):
        for model, saved in models.items():
            merged[model] = merged.get(model, SavedModel()).below(saved)
    return merged


def saved_model(model: str) -> SavedModel:
    """What the settings say about one model; an empty entry if nothing. `x` and `x:latest` are the same.

    Raises:
        ConfigError: a variable or file has an invalid value.
    """
    models = saved_models()
    if is_file_name(model):
        return models.get(model) or models.get(model_path(model)) or SavedModel()
    same = model.removesuffix(":latest") if model.endswith(":latest") else f"{model}:latest"
    return models.get(model) or models.get(same) or SavedModel()


def save_model(model: str, changes: Mapping[str, Any]) -> str:
    """Keep what is known of a model, for all kernels: in the user's settings file, or in that of `SOLLOL_CONFIG`.

    Args:
        changes: by the keys of `models.KEYS`; other keys of its entry stay.

    Returns:
        The path of the file; "" if `SOLLOL_CONFIG` is 0, and it is kept in this process only.

    Raises:
        ConfigError: a value is invalid, another file or variable that comes first says something else, or the file
            cannot be written.
    """
    model = model_path(model) if is_file_name(model) else model
    changes = checked_entry(model, changes)
    changes |= {key: Path.cwd() / changes[key] for key in PATHS if key in changes}
    path = _written_file()
    if path is None:
        _of_this_process[model] = _of_this_process.get(model, SavedModel()).below(
            SavedModel(changes, "this kernel")
        )
        return ""
    _check_not_overridden(model, changes, path)
    edit.save_entry(path, model, changes, lock=state_file("settings.lock"))
    return str(path)


def forget_model(model: str) -> bool:
    """Remove what `save_model` keeps of a model; whether there was something.

    Raises:
        ConfigError: another file or variable speaks of it, or the file cannot be written.
    """
    model = model_path(model) if is_file_name(model) else model
    path = _written_file()
    was_here = _of_this_process.pop(model, None) is not None
    if path is None:
        return was_here
    is_in_file = path.is_file() and model in read_settings(path).values.get("models", {})
    if is_in_file:
        edit.remove_entry(path, model, lock=state_file("settings.lock"))
    elif (saved := saved_model(model)).values:
        raise ConfigError(f"{model} is set in {saved.source}; remove it there")
    return is_in_file or was_here


def _model_sources() -> list[dict[str, SavedModel]]:
    """The models of each source; the first one comes first."""
    sources = [_of_this_process]
    setting = SETTINGS["models"]
    text = _variable(setting.variable)
    if text is not None:
        value = setting.kind.checked(setting.kind.from_text(text), setting.variable)
        sources.append({model: SavedModel(entry, setting.variable) for model, entry in value.items()})
    for file in settings_in_use():
        models = file.values.get("models", {})
        sources.append({model: SavedModel(entry, str(file.path)) for model, entry in models.items()})
    return sources


def _check_not_overridden(model: str, changes: Mapping[str, Any], path: Path) -> None:
    """Refuse a change of the file that would have no effect."""
    for models in _model_sources():
        saved = models.get(model, SavedModel())
        if saved.source == str(path):
            return
        for key in changes.keys() & saved.values.keys():
            raise ConfigError(
                f"{saved.source} sets {key} of {model}, and comes before {path}; change it in {saved.source}"
            )


def _written_file() -> Path | None:
    """The settings file that this package writes to; None if there is none."""
    chosen = _variable("SOLLOL_CONFIG")
    if chosen is None:
        return user_settings_file()
    return None if chosen == "0" else Path(chosen).expanduser().absolute()


def model_path(model: str) -> str:
    """The absolute path that a model's name is, if it is one."""
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        path = path.expanduser()
    return str(path.absolute())


def _variable(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def cache_dir() -> Path:
    """Folder for engine builds; safe to delete. Not created here."""
    return default("cache_dir") or platformdirs.user_cache_path(APP_NAME, appauthor=False)


def state_dir() -> Path:
    """Folder for the latency log, engine logs and the registry, created with mode 0700.

    Raises:
        ConfigError: it cannot be created, or other users could have put there what it contains. The functions
            below raise it, too.
    """
    path: Path = default("state_dir") or platformdirs.user_state_path(APP_NAME, appauthor=False)
    return private_folder(path, shared_parent=True)


def state_file(name: str) -> Path:
    """The path of a file in the state folder, which need not exist; an existing one is made private."""
    path = state_dir() / name
    check_private(path)
    return path


def log_dir() -> Path:
    """Folder for the logs of engine processes, created with mode 0700 (debug logs may hold prompts)."""
    return private_folder(state_dir() / LOGS)


def registry_dir() -> Path:
    """Folder for the entries and keys of running engines, created with mode 0700."""
    return private_folder(state_dir() / "registry")


def default_keep_alive_s() -> float | None:
    """How long an engine runs without a request, in seconds; None means without end."""
    value = default("keep_alive")
    if isinstance(value, Mapping):
        value = value.get("*", SETTINGS["keep_alive"].default)
    return keep_alive_seconds(value)


def session_path() -> str | None:
    """The path of this kernel's notebook, which Jupyter's server puts into the environment (`JPY_SESSION_NAME`).

    A kernel that another kernel has started (a notebook that runs notebooks) inherits the variable; then it is not
    about this one, and the path is None.
    """
    path = _variable("JPY_SESSION_NAME")
    if path is not None:
        import psutil  # on first use: it takes a while

        with contextlib.suppress(psutil.Error):
            parent = psutil.Process().parent()
            if parent is not None and parent.environ().get("JPY_SESSION_NAME") == path:
                return None
    return path


def join_link() -> str | None:
    """The join link that `sollol-nb worker` uses (`SOLLOL_JOIN`), if set. It is a secret."""
    return _variable("SOLLOL_JOIN")


def hub_endpoint() -> str:
    """The Hugging Face Hub, or the mirror of it that `HF_ENDPOINT` names."""
    return (_variable("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_cache() -> Path:
    """The folder in which clients of the Hugging Face Hub keep files; `huggingface_hub` has the same rules."""
    folder = _variable("HF_HUB_CACHE") or _variable("HUGGINGFACE_HUB_CACHE")
    if folder is None:
        cache = _variable("XDG_CACHE_HOME") or "~/.cache"
        folder = f"{_variable('HF_HOME') or f'{cache}/huggingface'}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def llama_cpp_cache() -> Path:
    """The folder of llama.cpp's own downloads: `LLAMA_CACHE`, else the usual one."""
    folder = _variable("LLAMA_CACHE")
    if folder is not None:
        return Path(folder).expanduser()
    return platformdirs.user_cache_path("llama.cpp", appauthor=False, opinion=False)


def vulkan_sdk() -> Path | None:
    """Folder of the Vulkan SDK (`VULKAN_SDK`), if set."""
    value = _variable("VULKAN_SDK")
    return Path(value) if value else None


def cxx_compiler() -> str | None:
    """The C++ compiler the user chose (`CXX`), if set; CMake reads the same variable."""
    return _variable("CXX")


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for programs that this package starts: that of this process, plus `extra`.

    What is set for other work must not change or break the engines of this package: llama-server reads every
    option from `LLAMA_ARG_*`, moves to another port where Vertex AI's `AIP_*` are set (and ends if `AIP_HTTP_PORT`
    is not a number), acts as a part of another server with `LLAMA_SERVER_ROUTER_PORT`, and has debug switches. The
    folder of its cache and the choice of devices stay. Its crash handler, which runs a debugger, is switched off.
    """
    environment = {name: value for name, value in os.environ.items() if not _KEPT_AWAY.match(name)}
    return environment | {"GGML_NO_BACKTRACE": "1"} | extra
