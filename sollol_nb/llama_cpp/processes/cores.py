"""How many cores this process may use: fewer than the machine has, where a container or a batch system says so.

An engine that starts a thread for each core of the host, but may use two of them, spends its time waiting for
threads that do not run. Sources: the kernel's `cgroup-v2.rst` (`cpu.max`) and `sched-bwc.rst`
(`cpu.cfs_quota_us`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """The least of the machine's cores, the cores this process is bound to, and its quota of time; at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = quota_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def quota_cores(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that Linux control groups leave to this process, such as 1.5; None without a limit.

    Args:
        root: where `/proc` and `/sys` are.
    """
    groups = root / "sys/fs/cgroup"
    limits = [_limit_v2(groups / place / "cpu.max") for place in _own_groups(root)]
    limits.append(_limit_v1(groups / "cpu"))
    return min((one for one in limits if one is not None), default=None)


def _own_groups(root: Path) -> list[str]:
    """The process's control group and those above it, relative to the root, which is all a container may see."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            place = PurePosixPath(line.removeprefix("0::").lstrip("/"))
            return [str(place), *map(str, place.parents)]
    return ["."]


def _limit_v2(path: Path) -> float | None:
    quota, _, period = _text(path).partition(" ")
    return _cores(quota, period)


def _limit_v1(folder: Path) -> float | None:
    return _cores(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float | None:
    """Microseconds of time per microseconds; the quota is `max` or -1 where there is none."""
    quota, period = quota.strip(), period.strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, or another version of control groups
        return ""
