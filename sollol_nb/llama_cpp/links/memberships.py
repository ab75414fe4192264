"""Who may join: the invitations and the workers that joined, in private files of the state folder.

Every process of this user reads and changes them under one lock; the link process (`invitations.py`) follows what
the file says, so nothing is lost when it ends. Of tokens and secrets only hashes are kept.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sollol_nb.errors import ConfigError, JoinError
from sollol_nb.llama_cpp.links.join_link import Build, Facts, hash_of
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config

FILE = "invitations.json"
CERTIFICATE_FILE = "invitations.pem"
"""The self-signed certificate and its key."""
CERTIFICATE_DAYS = 3650
MAX_MEMBERS = 64
MAX_OPEN = 64
PAST_KEPT = 64
"""Invitations that are over; kept so that their links are refused with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """An invitation to join, as its file keeps it.

    Attributes:
        name: how people call it, and the workers that join with it.
        uses_left: how many may still join.
        expires_at: seconds since the epoch.
        revoked: whether it was withdrawn.
        token_hash: SHA-256 of the token, in hex.
    """

    name: str
    uses_left: int
    expires_at: float
    revoked: bool = False
    token_hash: str = field(default="", repr=False)

    @property
    def over(self) -> str:
        """Why nobody can join with it any more; "" while it is open."""
        if self.revoked:
            return "it was revoked"
        if not self.uses_left:
            return "it was used already"
        return "it has expired" if time.time() >= self.expires_at else ""


