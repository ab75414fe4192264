"""The blocking twins: complete, and usable in scripts, event loops and threads; Ctrl-C ends what they wait for."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb import hybrid_router, sync_wrapper
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.ollama import pool as ollama_pool
from sollol_nb.runtime.io_loop import submit
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import (
    HANG_GUARD_S,
    QUESTION,
    all_end,
    engine_on,
    engines_of,
    eventually,
    run,
    says,
    script,
    write_endless,
)

pytestmark = pytest.mark.engine

TWINS = [
    (hybrid_router.HybridRouter, sync_wrapper.HybridRouter),
    (ollama_pool.OllamaPool, sync_wrapper.OllamaPool),
]


def public(cls: type) -> dict[str, Any]:
    return {
        name: value
        for base in reversed(cls.__mro__[:-1])
        for name, value in vars(base).items()
        if not name.startswith("_")
    }


def is_async(method: Any) -> bool:
    inner = inspect.unwrap(method)
    is_stream = "AsyncGenerator" in str(getattr(inner, "__annotations__", {}).get("return"))
    return inspect.iscoroutinefunction(inner) or is_stream


# --- complete ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("original", "twin"), TWINS)
def test_every_public_method_has_a_twin_of_the_same_signature(original: type, twin: type) -> None:
    missing = public(original).keys() - public(twin).keys()
    assert missing == set()
    for name, method in public(original).items():
        ours = public(twin)[name]
        if isinstance(method, property | cached_property):
            assert isinstance(ours, property), name
        elif not isinstance(method, classmethod):
            assert inspect.signature(ours) == inspect.signature(method), name
            assert ours.__doc__ == method.__doc__, name
            assert is_async(public(original)[name]) or not hasattr(ours, "__await__"), name


@pytest.mark.parametrize(("original", "twin"), TWINS)
def test_twins_of_async_methods_do_not_return_coroutines(original: type, twin: type) -> None:
    async_names = {name for name, method in public(original).items() if is_async(method)}
    assert async_names >= {"close"}
    for name in async_names:
        code = public(twin)[name].__code__
        assert not code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR), name


def test_twins_have_the_attributes_of_the_async_router(router: HybridRouter) -> None:
    assert router.events is router._async.events
    assert router.latency is router._async.latency
    assert router.coordinators == router._async.coordinators
    assert repr(router) == repr(router._async)


# --- wherever they are called -----------------------------------------------------------------

PLAIN_SCRIPT = """
from sollol_nb.sync_wrapper import HybridRouter

