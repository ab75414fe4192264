"""The arguments of a router, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sollol_nb.chat.option_checks import check_options
from sollol_nb.errors import ConfigError
from sollol_nb.latency.log import LatencyLog
from sollol_nb.layers.planner import check_strategy
from sollol_nb.llama_cpp.coordinators.settings import PoolSettings
from sollol_nb.runtime.amounts import is_positive
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, format_endpoint, parse_endpoint, worker_target
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.settings.models import model_text
from sollol_nb.settings.table import SETTINGS


def check_amounts(**amounts: object) -> None:
    """Check that amounts are more than 0; None is allowed.

    Raises:
        ConfigError: one is not.
    """
    for name, amount in amounts.items():
        if amount is not None and not is_positive(amount):
            raise ConfigError(f"{name}={amount!r} must be more than 0")


def pool_settings(
    *,
    num_rpc_backends: int | None,
    context_tokens: int | None,
    slots: int,
    layer_strategy: str,
    coordinator_timeout: float,
    llama_cpp: str | Path | None,
    keep_alive: float | str | Mapping[str, float | str] | None,
    speculation: str,
    draft: str | Path | None,
    replan: str,
    standby: bool,
    **others: Any,
) -> PoolSettings:
    """The settings of the coordinator pool.

    Args:
        others: fields of `PoolSettings` that are passed on unchanged.

    Raises:
        ConfigError: one of them cannot be used.
    """
    counts = {"num_rpc_backends": num_rpc_backends, "context_tokens": context_tokens, "slots": slots}
    check_amounts(**counts)
    for name, count in counts.items():
        if isinstance(count, float):
            raise ConfigError(f"{name}={count!r} must be a whole number")
    check_strategy(layer_strategy)
    speculation = SETTINGS["speculation"].kind.checked(speculation, "speculation")
    draft_name = None if draft is None else SETTINGS["draft"].kind.checked(model_text(draft), "draft")
    return PoolSettings(
        num_rpc_backends=num_rpc_backends,
        context_tokens=context_tokens,
        slots=slots,
        layer_strategy=layer_strategy,
        coordinator_timeout_s=coordinator_timeout,
        llama_cpp=Path(llama_cpp) if llama_cpp is not None else None,
        speculation=speculation,
        draft=draft_name,
        replan=SETTINGS["replan"].kind.checked(replan, "replan"),
        standby=SETTINGS["standby"].kind.checked(standby, "standby"),
        **_keep_alive_settings(keep_alive),
        **others,
    )


def pool_arguments(settings: PoolSettings) -> dict[str, Any]:
    """The arguments of `Router` that give these settings; `pool_settings` the other way round."""
    arguments = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "exact"}
    arguments["coordinator_timeout"] = arguments.pop("coordinator_timeout_s")
    keep_alive = {**arguments.pop("keep_alive_of"), "*": arguments.pop("keep_alive_s")}
    arguments["keep_alive"] = {model: "forever" if s is None else s for model, s in keep_alive.items()}
    return arguments


def request_options(
    *, recovery: str | None, deterministic: bool | None, only_given: bool = False
) -> dict[str, Any]:
    """Options of requests that do not have them, from the arguments of `Router`, else from the settings.

    Args:
        only_given: leave out what is neither given nor set.

    Raises:
        ConfigError: one of them cannot be used.
    """
    given = {"recovery": recovery, "deterministic": deterministic}
    found = {name: config.find(name) for name, value in given.items() if value is None}
    if only_given:
        given = {name: value for name, value in given.items() if value is not None}
        found = {name: each for name, each in found.items() if each.source != config.BUILT_IN}
    return check_options({**given, **{name: each.value for name, each in found.items()}})


def check_gateway_arguments(url: str, **arguments: object) -> None:
    """Check that no argument is given that is about own engines.

    Raises:
        ConfigError: one is.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: the engines are those of the gateway {url}; leave this out, or give "
            "gateway='local'"
        )


def endpoints(backends: Iterable[str | Mapping[str, Any]] | None) -> list[str]:
    """The workers as `host:port`; by default those of the setting `workers`.

    Raises:
        ConfigError: one is not an endpoint.
    """
    return [*config.default("workers")] if backends is None else [_endpoint(backend) for backend in backends]


def _endpoint(backend: str | Mapping[str, Any]) -> str:
    """`host:port` of a backend given as text or as a dict with `host` and `port`."""
    if isinstance(backend, str):
        return worker_target(backend)
    if not isinstance(backend, Mapping) or "host" not in backend:
        raise ConfigError(f'{backend!r} is not an RPC backend; write {{"host": "192.168.1.10", "port": 50052}}')
    text = format_endpoint(str(backend["host"]), backend.get("port", DEFAULT_RPC_PORT))
    return format_endpoint(*parse_endpoint(text))


def _keep_alive_settings(keep_alive: float | str | Mapping[str, float | str] | None) -> dict[str, Any]:
    """`keep_alive` as the settings of the coordinator pool."""
    by_model = dict(keep_alive) if isinstance(keep_alive, Mapping) else {}
    rest = by_model.pop("*", None) if isinstance(keep_alive, Mapping) else keep_alive
    return {
        "keep_alive_s": config.default_keep_alive_s() if rest is None else keep_alive_seconds(rest),
        "keep_alive_of": {model: keep_alive_seconds(value) for model, value in by_model.items()},
    }


def latency_log() -> LatencyLog:
    """The latency log of the state folder, with the retention that is set."""
    keep_rows = config.default("latency_keep_rows") or None
    return LatencyLog(keep_days=config.default("latency_keep_days"), keep_rows=keep_rows)
