"""What workers have cached of models, as far as it was loaded onto them: kept in a file.

Each worker has a cache of its own, which belongs to what its calibration belongs to, not to a port that changes
(`Workers.cache_of`). What is remembered is only a hint where layers should go: the engine compares hashes of the
tensors themselves, so a cache that was emptied costs nothing but the bytes that are sent again. A load that shows
that a cache is emptier than remembered makes it forgotten.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.gguf.facts import MAX_BLOCKS
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config

logger = logging.getLogger(__name__)

RECORDS_KEPT = 500
TEXT_LIMIT = 4096
_FILE = "cached_layers.json"

Record = tuple[str, str]
"""Whose cache, and which model file, as texts."""


@dataclass(frozen=True, slots=True)
class _Known:
    """The units of a model that a cache has, and when some were last loaded, in seconds since the epoch."""

    units: frozenset[int]
    loaded_at: float


class CachedUnits:
    """What is known of all caches, in a file that all kernels share. Lives on the I/O loop."""

    def __init__(self) -> None:
        self._known: dict[Record, _Known] = {}
        # Not written yet: caches of which all was forgotten, and what was noted since.
        self._forgotten: set[str] = set()
        self._changed: dict[Record, _Known] = {}
        self._seen: tuple[str, int, int] | None = None
        self._writing: asyncio.Task[None] | None = None

    def of(self, cache: str, model: Mapping[str, Any]) -> frozenset[int]:
        """The units of a model that a cache has.

        Args:
            cache: whose; see `Workers.cache_of`.
            model: the identity of its file.
        """
        self._read()
        known = self._known.get(_record(cache, model))
        return known.units if known is not None else frozenset()

    def note(self, model: Mapping[str, Any], loaded: Iterable[tuple[str, Collection[int]]]) -> None:
        """Remember the units that were loaded, by cache; the file is written in the background."""
        self._read()
        for cache, units in loaded:
            record = _record(cache, model)
            before = self._known.get(record)
            kept = before.units if before is not None else frozenset[int]()
            self._known[record] = self._changed[record] = _Known(kept | frozenset(units), time.time())
        self._write_soon()

    def forget(self, caches: Collection[str]) -> None:
        """Forget what these caches have."""
        self._read()
        if any(record[0] in caches for record in self._known):
            self._forgotten |= set(caches)
            self._changed = {record: known for record, known in self._changed.items() if record[0] not in caches}
            self._apply(self._forgotten, self._changed)
            self._write_soon()

    async def saved(self) -> None:
        """Wait until what was noted is written down."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    def _write_soon(self) -> None:
        is_new = self._changed or self._forgotten
        if is_new and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write())

    def _apply(self, forgotten: Collection[str], changed: Mapping[Record, _Known]) -> None:
        kept = {record: known for record, known in self._known.items() if record[0] not in forgotten}
        self._known = {**kept, **changed}

    async def _write(self) -> None:
        try:
            async with registry.locked("cached_layers", "writing what workers have cached"):
                while self._changed or self._forgotten:
                    changed, self._changed = self._changed, {}
                    forgotten, self._forgotten = self._forgotten, set()
                    self._read(again=True)
                    for record, known in changed.items():
                        before = self._known.get(record)
                        if before is not None and record[0] not in forgotten:
                            changed[record] = replace(known, units=known.units | before.units)
                    self._apply(forgotten, changed)
                    newest = sorted(self._known.items(), key=lambda item: item[1].loaded_at)[-RECORDS_KEPT:]
                    text = json.dumps([_as_data(record, known) for record, known in newest])
                    await asyncio.to_thread(write_private, config.state_file(_FILE), text)
        except (SollolError, OSError) as error:  # nothing is lost but the hint
            logger.info("what workers have cached was not written down: %s", error)

    def _read(self, *, again: bool = False) -> None:
        """Read the file, if it has changed."""
        try:
            path = config.state_file(_FILE)
            found = path.stat()
        except (SollolError, OSError):
            return
        seen = (str(path), found.st_mtime_ns, found.st_ino)
        if seen == self._seen and not again:
            return
        self._seen = seen
        try:
            data = json.loads(read_private(path) or "[]")
            self._known = dict(_from_data(item) for item in data[-RECORDS_KEPT:])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._known = {}
            logger.warning("%s is damaged and is ignored; the next load writes it again", path)
        self._apply(self._forgotten, self._changed)


def _record(cache: str, model: Mapping[str, Any]) -> Record:
    return cache, json.dumps(model, sort_keys=True)


def _as_data(record: Record, known: _Known) -> dict[str, Any]:
    return {
        "cache": record[0],
        "model": record[1],
        "loaded_at": known.loaded_at,
        "units": [[run.start, run.stop] for run in runs_of(known.units)],
    }


def _from_data(data: Mapping[str, Any]) -> tuple[Record, _Known]:
    """Raises KeyError, TypeError or ValueError for what is no record."""
    cache, model, loaded_at = data["cache"], data["model"], data["loaded_at"]
    if not (isinstance(cache, str) and isinstance(model, str) and max(len(cache), len(model)) <= TEXT_LIMIT):
        raise TypeError("a text is missing or too long")
    units: set[int] = set()
    for first, end in data["units"]:
        if type(first) is not int or type(end) is not int or not 0 <= first < end <= MAX_BLOCKS + 1:
            raise ValueError(f"{first}-{end} is no run of units")
        units.update(range(first, end))
    return (cache, model), _Known(frozenset(units), float(loaded_at))


def runs_of(units: Collection[int]) -> list[range]:
    """Units as runs without a gap, in order."""
    runs: list[range] = []
    for unit in sorted(units):
        if runs and runs[-1].stop == unit:
            runs[-1] = range(runs[-1].start, unit + 1)
        else:
            runs.append(range(unit, unit + 1))
    return runs
