"""The worker's side of a join link: it connects to the inviting machine, and carries connections to workers.

Nothing listens here except the workers, on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from sollol_nb.errors import JoinError, SollolError
from sollol_nb.llama_cpp.links.join_link import Connection, Facts, JoinLink, beat, connect, receive, send
from sollol_nb.llama_cpp.links.program import COPY_BYTES, splice
from sollol_nb.runtime.http_client import one_line
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.text.tables import counted

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
FIRST_TRIES = 3
MAX_CONNECTIONS = 256
WORKER_LIMIT_S = 5.0

Verify = Callable[[Collection[int], Collection[int]], Awaitable[bool]]
"""Verifies the caches of these devices' workers; the second argument are sizes of tensors that they may cache."""
Say = Callable[[str], None]
"""Shows the user one line."""


class Membership:
    """One worker's membership: joined once, and kept over lost connections.

    Args:
        link: the join link.
        facts: about this machine.
        start: starts the workers once the other side has agreed; returns what gives the loopback port of each
            device now.
        say: shows the user one line about each change.
        verify: called before a load, and without devices when the other side tells sizes.
    """

    def __init__(
        self,
        link: JoinLink,
        facts: Facts,
        start: Callable[[], Awaitable[Callable[[int], int]]],
        say: Say,
        verify: Verify | None = None,
    ) -> None:
        self._link = link
        self._facts = facts
        self._start = start
        self._say = say
        self._verify = verify
        self._secret = secrets.token_urlsafe(32)
        self._token: str | None = link.token
        self._port_of: Callable[[int], int] | None = None
        self._is_over = False
        self._streams: set[asyncio.Task[None]] = set()

    async def serve(self) -> str:
        """Join, and serve until the other side ends the membership; returns why it did.

        Raises:
            JoinError: it cannot be joined, or has been gone for longer than `give_up_s`.
        """
        loop = asyncio.get_running_loop()
        lost_at, pause_s, tries = loop.time(), FIRST_PAUSE_S, 0
        while True:
            tries += 1
            why, was_welcome = await self._attempt()
            if was_welcome:
                lost_at, pause_s = loop.time(), FIRST_PAUSE_S
            if self._is_over:
                return why
            if self._port_of is None and tries >= FIRST_TRIES:
                raise JoinError(f"cannot connect to {self._link.address}: {why}")
            if loop.time() - lost_at > self._facts.give_up_s:
                raise JoinError(
                    f"{self._link.address} was gone for {self._facts.give_up_s:g} s ({why}); not tried again"
                )
            if was_welcome:
                self._say(f"lost the connection to {self._link.address} ({why}); trying to connect again")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _attempt(self) -> tuple[str, bool]:
        """One control connection, until it ends; why it ended, and whether it was established."""
        was_welcome = False
        try:
            reader, writer = await connect(self._link)
        except (OSError, TimeoutError) as error:
            return _describe(error), False
        beating = asyncio.create_task(beat(writer))
        try:
            send(writer, {"secret": self._secret, "token": self._token, "facts": self._facts.as_dict()})
            answer = await receive(reader)
            while "welcome" not in answer:
                if "refused" in answer:
                    raise JoinError(f"{self._link.address} refused: {one_line(str(answer['refused']))}")
                answer = await receive(reader)
            was_welcome = True
            self._token = None  # from now on, the secret counts
            await self._welcomed(writer, answer["welcome"])
            while True:
                message = await receive(reader)
                if "end" in message:
                    self._is_over = True
                    return one_line(str(message["end"])), True
                if self._verify is not None and "sizes" in message and len(self._streams) < MAX_CONNECTIONS:
                    self._run(self._verified(self._verify, writer, message))
                if "open" in message:
                    self._open(writer, message["open"], message.get("device"))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            return _describe(error), was_welcome
        except (asyncio.CancelledError, SollolError):
            send(writer, {"leave": True})
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await writer.drain()
            raise
        finally:
            beating.cancel()
            writer.close()
            for task in self._streams:
                task.cancel()

    async def _welcomed(self, writer: asyncio.StreamWriter, welcome: Any) -> None:
        name = one_line(str(welcome.get("name"))) if isinstance(welcome, dict) else "?"
        if self._port_of is None:
            self._port_of = await self._start()
            devices = ", ".join(self._facts.devices)
            self._say(
                f"joined {self._link.address} as {name}: {devices}, {counted(self._facts.threads, 'thread')}, "
                f"{self._facts.build}"
            )
        else:
            self._say(f"connected to {self._link.address} again")
        send(writer, {"ready": True})

    def _open(self, control: asyncio.StreamWriter, number: object, device: object) -> None:
        """Make a connection for the other side to the worker of one device."""
        is_known = isinstance(device, int) and 0 <= device < len(self._facts.devices)
        if not is_known or not isinstance(number, int) or len(self._streams) >= MAX_CONNECTIONS:
            send(control, {"failed": number if isinstance(number, int) else 0})
            return
        assert isinstance(device, int)
        self._run(self._carry(control, number, device))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)

    async def _verified(self, verify: Verify, control: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        """Verify caches, and answer once they have only complete files."""
        devices, sizes = message.get("devices", []), message["sizes"]
        if not all(
            isinstance(each, list) and all(type(number) is int for number in each) for each in (devices, sizes)
        ):
            return
        if await verify(devices, sizes) and isinstance(number := message.get("verify"), int):
            send(control, {"verified": number})

    async def _carry(self, control: asyncio.StreamWriter, number: int, device: int) -> None:
        assert self._port_of is not None
        here: Connection | None = None
        try:
            async with asyncio.timeout(WORKER_LIMIT_S):
                here = await asyncio.open_connection(LOOPBACK, self._port_of(device), limit=COPY_BYTES)
            there = await connect(self._link)
        except (OSError, TimeoutError, JoinError):
            if here is not None:
                here[1].transport.abort()
            send(control, {"failed": number})
            return
        send(there[1], {"secret": self._secret, "stream": number})
        try:
            await splice(here, there)
        except asyncio.CancelledError:
            for _, writer in (here, there):
                writer.transport.abort()
            raise


def _describe(error: Exception) -> str:
    """Why a connection failed or ended, for people."""
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; no invitation is open, or the notebook has ended"
    return getattr(error, "strerror", None) or str(error) or "the connection was closed"
