"""Helpers for tests with real engines: a model that never stops generating, processes, false peers, waiting."""

from __future__ import annotations

import asyncio
import http.server
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.gguf_files import write_llama

T = TypeVar("T")
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HANG_GUARD_S = 120.0
REPOSITORY = Path(__file__).parents[2]
ENGINE_NAMES = ("llama-server", "ggml-rpc-server", "rpc-server")
ENDLESS_CONTEXT_TOKENS = 32768
QUESTION = "What is a worker?"

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, file modes and process groups")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the I/O loop, to which coordinators and workers belong."""

    async def guarded() -> T:
        async with asyncio.timeout(HANG_GUARD_S):
            return await coroutine

    return run_blocking(guarded())


def read_and_do(stream: AsyncGenerator[T, None], at: int, do: Callable[[list[T]], object]) -> list[T]:
    """All items of a stream. After the one with this number, `do` gets those so far before anything more is read.

    A blocking stream is read ahead of its reader, so that a quick answer may have ended by then.
    """

    async def read() -> list[T]:
        items: list[T] = []
        async with aclosing(stream):
            async for item in stream:
                items.append(item)
                if len(items) == at + 1:
                    do(items)
        return items

    return run_blocking(read())  # an answer may take long on a busy machine


async def busy_slots(coordinator: Coordinator) -> int:
    """How many of a coordinator's slots are processing, according to its engine."""
    return sum(slot["is_processing"] for slot in await coordinator._client.get("/slots", timeout_s=5.0))


def eventually(condition: Callable[[], T], description: str) -> T:
    """The condition's first true value; a failure if it never becomes true."""
    deadline = time.monotonic() + HANG_GUARD_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {HANG_GUARD_S:g} s: {description}")


async def eventually_async(condition: Callable[[], T], description: str) -> T:
    """The same inside a coroutine."""
    deadline = time.monotonic() + HANG_GUARD_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {HANG_GUARD_S:g} s: {description}")


@contextmanager
def repeatedly(step: Callable[[], object]) -> Iterator[None]:
    """Call `step`, which takes its time, again and again in a thread until the block ends."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            step()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def on_io_loop(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """It is entered and left on the I/O loop of this process."""
    entered = run(manager.__aenter__())
    try:
        yield entered
    finally:
        run(manager.__aexit__(None, None, None))


@contextmanager
def worker_on(engine: Engine, host: str, port: int) -> Iterator[psutil.Process]:
    """An RPC worker that the package does not own."""
    process = subprocess.Popen(
        [str(engine.worker), "-H", host, "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        restore_signals=False,  # SIGPIPE stays ignored: a connection that is cut does not end it
    )
    try:
        free = ProbeOutcome.FREE
        eventually(lambda: run(probe("127.0.0.1", port)).outcome is free, "it listens")
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


# --- models -----------------------------------------------------------------------------------


def write_endless(folder: Path, name: str = "endless.gguf") -> Path:
    """A model with random weights and a long context: its greedy answer ends only at `max_tokens`."""
    path = folder / name
    return write_llama(
        path, blocks=4, embedding=128, feed_forward=512, vocabulary=1000, context=ENDLESS_CONTEXT_TOKENS
    )


# --- processes --------------------------------------------------------------------------------


def engines_of(root: psutil.Process, part_of_name: str = "") -> list[psutil.Process]:
    """Engine processes that descend from `root`, with this part of a name. They compare by pid and start time."""
    found = []
    for child in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            name = child.name().removesuffix(".exe")
            if name in ENGINE_NAMES and part_of_name in name:
                found.append(child)
    return found


def engine_on(port: int) -> psutil.Process:
    """The engine of this process with this port in its arguments."""
    ours = engines_of(psutil.Process())
    found = [engine for engine in ours if is_alive(engine) and argument_after(engine, "-p", "--port") == str(port)]
    assert len(found) == 1, f"engines of ours on port {port}: {found}"
    return found[0]


def arguments_of(process: psutil.Process) -> list[str]:
    """Its program and arguments; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def argument_after(process: psutil.Process, *flags: str) -> str | None:
    """The argument after one of these flags; None if there is none, or if the process has ended."""
    return next((value for flag, value in pairwise(arguments_of(process)) if flag in flags), None)


def is_alive(process: psutil.Process) -> bool:
    """Whether it is running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_at_once(processes: Iterable[psutil.Process]) -> None:
    """Kill them so that none can act on the end of another one. One may have ended by itself."""
    victims = list(processes)
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                act(process)


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """It waits meanwhile: however quick an engine is, its answer has no end. It may be ended meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def all_end(processes: list[psutil.Process]) -> None:
    """Wait until none of them is running."""
    eventually(lambda: not any(map(is_alive, processes)), f"{processes} ended")


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """The processes on this machine that were started with this environment variable."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and is_alive(process):
                found.append(process)
    return found


@contextmanager
def script(text: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `text`, with more environment variables; killed at the end if still running."""
    process = subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], wanted: str) -> str:
    """The rest of the next line that a script prints, which must begin with `wanted`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(wanted):
        process.send_signal(signal.SIGTERM)
        raise AssertionError(f"expected {wanted!r}, got {line!r}: {process.communicate()[1]}")
    return line[len(wanted) :].strip()


# --- peers ------------------------------------------------------------------------------------


@contextmanager
def silent_peer(port: int = 0) -> Iterator[int]:
    """A loopback port that accepts connections (the operating system does) and never sends anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen(16)
        yield int(listener.getsockname()[1])


