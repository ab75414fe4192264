"""The setting `models`: names for GGUF files, and what is known of a model: its size, and options of its requests.

In `sollol_nb.toml`:

    [models]
    smol = { gguf = "~/models/SmolLM2-135M-Instruct.Q4_1.gguf", sharded = true, temperature = 0 }
    tiny = "tiny.gguf"
    "llama3.1:70b" = { parameters = 70, memory_gb = 43 }

`%sollol_profile` writes such entries (see `edit.py`). `config.saved_models()` has those of all files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.settings import kinds
from sollol_nb.settings.kinds import Kind
from sollol_nb.text.nearest import nearest
from sollol_nb.text.short_names import is_file_name

BUILT_IN_NAMES = ("demo", "demo:sharded")
"""Names of the model that comes with the package, which cannot be given to another file."""


def model_text(model: Any) -> Any:
    """A model that is given as a `Path`, as text that names a file; anything else unchanged."""
    if not isinstance(model, PurePath):
        return model
    text = str(model)
    return text if is_file_name(text) else str(Path(model).absolute())


def _gguf(value: Any) -> Path:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    if not is_file_name(value) and "/" not in value and os.sep not in value:
        raise ValueError
    path = Path(value)
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        path = path.expanduser()
    return path


KEYS: Mapping[str, Kind] = MappingProxyType(
    {
        "gguf": Kind("the path of a .gguf file", _gguf),
        "mmproj": Kind("the path of a .gguf file", _gguf),
        "parameters": kinds.number("billions of parameters, such as 70"),
        "memory_gb": kinds.number("an amount of memory in 1e9 bytes, such as 42"),
        "sharded": kinds.YES_OR_NO,
        "temperature": kinds.TEMPERATURE,
        "top_p": kinds.TOP_P,
        "max_tokens": kinds.MAX_TOKENS,
        "seed": kinds.SEED,
        "system": kinds.SYSTEM,
    }
)
"""What an entry may say, and the kind of each value."""

PATHS = ("gguf", "mmproj")
"""The keys that are paths."""

OPTIONS = ("temperature", "top_p", "max_tokens", "seed")
"""The keys that are options of a request."""


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What the settings say about one model.

    Attributes:
        values: by the keys of `KEYS`.
        source: the file or variable that says so; of several the one that comes first.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def gguf(self) -> Path | None:
        """The file that the name stands for, if any."""
        return self.values.get("gguf")

    @property
    def projector(self) -> Path | None:
        """The file that lets the model read images, if any."""
        return self.values.get("mmproj")

    @property
    def options(self) -> dict[str, Any]:
        """The options of its requests."""
        return {name: self.values[name] for name in OPTIONS if name in self.values}

    @property
    def system(self) -> str | None:
        """The system message of its requests that have none, if any."""
        return self.values.get("system")

    @property
    def source_name(self) -> str:
        """The source as a few words."""
        return Path(self.source).name

    def below(self, first: SavedModel) -> SavedModel:
        """This entry, except where another one says something."""
        return SavedModel({**self.values, **first.values}, first.source or self.source)


def checked_entry(model: str, entry: object) -> dict[str, Any]:
    """An entry in its one form: a path alone is its `gguf`.

    Raises:
        ConfigError: the name cannot be used, a key is unknown, or a value is invalid.
    """
    if not model.strip() or not model.isprintable() or model != model.strip():
        raise ConfigError(f"{model!r} cannot be the name of a model; use a name such as smol")
    if isinstance(entry, str | Path):
        entry = {"gguf": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f'{model} must be the path of a .gguf file, or a table such as {{ gguf = "PATH" }}')
    checked = {}
    for key, value in entry.items():
        if key not in KEYS:
            near = nearest(key, KEYS)
            hint = f"did you mean {near}?" if near else f"known keys: {', '.join(KEYS)}"
            raise ConfigError(f"{model} has an unknown key {key!r}; {hint}")
        checked[key] = KEYS[key].checked(value, f"{model}: {key}")
    if "gguf" in checked and (model in BUILT_IN_NAMES or is_file_name(model)):
        what = "the built-in model" if model in BUILT_IN_NAMES else "a path"
        raise ConfigError(f"{model} is {what} and cannot name another file; choose another name")
    return checked


def _check(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {model: checked_entry(model, entry) for model, entry in value.items()}


def _from_text(text: str) -> Any:
    pairs = [entry.partition("=") for entry in text.split(",") if entry.strip()]
    return {name.strip(): path.strip() for name, _, path in pairs} if all(sign for _, sign, _ in pairs) else text


def _anchored(value: Any, folder: Path) -> Any:
    """The entries with paths that are seen from a folder."""
    return {
        str(folder / Path(model).expanduser()) if is_file_name(model) else model: entry
        | {key: folder / entry[key] for key in PATHS if key in entry}
        for model, entry in value.items()
    }


MODELS = Kind("a table of models by name, each a path or a table", _check, _from_text, _anchored)
