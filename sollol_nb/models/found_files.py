"""GGUF files that other programs and the user keep on this machine, and the names by which they can be asked.

Searched are the folders of the setting `model_dirs`, LM Studio's, llama.cpp's cache, and that of the Hugging Face
Hub. A file of the Hub's cache is called as for Ollama (`hf.co/user/repo:quant`), any other by its own name without
folders and `.gguf`; files with the same name get as many of their folders as needed. A name of Ollama or
of the settings always comes first.

The search is bounded in depth, files and time, and takes no file apart. What it could not see is a note.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sollol_nb.models.hub.files import SUFFIX, is_model, projector_of, quant_of
from sollol_nb.settings import config
from sollol_nb.text.short_names import short_names
from sollol_nb.text.tables import counted

LM_STUDIO = "LM Studio"
MAX_DEPTH = 8
MAX_ENTRIES = 20_000
"""Files and folders that are looked at."""
MAX_FILES = 300
TIME_LIMIT_S = 2.0
FRESH_FACTOR, MAX_FRESH_S = 20.0, 30.0
"""What was found counts for this many times as long as finding it took."""
_JSON_LIMIT_BYTES, _PATH_LIMIT_CHARS = 2**20, 4096
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SearchedFolder:
    """A folder that is searched. `name` is how it is shown; `is_named` if the user names it in `model_dirs`."""

    path: Path
    name: str
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A model file that was found.

    Attributes:
        path: the file; of a split model the first part.
        place: where, such as `LM Studio`.
        projector: the file that lets the model read images: in the folder of the model, in the Hub's cache also in
            one above; None without one, or if it is not clear.
    """

    path: Path
    place: str
    projector: Path | None = None


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """All model files that were found, by their names, and what could not be seen."""

    by_name: Mapping[str, FoundFile]
    notes: tuple[str, ...]

    def get(self, model: str) -> FoundFile | None:
        """The file of this name; case does not matter where it is the only one."""
        exact = self.by_name.get(model)
        if exact is not None:
            return exact
        same = [file for name, file in self.by_name.items() if name.lower() == model.lower()]
        return same[0] if len(same) == 1 else None


def searched_folders() -> list[SearchedFolder]:
    """The folders that are searched; they need not exist.

    Raises:
        ConfigError: the setting `model_dirs` has an invalid value.
    """
    named = [SearchedFolder(folder, str(folder), is_named=True) for folder in config.default("model_dirs")]
    studio = [SearchedFolder(folder, LM_STUDIO) for folder in _lm_studio_folders()]
    caches = [
        SearchedFolder(config.llama_cpp_cache(), "llama.cpp"),
        SearchedFolder(config.hub_cache(), "Hugging Face cache"),
    ]
    return [*named, *studio, *caches]


def search() -> FoundFiles:
    """Search now. Errors are those of `searched_folders`."""
    limits = _Limits()
    files: dict[tuple[int, int], tuple[float, Path, SearchedFolder]] = {}
    notes: list[str] = []
    for folder in searched_folders():
        if not folder.path.is_dir():
            if folder.is_named:
                notes.append(f"{folder.path} (setting model_dirs) is not a folder")
            continue
        for path in _walk(folder.path, limits, notes):
            try:
                status = path.stat()
            except OSError:  # a link to nowhere
                continue
            if not stat.S_ISREG(status.st_mode):  # a pipe, which nobody may write to
                continue
            files.setdefault((status.st_dev, status.st_ino), (-status.st_mtime, path, folder))
            if len(files) >= MAX_FILES:
                limits.stop(f"only the first {MAX_FILES} model files are listed")
    newest_first = sorted(files.values(), key=lambda file: file[:2])
    return FoundFiles(_named((path, folder) for _, path, folder in newest_first), tuple(notes + limits.notes))


_lock = threading.Lock()
_last: tuple[object, float, FoundFiles] | None = None


def found_files(*, fresh: bool = False) -> FoundFiles:
    """What `search` finds; what it found lately, unless it must be `fresh`."""
    global _last
    key = searched_folders()
    with _lock:
        if _last is None or fresh or _last[0] != key or time.monotonic() > _last[1]:
            began = time.monotonic()
            found = search()
            ended = time.monotonic()
            _last = (key, ended + min(FRESH_FACTOR * (ended - began), MAX_FRESH_S), found)
        return _last[2]


def find_file(model: str) -> FoundFile | None:
    """The file that a name stands for, if one was found."""
    if ":" in model and not model.lower().startswith("hf.co/"):
        return None  # one of Ollama's names; no file is called so
    return found_files().get(model)


