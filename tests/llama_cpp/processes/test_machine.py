"""Usable cores, as control groups of both versions limit them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.processes import machine
from sollol_nb.llama_cpp.processes.machine import quota_cores, usable_cores

V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        ({f"{V2}/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000"}, 2.0),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/cpu.max": "max 100000",
                f"{V2}/a/cpu.max": "50000 100000",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/gone/from/here\n", f"{V2}/cpu.max": "300000 100000"}, 3.0),
        ({f"{V2}/cpu/cpu.cfs_quota_us": "250000\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({f"{V2}/cpu/cpu.cfs_quota_us": "-1\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({f"{V2}/cpu.max": "nonsense"}, None),
        ({f"{V2}/cpu.max": "100000 0"}, None),
    ],
)
def test_the_lowest_quota_of_a_group_and_its_parents_counts(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cores(tmp_path) == quota


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (1.5, 2), (0.1, 1), (100.0, 8)])
def test_a_fraction_of_a_core_counts_as_one(
    quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "quota_cores", lambda: quota)
    assert usable_cores() == usable


def test_cores_that_the_process_is_not_bound_to_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5}, raising=False)
    monkeypatch.setattr(machine, "quota_cores", lambda: None)
    assert usable_cores() == 3


def test_this_machine_has_at_least_one_core() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.1", "0.0.0.0", "0"])
def test_names_of_this_machine_are_one_worker(name: str) -> None:
    assert machine.worker_at(name, 50052) == ("127.0.0.1", 50052)
