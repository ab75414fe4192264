"""The I/O loop: async work reachable from any loop and thread, cancelled and never abandoned."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sollol_nb.errors import RequestCancelledError, RequestTimeoutError
from sollol_nb.runtime import io_loop as io_loop_module
from sollol_nb.runtime.io_loop import (
    blocking,
    blocking_stream,
    delegate,
    io_bound,
    io_bound_stream,
    io_loop,
    iterate_blocking,
    on_io_loop,
    run_blocking,
)
from tests.support.engines import HANG_GUARD_S, posix_only


async def for_ever() -> None:
    await asyncio.Event().wait()


async def interrupt_main_thread(*, wake: bool = True) -> None:
    """Ctrl-C, once the main thread waits in a blocking call.

    Without `wake` it reacts when that call returns, as when the signal comes just before the thread falls asleep.
    """
    main = threading.main_thread().ident
    assert main is not None
    waiting_in = (threading.__file__, io_loop_module.__file__)
    while sys._current_frames()[main].f_code.co_filename not in waiting_in:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    signal.pthread_kill(main if wake else threading.get_ident(), signal.SIGINT)


def interrupt_while_starting(monkeypatch: pytest.MonkeyPatch, *, scheduled: bool) -> None:
    """Ctrl-C, once, just before or just after the next piece of work is scheduled on the I/O loop."""
    loop = io_loop()
    schedule = loop.call_soon_threadsafe

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.undo()
        if scheduled:
            schedule(*arguments, **settings)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)


class Numbers:
    """A stream that notes how it ended."""

    def __init__(self, *, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.stop_at = stop_at
        self.error = error
        self.cleaned_up = threading.Event()
        self.loops: list[asyncio.AbstractEventLoop] = []

    async def count(self) -> AsyncGenerator[int, None]:
        self.loops.append(asyncio.get_running_loop())
        try:
            number = 0
            while self.stop_at is None or number < self.stop_at:
                yield number
                number += 1
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            if self.stop_at is None:
                await for_ever()
        finally:
            self.cleaned_up.set()

    async def then_silence(self) -> AsyncGenerator[int, None]:
        try:
            yield 0
            await for_ever()
        finally:
            self.cleaned_up.set()


# --- one call ---------------------------------------------------------------------------------


def test_blocking_call_gives_the_result_and_runs_on_the_io_loop() -> None:
    async def work() -> tuple[asyncio.AbstractEventLoop, bool]:
        return asyncio.get_running_loop(), on_io_loop()

    assert run_blocking(work()) == (io_loop(), True)
    assert not on_io_loop()


@pytest.mark.parametrize(
    "error", [ValueError("bad"), TimeoutError("late"), RequestTimeoutError("late"), StopAsyncIteration()]
)
def test_blocking_call_raises_what_the_coroutine_raises(error: Exception) -> None:
    async def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_blocking(work())
    assert caught.value.args == error.args


def test_blocking_call_that_is_cancelled_from_inside_says_so() -> None:
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await for_ever()

    with pytest.raises(RequestCancelledError, match="was cancelled"):
        run_blocking(work())


@posix_only
@pytest.mark.parametrize("wake", [True, False])
def test_interrupt_cancels_the_work_and_waits_for_its_clean_up(wake: bool) -> None:
    cleaned_up = []

    async def work() -> None:
        try:
            await interrupt_main_thread(wake=wake)
            await for_ever()
        finally:
            await asyncio.sleep(0)
            cleaned_up.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_blocking(work())
    assert cleaned_up


@pytest.mark.parametrize("scheduled", [False, True])
def test_interrupt_while_the_work_is_started_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, scheduled: bool
) -> None:
    work = for_ever()
    interrupt_while_starting(monkeypatch, scheduled=scheduled)
    with pytest.raises(KeyboardInterrupt):
        run_blocking(work)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_blocking_call_on_the_io_loop_is_refused_and_never_hangs() -> None:
    async def work() -> None:
        with pytest.raises(RuntimeError, match="await the async API"):
            run_blocking(for_ever())
        with pytest.raises(RuntimeError, match="await the async API"):
            next(iterate_blocking(Numbers().count()))

    run_blocking(work())


def test_many_threads_may_call_and_read_at_once() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    def work(number: int) -> tuple[int, list[int]]:
        return run_blocking(double(number)), list(iterate_blocking(Numbers(stop_at=20).count()))

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(100)))

    assert results == [(number * 2, list(range(20))) for number in range(100)]


# --- from other loops -------------------------------------------------------------------------


def test_async_method_can_be_awaited_from_several_loops_in_turn_and_runs_on_one() -> None:
    @io_bound
    async def where() -> asyncio.AbstractEventLoop:
        """Tell the loop."""
        return asyncio.get_running_loop()

    async def twice() -> set[asyncio.AbstractEventLoop]:
        return {await where(), await where()}

    assert asyncio.run(twice()) | asyncio.run(twice()) | run_blocking(twice()) == {io_loop()}
    assert where.__doc__ == "Tell the loop."


def test_cancelled_waiting_in_another_loop_cancels_the_work() -> None:
    started, cancelled = threading.Event(), threading.Event()

    @io_bound
    async def work() -> None:
        started.set()
        try:
            await for_ever()
        finally:
            cancelled.set()

    async def impatient() -> None:
        task = asyncio.create_task(work())
        assert await asyncio.to_thread(started.wait, HANG_GUARD_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(impatient())
    assert cancelled.wait(HANG_GUARD_S)


def collect(stream: Callable[[], AsyncGenerator[int, None]], limit: int | None = None) -> list[int]:
    """Items of a stream read in a separate loop, at most `limit`."""

    async def read() -> list[int]:
        items: list[int] = []
        reading = stream()
        async for item in reading:
            items.append(item)
            if len(items) == limit:
                break
        await reading.aclose()
        return items

    return asyncio.run(read())


def test_stream_read_from_another_loop_keeps_its_order_and_runs_on_the_io_loop() -> None:
    numbers = Numbers(stop_at=500)

    assert collect(io_bound_stream(numbers.count)) == list(range(500))
    assert numbers.loops == [io_loop()]


def test_stream_read_on_the_io_loop_itself_is_the_stream() -> None:
    stream = io_bound_stream(Numbers(stop_at=5).count)

    async def read() -> list[int]:
        return [item async for item in stream()]

    assert run_blocking(read()) == list(range(5))


def test_stream_made_on_another_thread_is_read_on_the_io_loop_in_the_readers_task() -> None:
    tasks: list[asyncio.Task[object] | None] = []

    @io_bound_stream
    async def numbers() -> AsyncGenerator[int, None]:
        tasks.append(asyncio.current_task())
        yield 1

    stream = numbers()

    async def read() -> list[int]:
        tasks.append(asyncio.current_task())
        return [item async for item in stream]

    assert run_blocking(read()) == [1]
    assert tasks[0] is tasks[1] is not None


def test_stream_that_is_closed_unread_never_begins() -> None:
    numbers = Numbers()
    stream = io_bound_stream(numbers.count)()

    asyncio.run(stream.aclose())

    with pytest.raises(StopAsyncIteration):
        asyncio.run(anext(stream))
    assert numbers.loops == []


def test_function_that_returns_a_stream_is_called_at_the_first_item() -> None:
    calls: list[int] = []

    @io_bound_stream
    def numbers(stop_at: int) -> AsyncGenerator[int, None]:
        calls.append(stop_at)
        return Numbers(stop_at=stop_at).count()

    stream = numbers(2)
    assert calls == []
    assert inspect.isasyncgen(stream)
    assert inspect.isasyncgenfunction(numbers)

    async def read() -> list[int]:
        return [item async for item in stream]

    assert asyncio.run(read()) == [0, 1]
    assert calls == [2]


def test_stream_closed_early_has_cleaned_up_when_close_returns() -> None:
    numbers = Numbers()

    assert collect(io_bound_stream(numbers.count), limit=3) == [0, 1, 2]
    assert numbers.cleaned_up.is_set()


def test_error_in_a_stream_comes_after_the_items_before_it() -> None:
    stream = io_bound_stream(Numbers(stop_at=3, error=ValueError("broke")).count)
    items: list[int] = []

    async def read() -> None:
        async for item in stream():
            items.append(item)

    with pytest.raises(ValueError, match="broke"):
        asyncio.run(read())
    assert items == [0, 1, 2]


def test_cancelled_reader_of_a_silent_stream_cancels_the_work() -> None:
    numbers = Numbers()
    stream = io_bound_stream(numbers.then_silence)

    async def read() -> None:
        got_one = asyncio.Event()

        async def reader() -> None:
            async for _ in stream():
                got_one.set()

        task = asyncio.create_task(reader())
        await asyncio.wait_for(got_one.wait(), HANG_GUARD_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())
    assert numbers.cleaned_up.is_set()


def test_reader_cancelled_before_the_work_could_begin_is_cancelled_at_once() -> None:
    numbers = Numbers()
    stream = io_bound_stream(numbers.count)
    may_go_on = threading.Event()

    async def read() -> None:
        io_loop().call_soon_threadsafe(may_go_on.wait, HANG_GUARD_S)  # the I/O loop is occupied
        task = asyncio.create_task(anext(stream()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())
    assert numbers.loops == []


def test_work_cancelled_from_inside_is_told_as_cancelled() -> None:
    stream = Numbers(stop_at=1, error=asyncio.CancelledError()).count

    with pytest.raises(RequestCancelledError):
        collect(io_bound_stream(stream))
    with pytest.raises(RequestCancelledError):
        list(iterate_blocking(stream()))


# --- streams read by a thread -----------------------------------------------------------------


def test_blocking_iteration_gives_all_items_in_order() -> None:
    assert list(iterate_blocking(Numbers(stop_at=500).count())) == list(range(500))


def test_blocking_iteration_left_early_has_cleaned_up() -> None:
    numbers = Numbers()
    reading = iterate_blocking(numbers.count())

    assert [next(reading), next(reading)] == [0, 1]
    reading.close()
    assert numbers.cleaned_up.is_set()


def test_blocking_iteration_raises_what_the_stream_raises() -> None:
    reading = iterate_blocking(Numbers(stop_at=2, error=OSError("gone")).count())

    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(reading)


def test_ticks_are_given_while_a_stream_is_silent() -> None:
    numbers = Numbers()
    reading = iterate_blocking(numbers.then_silence(), tick_s=0.02)

    assert next(item for item in reading if item is not None) == 0
    assert [next(reading) for _ in range(5)] == [None] * 5
    reading.close()
    assert numbers.cleaned_up.is_set()


@posix_only
@pytest.mark.parametrize("tick_s", [None, 0.2])
@pytest.mark.parametrize("wake", [True, False])
def test_interrupt_of_a_blocking_iteration_cancels_the_work(wake: bool, tick_s: float | None) -> None:
    cleaned_up = threading.Event()

    async def interrupts() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await interrupt_main_thread(wake=wake)
            await for_ever()
        finally:
            cleaned_up.set()

    with pytest.raises(KeyboardInterrupt):
        list(iterate_blocking(interrupts(), tick_s=tick_s))
    assert cleaned_up.is_set()


@pytest.mark.parametrize("scheduled", [False, True])
def test_interrupt_while_a_blocking_iteration_starts_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, scheduled: bool
) -> None:
    begun, cleaned_up = threading.Event(), threading.Event()

    async def stream() -> AsyncGenerator[int, None]:
        begun.set()
        try:
            await for_ever()
            yield 0
        finally:
            cleaned_up.set()

    interrupt_while_starting(monkeypatch, scheduled=scheduled)
    with pytest.raises(KeyboardInterrupt):
        next(iterate_blocking(stream()))
    run_blocking(asyncio.sleep(0))  # after what was scheduled before
    assert begun.is_set() == cleaned_up.is_set()


def test_abandoned_iteration_is_cancelled_by_the_garbage_collector() -> None:
    numbers = Numbers()
    reading = iterate_blocking(numbers.then_silence())
    assert next(reading) == 0

    del reading

    assert numbers.cleaned_up.wait(HANG_GUARD_S)


# --- twins ------------------------------------------------------------------------------------


class Async:
    """An async object with one method of each kind."""

    async def add(self, left: int, *, right: int = 1) -> int:
        """Add."""
        return left + right

    async def numbers(self, stop: int) -> AsyncGenerator[int, None]:
        for number in range(stop):
            yield number

    def name(self) -> str:
        return "async"


class Blocking:
    """Its blocking twin."""

    def __init__(self) -> None:
        self._async = Async()

    add = blocking(Async.add)
    numbers = blocking_stream(Async.numbers)
    name = delegate(Async.name)


def test_blocking_twin_has_the_same_methods_and_docstrings() -> None:
    twin = Blocking()

    assert twin.add(1, right=4) == 5
    assert list(twin.numbers(3)) == [0, 1, 2]
    assert twin.name() == "async"
    assert Blocking.add.__doc__ == "Add."
    assert Blocking.add.__name__ == "add"


# --- fork -------------------------------------------------------------------------------------

FORKS = """
import asyncio, os, sys
from sollol_nb.runtime.io_loop import io_loop, run_blocking

