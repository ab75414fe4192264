"""How long a coordinator waits for each of its workers: measured while tokens are generated, where that is needed.

The time of a token alone does not show which of several workers is slow. For a second or so of an answer, a thread
looks at the coordinator's connections (`processes/traffic.py`), wherever they lead; nothing is asked of the engine
or the workers. Only Linux reports them.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary, WeakSet

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.processes.traffic import Waits, watch_waits
from sollol_nb.settings.endpoints import addresses_of

WATCHED_TOKENS, LEAST_WATCHED_S = 20, 0.25
"""So much is watched, in one answer or in several."""
SHORTEST_PART_S = 0.002
"""Where a token takes less than this for each worker, the looks would be too far apart."""
CHECK_EVERY_S = 0.02
LOOKS_PER_TOKEN = 100
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.001, 0.02

OnMeasured = Callable[[Coordinator, Mapping[str, float]], None]
"""Gets the share of each worker in the watched time, by endpoint."""


class WaitWatch:
    """Watches coordinators when asked to. Lives on the I/O loop.

    Args:
        on_measured: called when enough was watched.
    """

    def __init__(self, on_measured: OnMeasured) -> None:
        self._on_measured = on_measured
        # By coordinator, not by URL, which the next one may have too.
        self._waits: WeakKeyDictionary[Coordinator, Waits] = WeakKeyDictionary()  # watched so far
        self._watching: WeakSet[Coordinator] = WeakSet()  # watched now
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, coordinator: Coordinator) -> None:
        """Watch a coordinator from its next token on; nothing where there are no workers, or the operating system
        reports no waits."""
        if sys.platform != "linux" or not coordinator.rpc_backends:
            return
        coordinator.pace.at_next_token = lambda: self._start(coordinator)

    def _start(self, coordinator: Coordinator) -> None:
        token_s = coordinator.pace.seconds_per_token
        if token_s is None or token_s < SHORTEST_PART_S * len(coordinator.rpc_backends):
            return
        if coordinator in self._watching:  # for another of its answers
            return
        self._watching.add(coordinator)
        task = asyncio.create_task(self._watch(coordinator, token_s))
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._watching.discard(coordinator)

        task.add_done_callback(end)

    async def _watch(self, coordinator: Coordinator, token_s: float) -> None:
        known = await asyncio.to_thread(
            lambda: {endpoint: addresses_of(endpoint) for endpoint in coordinator.rpc_backends}
        )
        peers = {address for addresses in known.values() for address in addresses}
        waits = self._waits.setdefault(coordinator, Waits())
        enough_s = max(LEAST_WATCHED_S, WATCHED_TOKENS * token_s)
        every_s = min(max(token_s / LOOKS_PER_TOKEN, SHORTEST_LOOK_S), LONGEST_LOOK_S)
        over = threading.Event()
        watching = asyncio.create_task(
            asyncio.to_thread(
                watch_waits, coordinator.pid, peers, waits, every_s=every_s, is_wanted=lambda: not over.is_set()
            )
        )
        try:
            while coordinator.pace.is_generating and waits.total_s < enough_s and not watching.done():
                await asyncio.wait({watching}, timeout=CHECK_EVERY_S)
        finally:
            over.set()
            is_reported = await watching
        if is_reported and waits.total_s >= enough_s and coordinator.is_running():
            del self._waits[coordinator]
            shares = {
                endpoint: sum(waits.seconds.get(address, 0.0) for address in addresses) / waits.total_s
                for endpoint, addresses in known.items()
            }
            self._on_measured(coordinator, shares)
