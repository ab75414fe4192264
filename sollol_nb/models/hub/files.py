"""Which files of a repository on the Hugging Face Hub make up a model: pure functions over the list of its files.

The rules are those of llama.cpp's `-hf` (`common/download.cpp`) and of `ollama pull hf.co/...`: `Q4_K_M` where no
quantization is named, all parts of a split file, and the nearest `mmproj` file, which lets the model read images.
Where these two take the first file that fits, an error lists what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sollol_nb.errors import ModelNotFoundError
from sollol_nb.runtime.amounts import shown

DEFAULT_QUANT = "Q4_K_M"
SUFFIX = ".gguf"

_HOSTS = ("hf.co", "huggingface.co")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE | re.DOTALL)
_QUANT = re.compile(r"(?:^|[-./_])((?:UD-)?(?:I?Q|TQ|B?F|FP|MXFP|NVFP)\d[A-Z0-9_]*)$", re.IGNORECASE)
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""What is in the names of GGUF files that are only parts of models or projectors."""
_MOST_LISTED = 40
_LONGEST_NAME_CHARS = 96


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model on the Hub as a user names it: `hf.co/user/repo`, `hf.co/user/repo:Q5_K_M`, or `...:file.gguf`.

    Attributes:
        repository: `user/repo`.
        wanted: the quantization, or the name of a file; "" if the user leaves that open.
    """

    repository: str
    wanted: str = ""

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Read a reference; `hf.co/` and `https://` may be missing.

        Raises:
            ModelNotFoundError: it names no repository.
        """
        rest = re.sub(r"^https?://", "", text.strip())
        host, _, path = rest.partition("/")
        rest = path if host.lower() in _HOSTS else rest
        repository, _, wanted = rest.rstrip("/").partition(":")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            raise ModelNotFoundError(
                f"{shown(text)} is not a repository of the Hugging Face Hub; use hf.co/user/repo or "
                f"hf.co/user/repo:quant, or get a model of Ollama with `ollama pull`"
            )
        return cls(repository, "" if wanted.lower() == "latest" else wanted)

    def __str__(self) -> str:
        return f"hf.co/{self.repository}" + (f":{self.wanted}" if self.wanted else "")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: its path in the repository.
        size_bytes: its size.
        digest: hex digits; its SHA-256 if it is stored with LFS, else its hash as a Git blob (SHA-1). The Hub's
            ETag, too.
    """

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files that make up a model.

    Attributes:
        quant: its quantization as the files' names have it; else the part of the name in which it differs.
        parts: the file, or all parts of a split one in their order.
        projector: the file that lets the model read images; None without one.
    """

    quant: str
    parts: tuple[HubFile, ...]
    projector: HubFile | None = None

    @property
    def files(self) -> tuple[HubFile, ...]:
        """All files."""
        return self.parts if self.projector is None else (*self.parts, self.projector)

    @property
    def size_bytes(self) -> int:
        """Their size."""
        return sum(file.size_bytes for file in self.files)


def choose_model(reference: HubReference, files: Iterable[HubFile]) -> HubModel:
    """The model that a reference means.

    Raises:
        ModelNotFoundError: there is no such model, or more than one; the message lists what there is.
    """
    gguf = sorted((file for file in files if file.name.lower().endswith(SUFFIX)), key=lambda file: file.name)
    models = _models(gguf)
    if not models:
        raise ModelNotFoundError(
            f"hf.co/{reference.repository} has no GGUF file; look for a repository of the same model with GGUF "
            "in its name"
        )
    found = _named(models, reference.wanted) if reference.wanted else _default(models)
    if len(found) != 1:
        raise ModelNotFoundError(_choice(reference, found or models, is_ambiguous=bool(found)))
    ((stem, parts),) = found.items()
    missing = _missing_parts(parts)
    if missing:
        raise ModelNotFoundError(f"hf.co/{reference.repository} has not all parts of {stem}: {missing} is missing")
    by_name = {file.name: file for file in gguf}
    projector = projector_of(parts[0].name, by_name)
    return HubModel(
        _printable(quant_of(parts[0].name)), tuple(parts), None if projector is None else by_name[projector]
    )


def quant_of(name: str) -> str:
    """The quantization that a file's name ends with, such as `Q4_K_M`; else its folder's, else its name."""
    path = PurePosixPath(_stem(name))
    for text in (path.name, path.parent.name):
        match = _QUANT.search(text)
        if match is not None:
            return match[1].upper()
    return path.name