async def one():
    return 1

assert run_blocking(one()) == 1
before = io_loop()
child = os.fork()
if child == 0:
    os._exit(0 if run_blocking(one()) == 1 and io_loop() is not before else 1)
assert run_blocking(one()) == 1 and io_loop() is before
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@posix_only
def test_forked_child_gets_an_io_loop_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=True, timeout=HANG_GUARD_S)


FORKS_WITH_ROUTER = """
import os, sys
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.io_loop import iterate_blocking
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool

async def numbers():
    for number in range(3):
        yield number

def refused(use):
    try:
        use()
    except ConfigError as error:
        return "create new ones after the fork" in str(error)

stream, pool = iterate_blocking(numbers()), OllamaPool(["http://127.0.0.1:9"])
assert next(stream) == 0
pool.refresh()
with HybridRouter() as router:
    router.route("demo")
    child = os.fork()
    if child == 0:
        assert refused(lambda: router.route("demo"))
        assert refused(lambda: router.route_request("demo", "Hi"))
        assert refused(lambda: next(router.stream("demo", "Hi")))
        assert refused(pool.refresh)
        router.close()
        pool.close()
        with HybridRouter() as own:
            assert own.route("demo").backend == "llama.cpp-local"
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(stream) == [1, 2]
    assert router.route("demo").backend == "llama.cpp-local"
"""


