"""The cluster of a router, shown and changed: its workers, its coordinators, and how new ones are started."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sollol_nb.cluster.state import ClusterState
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.layers.planner import check_strategy
from sollol_nb.layers.what_if import Forecast
from sollol_nb.llama_cpp.coordinators.calibrator import Calibrated
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers import invited
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.llama_cpp.workers.discovery import FoundWorker, find_workers
from sollol_nb.llama_cpp.workers.invited import Invitations, NewInvitation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.io_loop import io_bound
from sollol_nb.settings.endpoints import worker_target
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.models import model_text


class ClusterControl:
    """The workers and coordinators of one router. Its methods are also the router's."""

    def __init__(
        self,
        coordinators: CoordinatorPool,
        workers: Workers,
        ollama: OllamaPool,
        *,
        state: ClusterState,
        events: EventBus,
    ) -> None:
        self._coordinators = coordinators
        self._workers = workers
        self._ollama = ollama
        self._state = state
        self._events = events

    @io_bound
    async def cluster(self) -> ClusterStatus:
        """Check all workers and Ollama nodes; returns their state, and the layers of each coordinator, also of
        other kernels."""
        return await self._state.refresh()

    @io_bound
    async def check_workers(self) -> list[WorkerStatus]:
        """Probe all known workers; returns each as seen now."""
        return await self._workers.refresh()

    @io_bound
    async def start_workers(self, count: int) -> list[str]:
        """Start workers on this machine, on loopback from `rpc_port` upward; returns their endpoints."""
        engine = await self._coordinators.engine()
        self._workers.use_engine(engine)
        settings = self._coordinators.settings
        return await self._workers.local.start(
            engine, count, first_port=settings.rpc_port, keep_alive_s=settings.keep_alive_s
        )

    @io_bound
    async def ensure_workers(self, count: int) -> list[str]:
        """See that so many workers of this user run on this machine, whichever process started them.

        Those that run are shared, those that died are replaced, and missing ones are started as by
        `start_workers`.

        Returns:
            The endpoints of those that were started now.
        """
        engine = await self._coordinators.engine()
        self._workers.use_engine(engine)
        settings = self._coordinators.settings
        return await self._workers.local.ensure(
            engine, count, first_port=settings.rpc_port, keep_alive_s=settings.keep_alive_s
        )

    @io_bound
    async def stop_workers(self, endpoints: Sequence[str] | None = None, *, force: bool = False) -> list[Ended]:
        """Stop the workers that this router started or shares on this machine and its links to other machines
        (all, or these), and before them its coordinators that use them. What another process uses is left running
        for that process. The next request connects to these machines again.

        Args:
            endpoints: workers on this machine, and machines as `ssh://host`; others are left out.
            force: stop what another process uses, too.

        Returns:
            What was stopped or left running, coordinators first.
        """
        links = self._workers.links
        local = {worker.endpoint for worker in self._workers.statuses() if worker.is_local}
        targets = links.targets
        if endpoints is not None:
            local &= set(endpoints)
            targets = [target for target in targets if target in endpoints]
        chosen = local.union(*map(links.endpoints_of, targets))
        ended = []
        for coordinator in self._coordinators.coordinators:
            if chosen & set(coordinator.rpc_backends):
                ended += await self._coordinators.stop(coordinator.model, force=force)
        ended += await self._workers.local.let_go(sorted(local), force=force)
        return ended + await links.let_go(targets, force=force)

    @io_bound
    async def share_workers(self) -> list[str]:
        """Share the workers that other processes of this user run on this machine and no coordinator holds, and
        those that have joined by invitation, unless somebody has named the workers to use.

        Returns:
            The endpoints that are new.
        """
        if self._workers.has_named:
            return []
        return [*await self._share_invited(), *await self._workers.local.adopt()]

    async def _share_invited(self) -> list[str]:
        """Use the workers that have joined by invitation; returns the endpoints that are new."""
        before = set(self._workers.endpoints)
        await self._workers.links.share_invited()
        keep_alive_s = self._coordinators.settings.keep_alive_s
        await self._workers.links.connect(keep_alive_s=keep_alive_s, engine=self._coordinators.engine)
        return [endpoint for endpoint in self._workers.endpoints if endpoint not in before]

    @io_bound
    async def discover_workers(self) -> list[str]:
        """Look for workers on the usual ports of this machine, except those of other users, and for those that
        have joined by invitation; returns the endpoints that are new."""
        joined = await self._share_invited()
        return [*joined, *await self._workers.discover()]

    @io_bound
    async def find_workers(
        self, *, ssh: Sequence[str] = (), scan: str | None = None, mdns: bool = False
    ) -> list[FoundWorker]:
        """Look for workers that could be used; returns those of all sources, each with the line that adds it.

        Looks at the workers of this router and of this user, and on the usual ports of this machine, and where
        asked to, elsewhere. Nothing is added, started or installed.

        Args:
            ssh: hosts to look at through the ssh program, such as `gpu1` or `user@gpu2:2222`.
            scan: a private network to scan on the usual ports, such as `192.168.1.0/24`.
            mdns: whether to look for workers that are announced in the local network.

        Raises:
            ConfigError: a host or the network cannot be used, or zeroconf is missing.
        """
        return await find_workers(self._workers, ssh=ssh, scan_network=scan, mdns=mdns)

    @io_bound
    async def calibrate(self, endpoints: Sequence[str] | None = None) -> list[Calibrated]:
        """Measure how fast workers are, with a small generated model: some seconds for each.

        A worker that is held or busy is left alone. The results are kept for all kernels of this user; times of
        tokens are predicted from them before a model's first token, and answers to requests correct them.

        Args:
            endpoints: known workers, by endpoint, name or machine (`ssh://gpu1`), and `this machine`; by default
                all.

        Returns:
            What became of each; `str()` of one is a line of text.

        Raises:
            ConfigError: one of them is not known.
            EngineError: llama.cpp cannot be used here.
        """
        keep_alive_s = self._coordinators.settings.keep_alive_s
        await self._workers.links.connect(keep_alive_s=keep_alive_s, engine=self._coordinators.engine)
        return await self._coordinators.calibrate(endpoints)

    @io_bound
    async def kept_calibrations(self) -> list[Calibration]:
        """The calibrations that are kept, of all workers that were ever measured, the oldest first."""
        return await asyncio.to_thread(lambda: self._workers.calibrations.all)

    @io_bound
    async def add_worker(self, endpoint: str) -> WorkerStatus:
        """Add a worker (`host:port`), or those of a machine (`ssh://host`), and probe it, as by `add_workers`.

        Returns:
            Its status, or that of the machine's first worker.

        Raises:
            ConfigError: it is neither.
            WorkersUnavailableError: it is `invitations`, and nobody has joined.
        """
        workers = await self.add_workers([endpoint])
        if not workers:
            raise WorkersUnavailableError(
                f"{endpoint} leads to no worker yet; workers are used as soon as they join"
            )
        return workers[0]

    @io_bound
    async def add_workers(self, endpoints: Sequence[str]) -> list[WorkerStatus]:
        """Add workers (`host:port`) and machines (`ssh://host`), connect to the machines and probe the workers.

        Where llama.cpp has to be installed on a machine, this takes minutes.

        Returns:
            The status of each worker, also of those behind the machines; a machine that could not be connected is
            one entry, whose detail says why.

        Raises:
            ConfigError: one is neither; then none is added.
        """
        wanted = [worker_target(endpoint) for endpoint in endpoints]
        for endpoint in wanted:
            self._workers.add(endpoint)
        targets = set(wanted) & set(self._workers.links.targets)
        if targets:
            keep_alive_s = self._coordinators.settings.keep_alive_s
            engine = self._coordinators.engine
            await self._workers.links.connect(targets, keep_alive_s=keep_alive_s, engine=engine)
        statuses = await self._workers.refresh()
        return [worker for name in wanted for worker in statuses if name in (worker.endpoint, worker.target)]

    @io_bound
    async def take_workers(self, endpoints: Sequence[str]) -> None:
        """Add workers that another router of this process knows (its `worker_targets`); this one holds those on
        this machine, and the links to others, too."""
        for endpoint in endpoints:
            self._workers.add(endpoint)
        await self._workers.local.adopt(endpoints)
        await self._workers.links.share()

    @io_bound
    async def invite(
        self,
        *,
        uses: int = 1,
        expires: float | str = "1h",
        name: str | None = None,
        host: str | None = None,
        port: int | None = None,
    ) -> NewInvitation:
        """Invite workers of other machines, which dial this one: nothing listens there. It returns the command to
        run there, and this router uses the workers once they have joined.

        Args:
            uses: how many machines may join, 1 to 64.
            expires: when the invitation ends: seconds, `"1h"`; at most 30 days. Who has joined stays.
            name: of the invitation and its workers; by default the workers have the names of their machines.
            host: the address to listen on (`0.0.0.0` is all); by default that of this machine on its network.
            port: the port to listen on; by default the same as before, at first any free one.

        Raises:
            ConfigError: an argument cannot be used.
            EngineError: there is no usable llama.cpp here.
            JoinError: this machine cannot listen there.
        """
        return await invited.invite(
            self._workers.links,
            self._coordinators.engine,
            uses=uses,
            expires=expires,
            name=name,
            host=host,
            port=port,
            keep_alive_s=self._coordinators.settings.keep_alive_s,
        )

    @io_bound
    async def revoke(self, name: str | None = None) -> list[str]:
        """Withdraw an invitation and end the workers that have joined with it, or end one such worker; or all.

        Args:
            name: of the invitation or the worker; None is all.

        Returns:
            The names of what was withdrawn or ended.

        Raises:
            ConfigError: nothing has this name.
        """
        return await invited.revoke(name)

    @io_bound
    async def invitations(self) -> Invitations:
        """The open invitations, and the machines that have joined."""
        return await invited.invitations()

    @io_bound
    async def remove_worker(self, endpoint: str) -> None:
        """Remove a worker, or a machine with its workers; one that this router started is stopped, and its link to
        a machine ended, unless another process uses it.

        Args:
            endpoint: as it was added, or the name of the machine.

        Raises:
            ConfigError: it is not known, or a coordinator holds it.
        """
        endpoint = self._workers.named(endpoint)
        self._workers.remove(endpoint)
        await self._workers.local.let_go([endpoint])
        await self._workers.links.let_go([endpoint], forget=True)

    @io_bound
    async def wait_started(self) -> None:
        """Wait until no coordinator of this router is being started; until then its workers cannot be freed."""
        await self._coordinators.wait_started()

    @io_bound
    async def end_coordinators(self, model: str | Path | None = None, *, force: bool = False) -> list[Ended]:
        """As `stop_coordinator`; returns also what was left running, and for whom."""
        return await self._coordinators.stop(model_text(model), force=force)

    @io_bound
    async def stop_coordinator(self, model: str | Path | None = None, *, force: bool = False) -> list[str]:
        """Stop the coordinators of a model, or all; returns the models stopped.

        One that another process uses is left running for that process.

        Args:
            force: stop it in any case.
        """
        all_ended = await self._coordinators.stop(model_text(model), force=force)
        return [ended.name for ended in all_ended if not ended.users]

    @io_bound
    async def apply_plan(self, model: str | Path, counts: Mapping[str, int]) -> None:
        """Start a running model anew with another layout; its answers continue on the new one.

        Args:
            model: one that this router runs sharded.
            counts: units (blocks, then the output layer) of each worker, in the order of their layers; they sum
                to the model's blocks plus one, and 0 leaves a worker out: `{"10.0.0.1:50052": 20, "gpu1": 21}`.

        Raises:
            ConfigError: no coordinator of this router shards the model, or this is not a layout of it.
            ModelDoesNotFitError: a worker's memory does not hold its part; the running coordinator continues.
            WorkersUnavailableError: a worker is not free; the running coordinator continues. Or a worker was taken
                or lost while the new one started.
            CoordinatorError: the new one could not be started; the old one has ended.
        """
        await self._coordinators.lay_out(model_text(model), self._workers.by_endpoint(counts))

    @io_bound
    async def replan(self, model: str | Path | None = None) -> list[str]:
        """Plan running models again, with what is known now about the workers, and start those anew that have a
        faster layout; their answers continue on it. Where tokens are slow and it is not known which worker is, the
        workers are calibrated in between.

        Args:
            model: one that this router runs sharded; None is all of them.

        Returns:
            What became of each, a line of text.

        Raises:
            ConfigError: no coordinator of this router shards the model, or the workers' speeds are not known.
            WorkersUnavailableError, CoordinatorError: it could not be started again.
        """
        return await self._coordinators.replan(None if model is None else model_text(model))

    @io_bound
    async def what_if(self, model: str | Path, counts: Mapping[str, int]) -> Forecast:
        """How much memory another layout of a running model would need, and how fast it would be.

        Args:
            model, counts: as in `apply_plan`; the forecast says whether the layout fits.

        Raises:
            ConfigError: no coordinator of this router shards the model, or this is not a layout of it.
        """
        return self._coordinators.what_if(model_text(model), self._workers.by_endpoint(counts))

    @io_bound
    async def configure(self, *, layer_strategy: str | None = None, keep_alive: float | str | None = None) -> None:
        """Change how coordinators are started from now on.

        Args:
            layer_strategy: how layers are spread, a name in `strategies.STRATEGIES`.
            keep_alive: how long they live without a request, as in `HybridRouter`; also of the running ones.

        Raises:
            ConfigError: one of them cannot be used.
        """
        settings = self._coordinators.settings
        if layer_strategy is not None:
            check_strategy(layer_strategy)
            settings = replace(settings, layer_strategy=layer_strategy)
        if keep_alive is not None:
            settings = replace(settings, keep_alive_s=keep_alive_seconds(keep_alive), keep_alive_of={})
        self._coordinators.settings = settings
        if layer_strategy is not None:
            message = f"models that start from now on are spread by strategy {layer_strategy!r}"
            self._events.publish(EventKind.ROUTER_CHANGED, "layer_strategy", message)
        if keep_alive is not None:
            standbys = self._coordinators.standbys.coordinators
            for coordinator in [*self._coordinators.coordinators, *standbys]:
                await coordinator.keep_alive(settings.keep_alive_s)
            message = f"coordinators live for {keep_alive} without a request"
            self._events.publish(EventKind.ROUTER_CHANGED, "keep_alive", message)

    @io_bound
    async def use_standbys(self, wanted: bool) -> list[str]:
        """Keep a standby of each running model over workers and of those that start later, or end all.

        Returns:
            What that takes of each running model, or why it is impossible: a line of text each. The standbys are
            started after that.
        """
        lines = await self._coordinators.use_standbys(wanted)
        message = "; ".join(lines or [f"standbys are {'kept' if wanted else 'ended'} from now on"])
        self._events.publish(EventKind.ROUTER_CHANGED, "standby", message)
        return lines

    @io_bound
    async def forget_contexts(self, conversations: Sequence[Sequence[str]]) -> None:
        """Delete the saved contexts of conversations, and empty the slots that hold them, so that they are not
        saved again. Other contexts stay, except those that have some of the same turns.

        Args:
            conversations: of each, the texts of its messages in order, without the system message.
        """
        for contents in conversations:
            if any(content.strip() for content in contents):  # none would mean all contexts
                await self._coordinators.forget_contexts(contents)

    @io_bound
    async def status(self) -> ClusterStatus:
        """The same as `cluster`, from what is known now; contacts no worker and no node."""
        await self._workers.refresh_holders()
        return self._state.status()

    async def close(self, *, keep: bool) -> None:
        """End the coordinators and workers that no other process uses, and close connections.

        Args:
            keep: leave the engines running for their keep_alive.
        """
        await self._state.close()
        if keep:
            await self._coordinators.detach()
            self._workers.local.detach()
            self._workers.links.detach()
        else:
            await self._coordinators.close()
            await self._workers.local.close()
            await self._workers.links.close()
        await self._ollama.close()
