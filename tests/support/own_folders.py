"""Settings with which nothing that belongs to the user is read or written, except engines and models for tests."""

from __future__ import annotations

import os
from pathlib import Path

from sollol_nb.settings import config
from sollol_nb.settings.table import SETTINGS

NO_OLLAMA = "127.0.0.1:9"  # the discard port: nothing answers there
SHARED = ("calibration", "engines", "ollama", "sources", "test-models")
"""Folders of the user's cache folder with what takes long to build or fetch. Tests use them, and add to them."""


def own_settings(folder: Path) -> dict[str, str | None]:
    """Environment variables, for folders inside this one; None is a variable that must not be set."""
    cache, state = folder / "cache", folder / "state"
    for own in (cache, state):
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in SHARED:
        shared = config.cache_dir() / name
        shared.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (cache / name).exists():
            (cache / name).symlink_to(shared.resolve(), target_is_directory=True)
    others = {setting.variable: None for setting in SETTINGS.values() if setting.name != "llama_cpp"}
    return {
        **others,
        "SOLLOL_STATE_DIR": str(state),
        "SOLLOL_CACHE_DIR": str(cache),
        "SOLLOL_CONFIG": "0",  # not the user's settings file
        "SOLLOL_KEEP_ALIVE": "60s",  # if the tests are killed, their engines end soon
        "OLLAMA_HOST": NO_OLLAMA,
        "OLLAMA_MODELS": str(folder / "ollama"),
        "HF_HOME": str(folder / "hub"),
        "LLAMA_CACHE": str(folder / "llama.cpp"),
        "HF_HUB_CACHE": None,
        "HUGGINGFACE_HUB_CACHE": None,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_TOKEN": None,
    }


def use(settings: dict[str, str | None]) -> dict[str, str | None]:
    """Set these variables; returns the settings with which this undoes it."""
    before = {name: os.environ.get(name) for name in settings}
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before
