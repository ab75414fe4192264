"""Which names of models are files, and how people read those: without folders and suffix."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath, PureWindowsPath

_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.gguf\Z", re.IGNORECASE)
_PATH = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
"""How a path begins, and no name of an Ollama model."""
_BLOB = re.compile(r".*[/\\]sha256[-:](?P<digits>[0-9a-f]{12})[0-9a-f]{52}", re.IGNORECASE | re.DOTALL)

_ENDPOINT = re.compile(r"(?P<host>\[[^\]]+\]|[^:\s/]+):(?P<port>\d+)")
_HOST_NAME = re.compile(r"(?P<host>[^\s/:.]*[A-Za-z][^\s/:.]*)\.[^\s/:]+(?P<port>:\d+)")


def is_file_name(model: str) -> bool:
    """Whether a model's name is the path of a GGUF file: it ends in `.gguf`, is one of Ollama's blobs, or begins
    as a path does."""
    return bool(_SUFFIX.search(model) or _PATH.match(model) or _BLOB.fullmatch(model))


def short_name(model: object) -> str:
    """A model's name for display: of a file its name without folders, `.gguf` and the number of a part; of one of
    Ollama's blobs the first digits of its digest; any other name as it is."""
    text = str(model)
    blob = _BLOB.fullmatch(text)
    if blob is not None:
        return f"sha256-{blob['digits']}"
    return (_SUFFIX.sub("", _parts(text)[-1]) or text) if is_file_name(text) else text


def short_names(models: Iterable[str]) -> dict[str, str]:
    """The name of each of these models for display. Files with the same name get as many of their folders as tell
    them apart, such as `a/model` and `b/model`."""
    same: defaultdict[str, list[str]] = defaultdict(list)
    for model in dict.fromkeys(models):
        same[short_name(model)].append(model)
    names: dict[str, str] = {}
    for name, group in same.items():
        depth = 1
        found = dict.fromkeys(group, name)
        while len(set(found.values())) < len(group) and depth < max(len(_parts(model)) for model in group):
            depth += 1
            found = {model: "/".join([*_parts(model)[-depth:-1], name]).lstrip("/") for model in group}
        names |= found if len(set(found.values())) == len(group) else {model: model for model in group}
    return names


def fitted_name(model: object, limit_chars: int) -> str:
    """A model's name for display, at most so long: `…` replaces its middle, since both ends tell models apart."""
    name = short_name(model)
    end = (limit_chars - 1) // 2
    return name if len(name) <= limit_chars else f"{name[: limit_chars - 1 - end]}…{name[-end:]}"


def short_endpoints(names: Iterable[str]) -> dict[str, str]:
    """The name of each of these workers for a small space.

    As by `without_domains`; and where all hosts are the same, only the port is left (`:50052`), where all ports
    are, only the host. Names that are no endpoints stay as they are.
    """
    short = without_domains(names)
    split = {name: (host, port) for name, text in short.items() for host, _, port in [text.rpartition(":")]}
    if len(short) < 2 or not all(_ENDPOINT.fullmatch(text) for text in short.values()):
        return short
    if len({host for host, _ in split.values()}) == 1:
        return {name: f":{port}" for name, (_, port) in split.items()}
    has_one_port = len({port for _, port in split.values()}) == 1
    return {name: host if has_one_port else f"{host}:{port}" for name, (host, port) in split.items()}


def without_domains(names: Iterable[str]) -> dict[str, str]:
    """The name of each of these workers: `gpu1:50052` for `gpu1.lab.example.org:50052`, unless two would have the
    same. Addresses stay as they are."""
    found = {name: _HOST_NAME.fullmatch(name) for name in names}
    short = {name: match["host"] + match["port"] if match else name for name, match in found.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def without_home(text: str) -> str:
    """A text in which paths below the home folder begin with `~`, so that a saved notebook does not name it."""
    home = os.path.expanduser("~").rstrip(r"\/")  # noqa: PTH111 - the one of pathlib raises where there is none
    return re.sub(rf"(?<![\w.~/\\-]){re.escape(home)}(?=[\\/])", "~", text) if home else text


def _parts(path: str) -> tuple[str, ...]:
    return (PureWindowsPath(path) if "\\" in path else PurePath(path)).parts or (path,)
