"""What drafts have brought to each model on each layout, kept in a file, so that the next start knows it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.llama_cpp.coordinators.speculation import DraftResults
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config

logger = logging.getLogger(__name__)

TOKENS_KEPT = 20_000
"""Results fade, so that no more than the last tokens count, about so many."""
FORGOTTEN_AFTER_S = 7 * 86400.0
"""After a week, drafts that did not pay are tried again: engines, machines and texts change."""
ENTRIES_KEPT = 200
SAVED_AFTER_S = 1.0
_FILE = "drafts.json"
_MOST = 1e12

Key = tuple[str, str, str]
"""Model file, layout and kind of speculation."""


def model_key(path: Path) -> str:
    """What distinguishes a model's file from another, and from its next version; "" if it is gone."""
    try:
        about = path.stat()
    except OSError:
        return ""
    return f"{path} {about.st_size} {about.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class _Entry:
    results: DraftResults = field(default_factory=DraftResults)
    at: float = 0.0


class DraftMemory:
    """The results of this user's coordinators, in a file that all kernels share. Lives on the I/O loop."""

    def __init__(self) -> None:
        self._new: dict[Key, DraftResults] = {}
        self._saving: asyncio.Task[None] | None = None

    async def of(self, model: str, layout: str) -> dict[str, DraftResults]:
        """What drafts have brought to a model on a layout, by kind."""
        await self.save()
        entries = await asyncio.to_thread(_read)
        return {
            kind: entry.results
            for (a_model, a_layout, kind), entry in entries.items()
            if (a_model, a_layout) == (model, layout)
        }

    def add(self, key: Key, results: DraftResults) -> None:
        """Add those of an answer; the file has them a second later."""
        self._new[key] = _sum(self._new.get(key, DraftResults()), results)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save_soon())

    async def _save_soon(self) -> None:
        while self._new:
            await asyncio.sleep(SAVED_AFTER_S)
            await self.save()

    async def save(self) -> None:
        """Write what was added. An error is logged: no answer depends on it."""
        new, self._new = self._new, {}
        if not new:
            return
        try:
            async with registry.locked("drafts", "writing results of drafts"):
                await asyncio.to_thread(_write, new)
        except (SollolError, OSError) as error:
            logger.warning("the results of drafts were not kept: %s", error)


def _sum(old: DraftResults, new: DraftResults) -> DraftResults:
    kept = max(0.0, 1 - new.tokens / TOKENS_KEPT) if old.tokens + new.tokens > TOKENS_KEPT else 1.0
    return DraftResults(
        **{name.name: getattr(old, name.name) * kept + getattr(new, name.name) for name in fields(DraftResults)}
    )


def _write(new: Mapping[Key, DraftResults]) -> None:
    entries = _read()
    for key, results in new.items():
        old = entries.pop(key, _Entry())
        entries[key] = _Entry(_sum(old.results, results), time.time())
    newest = sorted(entries.items(), key=lambda entry: entry[1].at)[-ENTRIES_KEPT:]
    data = [
        {"model": key[0], "layout": key[1], "kind": key[2], "at": entry.at, **asdict(entry.results)}
        for key, entry in newest
    ]
    write_private(config.state_file(_FILE), json.dumps(data, indent=1))


def _read() -> dict[Key, _Entry]:
    """The entries that are not too old; none if the file is missing or damaged."""
    text = read_private(config.state_file(_FILE))
    if text is None:
        return {}
    try:
        found = [_checked(data) for data in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        logger.warning("%s is damaged and is ignored; it will be written again", _FILE)
        return {}
    return {key: entry for key, entry in found if time.time() - entry.at < FORGOTTEN_AFTER_S}


def _checked(data: Mapping[str, Any]) -> tuple[Key, _Entry]:
    numbers = {name: float(data[name]) for name in ("at", *(each.name for each in fields(DraftResults)))}
    if not all(math.isfinite(number) and 0 <= number <= _MOST for number in numbers.values()):
        raise ValueError("a number")
    at = numbers.pop("at")
    return (str(data["model"]), str(data["layout"]), str(data["kind"])), _Entry(DraftResults(**numbers), at)
