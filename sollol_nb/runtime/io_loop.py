"""The one daemon thread with one event loop that carries all I/O of the process.

Async code runs on that loop, whichever loop or thread calls it: `io_bound` lets a coroutine method be awaited
from any loop (a kernel's, that of `asyncio.run`, several in turn), and `blocking` makes its blocking twin. So
connections, locks and child processes stay on one loop for the life of the process, and a stop button or Ctrl-C
cancels the work instead of abandoning it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from sollol_nb.errors import ConfigError, RequestCancelledError
from sollol_nb.runtime.callers import Send, context_with_caller, stop_functions_loop

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_CANCEL_GRACE_S = 10.0  # how long the caller waits for a cancelled coroutine to clean up
_INTERRUPT_CHECK_S = 0.5

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_users: weakref.WeakSet[object] = weakref.WeakSet()
_used: weakref.WeakSet[object] = weakref.WeakSet()  # all whose I/O has run on the loop
_of_parent: weakref.WeakSet[object] = weakref.WeakSet()  # those of the process that forked this one


def io_loop() -> asyncio.AbstractEventLoop:
    """The process's I/O loop, started on first use."""
    global _loop, _thread
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_run, args=(_loop,), name="sollol_nb I/O", daemon=True)
            _thread.start()
        return _loop


def is_exiting() -> bool:
    """Whether the interpreter is ending: thread pools take no more work, so what still runs on the loop fails."""
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int)
    except RuntimeError:  # the main thread still counts as alive by then
        return True
    return False


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not is_exiting():
        loop.default_exception_handler(context)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.set_exception_handler(_report)
    loop.run_forever()  # until `stop_if_unused`
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def hold_io_loop(user: object) -> None:
    """Note an object whose connections live on the loop, so that the loop is not stopped while it is open."""
    _users.add(user)


def release_io_loop(user: object) -> None:
    """Note that an object has closed its connections."""
    _users.discard(user)


def stop_if_unused(*, wait_s: float = 0.0) -> bool:
    """End the loop and its thread if no object holds it and nothing runs on it. Returns whether it has ended.

    A later call of `io_loop` starts a new one.

    Args:
        wait_s: how long to wait for tasks that still run.
    """
    _refuse_on_io_loop()
    deadline = time.monotonic() + wait_s
    with _lock:
        loop, thread = _loop, _thread
        if loop is None or thread is None or loop.is_closed():
            return True
        while _users or asyncio.all_tasks(loop):
            if _users or time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        stop_functions_loop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CANCEL_GRACE_S)
        return not thread.is_alive()


def _forget_loop() -> None:
    # A forked child has the loop object but not its thread; it gets a new loop when it needs one. What has used
    # the old one has connections and locks there.
    global _loop, _lock, _users, _used, _of_parent
    _loop, _lock = None, threading.Lock()
    _of_parent = weakref.WeakSet([*_of_parent, *_used])
    _users, _used = weakref.WeakSet(), weakref.WeakSet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)


def is_of_parent(user: object) -> bool:
    """Whether the process that forked this one has used the object, so that it cannot be used here."""
    return user in _of_parent


def _note_use(arguments: tuple[Any, ...]) -> None:
    """Note that an object, the first argument of its method, uses the loop now.

    Raises:
        ConfigError: it belongs to the process that forked this one.
    """
    if not arguments:
        return
    with contextlib.suppress(TypeError):  # an argument of a function, not an object with connections
        if is_of_parent(arguments[0]):
            raise _other_process_error()
        _used.add(arguments[0])


def _other_process_error() -> ConfigError:
    return ConfigError(
        f"process {os.getpid()} was forked from process {os.getppid()}, whose routers, pools and streams do not "
        "work here; create new ones after the fork"
    )


def on_io_loop() -> bool:
    """Whether the caller already runs on the I/O loop."""
    try:
        return asyncio.get_running_loop() is _loop
    except RuntimeError:
        return False


def _refuse_on_io_loop() -> None:
    if on_io_loop():
        raise RuntimeError("blocking calls cannot be made from the I/O loop; await the async API there")


