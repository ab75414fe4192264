"""The cluster of this user as seen from outside of any notebook, for `sollol-nb status`."""

from __future__ import annotations

import asyncio
from typing import Any

from sollol_nb.cluster.status import ClusterStatus, describe_node, describe_worker
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import is_target
from sollol_nb.settings.kinds import checked_gateway


async def user_cluster() -> ClusterStatus:
    """All coordinators of this user, the workers that they hold, run here, are configured or are reached through
    links, and Ollama nodes; where the setting `gateway` names one, the cluster of this gateway.

    Workers and nodes are probed now; nothing is started, held or stopped.

    Raises:
        GatewayUnavailableError: the gateway does not answer.
    """
    async with HybridRouter(**await user_workers()) as router:
        return await router.cluster()


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


def problems(status: ClusterStatus) -> list[str]:
    """What needs attention, one line each.

    An unreachable Ollama node is a problem only if `OLLAMA_HOST` or a settings file names it.
    """
    lines = [
        f"{_kind(worker)} {worker.label} is {worker.state}: {describe_worker(worker)}"
        for worker in status.workers
        # A machine that nobody uses now is not connected, which is no problem.
        if worker.state not in ("free", "held") and (worker.state, _kind(worker)) != ("unknown", "machine")
    ]
    if config.find("ollama_hosts").source != config.BUILT_IN:
        lines += [
            f"Ollama node {node.url} is {node.state}: {describe_node(node)}"
            for node in status.nodes
            if node.state != "ready"
        ]
    for coordinator in status.coordinators:
        lines += [f"{coordinator.model} differs from its plan: {text}" for text in coordinator.differences]
    return lines


def _kind(worker: WorkerStatus) -> str:
    return "machine" if is_target(worker.endpoint) else "worker"


def without_problems(status: ClusterStatus) -> str:
    """The verdict where nothing needs attention: a cluster in which nothing runs is not called well."""
    if status.workers or status.coordinators or any(node.state == "ready" for node in status.nodes):
        return "all is well"
    return "nothing runs: there is no worker, no loaded model, and no Ollama node that answers"
