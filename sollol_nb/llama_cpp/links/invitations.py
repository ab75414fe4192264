"""The link of join links: one process that accepts the workers that were invited, all on one port with TLS.

What it does follows from the file of `memberships.py`, which it reads again when it changes: it listens while an
invitation is open or a worker is a member, and ends the connection of a member that is in the file no longer. Each
device of a member has an endpoint on loopback; a connection to it is carried through a connection that the member
makes when it is requested.

Nobody who connects is trusted. Before a peer has shown a token or a secret, it has a few seconds, a line of
limited length, and one of few places; after that, a limited number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import sys
import time
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from sollol_nb.errors import JoinError, SollolError
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.links.join_link import (
    HANDSHAKE_LIMIT_S,
    MAX_SIZES,
    SILENCE_S,
    Connection,
    Facts,
    beat,
    is_secret,
    receive,
    send,
)
from sollol_nb.llama_cpp.links.link import LOST, READY, LinkedWorker
from sollol_nb.llama_cpp.links.memberships import Member, Memberships, changing
from sollol_nb.llama_cpp.links.program import COPY_BYTES, Report, run, serve_on_loopback
from sollol_nb.llama_cpp.links.verifying import VERIFIES, VERIFY_LIMIT_S, answer_requests
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint, parse_endpoint
from sollol_nb.text.tables import counted

POLL_S = 0.2
"""How often it looks whether the file has changed: a revoked worker ends within 2 s."""
MAX_UNKNOWN = 32
"""Peers that have not shown a token or secret yet; if there are more, the oldest is dropped."""
MAX_CONNECTIONS = 64
"""To one device at the same time."""
STREAM_LIMIT_S = 15.0
"""Until a member has made a connection that was requested."""
END_LIMIT_S = 0.5


class _Session:
    """A member that is connected."""

    def __init__(self, member: Member, writer: asyncio.StreamWriter) -> None:
        self.member = member
        self.is_ready = False
        self._writer = writer
        self._numbers = itertools.count(1)
        self._requested: dict[int, asyncio.Future[Connection]] = {}
        self._carried: dict[int, list[asyncio.StreamWriter]] = {}
        self._verified: dict[int, asyncio.Event] = {}

    async def connect(self, device: int) -> Connection:
        """A connection to the worker of one of its devices, made by the member.

        Raises:
            OSError, TimeoutError: it cannot be made.
        """
        self._carried[device] = open_now = [
            writer for writer in self._carried.get(device, []) if not writer.is_closing()
        ]
        if len(open_now) + len(self._requested) >= MAX_CONNECTIONS:
            raise OSError(
                f"{self.member.worker_name(device)} has {MAX_CONNECTIONS} connections, which is the limit"
            )
        number = next(self._numbers)
        made: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._requested[number] = made
        try:
            send(self._writer, {"open": number, "device": device})
            # Not cancelled at the limit: a connection that is made in this moment would be lost, and stay open.
            await asyncio.wait([made], timeout=STREAM_LIMIT_S)
        finally:
            self._requested.pop(number, None)
        if not made.done():
            raise TimeoutError(f"{self.member.worker_name(device)} made no connection")
        there = made.result()
        if self._writer.is_closing():  # it ended after the connection was made
            there[1].transport.abort()
            raise OSError(f"{self.member.name} is not connected")
        self._carried[device].append(there[1])
        return there

    def give(self, number: object, connection: Connection) -> bool:
        """The member has made a connection; False if it was not requested, or not by this number."""
        made = self._requested.pop(number, None) if isinstance(number, int) else None
        if made is None or made.done():
            return False
        made.set_result(connection)
        return True

    def fail(self, number: object) -> None:
        """The member cannot make a connection."""
        made = self._requested.pop(number, None) if isinstance(number, int) else None
        if made is not None and not made.done():
            made.set_exception(OSError(f"the worker of {self.member.name} accepts no connection"))

    async def verify(self, devices: list[int], sizes: Sequence[int]) -> bool:
        """Whether it says that the caches of these devices' workers have only complete files."""
        if not self.member.facts.verifies:  # an older version, which has none
            return True
        number = next(self._numbers)
        self._verified[number] = event = asyncio.Event()
        try:
            for first in range(0, len(sizes), MAX_SIZES):
                send(self._writer, {"sizes": sizes[first : first + MAX_SIZES]})
            send(self._writer, {"verify": number, "devices": devices, "sizes": []})
            async with asyncio.timeout(VERIFY_LIMIT_S):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            del self._verified[number]
        return True

    def note_verified(self, number: object) -> None:
        """It has answered."""
        if isinstance(number, int) and number in self._verified:
            self._verified[number].set()

    async def end(self, why: str = "") -> None:
        """End the member's connections; with a reason, it does not come back."""
        if why:
            send(self._writer, {"end": why})
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(END_LIMIT_S):
                    await self._writer.drain()
        self.close()

    def close(self) -> None:
        """End its connections at once."""
        self.is_ready = False
        self._writer.close()
        for made in self._requested.values():
            if not made.done():
                made.set_exception(OSError(f"{self.member.name} is not connected"))
        for writer in itertools.chain(*self._carried.values()):
            writer.transport.abort()


