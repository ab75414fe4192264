"""Workers in the local network by multicast DNS (RFC 6762, RFC 6763): announced when asked to, and found.

An announcement can come from anybody in the network, so it is a hint: its texts are cleaned and cut, its address
must be in a network that this machine is part of, and a worker is shown only after a probe. Needs the package
zeroconf.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.workers.probe import PROTOCOL_MAJOR, PROTOCOL_MINOR
from sollol_nb.llama_cpp.workers.scan import is_private
from sollol_nb.settings.endpoints import ALL_ADDRESSES, format_endpoint

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

SERVICE = "_sollol-rpc._tcp.local."
"""At most 15 characters between the underscore and the dot (RFC 6763, section 7.2)."""
BROWSE_S = 1.5
RESOLVE_LIMIT_S = 1.0
MAX_ANNOUNCED = 64
MAX_TEXT_CHARS = 64
MISSING = "mDNS needs the package zeroconf; run: pip install zeroconf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A worker as it was announced. Nothing of it is verified.

    Attributes:
        endpoint: `address:port`.
        name: of the announcement.
        version: of llama.cpp, as the TXT record says; "" if it does not.
        protocol: of RPC, such as `7.0`.
        machine: the host's name.
    """

    endpoint: str
    name: str
    version: str
    protocol: str
    machine: str


@contextlib.asynccontextmanager
async def announced(host: str, port: int, *, version: str) -> AsyncIterator[list[str]]:
    """Announce a worker while the context lasts; gives the announced endpoints.

    Args:
        host: the address that the worker listens on; `0.0.0.0` is all of this machine.
        port: its port.
        version: of its llama.cpp.

    Raises:
        ConfigError: zeroconf is missing, or other machines cannot reach that address.
    """
    addresses = announceable(host)
    machine = socket.gethostname().partition(".")[0][:MAX_TEXT_CHARS] or "worker"
    async with _zeroconf(addresses) as zeroconf:
        from zeroconf import ServiceInfo

        info = ServiceInfo(
            SERVICE,
            f"{machine}-{port}.{SERVICE}",
            port=port,
            parsed_addresses=addresses,
            server=f"{machine}.local.",
            properties={
                "version": version[:MAX_TEXT_CHARS],
                "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
                "machine": machine,
            },
        )
        await zeroconf.async_register_service(info, allow_name_change=True)
        try:
            yield [format_endpoint(address, port) for address in addresses]
        finally:
            await zeroconf.async_unregister_service(info)


async def browse() -> list[Announced]:
    """The workers that are announced in the networks of this machine, at most 64; takes two seconds.

    Raises:
        ConfigError: zeroconf is missing.
    """
    networks = _networks()
    async with _zeroconf([str(network.ip) for network in networks]) as zeroconf:
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

        names: dict[str, None] = {}

        def note(zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is not ServiceStateChange.Removed and len(names) < MAX_ANNOUNCED:
                names[name] = None

        async with AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[note]):
            await asyncio.sleep(BROWSE_S)
            infos = [AsyncServiceInfo(SERVICE, name) for name in names]
            limit_ms = RESOLVE_LIMIT_S * 1000
            await asyncio.gather(*(info.async_request(zeroconf.zeroconf, limit_ms) for info in infos))
    found = []
    for info in infos:
        name = cleaned(info.name.removesuffix(f".{SERVICE}"))
        texts = {cleaned(key): cleaned(value) for key, value in info.properties.items()}
        for address in reachable(info.parsed_addresses(), networks):
            if info.port and 0 < info.port < 65536:
                found.append(
                    Announced(
                        endpoint=format_endpoint(address, info.port),
                        name=name,
                        version=texts.get("version", ""),
                        protocol=texts.get("protocol", ""),
                        machine=texts.get("machine", ""),
                    )
                )
                break  # the other addresses are those of the same worker
    return found


def check_announceable(host: str) -> None:
    """Check what `announced` needs.

    Raises:
        ConfigError: zeroconf is missing, or other machines cannot reach that address.
    """
    announceable(host)
    if importlib.util.find_spec("zeroconf") is None:
        raise ConfigError(MISSING)


def announceable(host: str) -> list[str]:
    """The IPv4 addresses at which other machines reach a worker that listens on `host`.

    Raises:
        ConfigError: there is none.
    """
    own = [str(network.ip) for network in _networks()]
    if host in ALL_ADDRESSES and own:
        return own
    if host in own:
        return [host]
    where = "this machine has no private network" if not own else f"use --host with one of {', '.join(own)}"
    raise ConfigError(f"a worker that listens on {host} cannot be announced to the local network; {where}")


def reachable(addresses: Iterable[str], networks: Iterable[ipaddress.IPv4Interface]) -> list[str]:
    """Those of the addresses that are private and in one of these networks, in their order."""
    found = []
    for text in addresses:
        with contextlib.suppress(ValueError):
            address = ipaddress.IPv4Address(text)
            if is_private(address) and any(address in network.network for network in networks):
                found.append(text)
    return found


def cleaned(text: str | bytes | None) -> str:
    """A text of the network as it may be shown: at most 64 printable characters."""
    if isinstance(text, bytes):
        text = text[: 4 * MAX_TEXT_CHARS].decode("utf-8", errors="replace")
    return "".join(char for char in (text or "")[:MAX_TEXT_CHARS] if char.isprintable())


def _networks() -> list[ipaddress.IPv4Interface]:
    """The private networks of this machine, each with this machine's address in it; without loopback."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for known in addresses:
            if known.family == socket.AF_INET and known.netmask:
                interface = ipaddress.IPv4Interface(f"{known.address}/{known.netmask}")
                if is_private(interface.ip) and not interface.ip.is_loopback:
                    found.append(interface)
    return found


@contextlib.asynccontextmanager
async def _zeroconf(addresses: list[str]) -> AsyncIterator[AsyncZeroconf]:
    """Multicast DNS on the interfaces with these addresses.

    Raises:
        ConfigError: the package zeroconf is missing, or no multicast can be sent.
    """
    try:
        from zeroconf.asyncio import AsyncZeroconf
    except ImportError:
        raise ConfigError(MISSING) from None
    if not addresses:
        raise ConfigError("mDNS needs a private network (such as 192.168.1.0/24), and this machine is in none")
    try:
        zeroconf = AsyncZeroconf(interfaces=addresses)
    except OSError as error:
        raise ConfigError(f"mDNS cannot use the network: {error.strerror or error}") from None
    try:
        yield zeroconf
    finally:
        await zeroconf.async_close()