def submit(coroutine: Coroutine[Any, Any, R]) -> Future[R]:
    """Start a coroutine on the I/O loop; cancelling the future cancels the coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, io_loop())


def run_blocking(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine on the I/O loop and wait for it, from any other thread.

    A KeyboardInterrupt cancels the coroutine, waits until it has cleaned up, and is raised again. The waiting
    thread runs the functions that the coroutine calls through `callers.called`.

    Raises:
        RuntimeError: called on the I/O loop itself, where waiting would never end.
        RequestCancelledError: something else cancelled the coroutine.
    """
    try:
        _refuse_on_io_loop()
    except RuntimeError:
        coroutine.close()
        raise
    calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    work = _Work(coroutine, send=calls.put, then=lambda _: calls.put(_nothing))
    try:
        work.start()
        while not work.finished.is_set():
            try:
                call = calls.get(timeout=_INTERRUPT_CHECK_S)  # a wait without a limit blocks Ctrl-C on Windows
            except queue.Empty:
                continue
            call()
        return work.result()
    except asyncio.CancelledError as error:
        raise RequestCancelledError("the request was cancelled") from error
    finally:
        work.stop(_CANCEL_GRACE_S)


def _nothing() -> None:
    """Wakes the thread that waits."""


class _Work(Generic[R]):
    """One task on the I/O loop, for a caller in another thread.

    An interrupt may hit the caller anywhere, also inside `start`, when the task may already run. So a caller
    creates it, starts it inside of a `try`, and calls `stop` at the end.

    Args:
        send: takes functions that the waiting thread is to run, see `callers.py`.
        then: called on the I/O loop when the task has ended.

    Attributes:
        finished: set when the task has ended.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, R],
        *,
        send: Send | None = None,
        then: Callable[[asyncio.Task[R]], object] | None = None,
    ):
        self._coroutine = coroutine
        self._context = context_with_caller(send)
        self._then = then
        self._loop = io_loop()
        self._task: asyncio.Task[R] | None = None
        self._process_id = os.getpid()
        self.finished = threading.Event()

    def start(self) -> None:
        self._loop.call_soon_threadsafe(self._begin, context=self._context)

    def cancel(self) -> None:
        """Cancel the task, if it has not ended."""
        if not self.finished.is_set():
            self._loop.call_soon_threadsafe(self._cancel)

    def stop(self, grace_s: float) -> None:
        """Cancel the task, if it has not ended, and wait at most so long until it has cleaned up."""
        if self.is_of_parent or sys.is_finalizing():
            return  # the loop's thread is not in this process, or has been stopped: the process's end cleans up
        self.cancel()
        if not on_io_loop():  # the garbage collector may close a generator there, where waiting would lock
            self.finished.wait(grace_s)

    @property
    def is_of_parent(self) -> bool:
        """Whether the process that forked this one has started it; it never ends here."""
        return self._process_id != os.getpid()

    def result(self) -> R:
        """What the ended task returned or raised; CancelledError if it was cancelled."""
        assert self._task is not None
        return self._task.result()

    def _begin(self) -> asyncio.Task[R]:
        if self._task is None:
            self._task = self._loop.create_task(self._coroutine, context=self._context)
            self._task.add_done_callback(self._end)
        return self._task

    def _cancel(self) -> None:
        self._begin().cancel()  # where the interrupt prevented the start, a task that is cancelled before any step

    def _end(self, task: asyncio.Task[R]) -> None:
        if not task.cancelled():
            task.exception()  # now asyncio does not report it, should the caller have gone
        self.finished.set()
        if self._then is not None:
            self._then(task)


def io_bound(
    method: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Let a coroutine function be awaited from any loop; it runs on the I/O loop."""

    @functools.wraps(method)
    async def hop(*args: P.args, **kwargs: P.kwargs) -> R:
        _note_use(args)
        if on_io_loop():
            return await method(*args, **kwargs)
        return await asyncio.wrap_future(submit(method(*args, **kwargs)))

    return hop


