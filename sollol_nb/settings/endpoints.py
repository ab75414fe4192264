"""Endpoints as text: parse and format `host:port`, and find out whether an endpoint is on this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown

DEFAULT_RPC_PORT = 50052
DEFAULT_COORDINATOR_PORT = 18080
DEFAULT_OLLAMA_PORT = 11434
DEFAULT_GATEWAY_PORT = 11440
LOOPBACK = "127.0.0.1"
ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
SSH = "ssh://"
INVITATIONS = "invitations"
"""Target of the link through which all workers come that have joined by invitation."""

_USER = re.compile(r"[\w.$+-]+(?<!-)")


def parse_endpoint(text: str, default_port: int = DEFAULT_RPC_PORT) -> tuple[str, int]:
    """Split `host:port`, `host`, `[v6]:port` into host and port.

    Raises:
        ConfigError: the text is not an endpoint.
    """
    host, port = text.strip(), str(default_port)
    if host.startswith("["):
        host, closed, rest = host[1:].partition("]")
        if not closed or not host or rest[:1] not in ("", ":"):
            host = ""
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, port = host.split(":")
    if (
        not host
        or any(c.isspace() or not c.isprintable() or c in "/@,;" for c in host)
        or (":" in host and not _is_address(host))
        or not port.isdecimal()
        or len(port) > 5
        or not 0 < int(port) < 65536
    ):
        raise ConfigError(f"{shown(text)} is not an endpoint; use host:port, such as 192.168.1.10:{default_port}")
    return host, int(port)


def worker_target(text: str) -> str:
    """How a worker, or a machine with workers, is named: `host:port`, `[v6]:port`, `ssh://user@host:port`,
    or `invitations` for the machines that have joined.

    Raises:
        ConfigError: it is none of these.
    """
    if is_ssh(text):
        return ssh_target(text)
    if text.strip() == INVITATIONS:
        return INVITATIONS
    return format_endpoint(*parse_endpoint(text))


def ssh_target(text: str) -> str:
    """`ssh://user@host:port` of a machine given so, or as `user@host:port`; user and port may be left out.

    Raises:
        ConfigError: it is no such text.
    """
    rest = text.strip()
    if rest.lower().startswith(SSH):
        rest = rest[len(SSH) :]
    user, at, address = rest.rstrip("/").rpartition("@")
    has_port = bool(re.search(r"(^[^:]*|\]):\d+$", address))
    try:
        host, port = parse_endpoint(address, 22)
    except ConfigError:
        host, port = "", 0
    # What begins with a dash would be an option of the ssh program.
    if not host or host.startswith("-") or (at and not _USER.fullmatch(user)):
        raise ConfigError(f"{shown(text)} does not name a machine; use ssh://host or ssh://user@host:port")
    bracketed = f"[{host}]" if ":" in host else host
    return f"{SSH}{user}{at}{bracketed}{f':{port}' if has_port else ''}"


def is_ssh(text: str) -> bool:
    """Whether it names a machine as `ssh://host`."""
    return text.strip().lower().startswith(SSH)


def is_target(endpoint: str) -> bool:
    """Whether a worker is reached through a link, not by its address: `ssh://...`, `invitations`, or an IPv6
    address, which llama.cpp cannot connect to."""
    return endpoint == INVITATIONS or endpoint.startswith((SSH, "["))


def gateway_url(text: str) -> str:
    """The URL of a gateway given as URL, `host:port` or `host`; without a port, 11440, or with https 443.

    Raises:
        ConfigError: it is none of these, or contains a password.
    """
    scheme, separator, rest = text.strip().rpartition("://")
    scheme = scheme.lower() or "http"
    address, _, path = rest.partition("/")
    if "@" in rest:
        raise ConfigError("the address of a gateway must not contain a password; give the key as gateway_key")
    if scheme not in ("http", "https") or not address or "?" in rest or "#" in rest:
        raise ConfigError(f"{shown(text)} is not the address of a gateway; use a URL such as http://head:11440")
    try:
        host, port = parse_endpoint(address, 443 if scheme == "https" and separator else DEFAULT_GATEWAY_PORT)
    except ConfigError:
        raise ConfigError(
            f"{shown(text)} is not the address of a gateway; use a URL such as http://head:11440"
        ) from None
    return f"{scheme}://{format_endpoint(host, port)}{f'/{path}'.rstrip('/')}"


def format_endpoint(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(endpoint: str) -> bool:
    """Whether the address of a `host:port` endpoint is on this machine (127.0.0.0/8, ::1, localhost)."""
    host, _ = parse_endpoint(endpoint)
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def addresses_of(endpoint: str) -> frozenset[tuple[str, int]]:
    """An endpoint as pairs of IP address and port; empty while its name cannot be resolved."""
    try:
        return _resolved(endpoint)
    except OSError:  # it is asked again the next time
        return frozenset()


@lru_cache
def _resolved(endpoint: str) -> frozenset[tuple[str, int]]:
    host, port = parse_endpoint(endpoint)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset((str(address[0]), port) for *_, address in found)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
