"""Invitations for workers that dial in: make them, show them, withdraw them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sollol_nb.errors import ConfigError, JoinError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.links.join_link import Build, JoinLink
from sollol_nb.llama_cpp.links.link import LOST
from sollol_nb.llama_cpp.links.memberships import Invitation, OpenInvitation
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import primary_address
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers.links import Links
from sollol_nb.runtime.amounts import is_whole_number, shown
from sollol_nb.settings.endpoints import ALL_ADDRESSES, INVITATIONS, LOOPBACK, format_endpoint, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds

MAX_USES = 64
MAX_EXPIRES_S = 30 * 86400.0
LISTEN_LIMIT_S = 20.0
POLL_S = 0.05
_NAME = re.compile(r"[\w.-]{1,40}(?<!-)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewInvitation:
    """An invitation that was just made. Its link is a secret that is shown once: only a hash of it is kept.

    Attributes:
        name: how to withdraw it, and how the workers that join with it are called.
        link: for `sollol-nb worker --join`.
        uses: how many machines may join with it.
        expires_at: seconds since the epoch.
    """

    name: str
    link: str = field(repr=False)
    uses: int
    expires_at: float

    @property
    def command(self) -> str:
        """The command to run on the machine that joins."""
        return f"sollol-nb worker --join {self.link}"

    def __str__(self) -> str:
        times = "once" if self.uses == 1 else f"{self.uses} times"
        until = memberships.clock(self.expires_at)
        return f"{self.command}\n(can be used {times} until {until}; its name is {self.name})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedMachine:
    """A machine that has joined.

    Attributes:
        name: how to make it leave.
        invitation: the name of its invitation.
        host: its name, as it says.
        devices: llama.cpp's names of them, each with a worker.
        endpoints: of these workers here.
        is_connected: whether it is connected now; else it tries to come back.
    """

    name: str
    invitation: str
    host: str
    devices: tuple[str, ...]
    endpoints: tuple[str, ...]
    is_connected: bool

    def __str__(self) -> str:
        state = "connected" if self.is_connected else "not connected"
        return f"{self.name} ({self.host}: {', '.join(self.devices)}): {state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitations:
    """The open invitations, and who has joined.

    Attributes:
        listens: the address and port on which this machine listens for them; "" while it does not.
        open: nobody needs to have joined yet.
        joined: until they leave or are made to.
    """

    listens: str
    open: tuple[OpenInvitation, ...]
    joined: tuple[JoinedMachine, ...]

    def __str__(self) -> str:
        lines = [*map(str, self.open), *map(str, self.joined)] or ["no invitation is open, and nobody has joined"]
        return "\n".join([f"listening on {self.listens}", *lines] if self.listens else lines)

    __repr__ = __str__


async def invite(
    links: Links,
    engine: Callable[[], Awaitable[Engine]],
    *,
    uses: int = 1,
    expires: float | str = "1h",
    name: str | None = None,
    host: str | None = None,
    port: int | None = None,
    keep_alive_s: float | None,
) -> NewInvitation:
    """Make an invitation, and listen for those who come.

    Args:
        links: of the router that will use the workers.
        engine: finds the engine of this machine; theirs must be of the same build.
        uses: how many machines may join, 1 to 64.
        expires: when it ends, as in `keep_alive`: seconds, `"1h"`; at most 30 days.
        name: of the invitation and its workers; by default the workers have the names of their machines.
        host: the address to listen on; by default that of this machine on its network.
        port: the port to listen on; by default the same as before, at first any free one.
        keep_alive_s: seconds that members are served without a router; None is forever.

    Raises:
        ConfigError: an argument cannot be used.
        JoinError: this machine cannot listen there.
    """
    expires_s = _checked_expiry(expires)
    if not is_whole_number(uses) or not 1 <= uses <= MAX_USES:
        raise ConfigError(f"uses={shown(uses)} is not a number from 1 to {MAX_USES}")
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(f"name={shown(name)} is not a name; use up to 40 letters, digits, dots and dashes")
    if port is not None and (not is_whole_number(port) or not 0 <= port < 65536):
        raise ConfigError(f"port={shown(port)} is not a port; use a number up to 65535, 0 for any free one")
    if host is not None:
        parse_endpoint(format_endpoint(host, 1))
    here = await engine()
    primary = await asyncio.to_thread(primary_address)
    async with memberships.changing() as known:
        fingerprint = await asyncio.to_thread(memberships.certificate)  # here, since only one may make it
        after, invitation, token = memberships.made(
            known,
            name=name,
            uses=uses,
            expires_s=expires_s,
            host=host or (known.host if known.is_wanted else primary),
            port=port,
            build=Build.of(here.version, here.protocol),
        )
        memberships.write(after)
    try:
        links.add(INVITATIONS)
        await links.connect([INVITATIONS], keep_alive_s=keep_alive_s, engine=engine)
        listens = await _listening(links, invitation)
    except BaseException:
        async with memberships.changing() as now:
            memberships.write(now.withdrawn(invitation.name, host=known.host, port=known.port))
        raise
    address = primary if after.host in ALL_ADDRESSES else after.host
    link = JoinLink(host=address, port=parse_endpoint(listens)[1], token=token, fingerprint=fingerprint)
    return NewInvitation(name=invitation.name, link=link.text, uses=uses, expires_at=invitation.expires_at)


def _checked_expiry(expires: float | str) -> float:
    try:
        seconds = keep_alive_seconds(expires)
    except ConfigError:
        seconds = -1.0
    if seconds is None or not 0 < seconds <= MAX_EXPIRES_S:
        raise ConfigError(f'expires={shown(expires)} is not a time up to 30 days; use seconds, or such as "1h"')
    return seconds


async def _listening(links: Links, invitation: Invitation) -> str:
    """Where the link listens, once it knows this invitation.

    Raises:
        JoinError: it does not, or has ended.
    """
    deadline = asyncio.get_running_loop().time() + LISTEN_LIMIT_S
    while asyncio.get_running_loop().time() < deadline:
        await links.refresh()
        entry = await asyncio.to_thread(_entry)
        about = entry.about if entry is not None else {}
        if invitation.token_hash in (about.get("invitations") or ()):
            if about.get("state") == LOST:
                raise JoinError(str(about.get("detail")))
            if about.get("listens"):
                return str(about["listens"])
        if (ended := links.why_down(INVITATIONS)) is not None:
            raise JoinError(f"cannot listen for workers: {ended}")
        await asyncio.sleep(POLL_S)
    raise JoinError(f"the process that listens for workers did not answer within {LISTEN_LIMIT_S:g} s; try again")


def _entry() -> Entry | None:
    return next((entry for entry in registry.entries(registry.LINK) if entry.name == INVITATIONS), None)


async def revoke(name: str | None = None) -> list[str]:
    """Withdraw an invitation and end the workers that joined with it, or end one worker, by name; or all.

    Returns:
        The names of what was withdrawn.

    Raises:
        ConfigError: nothing has this name.
    """
    async with memberships.changing() as known:
        after, names = known.without(name)
        if names:
            memberships.write(after)
    return names


async def invitations() -> Invitations:
    """The open invitations, and who has joined."""
    known, entry = await asyncio.to_thread(lambda: (memberships.read(), _entry()))
    about = entry.about if entry is not None else {}
    connected = about.get("connected") or ()
    joined = tuple(
        JoinedMachine(
            name=member.name,
            invitation=member.invitation,
            host=member.facts.host,
            devices=member.facts.devices,
            endpoints=tuple(format_endpoint(LOOPBACK, port) for port in member.ports),
            is_connected=member.name in connected,
        )
        for member in known.members
    )
    return Invitations(listens=str(about.get("listens") or ""), open=known.shown, joined=joined)
