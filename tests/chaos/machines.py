"""Machines of a cluster that can fail: real RPC workers that the package does not own, each behind a wire.

The workers are started as a user starts them on another machine: plain processes in their own session. The wire is
a TCP proxy, which can also fail: it passes data, breaks all connections, or swallows the data.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Coroutine
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.machine import free_ports
from tests.support.engines import HANG_GUARD_S, eventually

T = TypeVar("T")

HOST = "127.0.0.1"
FIRST_PORT = 25000
COORDINATOR_PORT = 25800
MACHINES = 4
_LENGTH_BYTES = 8
_LONGEST_OTHER_BYTES = 256
_NO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


@cache
def _network() -> asyncio.AbstractEventLoop:
    """The event loop of all wires; not that of the package, which a fault may keep busy."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="wires", daemon=True).start()
    return loop


def _on_network(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, _network()).result(HANG_GUARD_S)


class Wire:
    """A proxy on `port` of loopback for the server on `target_port`."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._results_left: int | None = None

    @property
    def is_passing(self) -> bool:
        """Whether data passes."""
        return self._passing.is_set()

    def open(self) -> None:
        """Listen, and pass data."""

        async def opened() -> None:
            self._results_left = None
            self._passing.set()
            if self._server is None:
                self._server = await asyncio.start_server(self._link, HOST, self.port)

        _on_network(opened())

    def reset(self) -> None:
        """Break all connections (TCP RST on both sides); new ones pass."""
        _on_network(self._reset())

    def swallow(self) -> None:
        """Pass no byte in either direction, and close nothing. New connections get no answer."""

        async def swallowed() -> None:
            self._passing.clear()

        _on_network(swallowed())

    def swallow_after(self, results: int) -> None:
        """Pass so many more results of the worker's layers, and then no byte in either direction."""

        async def counted() -> None:
            self._results_left = results
            self._passing.set()

        _on_network(counted())

    def close(self) -> None:
        """Refuse new connections, and break the open ones."""

        async def closed() -> None:
            self._results_left = None
            if self._server is not None:
                self._server.close()
                self._server = None
            await self._reset()
            self._passing.set()

        _on_network(closed())

    async def _reset(self) -> None:
        for writer in list(self._links):
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        try:
            await self._passing.wait()
            with suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
                self._links.add(far_writer)
                try:
                    await asyncio.gather(
                        self._copy(reader, far_writer), self._copy(far_reader, writer, is_of_worker=True)
                    )
                finally:
                    self._links.discard(far_writer)
                    far_writer.transport.abort()
        finally:
            self._links.discard(writer)
            writer.transport.abort()

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_of_worker: bool = False
    ) -> None:
        replies = _Replies()
        with suppress(OSError):
            while data := await source.read(65536):
                results = replies.results_in(data) if is_of_worker else 0
                if self._results_left is not None:
                    self._results_left -= results
                    if self._results_left < 0:
                        self._passing.clear()
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
        await self._passing.wait()  # the end of a connection does not pass either
        sink.close()