class _Limits:
    """How much may still be looked at, in all folders together."""

    def __init__(self) -> None:
        self._entries = 0
        self._until = time.monotonic() + TIME_LIMIT_S
        self.notes: list[str] = []
        self.is_reached = False

    def count(self) -> None:
        """Count an entry."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            self.stop(f"only the first {MAX_ENTRIES:,} files and folders were searched for models")
        elif time.monotonic() > self._until:
            self.stop(f"the search for model files ended after {TIME_LIMIT_S:g} s; some may be missing")

    def stop(self, note: str) -> None:
        """Look at nothing more."""
        if not self.is_reached:
            self.is_reached = True
            self.notes.append(f"{note}; name fewer or deeper folders in model_dirs")


def _walk(root: Path, limits: _Limits, notes: list[str]) -> Iterator[Path]:
    """The model files in a folder, first parts only."""
    waiting = [(root, 0)]
    seen: set[tuple[int, int]] = set()
    unreadable: list[Path] = []
    while waiting and not limits.is_reached:
        folder, depth = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                for entry in listing:
                    limits.count()
                    if limits.is_reached:
                        return
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if depth < MAX_DEPTH and entry.name not in ("blobs", "refs"):
                            waiting.append((folder / entry.name, depth + 1))
                    elif is_model(entry.name) and not _LATER_PART.search(entry.name):
                        yield folder / entry.name
        except OSError:
            unreadable.append(folder)
    if unreadable:
        more = f" and {counted(len(unreadable) - 1, 'more folder')}" if len(unreadable) > 1 else ""
        notes.append(f"cannot read {unreadable[0]}{more}; models there are not listed")


def _named(files: Iterable[tuple[Path, SearchedFolder]]) -> Mapping[str, FoundFile]:
    """The files by their names. Of several versions in the Hub's cache the first one counts."""
    of_hub: dict[str, FoundFile] = {}
    others: dict[str, FoundFile] = {}
    for path, folder in files:
        repository, snapshot = _repository(path)
        own_folder = path.parent if folder.name == LM_STUDIO else snapshot
        found = FoundFile(path, folder.name, None if own_folder is None else _projector(path, own_folder))
        name = f"hf.co/{repository}:{quant_of(path.name)}"
        if repository is None or (name in of_hub and of_hub[name].path.name != path.name):
            others[str(path)] = found
        else:
            of_hub.setdefault(name, found)
    names = short_names(others)
    return MappingProxyType(of_hub | {names[path]: found for path, found in others.items()})


def _repository(path: Path) -> tuple[str | None, Path | None]:
    """`user/repo` of a file in the Hub's cache (`models--user--repo/snapshots/COMMIT/...`), and the folder of that
    commit; None elsewhere."""
    parts = path.parts
    if "snapshots" not in parts:
        return None, None
    at = parts.index("snapshots")
    user, _, name = parts[at - 1].removeprefix("models--").partition("--")
    if not parts[at - 1].startswith("models--") or not name:
        return None, None
    return f"{user}/{name}", Path(*parts[: at + 2])


def _projector(path: Path, own_folder: Path) -> Path | None:
    """The projector of a model, if there is one in its folder or above, within what is only of this model."""
    folders = [folder for folder in path.parents if folder.is_relative_to(own_folder)]
    names = []
    for folder in folders:
        with contextlib.suppress(OSError):
            names += [
                each.relative_to(own_folder).as_posix()
                for each in folder.iterdir()
                if each.name.lower().endswith(SUFFIX)
            ]
    projector = projector_of(path.relative_to(own_folder).as_posix(), names)
    return None if projector is None else own_folder / projector


def _lm_studio_folders() -> list[Path]:
    """LM Studio's folders: its usual ones, and the one that its settings name."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder
        return []
    studio = home / ".lmstudio"
    pointer = home / ".lmstudio-home-pointer"
    with contextlib.suppress(OSError, ValueError), pointer.open(encoding="utf-8") as named:
        studio = Path(named.read(_PATH_LIMIT_CHARS).strip() or studio)
    folders = [studio / "models", home / ".cache" / "lm-studio" / "models"]
    with (
        contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError),
        (studio / "settings.json").open("rb") as file,
    ):
        folders.insert(0, Path(json.loads(file.read(_JSON_LIMIT_BYTES))["downloadsFolder"]))
    return list(dict.fromkeys(folders))