class Hub:
    """Accepts members and carries connections to their workers, until the supervisor ends."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._known = Memberships()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._context: ssl.SSLContext | None = None
        self._unknown: dict[asyncio.Task[None], None] = {}  # in the order in which they came
        self._serving: set[asyncio.Task[None]] = set()
        self._sessions: dict[str, _Session] = {}  # by the hash of the member's secret
        self._servers: dict[str, list[asyncio.Server]] = {}
        self._away_since: dict[str, float] = {}
        self._place = ("", 0)
        self._problem = ""
        self._is_held = False
        self._reported: object = None

    async def serve(self) -> None:
        """Serve until the supervisor ends."""
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follow())
            await self._report.supervisor_ended()
            following.cancel()
            self._stop_listening()

    async def _follow(self) -> None:
        """Do what the file says, and report it."""
        while True:
            try:
                connected = set(self._sessions)  # who joins during the read may be missing in it
                self._known = await asyncio.to_thread(memberships.read)
                await self._forget_gone(connected)
                for member in self._known.members:
                    if member.secret_hash not in self._servers:
                        await self._open_endpoints(member)
                if not self._known.is_wanted:
                    self._stop_listening()
                elif self._listener is None or self._is_elsewhere():
                    self._stop_listening()
                    await self._listen()
                self._problem = ""
            except (SollolError, OSError) as error:  # a full disk, say; it may pass
                self._problem = str(error)
            await self._keep_while_open()
            await self._report_changes()
            await asyncio.sleep(POLL_S)

    # --- what the file says -----------------------------------------------------------------------

    async def _forget_gone(self, connected: Set[str]) -> None:
        """End what belongs to members that were revoked, and forget those that have given up.

        Args:
            connected: the sessions whose members must be in the file; others are new.
        """
        hashes = {member.secret_hash for member in self._known.members}
        for gone in self._servers.keys() - hashes:
            for server in self._servers.pop(gone):
                server.close()
            self._away_since.pop(gone, None)
        revoked = [self._sessions.pop(gone) for gone in (connected & self._sessions.keys()) - hashes]
        # Together: one that does not read must not delay the end of the others.
        await asyncio.gather(*(session.end("its invitation was revoked") for session in revoked))
        now = time.monotonic()
        for member in self._known.members:
            if member.secret_hash in self._sessions:
                self._away_since.pop(member.secret_hash, None)
            elif now - self._away_since.setdefault(member.secret_hash, now) > member.facts.give_up_s + SILENCE_S:
                print(f"{member.name} did not come back", flush=True)
                await self._remove(member)

    async def _remove(self, member: Member) -> None:
        """A member that has left, or has given up, needs no port to come back to."""
        async with changing() as known:
            members = tuple(kept for kept in known.members if kept.secret_hash != member.secret_hash)
            memberships.write(replace(known, members=members))

    async def _open_endpoints(self, member: Member) -> None:
        """Listen on loopback for each device of a member, on the same ports as before."""

        async def connect(device: int) -> Connection:
            session = self._sessions.get(member.secret_hash)
            if session is None or not session.is_ready:
                raise OSError(f"{member.name} is not connected")
            return await session.connect(device)

        def at_ports(known: Member) -> Member:
            is_it = known.secret_hash == member.secret_hash
            return replace(known, ports=tuple(ports)) if is_it else known

        servers: list[asyncio.Server] = []
        ports: list[int] = []
        try:
            for device in range(len(member.facts.devices)):
                port = member.ports[device] if device < len(member.ports) else 0
                endpoint, server = await serve_on_loopback(lambda device=device: connect(device), port)  # type: ignore[misc]
                servers.append(server)
                ports.append(parse_endpoint(endpoint)[1])
            if tuple(ports) != member.ports:
                async with changing() as known:
                    after = replace(known, members=tuple(map(at_ports, known.members)))
                    memberships.write(after)
                    self._known = after
        except BaseException:  # a full disk, say; it is tried again
            for server in servers:
                server.close()
            raise
        self._servers[member.secret_hash] = servers

    async def _keep_while_open(self) -> None:
        """An open invitation keeps this process; when it is over, keep_alive counts."""
        if bool(self._known.open) != self._is_held:
            self._is_held = not self._is_held
            await self._report.keep(self._is_held)

    async def _report_changes(self) -> None:
        workers = {}
        for member in self._known.members:
            for device, port in enumerate(member.ports):
                workers[format_endpoint(LOOPBACK, port)] = LinkedWorker(
                    name=member.worker_name(device),
                    machine=member.facts.machine,
                    device=member.facts.devices[device],
                    engine=member.facts.build.commit,
                )
        connected = sorted(session.member.name for session in self._sessions.values() if session.is_ready)
        listens = ""
        if self._listener is not None:
            listens = format_endpoint(self._known.host, self._listener.getsockname()[1])
        detail = f"{counted(len(connected), 'joined worker')}{f', listening on {listens}' if listens else ''}"
        hashes = [invitation.token_hash for invitation in self._known.open]
        state = LOST if self._problem else READY
        reported = (state, detail, workers, connected, hashes, listens, self._problem)
        if reported != self._reported:
            self._reported = reported
            await self._report.set(
                state,
                self._problem or detail,
                workers,
                listens=listens,
                invitations=hashes,
                connected=connected,
            )

    async def verify(self, endpoints: Collection[str], sizes: Sequence[int]) -> bool:
        """Have the caches of these workers verified by their members."""
        devices: dict[str, list[int]] = {}
        for member in self._known.members:
            for device, port in enumerate(member.ports):
                if format_endpoint(LOOPBACK, port) in endpoints:
                    devices.setdefault(member.secret_hash, []).append(device)
        sessions = {key: session for key, session in self._sessions.items() if key in devices}
        answers = await asyncio.gather(*(session.verify(devices[key], sizes) for key, session in sessions.items()))
        return len(sessions) == len(devices) and all(answers)

    # --- the port -----------------------------------------------------------------------------------

    def _is_elsewhere(self) -> bool:
        return (self._known.host, self._known.port) != self._place

    async def _listen(self) -> None:
        host, port = self._known.host, self._known.port
        try:
            await asyncio.to_thread(memberships.certificate)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(config.state_file(memberships.CERTIFICATE_FILE))
            family, *_, address = (
                await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )[0]
            listener = socket.create_server(address[:2], family=family, backlog=128)
        except (OSError, SollolError) as error:
            # Python adds the address to the reason.
            why = (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]
            raise JoinError(
                f"cannot listen on {format_endpoint(host, port)} ({why}); end what uses it, or revoke the "
                "invitations and make new ones with another host= or port="
            ) from error
        listener.setblocking(False)
        self._context, self._listener = context, listener
        self._place = (host, listener.getsockname()[1])
        if not port:
            async with changing() as known:
                self._known = replace(known, port=self._place[1])
                memberships.write(self._known)
        self._accepting = asyncio.create_task(self._accept(listener))

    def _stop_listening(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._listener.close()
        self._listener = self._accepting = None
        for task in [*self._unknown]:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors, say
                await asyncio.sleep(POLL_S)
                continue
            # The RPC protocol sends a request in parts; asyncio sets this only for the sockets that it has made.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._serve(connection))
            self._unknown[task] = None
            self._serving.add(task)
            task.add_done_callback(self._done)
            if len(self._unknown) > MAX_UNKNOWN:
                next(iter(self._unknown)).cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._unknown.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            print(f"a connection failed: {type(error).__name__}: {error}", flush=True)

    # --- connections ----------------------------------------------------------------------------------

    async def _serve(self, connection: socket.socket) -> None:
        """One connection, from its handshake on."""
        writer: asyncio.StreamWriter | None = None
        is_taken = False
        try:
            reader, writer = await self._with_tls(connection)
            message = await receive(reader, HANDSHAKE_LIMIT_S)
            if not is_secret(message.get("secret")):
                raise ValueError("a message without a secret")
            if "stream" in message:
                is_taken = self._take_stream(message, (reader, writer))
            else:
                await self._control(message, (reader, writer))
        except (SollolError, OSError, EOFError, TimeoutError, ValueError):
            pass  # whoever it was; a log that grows with each is a target, too
        finally:
            if writer is None:
                connection.close()
            elif not is_taken:
                writer.close()

    async def _with_tls(self, connection: socket.socket) -> Connection:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=COPY_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        async with asyncio.timeout(2 * HANDSHAKE_LIMIT_S):
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_LIMIT_S
            )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _take_stream(self, message: Mapping[str, Any], connection: Connection) -> bool:
        """Whether it is a connection that this member was to make."""
        member = self._known.member_of(message["secret"])
        session = self._sessions.get(member.secret_hash) if member else None
        return session is not None and session.give(message["stream"], connection)

    async def _control(self, message: Mapping[str, Any], connection: Connection) -> None:
        """A member's control connection, until it ends."""
        reader, writer = connection
        try:
            member = await self._admit(message)
        except JoinError as error:
            send(writer, {"refused": str(error)})
            return
        task = asyncio.current_task()
        assert task is not None
        self._unknown.pop(task, None)
        session = _Session(member, writer)
        before = self._sessions.get(member.secret_hash)
        self._sessions[member.secret_hash] = session
        if before is not None:  # its connection was cut, which this side has not noticed yet
            before.close()
        print(f"{member.name} is connected", flush=True)
        send(writer, {"welcome": {"name": member.name}})
        beating = asyncio.create_task(beat(writer, _SizesToTell()))
        try:
            while not await self._heed(session, await receive(reader)):
                pass
        finally:
            beating.cancel()
            session.close()
            if self._sessions.get(member.secret_hash) is session:
                del self._sessions[member.secret_hash]
            print(f"{member.name} is disconnected", flush=True)

    async def _heed(self, session: _Session, message: Mapping[str, Any]) -> bool:
        """Do what a member's message says; whether it was the last."""
        if message.get("ready"):
            session.is_ready = True
        if "failed" in message:
            session.fail(message["failed"])
        if "verified" in message:
            session.note_verified(message["verified"])
        if message.get("leave"):
            await self._remove(session.member)
            return True
        return False

    async def _admit(self, message: Mapping[str, Any]) -> Member:
        """The member that this is, or becomes.

        Raises:
            JoinError: it is not a member and does not become one; the message says why and what to do.
            ValueError: this is not a message of a worker.
        """
        facts, secret, token = Facts.of(message.get("facts")), message["secret"], message.get("token")
        known = await asyncio.to_thread(memberships.read)
        member = known.member_of(secret)
        if member is None:
            if not is_secret(token):
                raise JoinError("it is a member no longer")
            known.check_token(str(token))
        if not facts.build.fits(known.build):
            raise JoinError(
                f"{facts.host} has {facts.build}, and the inviting machine {known.build}; they must be the same: "
                "run `sollol-nb install` there, with the same version of sollol_nb"
            )
        if member is None:
            async with changing() as known:  # it may have been used or revoked since
                known, member = known.with_member(known.check_token(str(token)), secret, facts)
                memberships.write(known)
            self._known = known
        return member


class _SizesToTell:
    """The message with the sizes of tensors that a member's workers may cache, whenever there are new ones."""

    def __init__(self) -> None:
        self._told = frozenset[int]()

    def __call__(self) -> dict[str, Any]:
        new = sorted(cache.known_sizes() - self._told)[:MAX_SIZES]
        self._told |= frozenset(new)
        return {"sizes": new} if new else {}


async def serve(spec: Mapping[str, Any], report: Report) -> None:
    """Serve until the supervisor ends."""
    await report.tell(**{VERIFIES: True})
    hub = Hub(report)
    answering = asyncio.create_task(answer_requests(report, hub.verify))
    try:
        await hub.serve()
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(run(serve))
