"""Adopting a coordinator of a model that another kernel or router has started, instead of loading the model again.

Where no worker is free, a running one is adopted that differs from what was asked, too, and says in what. Only
what would make answers wrong forbids it: another file or another way to read it, or a smaller context.
"""

from __future__ import annotations

import asyncio

from sollol_nb.layers.strategies import AUTO as AUTO_STRATEGY
from sollol_nb.layers.strategies import LATENCY_AWARE
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.planning import Start
from sollol_nb.llama_cpp.coordinators.speculation import AUTO, OFF
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.text.tables import counted

MAY_DIFFER = frozenset(
    {"context_tokens", "slots", "strategy", "wanted_workers", "speculates", "engine", "engine_version"}
)
"""What a running coordinator need not have exactly as wanted: these do not change what it answers, if its context
is not smaller. All else that is wanted must agree."""


class Adopter:
    """Adopts coordinators for starts. Lives on the I/O loop."""

    def __init__(self, workers: Workers, events: EventBus) -> None:
        self._workers = workers
        self._events = events

    async def adopt(self, start: Start, *, exact: bool, as_it_is: bool = False) -> Coordinator | None:
        """A coordinator of the model that another kernel or router started and that is as wanted, or None.

        Args:
            exact: only one that was started with the same settings.
            as_it_is: also one that differs, as far as its answers are the same.
        """
        if self._workers.has_named:  # their addresses tell whether it holds them under other names
            await self._workers.refresh_holders()
        found: list[tuple[list[str], Entry]] = []
        for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
            differences = self._differences(start, entry, exact)
            # A standby may have got fewer workers than wanted.
            if differences is not None and (as_it_is or start.standby_of or not differences):
                found.append((differences, entry))
        for differences, entry in sorted(found, key=lambda candidate: len(candidate[0])):
            coordinator = await Coordinator.adopt(entry, gate=start.gate)
            if coordinator is None:
                continue
            if start.standby_of:
                return coordinator
            if coordinator.standby_of:
                await coordinator.set_standby_of("")
            if differences:
                coordinator.compromise = (
                    f"no worker is free for what was requested, so the running coordinator is used: it has "
                    f"{', '.join(differences)}"
                )
            owner = registry.describe_owner(entry.about)
            if entry.about.get("load_ms"):
                coordinator.loaded_by = owner
            else:
                message = f"{start.model} is being loaded by {owner}; waiting for it"
                self._events.publish(EventKind.COORDINATOR_STARTING, start.model, message)
            return coordinator
        return None

    def _differences(self, start: Start, entry: Entry, exact: bool) -> list[str] | None:
        """In what a running coordinator differs from what a start wants; None if it cannot be used instead."""
        about, wanted = entry.about, start.wanted
        if not _may_be_used(start, entry):
            return None
        if any(about.get(name) != value for name, value in wanted.items() if name not in MAY_DIFFER):
            return None
        if self._workers.has_named and not self._workers.knows_all(entry.workers):
            return None  # the user has named the workers to use
        if start.route.needs_worker and not entry.workers:
            return None
        if exact or start.layout is not None:
            return [] if all(about.get(name) == value for name, value in wanted.items()) else None
        drafts = (about.get("speculation") or {}).get("kind", OFF)
        if start.speculation == OFF != drafts:
            return None
        context_tokens, slots = about.get("context_tokens") or 0, about.get("slots") or 0
        if context_tokens < wanted["context_tokens"]:
            return None
        differences = []
        if slots < wanted["slots"]:
            differences.append(f"{counted(slots, 'slot')} instead of {wanted['slots']}")
        if wanted["wanted_workers"] not in (None, len(entry.workers)):
            differences.append(f"{counted(len(entry.workers), 'worker')} instead of {wanted['wanted_workers']}")
        used = (about.get("plan") or {}).get("strategy", about.get("strategy"))
        is_best = wanted["strategy"] == AUTO_STRATEGY and used == LATENCY_AWARE
        if wanted["strategy"] not in (used, about.get("strategy")) and not is_best:
            differences.append(f"layer strategy {used} instead of {wanted['strategy']}")
        if start.speculation not in (AUTO, OFF, drafts):
            differences.append(f"speculation {drafts} instead of {start.speculation}")
        if (about.get("engine"), about.get("engine_version")) != (wanted["engine"], wanted["engine_version"]):
            differences.append(f"llama.cpp {about.get('engine_version')} instead of {wanted['engine_version']}")
        return differences


def _may_be_used(start: Start, entry: Entry) -> bool:
    """Whether an entry has the part that is started: a standby waits for the end of the one that it belongs to;
    from then on every kernel may use it, but not for a model that was ended for the sake of a faster layout."""
    if start.standby_of or not entry.standby_of:
        return entry.standby_of == start.standby_of
    if start.by_speed:
        return False
    main = registry.find(entry.standby_of)
    return main is None or not main.is_alive()