router = HybridRouter(auto_discover_rpc=False)
answer = router.route_request("demo", "What is a worker?", temperature=0, max_tokens=30)
print("text", answer.text.encode().hex())
chunks = router.stream("demo", "What is a worker?", temperature=0, max_tokens=30)
print("streamed", "".join(chunk["message"]["content"] for chunk in chunks).encode().hex())
router.close()
print("closed", router.coordinators)
"""


def test_they_work_in_a_plain_script(router: HybridRouter) -> None:
    expected = router.route_request("demo", QUESTION, temperature=0, max_tokens=30).text
    with script(PLAIN_SCRIPT) as process:
        assert bytes.fromhex(says(process, "text")).decode() == expected
        assert bytes.fromhex(says(process, "streamed")).decode() == expected
        assert says(process, "closed") == "[]"
        assert process.wait(HANG_GUARD_S) == 0


def test_they_work_inside_a_running_event_loop(router: HybridRouter) -> None:
    async def main() -> list[str]:
        whole = router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=30).text
        chunks = router.stream("demo:sharded", QUESTION, temperature=0, max_tokens=30)
        return [whole, "".join(chunk["message"]["content"] for chunk in chunks)]

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_they_work_from_eight_threads_at_once(router: HybridRouter) -> None:
    together = threading.Barrier(8)

    def ask(number: int) -> tuple[int, bool]:
        together.wait()
        if number % 2:
            answer = router.route_request("demo:sharded", QUESTION, max_tokens=20)
            return answer["eval_count"], answer["done"]
        *_, last = router.stream("demo:sharded", QUESTION, max_tokens=20)
        return last["eval_count"], last["done"]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))

    assert all(done and 0 < count <= 20 for count, done in answers)


def test_on_the_io_loop_they_raise_instead_of_hanging(router: HybridRouter) -> None:
    async def inside() -> None:
        router.route_request("demo", QUESTION)

    with pytest.raises(RuntimeError, match="blocking calls cannot be made from the I/O loop"):
        run(inside())

    async def streaming_inside() -> None:
        next(router.stream("demo", QUESTION))

    with pytest.raises(RuntimeError, match="blocking calls cannot be made from the I/O loop"):
        submit(streaming_inside()).result(HANG_GUARD_S)


def test_a_router_takes_the_blocking_pool() -> None:
    pool = sync_wrapper.OllamaPool(["127.0.0.1:9"])
    assert [node.url for node in pool.nodes] == ["http://127.0.0.1:9"]
    assert HybridRouter(pool)._async._engines._ollama is pool._async


# --- Ctrl-C -----------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading, time
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import busy_slots

model, how = sys.argv[1:]

def busy(router):
    return sum(run_blocking(busy_slots(coordinator)) for coordinator in router.coordinators)

def until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited in vain")
        time.sleep(0.02)

def interrupt_when_busy(router):
    until(lambda: busy(router) == 1)
    os.kill(os.getpid(), signal.SIGINT)

with HybridRouter(auto_discover_rpc=False) as router:
    router.route_request(model, "Go on", max_tokens=1)
    threading.Thread(target=interrupt_when_busy, args=(router,)).start()
    try:
        if how == "whole":
            router.route_request(model, "Go on", temperature=0)
        else:
            for _ in router.stream(model, "Go on", temperature=0):
                pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.readline()
    until(lambda: busy(router) == 0)
    print("idle", router.latency.frame(model=model, last=1).status[0], flush=True)
    print("answers", router.route_request(model, "Go on", max_tokens=2)["eval_count"], flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
@pytest.mark.parametrize("how", ["whole", "stream"])
def test_keyboard_interrupt_cancels_the_generation_and_nothing_else(
    engine: Engine, tmp_path: Path, how: str
) -> None:
    with script(INTERRUPTED, str(write_endless(tmp_path)), how) as process:
        assert says(process, "interrupted") == ""
        engines = engines_of(psutil.Process(process.pid))
        assert process.stdin is not None
        process.stdin.write("\n")  # it ends, with its engines, only after they were looked at
        process.stdin.flush()
        assert says(process, "idle") == "cancelled"
        assert says(process, "answers") == "2", "the engine still serves"
        assert process.wait(HANG_GUARD_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert len(engines) == 1
    all_end(engines)


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_an_interrupt_before_the_coordinator_is_ready_stops_its_start(engine: Engine, alone: None) -> None:
    with HybridRouter(auto_discover_rpc=False) as mine:
        (endpoint,) = mine.start_workers(1)
        worker = engine_on(int(endpoint.rpartition(":")[2]))
        before = engines_of(psutil.Process())

        def hang_and_interrupt(event: Any) -> None:
            if event.kind == "coordinator.starting":
                worker.suspend()  # so that it never gets ready
                os.kill(os.getpid(), signal.SIGINT)

        forget = mine.events.subscribe(hang_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            mine.route_request("demo:sharded", QUESTION)
        forget()
        assert mine.coordinators == []
        all_end([engine for engine in engines_of(psutil.Process()) if engine not in before])
        worker.resume()
        eventually(lambda: mine.cluster().workers[0].state == "free", "the worker is free")
        assert mine.route_request("demo:sharded", QUESTION, max_tokens=1)["done"]


def test_a_router_shows_its_cluster(engine: Engine, alone: None) -> None:
    # Over workers that no other test uses: one that others have stopped twice would be avoided for a while.
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, context_tokens=1920, rpc_port=51152
    ) as mine:
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        shown = mine._repr_mimebundle_()
        title = repr(mine)

    assert shown["text/plain"].startswith(f"{title}\n")
    assert "\ndemo:sharded  ● ready\n" in shown["text/plain"]
    assert "  address: http://127.0.0.1:" in shown["text/plain"]
    assert shown["text/plain"].count("held by demo:sharded") == 3
    assert shown["text/html"].startswith("<p><code>&lt;HybridRouter: ")
    assert shown["text/html"].count("held by the coordinator of demo:sharded") == 3
