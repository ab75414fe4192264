"""The engines of a router that uses a gateway: the methods of `OwnEngines`, carried out by the gateway."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.journaling import JournalEntry
from sollol_nb.chat.request import ChatRequest
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.errors import ConfigError, GatewayError
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import Route
from sollol_nb.router.finder import ModelSlots
from sollol_nb.router.own_engines import OwnEngines
from sollol_nb.router.remote.answers import GatewayRequest
from sollol_nb.router.remote.calls import CALLS, GatewayCoordinator, GatewayInfo
from sollol_nb.router.remote.connection import GatewayConnection
from sollol_nb.router.remote.live import GatewayEvents, GatewayState
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import io_bound, run_blocking
from sollol_nb.settings import config
from sollol_nb.settings.models import model_text

P = ParamSpec("P")
R = TypeVar("R")


def _at_gateway(
    method: Callable[Concatenate[OwnEngines, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """A method of `OwnEngines` that the gateway carries out."""
    signature = inspect.signature(method)

    async def call(self: GatewayEngines, /, *args: P.args, **kwargs: P.kwargs) -> R:
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        return cast(R, await self.call(method.__name__, arguments))

    functools.update_wrapper(call, method)
    return io_bound(call)


class GatewayEngines:
    """The engines of a gateway. Making it does no I/O.

    Attributes:
        url: the gateway's.
        events, latency, state: as of the router.
        counts: requests of this router that have ended, by backend; "" where none was found.
    """

    def __init__(self, url: str, key: str | None, *, latency: LatencyLog, options: Mapping[str, Any]) -> None:
        """Arguments are those of `Router`, checked; `options` are of requests that do not have them."""
        self._connection = GatewayConnection(url, key)
        self._key = key
        self.url = self._connection.url
        self.events = EventBus()
        self.latency = latency
        self._options = options
        self._feed = GatewayEvents(self._connection, self.events)
        self.state = GatewayState(self._connection, self._feed.note_known, self.events)
        self.counts: Counter[str] = Counter()

    @io_bound
    async def connect(self) -> GatewayInfo:
        """Connect to the gateway, and follow its events from now on; returns what it says of itself.

        Raises:
            GatewayError: no gateway answers there, or it refuses the key.
        """
        info = await self._connection.hello()
        await self.call("status", {})
        return info

    def chunks(
        self,
        model: str,
        check: Callable[[], ChatRequest],
        *,
        router: object,
        interrupted: Answer | None = None,
        entry: JournalEntry | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a request; arguments are those of `OwnEngines.chunks`."""
        return GatewayRequest(
            self._connection,
            self._feed,
            latency=self.latency,
            counts=self.counts,
            model=model,
            check=check,
            options=self._options,
            router=router,
            interrupted=interrupted.state() if interrupted is not None else None,
            text=interrupted.text if interrupted is not None else "",
            entry=entry,
        ).chunks()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Have the gateway carry out a method; on the I/O loop.

        Raises:
            SollolError: the error of the method, or a `GatewayError`.
        """
        self._feed.start()
        data, known = await self._connection.call(name, arguments)
        self._feed.note_known(known)
        try:
            return CALLS[name].result(data)
        except ValueError as error:
            raise GatewayError(f"the gateway {self.url} sent something else than {name} gives: {error}") from None

    # --- deciding -------------------------------------------------------------------------------

    def should_use_distributed(self, model: str | Path) -> bool:
        """Whether the gateway would shard the model, by its profile. Waits for the gateway, so not on the I/O
        loop."""
        return cast(bool, run_blocking(self.call("should_use_distributed", {"model": model_text(model)})))

    def profile(self, model: str | Path) -> ModelProfile:
        """What the gateway knows about a model. Waits for the gateway, so not on the I/O loop.

        Raises:
            ModelFileError, ConfigError, GatewayError: it cannot be known.
        """
        return cast(ModelProfile, run_blocking(self.call("profile", {"model": model_text(model)})))

    @io_bound
    async def slots_for(self, model: str | Path, *, backend: str | None = None) -> ModelSlots:
        """How many requests for this model would run at the same time now, and which model that is."""
        arguments = {"model": model_text(model), "backend": backend}
        slots = cast(ModelSlots, await self.call("slots_for", arguments))
        saved = config.saved_model(model_text(model))
        defaults = {**saved.options, **({"system": saved.system} if saved.system else {})}
        added = {"defaults_here": defaults} if defaults else {}
        keeps = not self._options.get("deterministic")
        return replace(
            slots,
            identity={**slots.identity, **added},
            keeps=slots.keeps and keeps,
            saves=slots.saves and keeps,
        )

    @io_bound
    async def preload(self, model: str | Path | Route, *, keep_alive: float | str | None = None) -> str:
        """Load a model where a request for it would go; returns the place, such as `in Ollama`."""
        name = model.model if isinstance(model, Route) else model_text(model)
        return cast(str, await self.call("preload", {"model": name, "keep_alive": keep_alive}))

    @io_bound
    async def cluster(self) -> ClusterStatus:
        """The cluster after a check of all workers and nodes."""
        self._feed.start()
        return await self.state.refresh()

    @io_bound
    async def status(self) -> ClusterStatus:
        """The cluster as the gateway knows it; contacts no worker and no node."""
        self._feed.start()
        return await self.state.known_status()

    route = _at_gateway(OwnEngines.route)
    plan = _at_gateway(OwnEngines.plan)
    standby_of = _at_gateway(OwnEngines.standby_of)
    listed_models = _at_gateway(OwnEngines.listed_models)
    unload = _at_gateway(OwnEngines.unload)
    save_contexts = _at_gateway(OwnEngines.save_contexts)
    count_tokens = _at_gateway(OwnEngines.count_tokens)
    embed = _at_gateway(OwnEngines.embed)
    check_workers = _at_gateway(OwnEngines.check_workers)
    start_workers = _at_gateway(OwnEngines.start_workers)
    ensure_workers = _at_gateway(OwnEngines.ensure_workers)
    stop_workers = _at_gateway(OwnEngines.stop_workers)
    share_workers = _at_gateway(OwnEngines.share_workers)
    discover_workers = _at_gateway(OwnEngines.discover_workers)
    find_workers = _at_gateway(OwnEngines.find_workers)
    calibrate = _at_gateway(OwnEngines.calibrate)
    kept_calibrations = _at_gateway(OwnEngines.kept_calibrations)
    add_worker = _at_gateway(OwnEngines.add_worker)
    add_workers = _at_gateway(OwnEngines.add_workers)
    remove_worker = _at_gateway(OwnEngines.remove_worker)
    invite = _at_gateway(OwnEngines.invite)
    revoke = _at_gateway(OwnEngines.revoke)
    invitations = _at_gateway(OwnEngines.invitations)
    wait_started = _at_gateway(OwnEngines.wait_started)
    end_coordinators = _at_gateway(OwnEngines.end_coordinators)
    stop_coordinator = _at_gateway(OwnEngines.stop_coordinator)
    end_engines = _at_gateway(OwnEngines.end_engines)
    engine_log = _at_gateway(OwnEngines.engine_log)
    apply_plan = _at_gateway(OwnEngines.apply_plan)
    replan = _at_gateway(OwnEngines.replan)
    what_if = _at_gateway(OwnEngines.what_if)
    configure = _at_gateway(OwnEngines.configure)
    use_standbys = _at_gateway(OwnEngines.use_standbys)
    forget_contexts = _at_gateway(OwnEngines.forget_contexts)

    async def take_workers(self, endpoints: Sequence[str]) -> None:
        """Raises ConfigError: the workers are the gateway's."""
        self.refuse("workers cannot be taken")

    # --- what is known now ------------------------------------------------------------------------

    @property
    def coordinators(self) -> list[GatewayCoordinator]:
        """The gateway's coordinators, as last reported, the most recently used last."""
        return list(self._feed.known.coordinators)

    @property
    def worker_endpoints(self) -> list[str]:
        """The gateway's workers as `host:port`, as last reported."""
        return list(self._feed.known.worker_endpoints)

    @property
    def worker_targets(self) -> list[str]:
        """The gateway's, as last reported: `ssh://host` and the like for workers that it reaches through links,
        `host:port` for all others."""
        return list(self._feed.known.worker_targets)

    @property
    def layer_strategy(self) -> str:
        """How the layers of the gateway's next models are spread; "" before it has answered."""
        return self._feed.known.layer_strategy

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Router` that give another router over the same gateway."""
        return {"gateway": self.url, "gateway_key": self._key, **self._options, "latency": self.latency}

    def refuse(self, what: str) -> NoReturn:
        """Raises ConfigError: this is not possible over a gateway."""
        raise ConfigError(f"{what} (the engines are those of the gateway {self.url})")

    async def close(self, *, keep: bool) -> None:
        """Close the connections. The engines are the gateway's, so they run on, whatever `keep` says."""
        await self._feed.close()
        await self.state.close()
        await self._connection.aclose()
