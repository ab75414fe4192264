"""Join links, and how both sides of one talk: TLS to the certificate whose hash the link contains, then JSON lines.

A link is `sollol://HOST:PORT/TOKEN.FINGERPRINT`, one word for every shell: a token that lets a worker join, and the
SHA-256 of the certificate, both in URL-safe Base64.

The first line of a connection says what it is for:

| first line | then |
|---|---|
| `{"secret", "token", "facts"}` | control: the worker joins with the token, or comes back with its secret (of which only a hash is kept); answer: `{"welcome": {"name"}}`, or `{"refused": why}` |
| `{"secret", "stream"}` | the bytes of one connection to a worker, which the other side has requested by this number |

On a control connection the worker sends `{"ready": true}` once its workers run, `{"failed": stream}` where it cannot
connect to one, and `{"leave": true}` at its end; it receives `{"open": stream, "device": position}`, `{"sizes": [...]}`
(bytes of the tensors that its workers may cache), `{"verify": number, "devices": [position, ...], "sizes": [...]}` before
a load over these workers, which is answered by `{"verified": number}` once their caches have only complete files, and
`{"end": why}`. Both send `{}` every `BEAT_S` seconds, and a side that hears nothing for `SILENCE_S` ends the connection.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sollol_nb.errors import ConfigError, JoinError
from sollol_nb.llama_cpp.links.program import COPY_BYTES
from sollol_nb.settings.endpoints import format_endpoint, parse_endpoint

SCHEME = "sollol://"
LINE_BYTES = 8 * 1024
"""Of a message; what is longer is not one."""
HANDSHAKE_LIMIT_S = 5.0
"""For TLS, and again for the first line."""
BEAT_S = 4.0
SILENCE_S = 12.0
MAX_DEVICES = 16
MAX_THREADS = 4096
MAX_SIZES = 400
"""Told in one message."""
_SECRET = re.compile(r"[\w-]{20,100}")
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinLink:
    """What a join link says: where to connect, what lets a worker join, and which certificate is the right one."""

    host: str
    port: int
    token: str = field(repr=False)
    fingerprint: bytes

    @property
    def text(self) -> str:
        """The link. It contains the token, so it is a secret until its uses are over."""
        digest = base64.urlsafe_b64encode(self.fingerprint).decode().rstrip("=")
        return f"{SCHEME}{self.address}/{self.token}.{digest}"

    @property
    def address(self) -> str:
        """`host:port`."""
        return format_endpoint(self.host, self.port)

    @classmethod
    def of(cls, text: str) -> JoinLink:
        """The link with this text.

        Raises:
            ConfigError: it is not one; the message does not repeat it.
        """
        address, _, secret = text.strip().removeprefix(SCHEME).partition("/")
        token, _, digest = secret.rpartition(".")
        try:
            host, port = parse_endpoint(address, 0)
            fingerprint = base64.b64decode(digest + "=", altchars=b"-_", validate=True)
        except (ConfigError, ValueError):
            host, port, fingerprint = "", 0, b""
        if not text.strip().startswith(SCHEME) or not port or not is_secret(token) or len(fingerprint) != 32:
            raise ConfigError(
                f"this is not a join link; copy the whole {SCHEME}HOST:PORT/... from the output of "
                "`%sollol_cluster invite` or `sollol-nb invite`"
            )
        return cls(host=host, port=port, token=token, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A build of llama.cpp: its commit, and its RPC protocol such as `7.0.0`; "" where unknown."""

    commit: str = ""
    protocol: str = ""

    @classmethod
    def of(cls, version: str, protocol: str) -> Build:
        """The build of an engine, from what its program prints about itself."""
        commit = _COMMIT.search(version)
        return cls(commit=commit[0] if commit else "", protocol=protocol)

    def __str__(self) -> str:
        return f"llama.cpp {self.commit or 'of unknown version'} (RPC protocol {self.protocol or 'unknown'})"

    def fits(self, other: Build) -> bool:
        """Whether a worker of one and a coordinator of the other understand each other: the numbers of their
        operations change with every part of the protocol's number."""
        return not self.protocol or not other.protocol or self.protocol == other.protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a worker says about its machine.

    Attributes:
        host: the machine's name.
        machine: see `processes.machine.machine_id`.
        devices: llama.cpp's names, such as `CUDA0`; a worker process runs for each.
        threads: of a CPU worker.
        build: of its llama.cpp.
        give_up_s: how long it tries to come back after the connection was lost.
        verifies: whether its workers have caches, which it verifies when asked; older versions have none.
    """

    host: str
    machine: str
    devices: tuple[str, ...]
    threads: int
    build: Build
    give_up_s: float
    verifies: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Any) -> Facts:
        """The facts in a message of another machine, which is not trusted: names are short and plain.

        Raises:
            ValueError: it is something else.
        """
        try:
            build, devices = data["build"], data["devices"]
            facts = cls(
                host=_plain(data["host"]),
                machine=_plain(data["machine"]),
                devices=tuple(map(_plain, devices[:MAX_DEVICES])) if isinstance(devices, list) else (),
                threads=max(1, min(int(data["threads"]), MAX_THREADS)),
                build=Build(commit=_plain(build["commit"]), protocol=_plain(build["protocol"])),
                give_up_s=max(0.0, min(float(data["give_up_s"]), 30 * 86400.0)),
                verifies=data.get("verifies") is True,
            )
        except (AttributeError, LookupError, TypeError, OverflowError) as error:
            raise ValueError("these are not the facts of a worker") from error
        if not facts.devices:
            raise ValueError("it names no device")
        return facts


def _plain(text: Any) -> str:
    """A name without what could steer a terminal or a page, or look like another one. Being ASCII, it also has a
    limited length in the file of members, which must stay readable with as many as may join."""
    return re.sub(r"[^\w.:-]", "-", text, flags=re.ASCII)[:64] if isinstance(text, str) else ""


def is_secret(text: object) -> bool:
    """Whether this has the form of a token or a secret."""
    return isinstance(text, str) and bool(_SECRET.fullmatch(text))


def hash_of(secret: str) -> str:
    """What is kept of a token or secret. It has 128 random bits or more: a plain hash suffices."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def connect(link: JoinLink) -> Connection:
    """A TLS connection to the machine of a link, whose certificate is the link's.

    Raises:
        JoinError: another certificate was shown; nothing was sent.
        OSError, TimeoutError: it cannot be reached.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The certificate is known by its hash; no authority has signed it, and its name does not matter.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with asyncio.timeout(2 * HANDSHAKE_LIMIT_S):
        reader, writer = await asyncio.open_connection(
            link.host, link.port, limit=COPY_BYTES, ssl=context, ssl_handshake_timeout=HANDSHAKE_LIMIT_S
        )
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
    if not hmac.compare_digest(hashlib.sha256(shown).digest(), link.fingerprint):
        writer.transport.abort()
        raise JoinError(
            f"the server at {link.address} has another certificate than the link says, so nothing was sent to it: "
            "it is another server, or somebody is in between; make a new link with `%sollol_cluster invite`"
        )
    return reader, writer


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Send a message, unless the connection is closing."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader, limit_s: float = SILENCE_S) -> dict[str, Any]:
    """The next message of the other side.

    Raises:
        EOFError: the connection has ended.
        TimeoutError: it says nothing.
        OSError: the connection is broken.
        ValueError: this is not a message.
    """
    async with asyncio.timeout(limit_s):
        line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection has ended")
    try:
        message = json.loads(line) if len(line) <= LINE_BYTES else None
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError("this is not a message")
    return message


async def beat(writer: asyncio.StreamWriter, news: Callable[[], dict[str, Any]] = dict) -> None:
    """Show the other side that this one is there, until the connection closes.

    Args:
        news: gives the next message; it may block shortly.
    """
    with contextlib.suppress(OSError):
        while not writer.is_closing():
            send(writer, await asyncio.to_thread(news))
            await writer.drain()
            await asyncio.sleep(BEAT_S)
