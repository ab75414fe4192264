"""The links that a router uses: started where none runs, shared with other kernels, watched, and let go.

A link leads to machines whose workers are reachable through it (see `llama_cpp/links/`). Its registry entry has
these workers; it is read at every refresh. A router only looks at the link of a target until it uses the target
(`connect`); from then on it holds a lease on the link.

A plan waits for a link while its first connect is in progress, however long llama.cpp is being installed there. It
waits for no link that was lost or has failed once; such a link connects in the background. The workers of a lost
link stay known, as `lost`, since they come back at the same endpoints. A link that failed, or that somebody has
stopped, is started again by the next request that needs workers, and by nothing else.

Of two targets that lead to the same devices, such as `ssh://gpu1` and `ssh://192.168.1.10`, the second is let go
once that is known: two sets of workers would share these devices. It is used again when the first one is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

from sollol_nb.errors import LinkError, SollolError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import failures, link, memberships
from sollol_nb.llama_cpp.links.link import LinkedWorker, linked_workers, start_link
from sollol_nb.llama_cpp.links.memberships import OpenInvitation
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.identities import second_targets
from sollol_nb.llama_cpp.workers.link_states import NOT_CONNECTED, PENDING, KnownLink, unique_names, why_ended
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.http_client import one_line
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import INVITATIONS, SSH
from sollol_nb.settings.kinds import split_command

POLL_S = 0.1
END_REPORT_S = 2.0
NAME_LIMIT = 64
"""Names come from other machines."""


class KnownWorkers(Protocol):
    """What `Links` needs of all workers that the router may use, to which the linked ones belong."""

    def note(self, endpoint: str) -> None:
        """Know a worker from now on."""

    def forget(self, endpoint: str) -> None:
        """Know a worker no longer."""

    def lose(self, endpoint: str, detail: str) -> None:
        """A known worker is not reachable any more, as its link reports."""


class Links:
    """The links of one router. Lives on the I/O loop.

    Attributes:
        invitations: with which workers can join this user's machine now.
    """

    def __init__(self, known: KnownWorkers, events: EventBus) -> None:
        self.invitations: tuple[OpenInvitation, ...] = ()
        self._known = known
        self._events = events
        self._links: dict[str, KnownLink] = {}
        self._elsewhere: dict[str, LinkedWorker] = {}  # behind the links of other routers
        self._names: dict[str, str] = {}
        self._former_names: dict[str, str] = {}  # of endpoints that a link had before it was started again
        self._refreshing = asyncio.Lock()

    @property
    def targets(self) -> list[str]:
        """What the links lead to, in the order they were added."""
        return list(self._links)

    def add(self, target: str) -> bool:
        """Know a target from now on; False if it is known. It is not connected before `connect`."""
        is_new = target not in self._links
        self._links.setdefault(target, KnownLink())
        return is_new

    # --- what is behind them ----------------------------------------------------------------------

    async def share_invited(self) -> None:
        """Use the workers that have joined by invitation, and those that still will, whichever process invited
        them; they are connected to at the next `connect`."""
        if INVITATIONS not in self._links and (await asyncio.to_thread(memberships.read)).is_wanted:
            self.add(INVITATIONS)

    def worker(self, endpoint: str) -> LinkedWorker | None:
        """What is known about a worker that is reached through a link, of any router; None for other workers."""
        for known in self._links.values():
            if endpoint in known.workers:
                return known.workers[endpoint]
        return self._elsewhere.get(endpoint)

    def name_of(self, endpoint: str) -> str:
        """How people call a worker that is or was reached through a link, a unique name; "" for other workers."""
        return self._names.get(endpoint) or self._former_names.get(endpoint, "")

    def target_of(self, endpoint: str) -> str | None:
        """The target that a worker is reached through; None for other workers."""
        return next((target for target, known in self._links.items() if endpoint in known.workers), None)

    def is_connected(self, target: str) -> bool:
        """Whether a link to this target runs, of this router or another one."""
        known = self._links.get(target)
        return known is not None and known.state not in ("unknown", "down")

    def target_named(self, name: str) -> str | None:
        """The target that a name means: of a worker behind it, or of its machine; None if there is none."""
        by_name = {self._names[endpoint]: target for endpoint, target in self._targets().items()}
        return by_name.get(name) or next((target for target in self._links if target == f"{SSH}{name}"), None)

    def endpoints_of(self, target: str) -> list[str]:
        """The workers behind a target."""
        known = self._links.get(target)
        return list(known.workers) if known is not None else []

    def why_down(self, target: str) -> str | None:
        """Why a target has no link; None if it has one."""
        known = self._links.get(target)
        return known.detail if known is not None and known.process is None else None

    def trouble_of(self, endpoint: str) -> str | None:
        """Why a worker is not reachable although it is known, as its link reports; None if it is."""
        for known in self._links.values():
            if endpoint in known.workers:
                return None if endpoint in known.reachable else known.detail
        return None

    def was_replaced(self, endpoint: str) -> bool:
        """Whether a link had this endpoint before, and has others now."""
        return endpoint in self._former_names

    def may_return(self, lost: Collection[str]) -> bool:
        """Whether workers may come back soon.

        Args:
            lost: workers that were found lost, though the link that leads to them has not noticed it, perhaps.
        """
        return any(
            known.process is not None
            and known.was_ready
            and (known.reachable != known.workers.keys() or not known.reachable.isdisjoint(lost))
            for known in self._links.values()
        )

    # --- starting and adopting --------------------------------------------------------------------

    async def connect(
        self,
        targets: Collection[str] | None = None,
        *,
        keep_alive_s: float | None,
        engine: Callable[[], Awaitable[Engine]],
    ) -> None:
        """See that each target has a link, and wait for first connects until each is ready or cannot be.

        Args:
            targets: somebody waits for these also if they have failed before.
            keep_alive_s: seconds that a link lives without a router and without a coordinator; None is forever.
            engine: finds the engine of this machine, whose build the machines behind SSH get.

        Raises:
            WorkersUnavailableError: another process has been starting links for a minute.
        """
        if not self._links:
            return
        for target, known in self._links.items():
            known.is_wanted = True
            if targets is not None and target in targets:
                known.is_settled = False
        await self.refresh()
        if any(known.process is None and not known.same_as for known in self._links.values()):
            engine_here = await self._engine_for_ssh(engine)  # it may be built now, so not under the lock
            async with registry.locked("links", "connecting to other machines"):
                await self.refresh()  # another kernel may have started them
                missing = [
                    (target, known)
                    for target, known in self._links.items()
                    if known.process is None and not known.same_as
                ]
                await asyncio.gather(
                    *(self._start(target, known, keep_alive_s, engine_here) for target, known in missing)
                )
        while any(known.is_connecting_first for known in self._links.values()):
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def share(self) -> None:
        """Use the links that run from now on; none is started."""
        for known in self._links.values():
            known.is_wanted = True
        await self.refresh()

    async def _engine_for_ssh(self, engine: Callable[[], Awaitable[Engine]]) -> Engine | SollolError | None:
        """The engine of this machine, or why there is none; None if no link that is to be started needs it."""
        missing = [target for target, known in self._links.items() if known.process is None and not known.same_as]
        if not any(target.startswith(SSH) for target in missing):
            return None
        try:
            return await engine()
        except SollolError as error:
            return error

    async def _start(
        self, target: str, known: KnownLink, keep_alive_s: float | None, engine: Engine | SollolError | None
    ) -> None:
        process: EngineProcess | None = None
        try:
            program, spec = "invitations" if target == INVITATIONS else "relay", dict[str, Any]()
            if target.startswith(SSH):
                if not isinstance(engine, Engine):  # None: the target was added meanwhile
                    raise engine or LinkError(f"{target} was not connected yet; try again")
                program, spec = "ssh", _ssh_spec(engine)
            process = await start_link(program, target, spec, keep_alive_s=keep_alive_s)
            await process.hold()
            if self._links.get(target) is not known:  # let go meanwhile
                await process.stop_unless_foreign()
                return
        except SollolError as error:
            self._note_failure(target, known, str(error))
        except BaseException:
            if process is not None:  # a later refresh finds it
                process.detach()
            raise
        else:
            known.process = process
            self._report_progress(target, known, link.CONNECTING, f"connecting to {target}")

    async def _adopt(self, target: str, known: KnownLink, entry: Entry) -> None:
        process = await EngineProcess.adopt(entry)
        if process is None:
            return
        is_held = False
        try:
            is_held = await process.hold()
        finally:
            if is_held and self._links.get(target) is known:  # else it was let go meanwhile
                known.process = process
            else:
                process.detach()

    # --- what their entries say -------------------------------------------------------------------

    async def refresh(self) -> list[Entry]:
        """Read the registry, and share wanted links that other kernels have started; returns all its entries."""
        async with self._refreshing:  # so that no older entry is seen after a newer one
            entries, failed, invited = await asyncio.to_thread(
                lambda: (registry.entries(), failures.read(), memberships.read())
            )
            self.invitations = invited.shown
            links = {entry.name: entry for entry in entries if entry.kind == registry.LINK}
            for target, known in list(self._links.items()):
                entry = links.get(target)
                if entry is None and known.process is not None:  # its supervisor reports the end in a moment
                    await known.process.ended_within(END_REPORT_S)
                if self._links.get(target) is not known or known.same_as:  # let go meanwhile, or not used
                    continue
                if known.process is not None and not known.process.is_running():
                    if entry is not None and entry.id == known.process.entry.id:
                        entry = None  # it was read before the end
                    self._note_end(target, known)
                if entry is not None and known.process is None and known.is_wanted:
                    await self._adopt(target, known, entry)
                    if known.process is None:  # it is ending, or this target was let go meanwhile
                        continue
                if entry is not None:
                    self._note(target, known, entry)
                elif known.process is None and not known.is_wanted:
                    self._note_absence(known, failed.get(target))
            self._elsewhere = {
                endpoint: worker
                for target, entry in links.items()
                if target not in self._links
                for endpoint, worker in linked_workers(entry).items()
            }
            duplicates = self._find_duplicates()
            self._set_names()
        if duplicates:
            await asyncio.gather(*(process.stop_unless_foreign() for process in duplicates))
        return entries

    def _find_duplicates(self) -> list[EngineProcess]:
        """Notice which targets lead to the same devices as one before them; returns the links of these."""
        for known in self._links.values():
            first = self._links.get(known.same_as)
            if known.same_as and (first is None or not first.workers or first.state == "down"):
                known.same_as, known.state, known.detail = "", "unknown", NOT_CONNECTED
                known.is_settled = False
        second = second_targets({target: known.workers.values() for target, known in self._links.items()})
        released = []
        for target, first_target in second.items():
            known = self._links[target]
            known.same_as, known.state = first_target, "duplicate"
            known.detail = f"{target} leads to the same devices as {first_target}, which is used"
            known.is_settled = True
            if known.process is not None:
                released.append(known.process)
                known.process = None
            self._replace_workers(known, {})
            self._events.publish(EventKind.LINK_STOPPED, target, known.detail)
        return released

    def _note(self, target: str, known: KnownLink, entry: Entry) -> None:
        state, detail = str(entry.about.get("state")), one_line(str(entry.about.get("detail")))
        if state in PENDING:
            self._report_progress(target, known, state, detail)
            return
        before, known.state, known.detail = known.state, state, detail
        known.is_settled = True
        if state == link.READY:
            known.was_ready = True
            self._note_workers(target, known, entry)
            if before != state:
                failures.forget(target)
                where = detail.removeprefix(f"{target.removeprefix(SSH).rpartition('@')[2]}: ")
                message = detail if target in detail else f"connected to {target}: {where}"
                self._events.publish(EventKind.LINK_READY, target, message)
        elif before != state:
            self._lose(target, known)

    def _report_progress(self, target: str, known: KnownLink, state: str, detail: str) -> None:
        if (state, detail) != (known.state, known.detail):
            known.state, known.detail = state, detail
            self._events.report(EventKind.LINK_CONNECTING, target, detail)

    def _note_end(self, target: str, known: KnownLink) -> None:
        assert known.process is not None
        report = known.process.exit_report
        assert report is not None
        known.process = None
        if report.why and report.code is not None:  # stopped on request: nobody here wants it to start again
            known.is_wanted = known.is_settled = False
            known.state, known.detail = "unknown", NOT_CONNECTED
            self._replace_workers(known, {})
            self._events.publish(EventKind.LINK_STOPPED, target, f"the link to {target} was stopped: {report.why}")
        else:
            self._note_failure(target, known, why_ended(target, report))

    def _note_failure(self, target: str, known: KnownLink, why: str) -> None:
        known.state, known.detail, known.is_settled = "down", why, True
        failures.note(target, why)
        self._lose(target, known)

    def _note_absence(self, known: KnownLink, why: str | None) -> None:
        """No link runs, and this router wants none: what another kernel has seen of its end is shown."""
        known.state, known.detail = ("down", why) if why else ("unknown", NOT_CONNECTED)
        self._replace_workers(known, {})

    def _lose(self, target: str, known: KnownLink) -> None:
        self._events.publish(EventKind.LINK_LOST, target, known.detail)
        known.reachable = frozenset()
        for endpoint in known.workers:
            self._known.lose(endpoint, known.detail)

    def _note_workers(self, target: str, known: KnownLink, entry: Entry) -> None:
        """The workers of a link that is ready; a device that is missing now returns at the same endpoint, while a
        worker that had joined may never do."""
        workers = linked_workers(entry)
        before, known.reachable = known.reachable, frozenset(workers)
        if entry.id != known.entry_id:
            known.entry_id = entry.id
            self._replace_workers(known, workers)
        elif before != known.reachable:
            for endpoint in before - known.reachable:
                self._known.lose(endpoint, known.detail)
            self._replace_workers(known, workers if target == INVITATIONS else {**known.workers, **workers})

    def _replace_workers(self, known: KnownLink, workers: dict[str, LinkedWorker]) -> None:
        for endpoint in known.workers.keys() - workers.keys():
            self._former_names[endpoint] = self.name_of(endpoint)
            self._known.forget(endpoint)
        known.workers = workers
        if not workers:
            known.reachable, known.entry_id = frozenset(), ""
        for endpoint in workers:
            self._former_names.pop(endpoint, None)
            self._known.note(endpoint)
        self._set_names()

    def _targets(self) -> dict[str, str]:
        return {endpoint: target for target, known in self._links.items() for endpoint in known.workers}

    def _set_names(self) -> None:
        """A name is unlike all others: those of several targets add the target."""
        workers = {**self._elsewhere}
        for known in self._links.values():
            workers |= known.workers
        names = {endpoint: one_line(worker.name, NAME_LIMIT) or endpoint for endpoint, worker in workers.items()}
        self._names = unique_names(names, self._targets())

    def statuses(self) -> list[WorkerStatus]:
        """The targets behind which no worker is known now, as workers."""
        return [
            WorkerStatus(
                endpoint=target,
                state=known.state,
                detail=known.detail,
                held_by=None,
                probe=None,
                is_local=False,
                name=target,
            )
            for target, known in self._links.items()
            if not known.workers and target != INVITATIONS
        ]

    # --- the end ----------------------------------------------------------------------------------

    async def let_go(
        self, targets: Sequence[str] | None = None, *, force: bool = False, forget: bool = False
    ) -> list[Ended]:
        """Stop using targets (all, or these); links that no other process uses end.

        Args:
            force: end the others, too.
            forget: know the targets no longer; else they are connected again by the next request.
        """

        async def end(target: str, process: EngineProcess) -> Ended:
            users: list[str] = []
            if force:
                await process.stop()
            else:
                users = await process.stop_unless_foreign()
            message = f"disconnected from {target}"
            if users:
                message += f", which is still used by {', '.join(users)}"
            self._events.publish(EventKind.LINK_STOPPED, target, message)
            return Ended(kind=registry.LINK, name=target, users=tuple(users))

        released = self._release(targets, forget=forget)
        return await asyncio.gather(*(end(target, process) for target, process in released))

    async def close(self) -> None:
        """Let go of all; links that no other process or router uses end, but not while an invitation is open."""
        if INVITATIONS in self._links and (await asyncio.to_thread(memberships.read)).open:
            for _, process in self._release([INVITATIONS], forget=True):
                process.detach()
        released = self._release(None, forget=True)
        await asyncio.gather(*(process.stop_unless_shared() for _, process in released))

    def detach(self) -> None:
        """Disconnect from all; they live on for their keep_alive."""
        for _, process in self._release(None, forget=True):
            process.detach()

    def _release(self, targets: Iterable[str] | None, *, forget: bool) -> list[tuple[str, EngineProcess]]:
        released = []
        for target in [*self._links] if targets is None else targets:
            known = self._links.get(target)
            if known is None:
                continue
            self._replace_workers(known, {})
            if known.process is not None:
                released.append((target, known.process))
            if forget:
                del self._links[target]
            else:
                self._links[target] = KnownLink()
        self._set_names()
        return released


def _ssh_spec(engine: Engine) -> dict[str, Any]:
    """The arguments of a link over SSH."""
    return {
        "ssh": split_command(config.default("ssh")),
        "server": str(engine.server),
        "worker": str(engine.worker),
        "version": engine.version,
        "source": engine.source,
        "protocol": engine.protocol,
        "tensor_cache_gb": config.default("tensor_cache_gb"),
    }
