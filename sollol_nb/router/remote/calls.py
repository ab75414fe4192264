"""The methods that a gateway carries out for its notebooks, and the rights that they need.

Both sides read their types from `OwnEngines`. A method that is not in the table cannot be called.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sollol_nb.layers.plan import LayerPlan
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.router.own_engines import OwnEngines
from sollol_nb.router.remote.plain_data import from_plain

PROTOCOL = 1
"""Of the paths below `/sollol/`; another number is another protocol."""
SHORT_S = 60.0
LONG_S = 3600.0
"""Of calls that may build an engine or load a model; each step has its own limit at the gateway."""
MODEL_ARGUMENTS = ("model", "name")


@dataclass(frozen=True)
class Call:
    """A method that can be called.

    Attributes:
        method: of `OwnEngines`.
        controls: whether it changes the cluster, or shows data that needs a key with control.
        limit_s: how long a notebook waits for its result, in seconds.
    """

    method: Callable[..., Any]
    controls: bool = False
    limit_s: float = SHORT_S

    @property
    def asks(self) -> bool:
        """Whether it waits at a gate, with a priority."""
        return "priority" in self._types

    @property
    def is_plain(self) -> bool:
        """Whether the method is not async."""
        return not inspect.iscoroutinefunction(inspect.unwrap(self.method))

    @cached_property
    def _types(self) -> dict[str, Any]:
        return typing.get_type_hints(self.method)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, checked.

        Raises:
            ValueError: one is unknown, or of another type.
        """
        for name in given:
            if name not in self._types or name == "return":
                raise ValueError(f"{name} is not an argument of {self.method.__name__}")
        return {name: from_plain(self._types[name], value, name) for name, value in given.items()}

    def result(self, data: Any) -> Any:
        """The result of a call, from plain data.

        Raises:
            ValueError: it is of another type.
        """
        return from_plain(self._types["return"], data, "the result")


CALLS: Mapping[str, Call] = {
    call.method.__name__: call
    for call in (
        Call(OwnEngines.should_use_distributed),
        Call(OwnEngines.profile),
        Call(OwnEngines.route),
        Call(OwnEngines.plan),
        Call(OwnEngines.standby_of),
        Call(OwnEngines.slots_for),
        Call(OwnEngines.listed_models),
        Call(OwnEngines.preload, limit_s=LONG_S),
        Call(OwnEngines.unload, controls=True),
        Call(OwnEngines.save_contexts),
        Call(OwnEngines.count_tokens, limit_s=LONG_S),
        Call(OwnEngines.embed, limit_s=LONG_S),
        Call(OwnEngines.cluster),
        Call(OwnEngines.status),
        Call(OwnEngines.check_workers),
        Call(OwnEngines.what_if),
        Call(OwnEngines.wait_started, limit_s=LONG_S),
        Call(OwnEngines.start_workers, controls=True, limit_s=LONG_S),
        Call(OwnEngines.ensure_workers, controls=True, limit_s=LONG_S),
        Call(OwnEngines.stop_workers, controls=True),
        Call(OwnEngines.share_workers, controls=True),
        Call(OwnEngines.discover_workers, controls=True, limit_s=LONG_S),
        Call(OwnEngines.find_workers, controls=True, limit_s=LONG_S),
        Call(OwnEngines.add_worker, controls=True, limit_s=LONG_S),
        Call(OwnEngines.add_workers, controls=True, limit_s=LONG_S),
        Call(OwnEngines.calibrate, controls=True, limit_s=LONG_S),
        Call(OwnEngines.kept_calibrations),
        Call(OwnEngines.remove_worker, controls=True),
        Call(OwnEngines.invite, controls=True, limit_s=LONG_S),
        Call(OwnEngines.revoke, controls=True),
        Call(OwnEngines.invitations, controls=True),
        Call(OwnEngines.end_coordinators, controls=True),
        Call(OwnEngines.stop_coordinator, controls=True),
        Call(OwnEngines.end_engines, controls=True),
        Call(OwnEngines.engine_log, controls=True),
        Call(OwnEngines.apply_plan, controls=True, limit_s=LONG_S),
        Call(OwnEngines.replan, controls=True, limit_s=LONG_S),
        Call(OwnEngines.configure, controls=True),
        Call(OwnEngines.forget_contexts),
        Call(OwnEngines.use_standbys, controls=True),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayCoordinator:
    """A coordinator of a gateway.

    Attributes:
        model: its name.
        base_url: where it is, as the gateway reaches it.
        rpc_backends: the workers that it holds; empty where nothing is sharded.
        uptime_s: seconds since its start, when the gateway reported it.
        plan: its layer plan; None where nothing is sharded, or a gateway of an older version did not report it.
    """

    model: str
    base_url: str
    rpc_backends: tuple[str, ...]
    uptime_s: float
    plan: LayerPlan | None = None

    @classmethod
    def of(cls, coordinator: Coordinator) -> GatewayCoordinator:
        """A coordinator as notebooks see it."""
        return cls(
            model=coordinator.model,
            base_url=coordinator.base_url,
            rpc_backends=tuple(coordinator.rpc_backends),
            uptime_s=coordinator.uptime_s,
            plan=coordinator.plan,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The facts about a gateway that its notebooks keep.

    Attributes:
        coordinators, worker_endpoints, worker_targets, layer_strategy: as of the router.
    """

    coordinators: tuple[GatewayCoordinator, ...] = ()
    worker_endpoints: tuple[str, ...] = ()
    worker_targets: tuple[str, ...] = ()
    layer_strategy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayInfo:
    """The facts that a gateway reports about itself.

    Attributes:
        version: of its package.
        host: the name of its machine.
        key: the name of the key that was used; "" where none is needed.
        may_control: whether that key may change the cluster.
        latency_log: the identity of the latency log that it writes.
        protocol: see `PROTOCOL`.
    """

    version: str
    host: str
    key: str
    may_control: bool
    latency_log: str
    protocol: int
