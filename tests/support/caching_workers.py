"""Workers with caches of tensors of their own, as on machines of their own; bytes to each are counted."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from tests.support.engines import eventually, run, unused_port

CHUNK_BYTES = 1024 * 1024


class CachingWorker:
    """A real worker behind a port that counts what it receives.

    Attributes:
        endpoint: how a router names it.
        received_bytes: since the last `count_anew`.
        cache: its folder.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.cache = folder
        self.received_bytes = 0
        self._engine = engine
        self._worker_port = unused_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def start(self) -> None:
        """Start its process, with what its cache has."""
        self._process = subprocess.Popen(
            [str(self._engine.worker), "-H", "127.0.0.1", "-p", str(self._worker_port), "-t", "1", "-c"],
            env={**os.environ, "LLAMA_CACHE": str(self.cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            restore_signals=False,  # SIGPIPE stays ignored: a client that leaves must not end it
        )
        free = ProbeOutcome.FREE
        eventually(lambda: run(probe("127.0.0.1", self._worker_port)).outcome is free, "the worker is free")

    def kill(self) -> None:
        """Its machine dies: the process and all connections end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def stop(self) -> None:
        """End it for good."""
        self.kill()
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                try:
                    worker = socket.create_connection(("127.0.0.1", self._worker_port))
                except OSError:
                    client.close()
                    continue
                for each in (client, worker):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections += [client, worker]
                threading.Thread(target=self._copy, args=(client, worker, True), daemon=True).start()
                threading.Thread(target=self._copy, args=(worker, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if counts:
                    self.received_bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def caching_workers(engine: Engine, folder: Path, count: int) -> Iterator[list[CachingWorker]]:
    """Running workers with empty caches."""
    workers = [CachingWorker(engine, folder / f"cache{number}") for number in range(count)]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def count_anew(workers: Sequence[CachingWorker]) -> None:
    """Forget what they have received."""
    for worker in workers:
        worker.received_bytes = 0


def received_bytes(workers: Sequence[CachingWorker]) -> int:
    """What they have received together since then."""
    return sum(worker.received_bytes for worker in workers)
