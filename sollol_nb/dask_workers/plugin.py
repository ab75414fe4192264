"""The plugin of Dask's workers: each runs one RPC worker, which joins the machine that has invited it.

The RPC worker is the command `sollol-nb worker`, a child process that ends when its standard input does: with the
Dask worker, however that ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections import deque
from contextlib import suppress
from pathlib import Path

from distributed import Worker
from distributed.diagnostics.plugin import WorkerPlugin

logger = logging.getLogger(__name__)

JOINED = "sollol-nb: joined "
"""How the line begins that the command prints once its worker can be used."""
JOIN_LIMIT_S = 60.0
END_LIMIT_S = 10.0
LINES_KEPT = 5


class RpcWorkers(WorkerPlugin):
    """Runs an RPC worker beside a Dask worker.

    Attributes:
        name: of the plugin: a cluster has one, and the next replaces it.
    """

    name = "sollol-nb-worker"

    def __init__(self, link: str, threads: int | None) -> None:
        """
        Args:
            link: the join link, with a use for each Dask worker.
            threads: of each RPC worker; None is as many as its Dask worker has.
        """
        self._link = link
        self._threads = threads
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return "<RpcWorkers>"

    async def setup(self, worker: Worker) -> None:
        """Start the RPC worker, and wait until it has joined.

        Raises:
            RuntimeError: it has not; the message is its last line.
        """
        # Machines may share a home folder, but not the state of processes. Dask removes its folder at the end.
        state = Path(worker.local_directory) / "sollol_nb"
        threads = self._threads or worker.state.nthreads
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "sollol_nb", "worker", "--join", "-", "--until-eof", "--threads", str(threads)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env={**os.environ, "SOLLOL_STATE_DIR": str(state)},
        )
        assert process.stdin is not None
        joined = asyncio.Event()
        lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._reading = reading = asyncio.create_task(_read(process, lines, joined))
        with suppress(OSError):
            process.stdin.write(f"{self._link}\n".encode())
        waiting = asyncio.create_task(joined.wait())
        await asyncio.wait([reading, waiting], timeout=JOIN_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not joined.is_set():
            await self.teardown(worker)
            why = lines[-1] if lines else f"it did not join within {JOIN_LIMIT_S:g} s"
            raise RuntimeError(f"the RPC worker of Dask worker {worker.address} did not start: {why}")

    async def teardown(self, worker: Worker) -> None:
        """End the RPC worker."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(END_LIMIT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reading is not None:
            self._reading.cancel()


async def _read(process: asyncio.subprocess.Process, lines: deque[str], joined: asyncio.Event) -> None:
    """Log what the process prints, until it ends."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        text = line.decode("utf-8", "replace").strip()
        logger.info("%s", text)
        lines.append(text)
        if text.startswith(JOINED):
            joined.set()