def io_bound_stream(method: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, AsyncGenerator[T, None]]:
    """Let an async generator be iterated from any loop; it runs on the I/O loop, and from other loops as one task.

    Args:
        method: an async generator function, or a function that returns an async generator. It is called when the
            first item is requested, so that the clock of a request starts there.
    """

    @functools.wraps(method)
    async def hop(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        _note_use(args)
        stream = method(*args, **kwargs)
        async with aclosing(stream if on_io_loop() else _from_io_loop(stream)) as items:
            async for item in items:
                yield item

    return hop


async def _from_io_loop(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items of a stream that runs as one task on the I/O loop, for another loop."""
    deliveries: asyncio.Queue[_Delivery[T]] = asyncio.Queue()
    here = asyncio.get_running_loop()
    work = _pump(stream, lambda delivery: here.call_soon_threadsafe(deliveries.put_nowait, delivery))
    ended = False
    try:
        work.start()
        while True:
            delivery = await deliveries.get()
            ended = delivery.ended
            if ended:
                break
            yield delivery.item
    finally:
        if not ended:
            work.cancel()
            async with asyncio.timeout(_CANCEL_GRACE_S):
                while not (await deliveries.get()).ended:
                    pass
    delivery.raise_error()


class _Delivery(Generic[T]):
    """One item of a stream on its way to another thread, a function that this is to run, or the stream's end,
    with or without an error."""

    def __init__(
        self,
        *,
        item: T | None = None,
        call: Callable[[], object] | None = None,
        ended: bool = False,
        error: BaseException | None = None,
    ) -> None:
        self.item: T = item  # type: ignore[assignment]  # only read where it is an item
        self.call = call
        self.ended = ended
        self._error = error

    def raise_error(self) -> None:
        if isinstance(self._error, asyncio.CancelledError):
            raise RequestCancelledError("the request was cancelled") from self._error
        if self._error is not None:
            raise self._error


def _pump(
    stream: AsyncGenerator[T, None], deliver: Callable[[_Delivery[T]], object], *, send: Send | None = None
) -> _Work[None]:
    """One task on the I/O loop that delivers a stream's items and its end."""

    async def pump() -> None:
        async with aclosing(stream):
            async for item in stream:
                deliver(_Delivery(item=item))

    def end(task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        with contextlib.suppress(RuntimeError):  # the consumer's loop is closed
            deliver(_Delivery(ended=True, error=error))

    return _Work(pump(), send=send, then=end)


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], R]:
    """The blocking twin of an async method; the instance carries the async object as `_async`."""

    def twin(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run_blocking(method(self._async, *args, **kwargs))

    functools.update_wrapper(twin, method)
    return twin


def blocking_stream(
    method: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Generator[T, None, None]]:
    """The blocking twin of an async generator method: a generator; closing it cancels the work."""

    def twin(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return iterate_blocking(method(self._async, *args, **kwargs))

    functools.update_wrapper(twin, method)
    return twin


@overload
def iterate_blocking(stream: AsyncGenerator[T, None]) -> Generator[T, None, None]: ...


@overload
def iterate_blocking(
    stream: AsyncGenerator[T, None], *, tick_s: float, cancel_grace_s: float = ...
) -> Generator[T | None, None, None]: ...


def iterate_blocking(
    stream: AsyncGenerator[T, None], *, tick_s: float | None = None, cancel_grace_s: float = _CANCEL_GRACE_S
) -> Generator[T | None, None, None]:
    """Read an async generator, run as one task on the I/O loop, from another thread. While this thread waits, it
    runs the functions that the generator calls through `callers.called`.

    Args:
        tick_s: if given, None is yielded whenever no item has arrived for so long.
        cancel_grace_s: how long a reader that stops early waits until the work has cleaned up.

    Raises:
        RuntimeError: read on the I/O loop itself, where waiting would never end.
        RequestCancelledError: something else cancelled the work.
    """
    _refuse_on_io_loop()
    deliveries: queue.SimpleQueue[_Delivery[T]] = queue.SimpleQueue()
    work = _pump(stream, deliveries.put, send=lambda call: deliveries.put(_Delivery(call=call)))
    try:
        work.start()
        last = yield from _items(work, deliveries, tick_s)
    finally:
        work.stop(cancel_grace_s)
    last.raise_error()


def _items(
    work: _Work[None], deliveries: queue.SimpleQueue[_Delivery[T]], tick_s: float | None
) -> Generator[T | None, None, _Delivery[T]]:
    """Yield the items; return the end.

    This loop is not written inside the `try` of its caller, because of CPython 3.11 and 3.12: where an interrupt
    arrives at the jump back of a loop, they look up its handler one instruction before the loop. If a `try` begins
    with the loop, that is outside of it, and its `finally` does not run.
    """
    while True:
        try:
            delivery = deliveries.get(timeout=tick_s or _INTERRUPT_CHECK_S)  # with a limit: see `run_blocking`
        except queue.Empty:
            if work.is_of_parent:
                raise _other_process_error() from None
            if tick_s is not None:
                yield None
            continue
        if delivery.ended:
            return delivery
        if delivery.call is not None:
            delivery.call()
            continue
        yield delivery.item


def delegate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """The twin of a method that does no I/O: it calls the async object's method directly."""

    def twin(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self._async, *args, **kwargs)

    functools.update_wrapper(twin, method)
    return twin
