"""The process of a link: it reports its state to its registry entry, and copies bytes between connections.

What it prints is its log. A link that cannot work ends; its last line says why (`link.FAILED`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.llama_cpp.links.link import FAILED, SPEC, LinkedWorker
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint

ENTRY_LIMIT_S = 10.0
COPY_BYTES = 256 * 1024

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Connects to a worker. Raises OSError or TimeoutError."""


class Report:
    """What the registry entry of this link says."""

    def __init__(self, supervisor: EngineProcess) -> None:
        self._supervisor = supervisor

    @classmethod
    async def connect(cls) -> Report:
        """The report of this process, which a supervisor has started.

        Raises:
            SollolError: there is no registry entry of this process.
        """
        deadline = asyncio.get_running_loop().time() + ENTRY_LIMIT_S
        while asyncio.get_running_loop().time() < deadline:
            for entry in registry.entries(registry.LINK):
                if entry.pid == os.getpid() and (supervisor := await EngineProcess.adopt(entry)) is not None:
                    return cls(supervisor)
            await asyncio.sleep(0.02)
        raise SollolError("this link has no registry entry; it is started by a router, not by hand")

    async def set(self, state: str, detail: str, workers: Mapping[str, LinkedWorker], **more: Any) -> None:
        """Report the state, one line about it, the workers that are reachable now, by endpoint, and more."""
        print(f"{state}: {detail}", flush=True)
        endpoints = {endpoint: worker.as_dict() for endpoint, worker in workers.items()}
        await self._supervisor.update_about(state=state, detail=detail, endpoints=endpoints, **more)

    async def tell(self, **about: Any) -> None:
        """Report something else."""
        await self._supervisor.update_about(**about)

    async def about(self) -> dict[str, Any]:
        """What the registry entry says now."""
        entry = await asyncio.to_thread(registry.find, self._supervisor.entry.id)
        return entry.about if entry is not None else {}

    async def keep(self, is_kept: bool) -> None:
        """Whether this link lives without a router that uses it."""
        if is_kept:
            await self._supervisor.hold()
        else:
            self._supervisor.free()

    async def supervisor_ended(self) -> None:
        """Wait until the supervisor has ended; then this process is not wanted any more."""
        await self._supervisor.wait()


def run(link: Callable[[Mapping[str, Any], Report], Awaitable[None]]) -> int:
    """Run a link until it ends, or its supervisor ends it; returns the exit code.

    Args:
        link: gets the arguments given to `start_link` and the report.
    """
    spec = json.loads(os.environ.pop(SPEC))

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await link(spec, await Report.connect())

    try:
        asyncio.run(main())
    except (SollolError, OSError) as error:
        print(f"{FAILED}{' '.join(str(error).split())}", flush=True)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        pass
    return 0


async def serve_on_loopback(connect: Connect, port: int = 0) -> tuple[str, asyncio.Server]:
    """Listen on loopback, and carry each connection to a worker; returns the endpoint and its server.

    Args:
        port: the port to use, if it is free; else, and by default, any free one.
    """

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await connect()
        except (OSError, TimeoutError, EOFError) as error:
            print(f"a connection failed: {error}", flush=True)
            writer.transport.abort()
            return
        await splice((reader, writer), there)

    try:
        server = await asyncio.start_server(carry, LOOPBACK, port, limit=COPY_BYTES)
    except OSError:
        if not port:
            raise
        server = await asyncio.start_server(carry, LOOPBACK, 0, limit=COPY_BYTES)
    return format_endpoint(LOOPBACK, server.sockets[0].getsockname()[1]), server


async def splice(
    here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Copy bytes in both directions until either side closes; then both are closed."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(COPY_BYTES):
            writer.write(data)
            await writer.drain()

    copies = [asyncio.create_task(copy(here[0], there[1])), asyncio.create_task(copy(there[0], here[1]))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in copies:
            task.cancel()
        for writer in (here[1], there[1]):
            with contextlib.suppress(OSError):
                writer.close()
        await asyncio.gather(*copies, return_exceptions=True)
