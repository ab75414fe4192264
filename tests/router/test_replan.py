"""A worker that becomes slow is named, a better layout said, and with replan="auto" the model moves there."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.layers import replan
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.own_devices import OwnDevices
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import engine_on, linux_only

pytestmark = [pytest.mark.engine, linux_only]

TOKENS = 16
MOST_ANSWERS = 25


@contextmanager
def throttled(process: psutil.Process) -> Iterator[None]:
    """The process runs for a tenth of the time meanwhile."""
    over = threading.Event()

    def stop_and_continue() -> None:
        while not over.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.045)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)

    thread = threading.Thread(target=stop_and_continue)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def units(router: HybridRouter) -> dict[str, int]:
    coordinator = router.coordinator
    assert coordinator is not None
    assert coordinator.plan is not None
    return {shard.endpoint: shard.unit_count for shard in coordinator.plan.shards}


def test_the_model_leaves_a_worker_that_is_throttled_in_mid_session(
    engine: Engine, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replan, "CONFIRMATIONS", 2)
    # As if each worker were another machine, and this one had nothing to offer.
    monkeypatch.setattr(WorkerStatus, "_is_here", property(lambda _: False))
    monkeypatch.setattr(OwnDevices, "capacities", lambda _: [])
    settings: dict[str, Any] = {"distributed_threshold_params": 1e-6, "context_tokens": 1024, "slots": 3}
    with HybridRouter(auto_discover_rpc=False, replan="auto", **settings) as router, ExitStack() as stack:
        slow = router.start_workers(3)[1]
        model = str(smollm2)

        def ask() -> None:
            answer = router.route_request(model, "Tell me a story.", temperature=0, max_tokens=TOKENS)
            assert answer["eval_count"] == TOKENS
            texts.add(answer.text)

        def advice() -> list[Event]:
            return [event for event in router.events.recent() if event.kind == EventKind.COORDINATOR_ADVICE]

        def moves() -> int:
            starts = [event for event in router.events.recent() if event.kind == EventKind.COORDINATOR_READY]
            return len(starts) - 1

        texts: set[str] = set()
        for _ in range(7):
            ask()
        before = units(router)[slow]
        assert moves() == 0
        stack.enter_context(throttled(engine_on(int(slow.rpartition(":")[2]))))
        for _ in range(MOST_ANSWERS):
            ask()
            if moves():
                break
        assert advice()[-1].data["slow"] == [slow]
        assert advice()[-1].message.startswith(f"{slow} takes ")
        assert units(router).get(slow, 0) < before / 2
        stack.close()  # from now on it is as quick as before
        for _ in range(3):
            ask()
        assert moves() == 1
        assert router.replan()[0].startswith(f"{router.coordinator_model} stays as it is")
        assert len(texts) <= 2, "a layout may round otherwise"