def unused_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def unused_ports(count: int) -> int:
    """The first of `count` consecutive unused ports, below the range that systems assign themselves."""
    for first in range(20000, 30000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as trial:
                    trial.bind(("127.0.0.1", port))
            return first
    raise AssertionError(f"no {count} consecutive unused ports")


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler], port: int = 0) -> Iterator[int]:
    """A threaded loopback server; yields its port."""

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def listening(peer: Peer) -> AsyncIterator[int]:
    """The port of a loopback server that treats every client as `peer` does."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await peer(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


class OtherProtocolWorker(socketserver.BaseRequestHandler):
    """A worker that greets with RPC protocol 8."""

    def handle(self) -> None:
        # Read all of the request: a connection that is closed with unread bytes is reset.
        header = self.request.recv(9, socket.MSG_WAITALL)
        if len(header) == 9:
            self.request.recv(int.from_bytes(header[1:], "little"), socket.MSG_WAITALL)
        self.request.sendall(struct.pack("<Q", 28) + bytes([8, 0, 0, 0]) + bytes(24))


def http_stranger(status: int, body: bytes = b'{"status":"ok"}') -> type[http.server.BaseHTTPRequestHandler]:
    """A web server that gives every request the same answer, and lists their paths in `asked`."""

    class Stranger(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        asked: list[str] = []  # noqa: RUF012 - all its connections share it

        def answer(self) -> None:
            type(self).asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    return Stranger


TUNNEL = """
import asyncio, socket, struct, sys
host, port, worker_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
no_linger = struct.pack("ii", 1, 0)
async def copy(source, sink):
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()
async def carry(reader, writer):
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", worker_port)
    except OSError:
        writer.transport.abort()
        return
    copies = [asyncio.create_task(copy(*ends)) for ends in ((reader, far_writer), (far_reader, writer))]
    await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    if copies[0].done() and copies[0].exception():  # a reset is passed on, so that SIGPIPE does not end the worker
        far_writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    for end in (writer, far_writer):
        end.transport.abort()
async def main():
    server = await asyncio.start_server(carry, host, port)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def tunnel_to(worker_port: int, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A process that carries connections to a worker on loopback, as `ssh -L` does; yields its port."""
    with script(TUNNEL, host, str(port), str(worker_port)) as process:
        yield int(says(process, "port"))


class MeteredWire:
    """A proxy to a worker that passes as many bytes from the coordinator as it is allowed, and then waits.

    Args:
        buffer_bytes: about how many unread bytes the system keeps for a connection; by default the system decides.

    Attributes:
        passed_bytes: so far.
        halted: set once it has waited.
    """

    def __init__(self, worker_port: int, allowed_bytes: int = 0, *, buffer_bytes: int | None = None) -> None:
        self.passed_bytes = 0
        self.halted = asyncio.Event()
        self._worker_port = worker_port
        self._left_bytes = allowed_bytes
        self._more = asyncio.Condition()
        self._buffer_bytes = buffer_bytes

    async def __aenter__(self) -> MeteredWire:
        listener = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio does not set TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `start_server` does it
        if self._buffer_bytes is not None:  # its connections have the same
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._pass, sock=listener)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.let_through(2**40)

    async def let_through(self, more_bytes: int) -> None:
        await self.let_through_only(self._left_bytes + more_bytes)

    async def let_through_only(self, more_bytes: int) -> None:
        """Whatever was allowed before."""
        async with self._more:
            self._left_bytes = more_bytes
            self._more.notify_all()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            worker_reader, worker_writer = await asyncio.open_connection("127.0.0.1", self._worker_port)
        except OSError:  # it has ended
            writer.transport.abort()
            return
        await asyncio.gather(self._copy(reader, worker_writer, metered=True), self._copy(worker_reader, writer))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, metered: bool = False) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                while data:
                    passed = await self._allowed(data) if metered else data
                    sink.write(passed)
                    await sink.drain()
                    data = data[len(passed) :]
        sink.close()

    async def _allowed(self, data: bytes) -> bytes:
        """The beginning of it that may pass: exactly as much as is allowed, however much one read gave."""
        async with self._more:
            if self._left_bytes <= 0:
                self.halted.set()
            await self._more.wait_for(lambda: self._left_bytes > 0)
            passed = data[: self._left_bytes]
            self._left_bytes -= len(passed)
            self.passed_bytes += len(passed)
            return passed


class WireProxy:
    """A proxy to a worker that passes on what is sent there later, or not more than so many bytes a second."""

    def __init__(self, worker_port: int, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self._worker_port = worker_port
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s

    async def __aenter__(self) -> WireProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker_reader, worker_writer = await asyncio.open_connection("127.0.0.1", self._worker_port)
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=32)
        await asyncio.gather(
            self._receive(reader, waiting),
            self._send(waiting, worker_writer),
            self._copy(worker_reader, writer),
        )

    async def _receive(self, source: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            data = b""
            with suppress(OSError):
                data = await source.read(65536)
            await waiting.put((time.monotonic() + self._delay_s, data))

    async def _send(self, waiting: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        free_at = 0.0
        with suppress(OSError):
            while True:
                due, data = await waiting.get()
                if not data:
                    break
                await asyncio.sleep(max(due, free_at) - time.monotonic())
                if self._bytes_per_s is not None:
                    free_at = max(time.monotonic(), free_at) + len(data) / self._bytes_per_s
                sink.write(data)
                await sink.drain()
        sink.close()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()
