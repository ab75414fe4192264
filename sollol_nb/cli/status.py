"""The cluster of this user as seen from outside of any notebook, for `sollol-nb status`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sollol_nb.cluster.live_figures import LiveFigures
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import is_target
from sollol_nb.settings.kinds import checked_gateway
from sollol_nb.text.tables import counted


async def user_cluster() -> ClusterStatus:
    """All coordinators of this user, the workers that they hold, run here, are configured or are reached through
    links, and Ollama nodes; where the setting `gateway` names one, the cluster of this gateway.

    Workers and nodes are probed now; nothing is started, held or stopped. It has no events: those of a router that
    lives for a moment say nothing of the cluster.

    Raises:
        GatewayUnavailableError: the gateway does not answer.
    """
    async with HybridRouter(**await user_workers()) as router:
        return replace(await router.cluster(), live=LiveFigures())


async def user_workers() -> dict[str, Any]:
    """The arguments of a router over the workers of this user; none where a gateway has its own."""
    if uses_gateway():
        return {}
    return {"rpc_backends": await known_workers(), "auto_discover_rpc": False}


def uses_gateway() -> bool:
    """Whether the setting `gateway` names one; `local` does not."""
    return checked_gateway(config.default("gateway")) is not None


async def known_workers() -> list[str]:
    """The workers of this user: configured ones, and those that run here or are held."""
    entries = await asyncio.to_thread(registry.entries)
    endpoints = [*config.default("workers")]
    endpoints += [entry.name for entry in entries if entry.kind == registry.LINK and is_target(entry.name)]
    linked = {endpoint for entry in entries for endpoint in entry.endpoints}
    for entry in entries:
        endpoints += [worker for worker in entry.workers if worker not in linked]
        if entry.kind == registry.WORKER and "endpoint" in entry.about:
            endpoints.append(entry.about["endpoint"])
    return list(dict.fromkeys(endpoints))


def verdict(status: ClusterStatus) -> str:
    """Whether something needs attention. A cluster in which nothing runs is not called well."""
    if status.problems:
        return f"needs attention: {counted(len(status.problems), 'problem')}, see the first lines"
    if status.workers or status.coordinators or any(node.state == "ready" for node in status.nodes):
        return "all is well"
    return "nothing runs: there is no worker, no loaded model, and no Ollama node that answers"
