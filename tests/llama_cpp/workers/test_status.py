"""A worker as a layer plan sees it: whose memory it shares."""

from __future__ import annotations

import psutil
import pytest

from sollol_nb.llama_cpp.processes.machine import boot_id
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus

HERE = "127.0.0.1"
TOTAL = psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("target", "machine", "domain"),
    [
        ("", "", HERE),
        ("ssh://gpu1", "", None),
        ("ssh://gpu1", "a-boot", "a-boot"),
        ("ssh://localhost", boot_id(), HERE),
        ("[::1]:50052", "", HERE),
        ("[fd00::1]:50052", "", None),
    ],
)
def test_a_worker_behind_a_link_has_the_memory_of_its_own_machine(
    target: str, machine: str, domain: str | None
) -> None:
    probe = Probe(
        endpoint="127.0.0.1:40000",
        outcome=ProbeOutcome.FREE,
        detail="free",
        device_free_bytes=(2 * TOTAL,),
        total_bytes=TOTAL,
    )
    worker = WorkerStatus(
        endpoint=probe.endpoint,
        state="free",
        detail="free",
        held_by=None,
        probe=probe,
        is_local=False,
        name=target,
        machine=machine,
        target=target,
    )
    assert worker.capacity.memory_domain == domain
    assert (worker.capacity.free_bytes < TOTAL) is (domain == HERE), "what is free here limits those that are here"
