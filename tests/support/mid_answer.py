"""Answers whose engines or workers are killed in the middle of them, however quick these are and however late the
answer is read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any, TypeVar

import psutil
import pytest

from sollol_nb.errors import ConnectionBrokenError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.exchange import Exchange
from tests.support.engines import MeteredWire, on_io_loop, read_and_do, unused_port, worker_on

T = TypeVar("T")


def read_and_kill(stream: AsyncGenerator[T, None], at: int, kill: Callable[[], object]) -> list[T]:
    """All items of an answer. After the item with this number, `kill` must end its engine. What the engine has
    sent by then, and is not read yet, is lost: it may be the whole rest. All other streams of this process that
    began earlier break, too."""
    is_killed = False
    lines = Exchange.lines

    async def until_killed(exchange: Exchange, path: str, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        is_later = is_killed
        async with aclosing(lines(exchange, path, body)) as whole:
            async for line in whole:
                if is_killed and not is_later:
                    raise ConnectionBrokenError(f"{path}: the rest is lost")
                yield line

    def do(_: list[T]) -> None:
        nonlocal is_killed
        is_killed = True
        kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "lines", until_killed)
        return read_and_do(stream, at, do)


@contextmanager
def wired_workers(engine: Engine, count: int) -> Iterator[dict[str, psutil.Process]]:
    """Workers that the package does not own, by their endpoints. They are reached through the I/O loop of this
    process: while it reads an answer late, the coordinator waits for them."""
    with ExitStack() as stack:
        workers = {}
        for _ in range(count):
            port = unused_port()
            worker = stack.enter_context(worker_on(engine, "127.0.0.1", port))
            workers[stack.enter_context(wire_to(port))] = worker
        yield workers


@contextmanager
def wire_to(worker_port: int) -> Iterator[str]:
    """An endpoint that leads through the I/O loop of this process to a worker."""
    with on_io_loop(MeteredWire(worker_port, allowed_bytes=2**40)) as wire:
        yield wire.endpoint
