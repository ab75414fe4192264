"""Kernels that are killed, and kernels that want the same workers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.workers.probe import test_rpc_backend as is_free
from tests.chaos.machines import COORDINATOR_PORT
from tests.chaos.trials import ACCENTS, LONG, MODEL, Chaos
from tests.support.engines import eventually, with_variable
from tests.support.kernels import Kernel, Shown
from tests.support.kernels import kernel as new_kernel

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]

MAKE_ROUTER = f"""
from IPython.display import Markdown, display
from sollol_nb.sync_wrapper import HybridRouter
router = HybridRouter(auto_discover_rpc=False, coordinator_port={COORDINATOR_PORT}, **settings)
"""
ASK = f"answer = router.route_request({MODEL!r}, {ACCENTS.text!r}, temperature=0)"
ASK_AND_STOP_READING = f"""
import threading
for number, chunk in enumerate(router.stream({MODEL!r}, {LONG.text!r}, temperature=0)):
    if number == 50:
        display(Markdown("half way"))
        threading.Event().wait()
"""
WHAT_RUNS = """dict(
    pid=router.coordinator.pid,
    url=router.coordinator.base_url,
    load_ms=router.coordinator.load_ms,
    log=str(router.coordinator.log_path),
    log_length=len(router.coordinator.log_path.read_text(errors="replace")) > 1000,
    layers={device.name: device.units for device in router.coordinator.placement.devices},
    workers=router.coordinator.rpc_backends,
)"""


@contextmanager
def kernel_with_router(chaos: Chaos, **settings: Any) -> Iterator[Kernel]:
    """A kernel whose `router` knows three of the machines, and ends its engines at the end, if it still runs."""
    backends = ",".join(machine.endpoint for machine in chaos.cluster.machines[:3])
    with new_kernel(RPC_BACKENDS=backends, SOLLOL_KEEP_ALIVE="60s") as running:
        shown = running.run(f"settings = {settings!r}\n{MAKE_ROUTER}")
        assert shown.status == "ok", shown.error
        yield running
        if running.manager.is_alive():
            assert running.run("router.close()").status == "ok"


def value(kernel: Kernel, expression: str) -> Any:
    return ast.literal_eval(kernel.value(expression))


def kinds(kernel: Kernel) -> list[str]:
    found: list[str] = value(kernel, "[event.kind for event in router.events.recent()]")
    return [kind for kind in found if kind.startswith("coordinator.")]


def test_a_kernel_killed_in_mid_answer_leaves_its_model_to_the_next_and_nothing_for_ever(
    chaos: Chaos, state: Path
) -> None:
    chaos.cluster.make_well()
    undisturbed = chaos.undisturbed(ACCENTS)
    with kernel_with_router(chaos) as first, kernel_with_router(chaos) as second:
        assert first.run(ASK).status == "ok"
        before = value(first, WHAT_RUNS)
        first.collect(first.client.execute(ASK_AND_STOP_READING), until_shown="half way")
        first.kill()

        assert second.run(ASK).status == "ok"
        assert value(second, "(answer.text, answer['eval_count'])") == (undisturbed.text, undisturbed.eval_count)
        assert value(second, WHAT_RUNS) == before
        assert sum(len(units) for units in before["layers"].values()) > 0
        assert kinds(second) == ["coordinator.adopted"]
        assert "held" in value(second, "[worker.state for worker in router.cluster().workers]")
        assert second.run("router.configure(keep_alive='1s')").status == "ok"
        second.kill()

        # What still runs are these kernels' engines and their supervisors; keep_alive ends them.
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(state)), "no process is left")
        assert not registry.entries()
        for machine in chaos.cluster.machines:
            assert is_free("127.0.0.1", int(machine.endpoint.rpartition(":")[2]))


def ask_both(first: Kernel, second: Kernel) -> list[Shown]:
    """The same cell in both, at the same time."""
    sent = [(kernel, kernel.client.execute(ASK)) for kernel in (first, second)]
    return [kernel.collect(message_id) for kernel, message_id in sent]


def test_two_kernels_that_ask_the_same_share_a_coordinator(chaos: Chaos) -> None:
    chaos.cluster.make_well()
    with kernel_with_router(chaos) as first, kernel_with_router(chaos) as second:
        assert [shown.status for shown in ask_both(first, second)] == ["ok", "ok"]
        seen = [value(kernel, WHAT_RUNS) for kernel in (first, second)]
        for coordinator in seen:
            assert coordinator.pop("load_ms") > 0, "each has waited for its own part of the load"
        assert seen[0] == seen[1]
        published = [
            [kind for kind in kinds(kernel) if kind != "coordinator.starting"] for kernel in (first, second)
        ]
        assert sorted(published) == [["coordinator.adopted"], ["coordinator.ready"]]
        for kernel in (first, second):
            assert value(kernel, "answer.text") == chaos.undisturbed(ACCENTS).text


def test_two_kernels_that_fight_for_workers_get_different_ones(chaos: Chaos) -> None:
    chaos.cluster.make_well()
    with (
        kernel_with_router(chaos, num_rpc_backends=2, context_tokens=2048) as first,
        kernel_with_router(chaos, num_rpc_backends=1, context_tokens=4096) as second,
    ):
        assert [shown.status for shown in ask_both(first, second)] == ["ok", "ok"]
        workers = [value(kernel, "router.coordinator.rpc_backends") for kernel in (first, second)]
        held = sorted(endpoint for each in workers for endpoint in each)
        assert held == [machine.endpoint for machine in chaos.cluster.machines[:3]]
        for kernel in (first, second):
            assert value(kernel, "answer.text") == chaos.undisturbed(ACCENTS).text


def test_of_two_kernels_that_want_all_workers_the_second_learns_who_has_them(chaos: Chaos) -> None:
    chaos.cluster.make_well()
    with (
        kernel_with_router(chaos, context_tokens=2048) as first,
        kernel_with_router(chaos, context_tokens=4096) as second,
    ):
        assert first.run(ASK).status == "ok"
        shown = second.run(ASK)  # its context would not fit into that of the first
        assert "WorkersUnavailableError" in shown.error[-1]
        assert f"held by the coordinator of {MODEL}, started by " in shown.error[-1]
        assert f"(process {first.pid})" in shown.error[-1]
        assert first.run("router.close()").status == "ok"
        assert second.run(ASK).status == "ok", "they are free now"
        assert value(second, "answer.text") == chaos.undisturbed(ACCENTS).text
