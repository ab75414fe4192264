"""Find the addresses of a private network that accept connections on the workers' usual ports.

A scan happens only where somebody has named the network. It connects to the first usual port of each address, then
to the other ports of the addresses that have reacted, and sends nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Sequence

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown
from sollol_nb.settings.endpoints import format_endpoint

CONNECT_LIMIT_S = 0.5
MAX_ADDRESSES = 1024
MAX_CONNECTIONS = 256
"""At the same time."""
MAX_FOUND = 256

_PRIVATE = [
    ipaddress.IPv4Network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8")
]
"""RFC 1918, link-local (RFC 3927) and loopback."""
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


def is_private(address: ipaddress.IPv4Address) -> bool:
    """Whether an address is in a private network (RFC 1918), link-local, or loopback."""
    return any(address in network for network in _PRIVATE)


def addresses_in(network: str) -> list[str]:
    """The addresses of a network given as `192.168.1.0/24` (or of a single address).

    Raises:
        ConfigError: it is not a private IPv4 network of at most 1024 addresses.
    """
    try:
        found = ipaddress.IPv4Network(network.strip(), strict=False)
    except ValueError:
        raise ConfigError(f"{shown(network)} is not an IPv4 network; use one such as 192.168.1.0/24") from None
    if not any(found.subnet_of(private) for private in _PRIVATE):
        raise ConfigError(
            f"{found} is not a private network; only private, link-local and loopback ones are scanned"
        )
    if found.num_addresses > MAX_ADDRESSES:
        raise ConfigError(
            f"{found} has {found.num_addresses:,} addresses; at most {MAX_ADDRESSES:,} (a /22) are scanned"
        )
    return [str(address) for address in found.hosts()]


async def scan(addresses: Sequence[str], ports: Iterable[int]) -> list[str]:
    """The endpoints that accept a connection, at most 256.

    An address that does not react to a connection to the first port within half a second, neither with an
    acceptance nor with a refusal, is not tried further.
    """
    first, *others = ports
    gate = asyncio.Semaphore(_connections_allowed())
    reactions = await asyncio.gather(*(_accepts(gate, address, first) for address in addresses))
    found = [(address, first) for address, accepted in zip(addresses, reactions, strict=True) if accepted is True]
    there = [address for address, accepted in zip(addresses, reactions, strict=True) if accepted is not None]
    pairs = [(address, port) for address in there for port in others]
    accepting = await asyncio.gather(*(_accepts(gate, *pair) for pair in pairs))
    found += [pair for pair, accepted in zip(pairs, accepting, strict=True) if accepted is True]
    return [format_endpoint(*pair) for pair in found[:MAX_FOUND]]


async def _accepts(gate: asyncio.Semaphore, address: str, port: int) -> bool | None:
    """Whether an address accepts a connection; False if it refuses, None if it does not react."""
    async with gate:
        with socket.socket() as trial:
            trial.setblocking(False)
            try:
                # Closing resets the connection: a worker that reads from it later must not answer to nobody.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                async with asyncio.timeout(CONNECT_LIMIT_S):
                    await asyncio.get_running_loop().sock_connect(trial, (address, port))
                return True
            except ConnectionRefusedError:
                return False
            except OSError:
                return None


def _connections_allowed() -> int:
    """How many connections may be open at the same time, without using up this process's file descriptors."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 4))
