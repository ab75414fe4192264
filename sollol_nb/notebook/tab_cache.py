"""Names for tab completion from slow places (disks, nodes), read behind the completer's back.

Each place is read in a thread of its own that ends with the reading, so that a place that hangs delays no other.
A completion waits a moment for those that it has just asked, and takes what is known.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait

Read = Callable[[], Iterable[str]]

WAIT_LIMIT_S = 0.03
"""One wait in each completion: people feel a Tab that takes longer than 50 ms."""
FRESH_FACTOR, MAX_FRESH_S = 20.0, 30.0
"""What was read is taken as it is for so many times as long as reading it took: a quick disk is read each time."""
CLOSE_LIMIT_S = 4.0


class CompletionCache:
    """What places said last, by their keys."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, tuple[str, ...]] = {}
        self._fresh_until: dict[str, float] = {}
        self._under_way: dict[str, Future[None]] = {}
        self._closed = False

    def names(self, places: Mapping[str, Read]) -> dict[str, tuple[str, ...]]:
        """The names that each place has now, as far as it says so within `WAIT_LIMIT_S`, else had before."""
        wait(self.refresh(places), timeout=WAIT_LIMIT_S)
        with self._lock:
            return {key: self._names.get(key, ()) for key in places}

    def refresh(self, places: Mapping[str, Read]) -> list[Future[None]]:
        """Begin to read those places that are not fresh, and not being read already."""
        begun = []
        with self._lock:
            for key, read in places.items():
                is_fresh = time.monotonic() < self._fresh_until.get(key, 0.0)
                if self._closed or is_fresh or key in self._under_way:
                    continue
                self._under_way[key] = Future()
                begun.append(self._under_way[key])
                thread = threading.Thread(
                    target=self._read, args=(key, read), name=f"sollol_nb completion {key}", daemon=True
                )
                thread.start()
        return begun

    def close(self) -> None:
        """Read nothing any more. Waits for what is being read, but not for a place that hangs."""
        with self._lock:
            self._closed = True
            under_way = list(self._under_way.values())
        wait(under_way, timeout=CLOSE_LIMIT_S)

    def _read(self, key: str, read: Read) -> None:
        names: tuple[str, ...] | None = None
        began = time.monotonic()
        with contextlib.suppress(Exception):  # a broken place has no names; what it had before is kept
            names = tuple(read())
        with self._lock:
            if names is not None:
                self._names[key] = names
            ended = time.monotonic()
            self._fresh_until[key] = ended + min(FRESH_FACTOR * (ended - began), MAX_FRESH_S)
            done = self._under_way.pop(key)
        done.set_result(None)
