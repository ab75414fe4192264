"""What is known of a coordinator as soon as it is ready, and of one that has just ended."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sollol_nb.errors import TransportTimeoutError
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.readiness import MIN_CALIBRATION_LIMIT_S, StartingCoordinator
from tests.support.engines import eventually, posix_only, run


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_time_of_a_token_is_published_only_where_it_was_measured(is_busy: bool) -> None:
    published: dict[str, Any] = {}

    async def post(path: str, body: object, *, timeout_s: float) -> dict[str, Any]:
        if is_busy:  # with requests of the process that has started it
            raise TransportTimeoutError(path)
        return {"timings": {"predicted_per_token_ms": 20.0}}

    async def update_about(**about: Any) -> None:
        published.update(about)

    async def ended_within(_: float) -> None:
        return None

    client: Any = SimpleNamespace(post=post)
    process: Any = SimpleNamespace(update_about=update_about, ended_within=ended_within)
    nothing: Any = None
    starting = StartingCoordinator(nothing, process, client, nothing, is_adopted=True)
    seconds, is_measured = run(starting._seconds_per_token(0.1))
    assert is_measured is not is_busy
    if is_busy:
        assert seconds >= MIN_CALIBRATION_LIMIT_S / 10, "silence of a busy engine is not taken for a loss"
        assert published == {}
    else:
        assert (seconds, published) == (0.02, {"seconds_per_token": 0.02})


@posix_only
def test_one_that_has_ended_is_not_said_to_have_lost_its_workers() -> None:
    """Its supervisor says a little later why it has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = psutil.Process(process.pid)
        eventually(lambda: ended.status() == psutil.STATUS_ZOMBIE, "it is a zombie, and no router has noticed")
        coordinator: Any = SimpleNamespace(pid=process.pid, rpc_backends=["127.0.0.1:50052"])
        assert Coordinator.broken_links(coordinator) == []
