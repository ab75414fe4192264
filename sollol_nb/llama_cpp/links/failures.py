"""Why links have failed, in one line each, for all kernels: the registry entry of a link ends with it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config

KEPT = 50


def read() -> dict[str, str]:
    """Targets whose last link has failed, each with the reason."""
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(read_private(_path()) or "{}")
        if isinstance(data, dict):
            return {target: why for target, why in data.items() if isinstance(why, str)}
    return {}


def note(target: str, why: str) -> None:
    """Note why a link has failed. Two processes may note the same."""
    reasons = read()
    if reasons.get(target) != why:
        reasons.pop(target, None)
        _write({**reasons, target: why})


def forget(target: str) -> None:
    """The target is connected."""
    reasons = read()
    if reasons.pop(target, None) is not None:
        _write(reasons)


def _path() -> Path:
    return config.registry_dir() / "link-failures"  # files of engines end with .json


def _write(reasons: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # the disk is full: this kernel still knows the reason
        write_private(_path(), json.dumps(dict(list(reasons.items())[-KEPT:])))
