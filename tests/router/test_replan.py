"""A worker that becomes slow is named, a better layout said, and with replan="auto" the model moves there."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.layers import replan
from sollol_nb.llama_cpp.coordinators import measurements, pool, replanning
from sollol_nb.llama_cpp.coordinators.waits import WaitWatch
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers import calibrations, workers
from sollol_nb.llama_cpp.workers.calibrations import Calibration, Calibrations, identity_of
from sollol_nb.llama_cpp.workers.local import LocalOptions, start_workers
from sollol_nb.llama_cpp.workers.own_devices import OwnDevices
from sollol_nb.llama_cpp.workers.probe import Probe, probe_all
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.notebook.magics.cluster_actions import ACTIONS
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import (
    QUESTION,
    engine_on,
    eventually,
    linux_only,
    repeatedly,
    run,
    says,
    script,
    unused_ports,
)

pytestmark = pytest.mark.engine

TOKENS = 16
MOST_ANSWERS = 60
LONGEST_STOP_S = 0.9  # no silence of an engine is doubtful before 1 s
ROUND_TRIP_MS = 0.05
SETTINGS: dict[str, Any] = {"distributed_threshold_params": 1e-6, "context_tokens": 1024, "slots": 3}
OTHER_USER = """
import sys
from sollol_nb.sync_wrapper import HybridRouter
model, endpoint = sys.argv[1:]
settings = {"distributed_threshold_params": 1e-6, "context_tokens": 1024, "slots": 3}
with HybridRouter(rpc_backends=[endpoint], auto_discover_rpc=False, speculation="off", **settings) as router:
    router.preload(model)
    print("uses", router.coordinator.base_url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def throttled(process: psutil.Process) -> Iterator[None]:
    """The process runs for a tenth of the time meanwhile, also where each stop comes late."""
    ran_s = 0.005

    def stop_and_continue() -> None:
        nonlocal ran_s
        process.send_signal(signal.SIGSTOP)
        time.sleep(min(9 * ran_s, LONGEST_STOP_S))
        process.send_signal(signal.SIGCONT)
        continued_at = time.monotonic()
        time.sleep(0.005)
        ran_s = time.monotonic() - continued_at

    with repeatedly(stop_and_continue):
        yield


def units(router: HybridRouter) -> dict[str, int]:
    coordinator = router.coordinator
    assert coordinator is not None
    assert coordinator.plan is not None
    return {shard.endpoint: shard.unit_count for shard in coordinator.plan.shards}


@linux_only
@pytest.mark.timeout(900)
def test_the_model_leaves_a_worker_that_is_throttled_in_mid_session(
    engine: Engine, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replan, "CONFIRMATIONS", 2)
    # As if each worker were another machine, and this one had nothing to offer.
    monkeypatch.setattr(WorkerStatus, "_is_here", property(lambda _: False))
    monkeypatch.setattr(OwnDevices, "capacities", lambda _: [])
    # On one machine, one worker is quicker than three by up to a fifth: neither a move nor a replan goes by that.
    monkeypatch.setattr(replan, "MIN_GAIN", 0.5)
    monkeypatch.setattr(replanning, "MIN_GAIN", 0.5)
    monkeypatch.setattr(pool, "LEAST_GAIN", 0.5)
    # On a busy machine the time of a token varies by more than 15 %; measured waits for workers must still count.
    monkeypatch.setattr(measurements, "SAME_TIME", 0.5)
    model = str(smollm2)
    settings = {**SETTINGS, "speculation": "off"}  # drafts would copy the repeated answer, which measures no token
    with HybridRouter(auto_discover_rpc=False, replan="auto", **settings) as router, ExitStack() as stack:
        slow = router.start_workers(3)[1]

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


# --- workers that become free or quicker ------------------------------------------------------


@pytest.fixture
def two_workers(engine: Engine, alone: None) -> Iterator[tuple[str, str]]:
    """Workers that routers know only by their endpoints."""
    started = run(start_workers(engine, unused_ports(2), LocalOptions(2, threads=1, keep_alive_s=60.0), set()))
    first, second = started
    yield first, second
    for process in started.values():
        run(process.stop())


def know(engine: Engine, endpoint: str, ms_per_byte: float) -> None:
    """Keep a calibration of a worker, made now."""
    calibration = Calibration(
        identity=identity_of(endpoint),
        engine=engine.version,
        endpoint=endpoint,
        name=endpoint,
        measured_at=time.time(),
        round_trip_ms=ROUND_TRIP_MS,
        bytes_per_s=None,
        hop_ms=0.1,
        block_ms=0.0,
        ms_per_byte=ms_per_byte,
        prompt_ms_per_byte=ms_per_byte / 10,
    )
    run(Calibrations().keep([calibration]))


def only_calibrations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers differ only in the calibrations that a test writes: their measured round trips are replaced by
    equal ones."""

    async def steady(endpoints: Iterable[str], **settings: Any) -> list[Probe]:
        found = await probe_all(endpoints, **settings)
        return [
            probe if probe.round_trip_ms is None else replace(probe, round_trip_ms=ROUND_TRIP_MS)
            for probe in found
        ]

    monkeypatch.setattr(workers, "probe_all", steady)
    monkeypatch.setattr(calibrations, "CHECK_EVERY_S", 0.0)
    monkeypatch.setattr(pool, "ANSWERS_PER_CORRECTION", 10**6)
    monkeypatch.setattr(WaitWatch, "watch", lambda *_: None)
    monkeypatch.setattr(WorkerStatus, "_is_here", property(lambda _: False))
    monkeypatch.setattr(OwnDevices, "capacities", lambda _: [])


def test_a_better_worker_that_is_added_is_moved_to_once_nobody_else_uses_the_model(
    engine: Engine,
    endless: str,
    two_workers: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replan, "CONFIRMATIONS", 1)
    monkeypatch.setattr(measurements, "MEANINGFUL_ANSWERS", 1)
    only_calibrations_count(monkeypatch)
    slow, quick = two_workers
    know(engine, slow, 1e-4)
    with HybridRouter(
        rpc_backends=[slow], auto_discover_rpc=False, replan="auto", speculation="off", **SETTINGS
    ) as router:
        texts: set[str] = set()

        def ask() -> tuple[str, str]:
            """Which coordinator and worker have answered: while the model moves, there is none."""
            answer = router.route_request(endless, QUESTION, temperature=0, max_tokens=TOKENS)
            texts.add(answer.text)
            (shard,) = answer.routing["plan"]["shards"]
            return answer.routing["coordinator_url"], shard["endpoint"]

        def advice() -> list[Event]:
            return [event for event in router.events.recent() if event.kind == EventKind.COORDINATOR_ADVICE]

        url, worker = ask()
        assert worker == slow
        with script(OTHER_USER, endless, slow) as other:
            assert says(other, "uses ") == url
            know(engine, quick, 1e-6)
            router.add_worker(quick)
            said = eventually(advice, "the better worker is named")[0]
            assert f"over {quick} would take " in said.message
            for _ in range(4):
                assert ask() == (url, slow), "another process uses it"
        eventually(lambda: ask()[1] == quick, "it has moved")
        assert len(texts) == 1


def test_a_model_is_planned_again_when_its_user_says_so(
    endless: str,
    two_workers: tuple[str, str],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only_calibrations_count(monkeypatch)
    slow, quick = two_workers
    know(engine, slow, 1e-2)
    know(engine, quick, 1e-3)
    with HybridRouter(
        rpc_backends=[slow, quick], auto_discover_rpc=False, replan="off", speculation="off", **SETTINGS
    ) as router:

        def worker() -> str:
            """Which one has answered."""
            answer = router.route_request(endless, QUESTION, temperature=0, max_tokens=TOKENS)
            (shard,) = answer.routing["plan"]["shards"]
            return shard["endpoint"]

        assert worker() == quick
        know(engine, slow, 1e-4)
        (line,) = router.replan()
        assert line.startswith("new layout for endless: 5 over 1 worker, ")
        assert worker() == slow
        know(engine, quick, 1e-5)
        ACTIONS["replan"](router, argparse.Namespace(what=["endless"]))
        assert capsys.readouterr().out.startswith("new layout for endless: 5 over 1 worker, ")
        assert worker() == quick