class _Replies:
    """Counts the results of layers in what a worker sends: replies of 8 bytes with their length, and so many more.
    All other replies are short."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._left_bytes = 0

    def results_in(self, data: bytes) -> int:
        """How many results begin in these bytes, which follow those before."""
        self._data += data
        results = 0
        while True:
            skipped = min(self._left_bytes, len(self._data))
            del self._data[:skipped]
            self._left_bytes -= skipped
            if self._left_bytes or len(self._data) < _LENGTH_BYTES:
                return results
            self._left_bytes = int.from_bytes(self._data[:_LENGTH_BYTES], "little")
            del self._data[:_LENGTH_BYTES]
            results += self._left_bytes > _LONGEST_OTHER_BYTES


class Machine:
    """A worker machine: an RPC worker, reached directly or through its wire.

    Attributes:
        endpoint: where the worker listens.
        wired_endpoint: where its wire listens.
    """

    def __init__(self, engine: Engine, port: int, wire_port: int) -> None:
        self.endpoint, self.wired_endpoint = f"{HOST}:{port}", f"{HOST}:{wire_port}"
        self._engine = engine
        self._port = port
        self._wire = Wire(wire_port, port)
        self._worker: subprocess.Popen[bytes] | None = None
        self._was_struck = False

    def __repr__(self) -> str:
        code = self._worker.poll() if self._worker is not None else None
        ended = "" if code is None else f", its worker ended with {code}"
        return f"<Machine {self.endpoint}, {'struck' if self._was_struck else 'not struck'}{ended}>"

    @property
    def is_well(self) -> bool:
        """Whether no fault has struck it since it was last made well."""
        return self._worker is not None and self._worker.poll() is None and not self._was_struck

    @property
    def has_broken_pipe(self) -> bool:
        """Whether its worker ended because it wrote to a coordinator that was gone, as workers do."""
        return self._worker is not None and self._worker.poll() == -signal.SIGPIPE

    def make_well(self) -> None:
        """Start it, or restart it after a fault; it listens on the same ports as before."""
        if self.is_well:
            self._wire.open()
            return
        self.kill()
        self._worker = subprocess.Popen(
            [str(self._engine.worker), "-H", HOST, "-p", str(self._port), "-t", "1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("SOLLOL_")},
            start_new_session=True,
        )
        eventually(self._listens, f"the worker on port {self._port} listens")
        self._wire.open()
        self._was_struck = False

    def kill(self) -> None:
        """End it without warning; it refuses connections."""
        self._was_struck = True
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
        self._wire.close()

    def freeze(self) -> None:
        """Stop it: its system accepts connections, but it does nothing."""
        self._was_struck = True
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it continue."""
        self._signal(signal.SIGCONT)

    def reset(self) -> None:
        """Break all connections through its wire."""
        self._wire.reset()

    def swallow(self) -> None:
        """Let its wire swallow all data."""
        self._was_struck = True
        self._wire.swallow()

    def swallow_after(self, results: int) -> None:
        """Let its wire swallow all data once the worker has sent so many more results of its layers: about as many
        tokens have been computed then, and no more can be. Followed by `pass_again`, it breaks nothing."""
        self._wire.swallow_after(results)

    @property
    def is_swallowing(self) -> bool:
        """Whether its wire swallows all data."""
        return not self._wire.is_passing

    def pass_again(self) -> None:
        """Let its wire pass data again, the swallowed data first."""
        self._wire.open()

    def _signal(self, number: int) -> None:
        assert self._worker is not None
        self._worker.send_signal(number)

    def _listens(self) -> bool:
        with socket.socket() as trial:
            return trial.connect_ex((HOST, self._port)) == 0


def _reserve_ports(count: int) -> tuple[socket.socket, int]:
    """The first of so many free ports in a row, and a listener on it that reserves them."""
    for first in range(FIRST_PORT, COORDINATOR_PORT, count):
        listener = socket.socket()
        try:
            listener.bind((HOST, first))
            listener.listen()
        except OSError:
            listener.close()
            continue
        if free_ports(first + 1, count - 1) == list(range(first + 1, first + count)):
            return listener, first
        listener.close()
    raise AssertionError(f"no {count} free ports in a row from {FIRST_PORT} upward")


class Cluster:
    """Three machines and a spare one."""

    def __init__(self, engine: Engine) -> None:
        # The ports of a dead machine are free; another cluster must not take them.
        self._reserved, first = _reserve_ports(1 + 2 * MACHINES)
        workers = range(first + 1, first + 1 + MACHINES)
        self.machines = [Machine(engine, port, port + MACHINES) for port in workers]

    def __enter__(self) -> Cluster:
        self.make_well()
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.kill()
        self._reserved.close()

    def make_well(self) -> None:
        """Make all machines well again."""
        for machine in self.machines:
            machine.make_well()

    def machine(self, endpoint: str) -> Machine:
        """The machine at an endpoint, wired or not."""
        return next(machine for machine in self.machines if endpoint in (machine.endpoint, machine.wired_endpoint))

    def well(self) -> list[Machine]:
        """The machines that no fault has struck."""
        return [machine for machine in self.machines if machine.is_well]
