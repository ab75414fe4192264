"""Requests that are cancelled at their start leave no busy slot, lease or connection.

If the coordinator ends at that moment, another one answers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.streams import AnswerStreams
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.process import Lease
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import HANG_GUARD_S, busy_slots, run

pytestmark = pytest.mark.engine

QUESTION = "What is model sharding?"
STEPS, STEP_S = 60, 0.0003
_numbers = itertools.count()


@pytest.fixture(scope="module")
def coordinator(router: HybridRouter, endless: str) -> Coordinator:
    """That of a model that never stops, after two requests: the prompts of the next ones are foreseen."""
    for _ in range(2):
        router.route_request(endless, question(), max_tokens=1)
    (found,) = [known for known in router.coordinators if str(known.settings.model_path) == endless]
    assert isinstance(found, Coordinator)
    return found


def question() -> str:
    return f"Go on, {next(_numbers)}"


async def nothing_is_left(coordinator: Coordinator) -> None:
    assert (await coordinator._process.status())["leases"] == 0
    assert coordinator.is_idle
    deadline = time.monotonic() + HANG_GUARD_S
    while await busy_slots(coordinator) or open_connections(coordinator) > kept_connections(coordinator):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def open_connections(coordinator: Coordinator) -> int:
    own = psutil.Process().net_connections("tcp")
    return sum(
        1 for link in own if link.raddr and link.raddr.port == coordinator.port and link.status == "ESTABLISHED"
    )


def kept_connections(coordinator: Coordinator) -> int:
    """Those that render prompts, and that of the general client."""
    return len(coordinator._streams._renderers) + 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(Coordinator, "keep_alive", id="setting its keep_alive"),
        pytest.param(Exchange, "connect", id="connecting"),
        pytest.param(Lease, "is_granted", id="waiting for its lease"),
        pytest.param(Exchange, "_send", id="sending"),
        pytest.param(AnswerStreams, "_render", id="rendering a foreseen prompt"),
        pytest.param(Exchange, "post", id="rendering"),
        pytest.param(Exchange, "_check", id="waiting for the answer"),
        pytest.param(Exchange, "_event", id="reading the answer"),
    ],
)
def test_nothing_is_left_of_a_request_that_is_cancelled_while(
    router: HybridRouter,
    coordinator: Coordinator,
    endless: str,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
) -> None:
    if name == "post":
        coordinator._streams._prompts._frames.clear()  # so that no prompt is foreseen

    async def ask() -> None:
        asking = asyncio.create_task(router._async.route_request(endless, question(), keep_alive="60s"))
        original = getattr(owner, name)

        async def cancels(*arguments: Any) -> Any:
            asking.cancel()
            return await original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, cancels)
            with pytest.raises(asyncio.CancelledError):
                await asking
        await nothing_is_left(coordinator)

    run(ask())
    assert router.route_request(endless, question(), max_tokens=2)["eval_count"] == 2


def test_nothing_is_left_of_a_request_that_is_cancelled_at_any_moment(
    router: HybridRouter, coordinator: Coordinator, endless: str
) -> None:
    async def ask() -> None:
        for step in range(STEPS):
            asking = asyncio.create_task(router._async.route_request(endless, question()))
            await asyncio.sleep(step * STEP_S)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert (await coordinator._process.status())["leases"] == 0
        await nothing_is_left(coordinator)

    run(ask())
    assert router.route_request(endless, question(), max_tokens=2)["eval_count"] == 2


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    """A router whose coordinators use no workers and nobody else uses."""
    with HybridRouter(auto_discover_rpc=False, context_tokens=1664) as own:
        yield own


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(Exchange, "connect", id="before the connection"),
        pytest.param(Lease, "is_granted", id="before the request"),
        pytest.param(AnswerStreams, "_render", id="while it renders a foreseen prompt"),
        pytest.param(Exchange, "_check", id="before the answer"),
    ],
)
def test_a_coordinator_that_is_killed_at_the_start_of_a_request_is_replaced(
    local: HybridRouter, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    original, ended = getattr(owner, name), []

    async def ends_first(*arguments: Any) -> Any:
        if not ended:
            ended.extend(local.coordinators)
            psutil.Process(ended[0].pid).kill()
        return await original(*arguments)

    undisturbed = short_answer(local)
    monkeypatch.setattr(owner, name, ends_first)
    assert short_answer(local) == undisturbed
    assert ended
    assert local.coordinators != ended


def test_a_coordinator_that_is_stopped_just_before_a_lease_is_replaced(
    local: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_lease, ended = Coordinator.ask_lease, []

    def ends_first(coordinator: Coordinator) -> Lease:
        if not ended:
            ended.append(coordinator)
            coordinator._process._send("stop", why="stopped")
        return ask_lease(coordinator)

    undisturbed = short_answer(local)
    monkeypatch.setattr(Coordinator, "ask_lease", ends_first)
    assert short_answer(local) == undisturbed
    assert local.coordinators != ended


def short_answer(router: HybridRouter) -> str:
    """From the second one of a coordinator on, the prompt is foreseen."""
    return router.route_request(str(DEMO_MODEL_PATH), QUESTION, temperature=0, max_tokens=8).text
