"""The cluster of this user as seen from outside of any notebook: for `sollol-nb status`."""

from __future__ import annotations

import asyncio

from sollol_nb.cluster.status import ClusterStatus, describe_node, describe_worker
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.settings import config


async def user_cluster() -> ClusterStatus:
    """All coordinators of this user, the workers that they hold, that run here or that are set, and Ollama nodes.

    Workers and nodes are looked at now; nothing is started, held or stopped.
    """
    entries = await asyncio.to_thread(registry.entries)
    endpoints = [*config.default("workers")]
    for entry in entries:
        endpoints += entry.workers
        if entry.kind == registry.WORKER:
            endpoints.append(str(entry.about["endpoint"]))
    async with HybridRouter(rpc_backends=dict.fromkeys(endpoints), auto_discover_rpc=False) as router:
        return await router.cluster()


def troubles(status: ClusterStatus) -> list[str]:
    """What needs somebody's attention, one line each.

    An Ollama node is only missed where `OLLAMA_HOST` or a settings file names it.
    """
    lines = [
        f"worker {one.endpoint} is {one.state}: {describe_worker(one)}"
        for one in status.workers
        if one.state not in ("free", "held")
    ]
    if config.find("ollama_hosts").source != config.BUILT_IN:
        lines += [
            f"Ollama node {one.url} is {one.state}: {describe_node(one)}"
            for one in status.nodes
            if one.state != "ready"
        ]
    for one in status.coordinators:
        lines += [f"{one.model} differs from its plan: {difference}" for difference in one.differences]
    return lines
