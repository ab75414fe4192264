"""Facts about this machine: usable cores, identity, free ports, and who listens."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import platform
import re
import socket
import struct
import sys
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import psutil

from sollol_nb.errors import WorkerStartError
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.text.tables import counted

Address = tuple[str, int]


# --- cores: an engine with a thread for each core of the host is slow where its container may use two ------------


def usable_cores() -> int:
    """The smallest of: the machine's cores, the cores this process is bound to, and its CPU quota; at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = quota_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def quota_cores(root: Path = Path("/")) -> float | None:
    """CPU quota of this process's Linux control groups in cores, e.g. 1.5; None without a limit.

    Sources: the kernel's `cgroup-v2.rst` (`cpu.max`) and `sched-bwc.rst` (`cpu.cfs_quota_us`).

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    groups = root / "sys/fs/cgroup"
    quotas = [_quota_v2(groups / group / "cpu.max") for group in _own_groups(root)]
    quotas.append(_quota_v1(groups / "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _own_groups(root: Path) -> list[str]:
    """The process's control group and its parents, relative to the root, which is all a container may see."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            group = PurePosixPath(line.removeprefix("0::").lstrip("/"))
            return [str(group), *map(str, group.parents)]
    return ["."]


def _quota_v2(path: Path) -> float | None:
    quota, _, period = _text(path).partition(" ")
    return _cores(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _cores(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float | None:
    """Both in microseconds; without a limit the quota is `max` or -1."""
    quota, period = quota.strip(), period.strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, or the other version of control groups
        return ""


# --- identity and address ------------------------------------------------------------------------


@cache
def boot_id() -> str:
    """What is the same for all processes of a machine until it starts again, in containers too; "" if unknown."""
    return _text(Path("/proc/sys/kernel/random/boot_id")).strip()


def machine_id() -> str:
    """Equal for processes that share this machine's memory, until it starts again: its `boot_id`; where that is
    unknown, its name, network card and start."""
    facts = f"{platform.node()} {uuid.getnode()} {psutil.boot_time():.0f}"
    return boot_id() or str(uuid.uuid5(uuid.NAMESPACE_DNS, facts))


def primary_address() -> str:
    """This machine's address on the network that leads outside; that of loopback if it has no network.

    No packet is sent: connecting a datagram socket only looks up the route (`udp(7)`).
    """
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect((outside, 9))
            return str(trial.getsockname()[0])
    for known_of in psutil.net_if_addrs().values():  # a network without a way outside
        for known in known_of:
            if known.family == socket.AF_INET and not ipaddress.ip_address(known.address).is_loopback:
                return known.address
    return LOOPBACK


# --- ports -----------------------------------------------------------------------------------


def free_ports(first: int, count: int, host: str = LOOPBACK) -> list[int]:
    """The first `count` ports from `first` upward that no program listens on.

    Raises:
        WorkerStartError: there are not enough free ports.
    """
    found: list[int] = []
    for port in range(first, 65536):
        if len(found) == count:
            break
        with socket.socket() as trial:
            try:
                if os.name == "posix":  # a port whose old connections still linger is free for a server
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((host, port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise WorkerStartError(
            f"{host} has only {counted(len(found), 'free port')} from {first} upward ({count} needed); "
            "choose a lower first port"
        )
    return found


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket on this machine that accepts connections.

    Attributes:
        address: the IP address that it is bound to; `0.0.0.0` or `::` are all addresses of this machine.
        uid: the user who opened it.
    """

    address: str
    uid: int


_LISTENING = re.compile(r"^ *\d+: ([0-9A-F]+):([0-9A-F]{4}) [0-9A-F:]+ 0A (?:\S+ ){3} *(\d+) ", re.MULTILINE)


def listeners(port: int, root: Path = Path("/")) -> list[Listener]:
    """The sockets that listen on a TCP port; empty on systems other than Linux.

    Source: the Linux kernel documentation of proc_net_tcp: an address is words in the byte order of the machine,
    in hex, and the state 0A is listening.
    """
    found = []
    for name in ("tcp", "tcp6"):
        for address, hex_port, uid in _LISTENING.findall(_text(root / "proc/net" / name)):
            if int(hex_port, 16) == port:
                words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
                packed = struct.pack(f"={len(words)}I", *words)
                found.append(Listener(str(ipaddress.ip_address(packed)), int(uid)))
    return found


def other_user_of(host: str, port: int) -> str | None:
    """The user whose program listens on an address of this machine, if that is another one; None if it is the user
    of this process, or not known."""
    if sys.platform == "win32":
        return None
    import pwd

    address, _ = worker_at(host, port)
    here = listeners(port)
    owners = [listener.uid for listener in here if listener.address == address] or [known.uid for known in here]
    if not owners or os.getuid() in owners:
        return None
    try:
        return pwd.getpwuid(owners[0]).pw_name
    except KeyError:
        return str(owners[0])


def worker_at(host: str, port: int) -> Address:
    """What distinguishes a worker from others: equal for two names of one worker. Blocks while DNS answers.

    A program that listens on all addresses of this machine is one worker, by whichever of them it is named.
    """
    try:
        address = str(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):  # unknown now; it cannot be reached either
        return host.lower(), port
    if address == "0.0.0.0":  # noqa: S104 - who connects there reaches this machine
        address = LOOPBACK
    if _is_own_address(address):
        here = {listener.address for listener in listeners(port)}
        if address not in here and here & {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
            return LOOPBACK, port
    return address, port


def _is_own_address(address: str) -> bool:
    if ipaddress.ip_address(address).is_loopback:
        return True
    return any(known.address == address for known_of in psutil.net_if_addrs().values() for known in known_of)
