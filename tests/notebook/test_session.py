"""The session of a kernel: one router, whichever thread needs it first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from sollol_nb.chat.completion import Completion
from sollol_nb.layers.plan import THIS_MACHINE
from sollol_nb.layers.planner import plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.notebook import session as session_module
from sollol_nb.notebook.session import Session
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.layer_plans import model

GIB = 2**30


def test_threads_that_need_the_router_at_the_same_time_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[HybridRouter] = []
    two_at_once = threading.Barrier(2)

    def create(**settings: Any) -> HybridRouter:
        with suppress(threading.BrokenBarrierError):
            two_at_once.wait(0.2)
        created.append(HybridRouter(auto_discover_rpc=False, **settings))
        return created[-1]

    monkeypatch.setattr(session_module, "_new_router", create)
    session = Session()
    with ThreadPoolExecutor(4) as threads:
        given = list(threads.map(lambda _: session.router(), range(4)))
    assert len(created) == 1
    assert given == created * 4
    created[0].close()


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_each_new_router_has_the_settings_of_the_kernel(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = session_module._new_router
    monkeypatch.setattr(
        session_module, "_new_router", lambda **settings: create(auto_discover_rpc=False, **settings)
    )
    session = Session()
    session.start(shell).strategy = "even"
    try:
        assert session.router().layer_strategy == "even"
        assert session.use_router(None).layer_strategy == "even"
        assert session.router(layer_strategy="memory_aware").layer_strategy == "memory_aware"
    finally:
        session.end(shell)


def test_the_previous_router_is_closed_also_if_the_next_one_cannot_take_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session()
    previous = session.use_router(HybridRouter(auto_discover_rpc=False))
    following = HybridRouter(auto_discover_rpc=False)

    def fails(_: HybridRouter, endpoints: object) -> None:
        raise OSError("the registry cannot be read")

    monkeypatch.setattr(HybridRouter, "take_workers", fails)
    monkeypatch.setattr(session_module, "_new_router", lambda **_: following)
    session._router_is_stale = True
    with pytest.raises(OSError, match="the registry cannot be read"):
        session.router()
    assert previous.state.is_closed
    assert session.router() is following
    following.close()


def test_without_the_extension_there_are_no_settings() -> None:
    with pytest.raises(RuntimeError, match="%load_ext sollol_nb"):
        Session().settings()


def answer_over(*endpoints: str, reason: str) -> Completion:
    devices = {endpoint: "CPU" if endpoint == THIS_MACHINE else "" for endpoint in endpoints}
    shards = [{"endpoint": endpoint, "device": device, "name": ""} for endpoint, device in devices.items()]
    plan = {"reasons": [reason], "shards": shards}
    return Completion({"_routing": {"plan": plan}})


def test_the_first_answer_over_unmeasured_machines_hints_at_the_calibration_once() -> None:
    plan = plan_layers(model([GIB] * 4, GIB), [WorkerCapacity("10.0.0.1:1", 9 * GIB, 9 * GIB)], strategy="auto")
    (reason,) = plan.reasons
    own = Session()
    assert own.hint(answer_over("10.0.0.1:1", "10.0.0.2:1", reason="26 ms per token")) == ""
    assert own.hint(answer_over("127.0.0.1:1", "127.0.0.1:2", reason=reason)) == "", "one machine"
    assert own.hint(answer_over("10.0.0.1:1", reason=reason)) == "", "one worker"
    assert own.hint(answer_over(THIS_MACHINE, "127.0.0.1:1", reason=reason)) == "", "one machine"
    assert own.hint(Completion({})) == ""
    assert "`%sollol_cluster calibrate`" in own.hint(answer_over("10.0.0.1:1", "10.0.0.2:1", reason=reason))
    assert own.hint(answer_over("10.0.0.1:1", "10.0.0.2:1", reason=reason)) == ""
