"""A link to one worker at an address that llama.cpp cannot connect to.

llama.cpp cuts an endpoint at the first colon, so an IPv6 address is reached through a port on loopback.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from sollol_nb.llama_cpp.links.link import LOST, READY, LinkedWorker
from sollol_nb.llama_cpp.links.program import COPY_BYTES, Report, run, serve_on_loopback
from sollol_nb.settings.endpoints import parse_endpoint

CONNECT_LIMIT_S = 5.0
RETRY_S = 1.0


async def relay(spec: Mapping[str, Any], report: Report) -> None:
    """Serve until the supervisor ends. Arguments: `target`, the worker's endpoint."""
    target = str(spec["target"])
    host, port = parse_endpoint(target)
    failed = asyncio.Event()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                return await asyncio.open_connection(host, port, limit=COPY_BYTES)
        except (OSError, TimeoutError):
            failed.set()
            raise

    async def watch(endpoint: str) -> None:
        worker = {endpoint: LinkedWorker(name=target)}
        state = ""
        while True:
            try:
                (await connect())[1].transport.abort()
            except (OSError, TimeoutError) as error:
                if state != LOST:
                    state = LOST
                    await report.set(LOST, _describe(target, error), {})
                await asyncio.sleep(RETRY_S)
                continue
            failed.clear()
            if state != READY:
                state = READY
                await report.set(READY, f"{target} is reached through {endpoint}", worker)
            await failed.wait()

    endpoint, server = await serve_on_loopback(connect)
    async with server, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch(endpoint))
        await report.supervisor_ended()
        watching.cancel()


def _describe(target: str, error: OSError | TimeoutError) -> str:
    """What is wrong with a worker that accepts no connection, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        host, port = parse_endpoint(target)
        return f"nothing listens on {target}; start a worker there: ggml-rpc-server -H {host} -p {port}"
    why = f"no answer within {CONNECT_LIMIT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or error
    return f"{target} cannot be reached ({why}); check the address, the network and the firewall"


if __name__ == "__main__":
    sys.exit(run(relay))
