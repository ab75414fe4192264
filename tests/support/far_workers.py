"""Workers at IPv6 addresses, whose links can be cut: each a real worker behind a tunnel that a test kills."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from tests.support.engines import eventually, run, tunnel_to, unused_port


class FarWorker:
    """One worker that is reached at an IPv6 address only.

    Attributes:
        target: how a router names it.
    """

    def __init__(self, engine: Engine) -> None:
        self._port, self._worker_port = unused_port(), unused_port()
        self.target = f"[::1]:{self._port}"
        self._tunnel = ExitStack()
        self._is_connected = False
        self._process = subprocess.Popen(
            [str(engine.worker), "-H", "127.0.0.1", "-p", str(self._worker_port), "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            restore_signals=False,  # SIGPIPE stays ignored: a cut connection must not end it
        )

    @property
    def is_connected(self) -> bool:
        """Whether its address answers."""
        return self._is_connected

    def connect(self) -> None:
        """Its address answers from now on."""
        free = ProbeOutcome.FREE
        eventually(lambda: run(probe("127.0.0.1", self._worker_port)).outcome is free, "the worker is free")
        self._tunnel.enter_context(tunnel_to(self._worker_port, "::1", self._port))
        self._is_connected = True

    def cut(self) -> None:
        """Its connections end, and its address refuses new ones."""
        self._tunnel.close()
        self._is_connected = False

    def stop(self) -> None:
        """End it."""
        self.cut()
        self._process.kill()
        self._process.wait()


@contextmanager
def far_workers(engine: Engine, count: int) -> Iterator[list[FarWorker]]:
    """Connected workers."""
    workers: list[FarWorker] = []
    try:
        for _ in range(count):
            workers.append(FarWorker(engine))
            workers[-1].connect()
        yield workers
    finally:
        for worker in workers:
            worker.stop()
