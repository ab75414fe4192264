"""The coordinators of a benchmark: a router for each target, and which of them are loaded.

A router has one layout, so each target gets a router of its own over the same workers, with the settings of the
router that is measured; `auto` is that router itself. A worker belongs to one coordinator at a time. Where enough
workers are free, all coordinators are loaded at once, each on workers of its own, and cases can take turns without
a load. Else the coordinators take turns on the same workers, and each turn begins with a load, which is not
measured.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sollol_nb.bench.plan import (
    BenchCase,
    BenchSettings,
    BenchTarget,
    Layout,
    bench_cases,
    check_counts,
    fits_side_by_side,
)
from sollol_nb.errors import ConfigError, ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.models.routing import DISTRIBUTED, LOCAL
from sollol_nb.router.router import Router
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.settings.table import DEFAULT_WORKERS

if TYPE_CHECKING:
    from sollol_nb.chat.completion import Completion
    from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator

# A coordinator must not end between its turns; the benchmark ends it. This is for a kernel that was killed.
KEEP_ALIVE_S = 900.0


class BenchPlaces:
    """Makes sure that what is measured is loaded. Lives on the I/O loop.

    Attributes:
        cases: what is measured, in the order of turns; empty before `prepare`.
        takes_turns: whether coordinators take turns on the same workers.
    """

    def __init__(self, router: Router, settings: BenchSettings) -> None:
        self.cases: tuple[BenchCase, ...] = ()
        self.takes_turns = bool(settings.reload)
        self._notes: list[str] = []
        self._router = router
        self._settings = settings
        self._routers: dict[BenchTarget, Router] = {}
        self._needs: dict[BenchTarget, int] = {}
        self._loaded: set[BenchTarget] = set()

    async def ask(self, target: BenchTarget, prompt: str) -> Completion:
        """Ask a target. Errors are those of `Router.route_request`."""
        return await self._routers[target].route_request(
            target.model,
            prompt,
            backend=_backend(target),
            timeout=self._settings.timeout_s,
            **self._settings.options,
        )

    async def prepare(self) -> None:
        """Find out the cases, check them, and see to it that there are workers.

        Raises:
            ConfigError: a layout or strategy cannot be used.
            ModelError: a model has no file, or no place has it.
            WorkersUnavailableError: there are too few workers for a layout.
        """
        models = self._settings.models if Layout() in self._settings.layouts else ()
        backends = {model: (await self._router.route(model)).backend for model in models}
        self.cases = bench_cases(self._settings, backends)
        for target in dict.fromkeys(case.target for case in self.cases):
            self._routers[target] = await self._router_for(target)
            by_itself = self._router.settings.num_rpc_backends or DEFAULT_WORKERS
            if target.layout.worker_count is not None:
                self._needs[target] = target.layout.worker_count
            else:
                self._needs[target] = by_itself if backends[target.model] == DISTRIBUTED else 0
        await self._find_workers(max(self._needs.values()))
        known = len(self._router.worker_endpoints)
        self._needs = {one: min(need, known) for one, need in self._needs.items()}
        await self._decide()

    async def load(self, target: BenchTarget) -> bool:
        """Make sure that the workers a target needs are free, or that it is loaded.

        Returns:
            Whether it was not loaded before; if need be its next request loads it.

        Raises:
            WorkersUnavailableError: other coordinators hold the workers.
            SollolError: exact counts cannot be laid out.
        """
        if target in self._loaded:
            return False
        if self._needs[target] and self.takes_turns:
            await self._unload_all()
        need = 0 if self._runs(target) else self._needs[target]
        if need > (free := len(await self._free())):
            await self._free_idle(need - free)
            free = len(await self._free())
            if free < need:
                raise WorkersUnavailableError(
                    f"layout {target.layout} of {target.model} needs {need} workers and {free} are free; "
                    "%sollol_cluster shows who holds the others"
                )
        self._loaded.add(target)
        if target.layout.unit_counts:
            await self._lay_out(target)
        return True

    async def failed(self, target: BenchTarget, error: Exception) -> bool:
        """A target could not be loaded. Returns whether it can be tried again, with the others out of its way."""
        self._loaded.discard(target)
        if self._routers[target] is not self._router:
            await self._routers[target].stop_coordinator()
        is_short = isinstance(error, WorkersUnavailableError | ModelDoesNotFitError)
        others = any(self._needs[one] for one in self._loaded)
        if not is_short or self.takes_turns or not others or self._settings.reload is False:
            return False
        self.takes_turns = True
        self._notes.append(f"not all could be loaded at once ({error}), so from then on they took turns")
        return True

    def take_notes(self) -> list[str]:
        """What was done or must be known, in words, since this was last called."""
        notes, self._notes = self._notes, []
        return notes

    async def close(self) -> None:
        """End all coordinators that were started for the benchmark; that of `auto` stays loaded."""
        mine = [one for one in self._routers.values() if one is not self._router]
        await asyncio.gather(*(one.close() for one in mine))

    # --- targets --------------------------------------------------------------------------------

    async def _router_for(self, target: BenchTarget) -> Router:
        """The router whose requests for the target's model are spread as the target says."""
        theirs, settings = self._router, self._router.settings
        route = await theirs.route(target.model, backend=_backend(target))
        if _backend(target) != DISTRIBUTED:
            return theirs
        assert route.model_path is not None  # what is sharded has a file
        facts = await asyncio.to_thread(read_facts, route.model_path)
        check_counts(target.layout, target.model, facts.layer_count)
        router = theirs.sibling(
            num_rpc_backends=target.layout.worker_count or settings.num_rpc_backends,
            auto_discover_rpc=False,
            gguf_path=route.model_path,
            layer_strategy=target.strategy or settings.layer_strategy,
            keep_alive=max(KEEP_ALIVE_S, settings.keep_alive(target.model) or 0.0),
        )

        def pass_on(event: Event) -> None:
            if event.kind != EventKind.PROBE_DONE:  # each look at a worker, which the bus does not keep either
                theirs.events.publish(event.kind, event.subject, event.message, **event.data)

        router.events.subscribe(pass_on)
        return router

    # --- workers --------------------------------------------------------------------------------

    async def _find_workers(self, wanted: int) -> None:
        """Make as many workers known as the largest layout takes, as far as the router may."""
        settings = self._router.settings
        if len(self._router.worker_endpoints) < wanted and settings.auto_discover_rpc:
            await self._router.discover_workers()
        known = self._router.worker_endpoints
        if len(known) < wanted and settings.auto_setup_rpc:
            await self._router.start_workers(wanted - len(known))
            known = self._router.worker_endpoints
        for router in self._routers.values():
            for endpoint in set(known) - set(router.worker_endpoints):
                await router.add_worker(endpoint)
        named = max((one.layout.worker_count or 0 for one in self._routers), default=0)
        least = max(named, min(wanted, 1))
        if len(known) < least:
            raise WorkersUnavailableError(
                f"{least} workers are needed and {len(known)} are known; start them here with "
                f"`%sollol_cluster start {least}`, or name those of other machines with `%sollol_cluster add`"
            )

    async def _decide(self) -> None:
        """Side by side or in turns; idle coordinators of the router can make room for either."""
        needs = [need for need in self._needs.values() if need]
        if len(needs) < 2:
            self.takes_turns = False
            return
        idle = sum(len(one.rpc_backends) for one in self._idle())
        available = len(await self._free()) + idle
        fits = fits_side_by_side(needs, available)
        if self._settings.reload is False and not fits:
            raise ConfigError(
                f"{sum(needs)} workers are needed to load all layouts at once and {available} are available; "
                "start more, or let the layouts take turns (reload=True)"
            )
        self.takes_turns = bool(self._settings.reload) or not fits
        self._notes.append(
            "coordinators took turns on the same workers; each turn began with a load, which is not measured"
            if self.takes_turns
            else "each coordinator had workers of its own (column `workers`): a fair comparison if these are alike"
        )

    async def _lay_out(self, target: BenchTarget) -> None:
        """Start a target's coordinator with exact counts. Only what runs can be laid out, so it loads twice."""
        router, counts = self._routers[target], target.layout.unit_counts
        await router.route_request(target.model, "Hello!", backend=_backend(target), max_tokens=1)
        usable = {endpoint for one in router.coordinators for endpoint in one.rpc_backends}
        usable |= set(await self._free())
        chosen = [endpoint for endpoint in router.worker_endpoints if endpoint in usable][: len(counts)]
        await router.apply_plan(target.model, dict(zip(chosen, counts, strict=True)))

    async def _free(self) -> list[str]:
        return [worker.endpoint for worker in await self._router.check_workers() if worker.state == "free"]

    def _idle(self) -> list[Coordinator]:
        """Coordinators that the router keeps warm, the longest idle first."""
        return [one for one in self._router.coordinators if one.is_idle and one.rpc_backends]

    def _runs(self, target: BenchTarget) -> bool:
        """Whether the target's own coordinator runs already."""
        running = self._routers[target].coordinators
        return any(one.rpc_backends and one.model == target.model for one in running)

    async def _free_idle(self, count: int) -> None:
        """Stop idle coordinators, but those of loaded targets, until so many workers more are free."""
        kept = {one.model for one in self._loaded if self._routers[one] is self._router}
        for coordinator in self._idle():
            if count > 0 and coordinator.model not in kept:
                await self._router.stop_coordinator(coordinator.model)
                self._notes.append(f"stopped the idle coordinator of {coordinator.model} to free its workers")
                count -= len(coordinator.rpc_backends)

    async def _unload_all(self) -> None:
        """Stop the coordinators of all targets that hold workers."""
        for target in [one for one in self._loaded if self._needs[one]]:
            await self._routers[target].stop_coordinator(target.model)
            self._loaded.discard(target)


def _backend(target: BenchTarget) -> str | None:
    """Where a target must run; None leaves it to the router."""
    if target.layout.worker_count == 0:
        return LOCAL
    return DISTRIBUTED if target.layout.worker_count or target.strategy else None
