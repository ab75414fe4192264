"""Bytes that a process has delivered over its TCP connections, as the system counts them; no peer is asked.

Linux tells this of every connection (`sock_diag(7)`: the `INET_DIAG_INFO` attribute holds a `tcp_info`, see
`linux/inet_diag.h` and `linux/tcp.h`), without privileges. Other systems tell it to administrators only or not at
all: there nothing is known.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator

import psutil

Address = tuple[str, int]

_LIMIT_S = 0.5  # the kernel answers at once, or not at all
_SOCK_DIAG = 4  # the netlink family, NETLINK_SOCK_DIAG
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_FLAG = 1
_INFO_ATTRIBUTE = 2  # INET_DIAG_INFO
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_HEADER_BYTES, _MESSAGE_BYTES, _ATTRIBUTE_BYTES = 16, 72, 4
_BYTES_ACKED_AT = 120  # `tcpi_bytes_acked` in `tcp_info`


def delivered_bytes(pid: int) -> dict[Address, int] | None:
    """Bytes that the peers have acknowledged, by the peer's IP address and port: those of all connections to it.

    None where the system does not tell, or the process has ended.
    """
    if sys.platform != "linux":
        return None
    try:
        connections = psutil.Process(pid).net_connections("tcp")
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as netlink:
            netlink.settimeout(_LIMIT_S)
            delivered: dict[Address, int] = {}
            for one in connections:
                if not one.raddr:
                    continue
                netlink.send(_question(one.family, one.laddr, one.raddr))
                acked = _acked_bytes(netlink.recv(65536))
                if acked is not None:  # else it was closed a moment ago
                    peer = (str(one.raddr[0]), int(one.raddr[1]))
                    delivered[peer] = delivered.get(peer, 0) + acked
    except (psutil.Error, OSError):
        return None
    return delivered


def _question(family: int, local: Address, remote: Address) -> bytes:
    """A `nlmsghdr`, and a `inet_diag_req_v2` that names one connection."""
    wanted = 1 << (_INFO_ATTRIBUTE - 1)
    connection = struct.pack("!HH", local[1], remote[1]) + _packed(local[0]) + _packed(remote[0])
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, wanted, 0, _ALL_STATES)
    request += connection + bytes(4) + _NO_COOKIE
    return struct.pack("=IHHII", _HEADER_BYTES + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_FLAG, 0, 0) + request


def _packed(host: str) -> bytes:
    return ipaddress.ip_address(host).packed.ljust(16, b"\0")


def _acked_bytes(answer: bytes) -> int | None:
    """Acknowledged bytes in the kernel's answer; None if it is an error, or says nothing of it."""
    size, kind = struct.unpack_from("=IH", answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return None
    for name, value in _attributes(answer[_HEADER_BYTES + _MESSAGE_BYTES : size]):
        if name == _INFO_ATTRIBUTE and len(value) >= _BYTES_ACKED_AT + 8:
            (acked,) = struct.unpack_from("=Q", value, _BYTES_ACKED_AT)
            return int(acked)
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE_BYTES:
        size, name = struct.unpack_from("=HH", data)
        if size < _ATTRIBUTE_BYTES:
            return
        yield name, data[_ATTRIBUTE_BYTES:size]
        data = data[(size + 3) & ~3 :]