@posix_only
def test_forked_child_is_told_that_the_routers_and_streams_of_its_parent_do_not_work_there() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS_WITH_ROUTER], check=True, timeout=HANG_GUARD_S)


@posix_only
def test_forked_child_does_not_wait_for_a_stream_of_its_parent() -> None:
    code = """
import asyncio, os
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.io_loop import iterate_blocking

async def silent():
    yield 1
    await asyncio.sleep(3600)

stream = iterate_blocking(silent(), cancel_grace_s=3600)
assert next(stream) == 1
child = os.fork()
if child == 0:
    try:
        next(stream)
    except ConfigError:
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stream.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=HANG_GUARD_S)


def test_a_script_that_leaves_a_stream_unfinished_ends() -> None:
    code = """
import asyncio
from sollol_nb.runtime.io_loop import iterate_blocking

async def endless():
    while True:
        yield 1
        await asyncio.sleep(0.01)

stream = iterate_blocking(endless(), cancel_grace_s=3600)
next(stream)
print("last line")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=HANG_GUARD_S, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("last line\n", "")


def test_a_script_ends_without_complaints_about_what_still_runs_on_the_loop() -> None:
    """Its end closes the thread pools under the tasks; the state of a cluster that is watched is one of them."""
    code = """
import asyncio, atexit, gc, time
from sollol_nb.cluster import state
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter

async def busy():
    while True:
        await asyncio.to_thread(int)

async def start():
    await watched.watch(lambda patch: None)
    _, poll = watched._tasks
    tasks.extend([asyncio.create_task(busy()), poll])

@atexit.register  # it runs after the thread pools have ended
def collect():
    deadline = time.monotonic() + 10
    while not all(task.done() for task in tasks) and time.monotonic() < deadline:
        time.sleep(0.01)
    tasks.clear()  # only a task that is collected reports its error
    gc.collect()

tasks = []
state.PROBES_PER_S, state.OTHERS_EVERY_S = 1000, 0
router = HybridRouter(rpc_backends=["127.0.0.1:1"])
watched = router._async.state
run_blocking(start())
print("last line")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=HANG_GUARD_S, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("last line\n", "")


def test_the_loop_ends_when_nothing_uses_it_and_begins_anew_when_asked() -> None:
    """In a separate process: the suite's loop has users."""
    code = """
import asyncio, threading
from sollol_nb.runtime import io_loop

class User:
    pass

user = User()
first = io_loop.io_loop()
io_loop.hold_io_loop(user)
assert io_loop.stop_if_unused() is False
io_loop.release_io_loop(user)

release = threading.Event()
work = io_loop.submit(asyncio.to_thread(release.wait, 60))
assert io_loop.run_blocking(asyncio.sleep(0, True))
assert io_loop.stop_if_unused() is False, "something runs there"
release.set()
assert work.result(60)
while not io_loop.stop_if_unused():
    pass
assert first.is_closed()
assert not any(thread.name == "sollol_nb I/O" for thread in threading.enumerate())
assert io_loop.run_blocking(asyncio.sleep(0, "again")) == "again"
assert io_loop.io_loop() is not first
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_GUARD_S)
