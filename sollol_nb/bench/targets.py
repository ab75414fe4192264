"""The targets of a benchmark: a router for each, and which of their coordinators are loaded.

A router has one layout, so each target gets a separate router over the same workers, with the settings of the
router that is measured; `auto` is that router itself. A worker belongs to one coordinator at a time. If enough
workers are free, all coordinators are loaded at the same time, each on its own workers, and cases take turns
without a load. Otherwise the coordinators take turns on the same workers, and each turn begins with a load, which
is not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from sollol_nb.bench.plan import (
    BenchCase,
    BenchSettings,
    BenchTarget,
    Layout,
    bench_cases,
    check_counts,
    fits_side_by_side,
)
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, ModelDoesNotFitError, SollolError, WorkersUnavailableError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.models.routing import DISTRIBUTED, LOCAL, Route
from sollol_nb.router.router import Router
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.runtime.io_loop import submit
from sollol_nb.settings.endpoints import is_target
from sollol_nb.settings.table import DEFAULT_WORKERS
from sollol_nb.text.tables import counted

# Longer than any pause between two turns of a coordinator; the benchmark stops it, unless the kernel is killed.
KEEP_ALIVE_S = 900.0


class BenchTargets:
    """Makes sure that a target is loaded before it is measured. Lives on the I/O loop.

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
        self._stopped: list[Route] = []  # of models that the router had loaded

    async def ask(self, target: BenchTarget, prompt: str) -> Completion:
        """Send a prompt to a target. Errors are those of `Router.route_request`."""
        return await self._routers[target].route_request(
            target.model,
            prompt,
            backend=_backend(target),
            timeout=self._settings.timeout_s,
            **{**self._settings.options, "journal": False},
        )

    async def prepare(self) -> None:
        """Determine and check the cases, and make sure that there are enough workers.

        Raises:
            ConfigError: a layout or strategy cannot be used.
            ModelError: a model has no file, or no backend has it.
            WorkersUnavailableError: there are too few workers for a layout.
        """
        models = self._settings.models if Layout() in self._settings.layouts else ()
        backends = {model: (await self._router.route(model)).backend for model in models}
        self.cases = bench_cases(self._settings, backends)
        if self._router.gateway:
            self._use_gateway()
            return
        model_paths: dict[BenchTarget, Path | None] = {}
        for target in dict.fromkeys(case.target for case in self.cases):
            model_paths[target] = await self._sharded_file(target)
            usual = self._router.settings.num_rpc_backends or DEFAULT_WORKERS
            if target.layout.worker_count is not None:
                self._needs[target] = target.layout.worker_count
            else:
                self._needs[target] = usual if backends[target.model] == DISTRIBUTED else 0
        await self._find_workers(max(self._needs.values()))
        await self._router.wait_started()  # such as one that the previous benchmark loads again
        known = len(self._router.worker_endpoints)
        self._needs = {target: min(need, known) for target, need in self._needs.items()}
        self._routers = {target: self._router_for(target, path) for target, path in model_paths.items()}
        await self._decide()

    def _use_gateway(self) -> None:
        """Measure over a gateway: its coordinators are everybody's, so they are used as they are.

        Raises:
            ConfigError: a case has its own layout.
        """
        for case in self.cases:
            target = case.target
            if target.layout.worker_count or target.strategy:
                what = f"strategy {target.strategy}" if target.strategy else f"layout {target.layout}"
                raise ConfigError(
                    f"{what}: over the gateway {self._router.gateway}, models are measured as it runs them; leave "
                    "out layouts and strategies, or use own engines (%sollol_connect --off)"
                )
            self._needs[target] = 0
            self._routers[target] = self._router
        self.takes_turns = False

    async def load(self, target: BenchTarget) -> bool:
        """Make sure that a target is loaded, or that the workers are free that its next request needs to load it.

        Returns:
            Whether it was not loaded before.

        Raises:
            WorkersUnavailableError: other coordinators hold the workers.
            SollolError: a layout with exact counts could not be applied.
        """
        if target in self._loaded:
            return False
        if self._needs[target] and self.takes_turns:
            await self._unload_all()
        need = 0 if self._is_running(target) else self._needs[target]
        if need > (free := len(await self._free())):
            await self._stop_idle(need - free)
            free = len(await self._free())
            if free < need:
                raise WorkersUnavailableError(
                    f"layout {target.layout} of {target.model} needs {counted(need, 'free worker')} (free now: "
                    f"{free}); see %sollol_cluster for who holds the others"
                )
        self._loaded.add(target)
        if target.layout.unit_counts:
            await self._apply_counts(target)
        return True

    async def record_failure(self, target: BenchTarget, error: Exception) -> bool:
        """Record that a target could not be loaded.

        Returns:
            Whether to try it again, now that the other coordinators are stopped first.
        """
        self._loaded.discard(target)
        if self._routers[target] is not self._router:
            await self._routers[target].stop_coordinator()
        is_short = isinstance(error, WorkersUnavailableError | ModelDoesNotFitError)
        has_others = any(self._needs[loaded] for loaded in self._loaded)
        if not is_short or self.takes_turns or not has_others or self._settings.reload is False:
            return False
        self.takes_turns = True
        self._notes.append(
            f"not all layouts could be loaded at the same time ({error}); from then on they took turns"
        )
        return True

    def take_notes(self) -> list[str]:
        """Remarks on the measurement since the last call."""
        notes, self._notes = self._notes, []
        return notes

    async def close(self) -> None:
        """Stop all coordinators that were started for the benchmark; that of `auto` stays loaded, and what was
        stopped to free its workers is loaded again, in the background."""
        siblings = [router for router in self._routers.values() if router is not self._router]
        await asyncio.gather(*(router.close() for router in siblings))
        for route in self._stopped:
            submit(_load_again(self._router, route))

    # --- targets --------------------------------------------------------------------------------

    async def _sharded_file(self, target: BenchTarget) -> Path | None:
        """The file of the model that a target shards, after a check of its layout; None if the router runs it."""
        route = await self._router.route(target.model, backend=_backend(target))
        if _backend(target) != DISTRIBUTED:
            return None
        assert route.model_path is not None  # a sharded model has a file
        facts = await asyncio.to_thread(read_facts, route.model_path)
        check_counts(target.layout, target.model, facts.layer_count)
        return route.model_path

    def _router_for(self, target: BenchTarget, model_path: Path | None) -> Router:
        """The router that runs the target's model with the target's layout and strategy."""
        main, settings = self._router, self._router.settings
        if model_path is None:
            return main
        router = main.sibling(
            exact=True,
            num_rpc_backends=target.layout.worker_count or settings.num_rpc_backends,
            auto_discover_rpc=False,  # the benchmark has found or started all workers that it needs
            auto_setup_rpc=False,
            gguf_path=model_path,
            layer_strategy=target.strategy or settings.layer_strategy,
            speculation="off",  # drafts would copy a repeated answer, and hide what layouts differ in
            keep_alive=max(KEEP_ALIVE_S, settings.keep_alive(target.model) or 0.0),
        )

        def forward(event: Event) -> None:
            if event.kind != EventKind.PROBE_DONE:  # the bus does not keep these either
                main.events.publish(event.kind, event.subject, event.message, **event.data)

        router.events.subscribe(forward)
        return router

    # --- workers --------------------------------------------------------------------------------

    async def _find_workers(self, wanted: int) -> None:
        """Find or start as many workers as the largest layout needs, if the router's settings allow it."""
        settings = self._router.settings
        machines = [target for target in self._router.worker_targets if is_target(target)]
        if machines:
            await self._router.add_workers(machines)  # they are known, but may not be connected yet
        if len(self._router.worker_endpoints) < wanted and settings.auto_discover_rpc is not False:
            await self._router.share_workers()
        if len(self._router.worker_endpoints) < wanted and settings.auto_discover_rpc:
            await self._router.discover_workers()
        known = self._router.worker_endpoints
        if len(known) < wanted and settings.auto_setup_rpc:
            await self._router.start_workers(wanted - len(known))
            known = self._router.worker_endpoints
        requested = max((target.layout.worker_count or 0 for target in self._needs), default=0)
        least = max(requested, min(wanted, 1))
        if len(known) < least:
            raise WorkersUnavailableError(
                f"the benchmark needs {counted(least, 'worker')} but found only {len(known)}; start workers here "
                f"with `%sollol_cluster start {least}`, or add those of other machines with "
                "`%sollol_cluster add HOST:PORT`"
            )

    async def _decide(self) -> None:
        """Decide between side by side and in turns; the router's idle coordinators count as free workers."""
        needs = [need for need in self._needs.values() if need]
        if len(needs) < 2:
            self.takes_turns = False
            return
        idle = sum(len(coordinator.rpc_backends) for coordinator in self._idle())
        available = len(await self._free()) + idle
        fits = fits_side_by_side(needs, available)
        if self._settings.reload is False and not fits:
            raise ConfigError(
                f"loading all layouts at once needs {counted(sum(needs), 'worker')} (available: {available}); "
                "start more, or let the layouts take turns (reload=True)"
            )
        self.takes_turns = bool(self._settings.reload) or not fits
        self._notes.append(
            "coordinators took turns on the same workers; each turn began with a model load, which is not measured"
            if self.takes_turns
            else "each coordinator had its own workers (column `workers`): a fair comparison if these are alike"
        )

    async def _apply_counts(self, target: BenchTarget) -> None:
        """Start a target's coordinator with exact counts. Only a running one can get them, so it loads twice."""
        router, counts = self._routers[target], target.layout.unit_counts
        await router.route_request(target.model, "Hello!", backend=_backend(target), max_tokens=1, journal=False)
        usable = {endpoint for coordinator in router.coordinators for endpoint in coordinator.rpc_backends}
        usable |= set(await self._free())
        chosen = [endpoint for endpoint in router.worker_endpoints if endpoint in usable][: len(counts)]
        await router.apply_plan(target.model, dict(zip(chosen, counts, strict=True)))

    async def _free(self) -> list[str]:
        return [worker.endpoint for worker in await self._router.check_workers() if worker.state == "free"]

    def _idle(self) -> list[Coordinator]:
        """Coordinators that the router keeps warm, the longest idle first."""
        return [
            coordinator
            for coordinator in self._router.own_coordinators
            if coordinator.is_idle and coordinator.rpc_backends
        ]

    def _is_running(self, target: BenchTarget) -> bool:
        """Whether the target's own coordinator is running already."""
        running = self._routers[target].own_coordinators
        return any(
            coordinator.rpc_backends and coordinator.settings.is_named(target.model) for coordinator in running
        )

    async def _stop_idle(self, count: int) -> None:
        """Stop idle coordinators, except those of loaded targets, until `count` more workers are free."""
        kept = {target.model for target in self._loaded if self._routers[target] is self._router}
        for coordinator in self._idle():
            if count > 0 and not any(map(coordinator.settings.is_named, kept)):
                self._stopped.append(self._router.route_of(coordinator))
                await self._router.stop_coordinator(coordinator.model)
                self._notes.append(
                    f"stopped the idle coordinator of {coordinator.model} to free its workers; it is loaded again "
                    "after the benchmark"
                )
                count -= len(coordinator.rpc_backends)

    async def _unload_all(self) -> None:
        """Stop the coordinators of all targets that hold workers."""
        for target in [loaded for loaded in self._loaded if self._needs[loaded]]:
            await self._routers[target].stop_coordinator(target.model)
            self._loaded.discard(target)


async def _load_again(router: Router, route: Route) -> None:
    with contextlib.suppress(SollolError):  # the next request says what is wrong
        await router.preload(route)


def _backend(target: BenchTarget) -> str | None:
    """The backend that a target must use; None leaves it to the router."""
    if target.layout.worker_count == 0:
        return LOCAL
    return DISTRIBUTED if target.layout.worker_count or target.strategy else None