def is_model(name: str) -> bool:
    """Whether a file's name is that of a model, and not of what belongs to one (projectors, drafting heads)."""
    lower = PurePosixPath(name).name.lower()
    return lower.endswith(SUFFIX) and not any(part in lower for part in _NO_MODELS)


def projector_of(model: str, names: Iterable[str]) -> str | None:
    """Of the names of GGUF files, that of the projector in the model's folder, or in the nearest one above, with
    the nearest number of bits. All are paths in one repository or folder."""
    folders = list(PurePosixPath(model).parents)
    candidates = []
    for name in names:
        path = PurePosixPath(name)
        if "mmproj" in path.name.lower() and path.parent in folders:
            candidates.append((folders.index(path.parent), abs(_bits(name) - _bits(model)), name))
    return min(candidates)[-1] if candidates else None


def _models(gguf: Sequence[HubFile]) -> dict[str, list[HubFile]]:
    """The parts of each model, by the name of the model's file without suffix and number."""
    models: dict[str, list[HubFile]] = {}
    for file in gguf:
        if is_model(file.name):
            models.setdefault(_stem(file.name), []).append(file)
    return models


def _stem(name: str) -> str:
    stem = name[: -len(SUFFIX)]
    match = _SPLIT.fullmatch(stem)
    return match["stem"] if match is not None else stem


def _named(models: dict[str, list[HubFile]], wanted: str) -> dict[str, list[HubFile]]:
    lower = wanted.lower()
    if lower.endswith(SUFFIX):
        return {
            stem: parts
            for stem, parts in models.items()
            if any(lower in (file.name.lower(), PurePosixPath(file.name).name.lower()) for file in parts)
        }
    exact = {stem: parts for stem, parts in models.items() if quant_of(parts[0].name).lower() == lower}
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}[.-]", re.IGNORECASE)
    return exact or {stem: parts for stem, parts in models.items() if pattern.search(parts[0].name)}


def _default(models: dict[str, list[HubFile]]) -> dict[str, list[HubFile]]:
    return models if len(models) == 1 else _named(models, DEFAULT_QUANT)


def _choice(reference: HubReference, models: dict[str, list[HubFile]], *, is_ambiguous: bool) -> str:
    """The error that lists what can be chosen."""
    quants = [_printable(quant_of(parts[0].name)) for parts in models.values()]
    by_file = is_ambiguous or len(set(quants)) < len(quants)
    listed = []
    for quant, parts in zip(quants, models.values(), strict=True):
        name = _printable(PurePosixPath(parts[0].name).name) if by_file else quant
        listed.append(f"{name} ({shown_size(sum(file.size_bytes for file in parts))})")
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    there = f"{', '.join(listed[:_MOST_LISTED])}{more}"
    what = shown(reference.wanted) if reference.wanted else DEFAULT_QUANT
    problem = f"has several files of {what}" if is_ambiguous else f"has no {what}"
    example = _printable(PurePosixPath(next(iter(models.values()))[0].name).name) if by_file else quants[0]
    repository = f"hf.co/{reference.repository}"
    return f"{repository} {problem}; choose one, as in {repository}:{example}. It has {there}"


def _missing_parts(parts: Sequence[HubFile]) -> str:
    """The name of the first part that is missing; "" if all are there."""
    match = _SPLIT.fullmatch(parts[0].name[: -len(SUFFIX)])
    if match is None:
        return ""
    names = {file.name.lower() for file in parts}
    stem, count = match["stem"], int(match["count"])
    wanted = (f"{stem}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1))
    return next((_printable(name) for name in wanted if name.lower() not in names), "")


def _bits(name: str) -> int:
    digits = re.search(r"\d+", quant_of(name))
    return int(digits[0]) if digits is not None else 0


def folder_name(repository: str) -> str:
    """The name of a repository's folder in the cache."""
    return f"models--{repository.replace('/', '--')}"


def shown_size(size_bytes: float) -> str:
    """`4.92 GB`, `12.3 MB`."""
    return f"{size_bytes / 1e9:,.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.3g} MB"


def _printable(name: str) -> str:
    """A name that a server sent, for a message: on one line and not too long."""
    text = "".join(character if character.isprintable() else "?" for character in name)
    return text if len(text) <= _LONGEST_NAME_CHARS else f"{text[: _LONGEST_NAME_CHARS - 1]}…"
