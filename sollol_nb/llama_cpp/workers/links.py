"""The links that a router uses: started where none runs, shared with other kernels, watched, and let go.

A link leads to machines whose workers are reachable through it (see `llama_cpp/links/`). Which workers these are,
its registry entry says; it is read at every refresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.llama_cpp.links import link
from sollol_nb.llama_cpp.links.link import LinkedWorker, linked_workers, start_link
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.local_workers import KnownWorkers
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import SSH

POLL_S = 0.1


@dataclass(slots=True)
class _Link:
    """One target that this router uses.

    Attributes:
        process: its link; None while none runs.
        state, detail: as its registry entry says, or why none runs.
        workers: reachable through it, by endpoint.
    """

    process: EngineProcess | None = None
    state: str = "unknown"
    detail: str = "not connected yet"
    workers: dict[str, LinkedWorker] = field(default_factory=dict)


class Links:
    """The links of one router, each with a lease. Lives on the I/O loop."""

    def __init__(self, known: KnownWorkers, events: EventBus) -> None:
        self._known = known
        self._events = events
        self._links: dict[str, _Link] = {}

    @property
    def targets(self) -> list[str]:
        """What the links lead to, in the order they were added."""
        return list(self._links)

    def add(self, target: str) -> None:
        """Use a target from now on; adding twice is fine. It is not connected before `connect`."""
        self._links.setdefault(target, _Link())

    def worker(self, endpoint: str) -> LinkedWorker | None:
        """What is known about a worker that is reached through a link; None for other workers."""
        for known in self._links.values():
            if endpoint in known.workers:
                return known.workers[endpoint]
        return None

    def target_of(self, endpoint: str) -> str | None:
        """The target that a worker is reached through; None for other workers."""
        return next((target for target, known in self._links.items() if endpoint in known.workers), None)

    async def connect(
        self, *, keep_alive_s: float | None, limit_s: float | None = None, spec: Mapping[str, Any] | None = None
    ) -> None:
        """See that each target has a link, and wait until each is ready or cannot be.

        Args:
            keep_alive_s: seconds that a link lives without a router and without a coordinator; None is forever.
            limit_s: seconds to wait; None waits as long as links connect or install llama.cpp there.
            spec: arguments of links over SSH.
        """
        if not self._links:
            return
        async with registry.locked("links", "connecting to other machines"):
            await self.refresh()
            for target, known in self._links.items():
                if known.process is None:
                    await self._start(target, known, keep_alive_s, spec or {})
        loop = asyncio.get_running_loop()
        deadline = None if limit_s is None else loop.time() + limit_s
        while any(known.process and known.state not in link.SETTLED for known in self._links.values()):
            if deadline is not None and loop.time() > deadline:
                return
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def _start(self, target: str, known: _Link, keep_alive_s: float | None, spec: Mapping[str, Any]) -> None:
        try:
            program, spec = ("ssh", spec) if target.startswith(SSH) else ("relay", {})
            known.process = await start_link(program, target, spec, keep_alive_s=keep_alive_s)
            await known.process.hold()
            known.state, known.detail = link.CONNECTING, f"connecting to {target}"
        except SollolError as error:
            known.state, known.detail = "down", str(error)

    async def refresh(self) -> None:
        """Read the registry entries of the links, and share those that other kernels have started."""
        if not self._links:
            return
        entries = {entry.name: entry for entry in await asyncio.to_thread(registry.entries, registry.LINK)}
        for target, known in self._links.items():
            entry = entries.get(target)
            if known.process is not None and not known.process.is_running():
                self._note_end(target, known)
            if entry is None:
                continue
            if known.process is None:
                process = await EngineProcess.adopt(entry)
                if process is None or not await process.hold():
                    continue
                known.process = process
            self._note(target, known, entry)

    def _note(self, target: str, known: _Link, entry: Entry) -> None:
        state, detail = str(entry.about.get("state")), str(entry.about.get("detail"))
        before, known.state, known.detail = known.state, state, detail
        self._replace_workers(known, linked_workers(entry))
        if state != before and state in (link.READY, link.LOST):
            kind = EventKind.LINK_READY if state == link.READY else EventKind.LINK_LOST
            self._events.publish(kind, target, detail)

    def _note_end(self, target: str, known: _Link) -> None:
        assert known.process is not None
        report = known.process.exit_report
        last = report.tail[-1] if report and report.tail else ""
        failed = last.removeprefix(link.FAILED) if last.startswith(link.FAILED) else ""
        why = failed or (report and report.why) or "its process ended"
        known.process, known.state, known.detail = None, "down", failed or f"{target}: {why}"
        self._replace_workers(known, {})
        self._events.publish(EventKind.LINK_LOST, target, f"lost {target}: {why}")

    def _replace_workers(self, known: _Link, workers: dict[str, LinkedWorker]) -> None:
        for endpoint in known.workers.keys() - workers.keys():
            self._known.forget(endpoint)
        known.workers = workers
        for endpoint in workers:
            self._known.note(endpoint)

    def statuses(self) -> list[WorkerStatus]:
        """The targets through which no worker can be reached now, as workers that are down."""
        return [
            WorkerStatus(
                endpoint=target,
                state="down" if known.process is None else known.state,
                detail=known.detail,
                held_by=None,
                probe=None,
                is_local=False,
                name=target,
            )
            for target, known in self._links.items()
            if not known.workers
        ]

    async def let_go(self, targets: Sequence[str] | None = None, *, force: bool = False) -> list[Ended]:
        """Stop using targets (all, or these); links that no other process uses end.

        Args:
            force: end the others, too.
        """
        ended = []
        for target in [*self._links] if targets is None else targets:
            known = self._links.pop(target, None)
            if known is None:
                continue
            self._replace_workers(known, {})
            if known.process is not None:
                users: list[str] = []
                if force:
                    await known.process.stop()
                else:
                    users = await known.process.stop_unless_foreign()
                ended.append(Ended(kind=registry.LINK, name=target, users=tuple(users)))
        return ended

    def detach(self) -> None:
        """Disconnect from all; they live on for their keep_alive."""
        for known in self._links.values():
            if known.process is not None:
                known.process.detach()
        self._links.clear()
