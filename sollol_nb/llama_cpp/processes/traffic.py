"""What the operating system knows of a process's TCP connections: bytes that it has sent, and peers it waits for.

Linux reports both without privileges (`sock_diag(7)`: the attribute `INET_DIAG_INFO` holds a `tcp_info`, see
`linux/inet_diag.h` and `linux/tcp.h`); other systems do not. No peer is asked.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import psutil

from sollol_nb.llama_cpp.processes.machine import Address

_NETLINK_TIMEOUT_S = 0.5  # the kernel answers immediately or not at all
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_INET_DIAG_INFO = 2
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_HEADER_BYTES, _MESSAGE_BYTES, _ATTRIBUTE_BYTES = 16, 72, 4
_BYTES_ACKED_OFFSET = 120  # of `tcpi_bytes_acked` in `tcp_info`
_DATA_SEGMENTS_OFFSET = 152  # of `tcpi_data_segs_in`; `tcpi_data_segs_out` follows
PAUSES_PER_SAMPLE = 10
"""Looking at the connections takes at most about a tenth of a processor core."""


# --- bytes sent ------------------------------------------------------------------------------


def delivered_bytes(pid: int) -> dict[Address, int] | None:
    """Bytes that a process has sent and its peers have acknowledged, by the peer's IP address and port. Several
    connections to one peer are added up.

    Returns:
        None on other systems than Linux, and if the process has ended.
    """
    delivered: dict[Address, int] = {}
    try:
        with _netlink() as netlink:
            for peer, request in _connections(pid):
                info = _tcp_info(netlink, request)
                if len(info) >= _BYTES_ACKED_OFFSET + 8:  # else the connection was just closed
                    (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED_OFFSET)
                    delivered[peer] = delivered.get(peer, 0) + int(acked)
    except (psutil.Error, OSError):
        return None
    return delivered


# --- waiting ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Waits:
    """How long a process has waited for each of its peers.

    Attributes:
        seconds: by peer.
        own_s: in which it waited for none of them.
    """

    seconds: dict[Address, float] = field(default_factory=dict)
    own_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The time in which it was watched."""
        return sum(self.seconds.values()) + self.own_s


def watch_waits(
    pid: int,
    peers: Collection[Address],
    waits: Waits,
    *,
    every_s: float,
    is_wanted: Callable[[], bool],
) -> bool:
    """Add to `waits` for which peers a process waits, as long as `is_wanted` says so. Blocks meanwhile.

    It waits for the peer to which it has sent something after it last received something from there; of several,
    for the one to which it has sent last. Which of both came last, the counts of segments show: they are looked at
    so often that a peer's answer is seen apart from the question. A peer that answers quicker is not waited for.

    Args:
        every_s: the time between two looks.

    Returns:
        False where the operating system does not report it, or the process has ended.
    """
    sent, received = dict.fromkeys(peers, 0), dict.fromkeys(peers, 0)  # the looks that found something new
    known: dict[Address, tuple[int, int]] = {}
    awaited: Address | None = None
    is_known, look, since, own_s = False, 0, time.monotonic(), 0.0
    try:
        requests = {peer: request for peer, request in _connections(pid) if peer in sent}
        with _netlink() as netlink:
            while is_wanted():
                look, began = look + 1, time.monotonic()
                if is_known and awaited is None:
                    own_s += began - since
                elif is_known and awaited is not None:
                    # Its own time counts once it has continued: after the last token it has nothing to do.
                    waits.own_s, own_s = waits.own_s + own_s, 0.0
                    waits.seconds[awaited] = waits.seconds.get(awaited, 0.0) + began - since
                since = began
                for peer, request in requests.items():
                    segments = _data_segments(_tcp_info(netlink, request))
                    if segments is None:
                        return False
                    before_in, before_out = known.get(peer, segments)
                    known[peer] = segments
                    received[peer] = look if segments[0] != before_in else received[peer]
                    sent[peer] = look if segments[1] != before_out else sent[peer]
                awaited = _awaited(sent, received)
                is_known = is_known or look in received.values()
                time.sleep(max(every_s, PAUSES_PER_SAMPLE * (time.monotonic() - began)))
    except (psutil.Error, OSError):
        return False
    return bool(requests)


def _awaited(sent: Mapping[Address, int], received: Mapping[Address, int]) -> Address | None:
    open_questions = {peer: look for peer, look in sent.items() if look > received[peer]}
    return max(open_questions, key=lambda peer: open_questions[peer]) if open_questions else None


def _data_segments(info: bytes) -> tuple[int, int] | None:
    """Segments with data that a connection has received and sent; None where that is not reported."""
    if len(info) < _DATA_SEGMENTS_OFFSET + 8:
        return None
    received, sent = struct.unpack_from("=II", info, _DATA_SEGMENTS_OFFSET)
    return int(received), int(sent)


# --- netlink ---------------------------------------------------------------------------------


def _netlink() -> socket.socket:
    """A socket for requests to the kernel. Raises OSError on systems without it."""
    if sys.platform != "linux":
        raise OSError("only Linux has sock_diag")
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    netlink.settimeout(_NETLINK_TIMEOUT_S)
    return netlink


def _connections(pid: int) -> list[tuple[Address, bytes]]:
    """The peer of each TCP connection of a process, and the request that asks for its `tcp_info`."""
    return [
        ((str(known.raddr[0]), int(known.raddr[1])), _diag_request(known.family, known.laddr, known.raddr))
        for known in psutil.Process(pid).net_connections("tcp")
        if known.raddr
    ]


def _diag_request(family: int, local: Address, remote: Address) -> bytes:
    """An `nlmsghdr` and an `inet_diag_req_v2` that names one connection."""
    wanted = 1 << (_INET_DIAG_INFO - 1)
    connection = struct.pack("!HH", local[1], remote[1]) + _packed(local[0]) + _packed(remote[0])
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, wanted, 0, _ALL_STATES)
    request += connection + bytes(4) + _NO_COOKIE
    header = struct.pack("=IHHII", _HEADER_BYTES + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    return header + request


def _packed(host: str) -> bytes:
    return ipaddress.ip_address(host).packed.ljust(16, b"\0")


def _tcp_info(netlink: socket.socket, request: bytes) -> bytes:
    """The `tcp_info` of a connection; empty if the answer is an error or does not contain it."""
    netlink.send(request)
    answer = netlink.recv(65536)
    if len(answer) < _HEADER_BYTES:
        return b""
    size, kind = struct.unpack_from("=IH", answer)
    if kind == _SOCK_DIAG_BY_FAMILY:
        for name, value in _attributes(answer[_HEADER_BYTES + _MESSAGE_BYTES : size]):
            if name == _INET_DIAG_INFO:
                return value
    return b""


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE_BYTES:
        size, name = struct.unpack_from("=HH", data)
        if size < _ATTRIBUTE_BYTES:
            return
        yield name, data[_ATTRIBUTE_BYTES:size]
        data = data[(size + 3) & ~3 :]
