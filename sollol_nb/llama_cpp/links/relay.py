"""A link to one worker at an address that llama.cpp cannot connect to.

llama.cpp cuts an endpoint at the first colon, so an IPv6 address is reached through a port on loopback."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from sollol_nb.llama_cpp.links.link import READY, LinkedWorker
from sollol_nb.llama_cpp.links.program import COPY_BYTES, Report, run, serve_on_loopback
from sollol_nb.settings.endpoints import parse_endpoint

CONNECT_LIMIT_S = 5.0


async def relay(spec: Mapping[str, Any], report: Report) -> None:
    """Serve until the supervisor ends. Arguments: `target`, the worker's endpoint."""
    target = str(spec["target"])
    host, port = parse_endpoint(target)

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            return await asyncio.open_connection(host, port, limit=COPY_BYTES)

    endpoint, server = await serve_on_loopback(connect)
    async with server:
        await report.set(READY, f"{target} is reached through {endpoint}", {endpoint: LinkedWorker(name=target)})
        await report.supervisor_ended()


if __name__ == "__main__":
    sys.exit(run(relay))
