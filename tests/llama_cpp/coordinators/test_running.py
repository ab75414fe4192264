"""Coordinators of other kernels in a router: shown without using them, ended where their kernel has ended."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.coordinators.running import RunningCoordinators, key_of
from sollol_nb.llama_cpp.coordinators.settings import file_identity
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.models.profiles import profile_of
from sollol_nb.models.routing import DISTRIBUTED, Route
from sollol_nb.runtime.events import EventBus
from sollol_nb.settings import config
from tests.support.engines import run

LEFT = {
    "model": "left",
    "model_file": file_identity(DEMO_MODEL_PATH),
    "plan": None,
    "context_tokens": 512,
    "slots": 1,
    "port": 1,
    "workers": ["127.0.0.1:50052"],
}


async def start_left(**about: object) -> EngineProcess:
    """A process that is registered as a coordinator, but is not one."""
    return await EngineProcess.start(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        kind="coordinator",
        about={**LEFT, **about},
        keep_alive_s=60,
        log_path=config.log_dir() / "coordinator.log",
    )


def test_a_snapshot_of_a_coordinator_does_not_prolong_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))

    async def inspect() -> None:
        process = await start_left()
        before = await process.status()
        began = time.monotonic()
        seen = await Coordinator.snapshot(process.entry)
        assert seen is not None
        assert seen.model == "left"
        asked_at = time.monotonic()
        assert (await process.status())["idle_s"] >= before["idle_s"] + asked_at - began
        await process.stop()

    run(inspect())


@pytest.mark.parametrize("load_ms", [None, 100.0], ids=["loading", "ready"])
def test_only_a_coordinator_that_is_ready_and_left_by_its_kernel_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_ms: float | None
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    run(start_left(load_ms=load_ms)).detach()  # as if its kernel had gone, or not come yet
    events = EventBus()
    coordinators = RunningCoordinators(Workers([], events), events, TokenMeasurements(events))
    assert run(coordinators.end_left("wanted")) == (load_ms is not None)
    assert len(registry.entries()) == (load_ms is None)
    run(stop_engines(also_used=True))


def test_a_left_coordinator_whose_model_file_is_gone_makes_room(alone: None, tmp_path: Path) -> None:
    gone = {"path": str(tmp_path / "removed.gguf"), "size": 1, "mtime_ns": 1}
    run(start_left(load_ms=100.0, model_file=gone)).detach()
    events = EventBus()
    coordinators = RunningCoordinators(Workers([], events), events, TokenMeasurements(events))
    assert run(coordinators.end_left("wanted"))
    assert registry.entries() == []
    (event,) = events.recent()
    assert event.message == "stopped left, which an ended kernel left, to make room for wanted"


class UsedCoordinator:
    """A coordinator that another process uses, as its supervisor says after a while."""

    def __init__(self) -> None:
        self.is_asked, self.is_answered = asyncio.Event(), asyncio.Event()

    async def save_contexts(self) -> int:
        return 0

    async def stop_unless_used(self) -> list[str]:
        self.is_asked.set()
        await self.is_answered.wait()
        return ["another notebook"]


def test_one_that_others_use_is_known_again_also_where_the_start_that_needed_its_workers_was_cancelled() -> None:
    async def check() -> None:
        events = EventBus()
        coordinators = RunningCoordinators(Workers([], events), events, TokenMeasurements(events))
        used: Any = UsedCoordinator()
        route = Route(
            model="m", backend=DISTRIBUTED, reason="", profile=profile_of("m"), model_path=DEMO_MODEL_PATH
        )
        coordinators._table[key_of(route)] = (route, used)
        ending = asyncio.create_task(coordinators.end_unless_used(used))
        await used.is_asked.wait()
        ending.cancel()
        with suppress(asyncio.CancelledError):
            await ending
        used.is_answered.set()
        await coordinators.until_ended()
        assert coordinators.known == [used]

    run(check())