def clock(at: float) -> str:
    is_today = time.localtime(at)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M", time.localtime(at))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenInvitation:
    """An invitation with which somebody can join now.

    Attributes:
        name: how to withdraw it.
        uses_left: how many machines may still join.
        expires_at: seconds since the epoch.
    """

    name: str
    uses_left: int
    expires_at: float

    def __str__(self) -> str:
        times = "once" if self.uses_left == 1 else f"{self.uses_left} times"
        return f"invitation {self.name} can be used {times} until {clock(self.expires_at)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker's machine that has joined.

    Attributes:
        name: how people call it.
        invitation: name of the invitation it joined with.
        facts: what it has reported about itself.
        secret_hash: SHA-256 of the secret with which it comes back, in hex.
        ports: the loopback ports of its devices here.
    """

    name: str
    invitation: str
    facts: Facts
    secret_hash: str = field(repr=False)
    ports: tuple[int, ...] = ()

    def worker_name(self, position: int) -> str:
        """How the worker of one of its devices is called."""
        devices = self.facts.devices
        return self.name if len(devices) == 1 else f"{self.name}/{devices[position]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memberships:
    """What the file says.

    Attributes:
        host: the address to listen on; "" before the first invitation.
        port: the port to listen on; 0 is any free one, which then replaces it.
        build: of this machine's llama.cpp.
    """

    host: str = ""
    port: int = 0
    build: Build = field(default_factory=Build)
    invitations: tuple[Invitation, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def open(self) -> tuple[Invitation, ...]:
        """The invitations with which somebody can join now."""
        return tuple(invitation for invitation in self.invitations if not invitation.over)

    @property
    def shown(self) -> tuple[OpenInvitation, ...]:
        """The open invitations as people see them."""
        return tuple(
            OpenInvitation(name=item.name, uses_left=item.uses_left, expires_at=item.expires_at)
            for item in self.open
        )

    @property
    def is_wanted(self) -> bool:
        """Whether anybody may connect."""
        return bool(self.open or self.members)

    def member_of(self, secret: str) -> Member | None:
        """The member with this secret."""
        given = hash_of(secret)
        found = [member for member in self.members if hmac.compare_digest(member.secret_hash, given)]
        return found[0] if found else None

    def check_token(self, token: str) -> Invitation:
        """The open invitation with this token.

        Raises:
            JoinError: there is none; the message says why.
        """
        given = hash_of(token)
        found = [known for known in self.invitations if hmac.compare_digest(known.token_hash, given)]
        if not found:
            raise JoinError("no invitation has this token")
        if found[0].over:
            raise JoinError(f"the invitation cannot be used: {found[0].over}")
        if len(self.members) >= MAX_MEMBERS:
            raise JoinError(f"{MAX_MEMBERS} workers have joined, which is the limit")
        return found[0]

    def with_member(self, invitation: Invitation, secret: str, facts: Facts) -> tuple[Memberships, Member]:
        """With one more member, and one use of the invitation less; and the member."""
        names = {member.name for member in self.members}
        # The inviter has chosen the name of an invitation; a made-up one gives way to that of the machine.
        base = facts.host or "worker" if invitation.name.startswith(MADE_UP) else invitation.name
        numbered = (f"{base}-{number}" for number in range(2, MAX_MEMBERS + 2))
        name = base if base not in names else next(name for name in numbered if name not in names)
        member = Member(name=name, invitation=invitation.name, facts=facts, secret_hash=hash_of(secret))
        used = replace(invitation, uses_left=invitation.uses_left - 1)
        invitations = tuple(used if known is invitation else known for known in self.invitations)
        return replace(self, invitations=invitations, members=(*self.members, member)), member

    def without(self, name: str | None) -> tuple[Memberships, list[str]]:
        """Without an invitation and those who joined with it, or one member (all, if it has no name); and the
        names of what was revoked.

        Raises:
            ConfigError: nothing has this name.
        """
        gone = [known for known in self.members if name in (None, known.name, known.invitation)]
        ended = [known for known in self.open if name in (None, known.name)]
        if name is not None and not gone and not ended:
            named = sorted({*(item.name for item in self.open), *(member.name for member in self.members)})
            raise ConfigError(
                f"no open invitation and no joined worker is named {name}; known: {', '.join(named) or 'none'}"
            )
        invitations = tuple(
            replace(known, revoked=True) if known in ended else known for known in self.invitations
        )
        members = tuple(known for known in self.members if known not in gone)
        names = dict.fromkeys([*(known.name for known in ended), *(known.name for known in gone)])
        return replace(self, invitations=invitations, members=members), list(names)

    def withdrawn(self, name: str, *, host: str, port: int) -> Memberships:
        """Without an invitation with which nothing could be done, and at the address of before, unless others have
        come to use this one."""
        invitations = tuple(known for known in self.open if known.name != name)
        kept = replace(self, invitations=(*(known for known in self.invitations if known.over), *invitations))
        return kept if kept.is_wanted else replace(kept, host=host, port=port)

    def as_text(self) -> str:
        """As the file has it."""
        past = [invitation for invitation in self.invitations if invitation.over][-PAST_KEPT:]
        kept = [invitation for invitation in self.invitations if not invitation.over or invitation in past]
        return json.dumps(asdict(replace(self, invitations=tuple(kept))), indent=1)

    @classmethod
    def of(cls, text: str) -> Memberships:
        """What a file says; nothing, if it is not one of these files.

        Raises:
            ValueError: it is not one of these files.
        """
        data: dict[str, Any] = json.loads(text)
        try:
            members = [
                Member(**{**known, "facts": Facts.of(known["facts"]), "ports": tuple(map(int, known["ports"]))})
                for known in data["members"]
            ]
            return cls(
                host=str(data["host"]),
                port=int(data["port"]),
                build=Build(**data["build"]),
                invitations=tuple(Invitation(**known) for known in data["invitations"]),
                members=tuple(members),
            )
        except (LookupError, TypeError) as error:
            raise ValueError("this is not a file of invitations") from error


MADE_UP = "invitation-"
"""How the name of an invitation begins to which nobody gave one."""


def read() -> Memberships:
    """What the file says now; nothing, if there is none, or it is damaged.

    Raises:
        ConfigError: it cannot be read now, so who has joined is unknown.
    """
    path = config.state_file(FILE)
    is_there = path.exists()
    text = read_private(path)
    if text is None and is_there:
        raise ConfigError(
            f"cannot read {path}, which lists the workers that have joined; if it is damaged, move it away"
        )
    try:
        return Memberships.of(text) if text is not None else Memberships()
    except ValueError:
        return Memberships()


def write(memberships: Memberships) -> None:
    """Replace the file; under `changing`.

    Raises:
        JoinError: it cannot be written.
    """
    path = config.state_file(FILE)
    try:
        write_private(path, memberships.as_text())
    except OSError as error:
        raise JoinError(f"cannot write {path} ({error.strerror or error})") from error


@asynccontextmanager
async def changing() -> AsyncIterator[Memberships]:
    """What the file says, which nobody else changes until the end."""
    async with registry.locked("invitations", "changing invitations"):
        yield read()


def made(
    known: Memberships, *, name: str | None, uses: int, expires_s: float, host: str, port: int | None, build: Build
) -> tuple[Memberships, Invitation, str]:
    """With one more invitation; and that, and its token.

    Raises:
        ConfigError: an open invitation has this name, or workers are connected at another address.
    """
    if len(known.open) >= MAX_OPEN:
        raise ConfigError(f"{MAX_OPEN} invitations are open; revoke some with `%sollol_cluster revoke`")
    taken = {item.name for item in known.open} | {member.invitation for member in known.members}
    if name is None:
        name = next(f"{MADE_UP}{number}" for number in range(1, 1000) if f"{MADE_UP}{number}" not in taken)
    elif name in taken:
        raise ConfigError(f"an invitation is named {name} already; choose another name, or revoke it first")
    if known.is_wanted and (host != known.host or port not in (None, 0, known.port)):
        raise ConfigError(
            f"join links lead to {known.host} port {known.port} while invitations are open or workers have "
            "joined; revoke them first, or leave out host and port"
        )
    token = secrets.token_urlsafe(16)
    invitation = Invitation(
        name=name, uses_left=uses, expires_at=time.time() + expires_s, token_hash=hash_of(token)
    )
    # The port stays as it was, so that a firewall's rule and the workers that come back find it.
    kept_port = known.port if host == known.host or not known.host else 0
    if port is None or known.is_wanted:
        port = kept_port
    after = replace(known, host=host, port=port, build=build, invitations=(*known.invitations, invitation))
    return after, invitation, token


def certificate() -> bytes:
    """The SHA-256 of this user's certificate for join links, which is made if there is none. Blocks shortly.

    Raises:
        JoinError: it cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    path = config.state_file(CERTIFICATE_FILE)
    text = read_private(path)
    now = datetime.datetime.now(datetime.UTC)
    if text is not None:
        try:
            known = x509.load_pem_x509_certificate(text.encode())
            if known.not_valid_after_utc > now + datetime.timedelta(days=1):
                return hashlib.sha256(known.public_bytes(serialization.Encoding.DER)).digest()
        except ValueError:
            pass  # it is replaced
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sollol_nb")])
    made_now = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = made_now.public_bytes(serialization.Encoding.PEM)
    try:
        write_private(path, (private + public).decode())
    except OSError as error:
        raise JoinError(f"cannot write {path} ({error.strerror or error})") from error
    return hashlib.sha256(made_now.public_bytes(serialization.Encoding.DER)).digest()
