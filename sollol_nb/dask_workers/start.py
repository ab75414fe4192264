"""`workers_from_dask`: one RPC worker beside each worker of a Dask cluster."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError, SollolError, WorkerStartError
from sollol_nb.router.router import Router
from sollol_nb.runtime.http_client import one_line
from sollol_nb.settings.endpoints import INVITATIONS
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    from distributed import Client

USES_OF_EACH, MAX_USES = 4, 64
CONNECT_LIMIT_S = 20.0
POLL_S = 0.05


def workers_from_dask(
    client: Client,
    *,
    threads: int | None = None,
    host: str | None = None,
    port: int | None = None,
    uses: int | None = None,
    expires: float | str = "24h",
) -> list[str] | Awaitable[list[str]]:
    """Run one RPC worker beside each worker of a Dask cluster.

    `HybridRouter(rpc_backends=workers_from_dask(client))` shards models over them.

    The RPC workers join this machine by an invitation, so they dial it, and listen on no network. Each ends with
    its Dask worker, however that ends. A Dask worker that starts later, or again after it was killed, gets one
    too, as long as the invitation has uses and has not expired. A second call replaces what the first has started;
    Dask's `unregister_worker_plugin`, given the name `sollol-nb-worker`, ends them all. On each machine, this
    package must be installed in Dask's environment, with llama.cpp (`sollol-nb install`).

    Args:
        client: of the cluster, blocking or asynchronous.
        threads: of each RPC worker; by default as many as its Dask worker has.
        host: the address on which this machine listens, which the cluster's machines can reach; by default its
            address on its network.
        port: the port on which it listens; by default a free one, which stays the same.
        uses: how many RPC workers may join in all; by default 4 for each Dask worker that runs now, at most 64.
        expires: when the invitation ends: seconds, `"24h"`. Who has joined stays. Until then this machine listens,
            also after the cluster has closed, unless `HybridRouter.revoke` withdraws it.

    Returns:
        What `rpc_backends` takes: the target through which all workers are reached that have joined this machine.
        An asynchronous client gets an awaitable of it.

    Raises:
        ConfigError: an argument cannot be used, or the cluster has no worker yet.
        JoinError: this machine cannot listen there.
        WorkerStartError: an RPC worker could not be started; none is left.
    """
    untyped: Any = client  # most of its methods have no types
    started: list[str] | Awaitable[list[str]] = untyped.sync(_start, client, threads, host, port, uses, expires)
    return started


async def _start(
    client: Any, threads: int | None, host: str | None, port: int | None, uses: int | None, expires: float | str
) -> list[str]:
    from sollol_nb.dask_workers.plugin import RpcWorkers  # needs Dask

    count = len(await client.scheduler.ncores(workers=None))
    if not count:
        raise ConfigError("the Dask cluster has no worker yet; wait for it with client.wait_for_workers(1)")
    # The same name for the same cluster, and so what a former call has started is found.
    name = f"dask-{hashlib.sha256(client.scheduler.address.encode()).hexdigest()[:6]}"
    router = Router(gateway="local", rpc_backends=[], auto_discover_rpc=False)
    try:
        await _revoke(router, name)
        invitation = await router.invite(
            uses=min(MAX_USES, USES_OF_EACH * count) if uses is None else uses,
            expires=expires,
            name=name,
            host=host,
            port=port,
        )
        try:
            await client.register_plugin(RpcWorkers(invitation.link, threads))
            await _all_connected(router, name, count)
        except BaseException as error:
            await _revoke(router, name)
            with suppress(ValueError, OSError):  # it was not registered, or the scheduler is gone
                await client.unregister_worker_plugin(RpcWorkers.name)
            if isinstance(error, SollolError) or not isinstance(error, Exception):
                raise
            raise WorkerStartError(
                f"cannot start workers in the Dask cluster: {one_line(str(error))}; check that its machines have "
                "this package, with llama.cpp, and reach this machine"
            ) from error
    finally:
        await router.close(keep=True)  # the link listens on
    return [INVITATIONS]


async def _revoke(router: Router, name: str) -> None:
    """Withdraw the invitation of a cluster, if it has one, which ends the workers that joined with it."""
    with suppress(ConfigError):
        await router.revoke(name)


async def _all_connected(router: Router, name: str, count: int) -> None:
    """Wait until this many workers that have joined by this invitation can be used."""
    deadline = asyncio.get_running_loop().time() + CONNECT_LIMIT_S
    while True:
        joined = [machine for machine in (await router.invitations()).joined if machine.invitation == name]
        connected = sum(machine.is_connected for machine in joined)
        if connected >= count:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise WorkerStartError(
                f"only {counted(connected, 'worker')} of {count} in the Dask cluster have joined"
            )
        await asyncio.sleep(POLL_S)
