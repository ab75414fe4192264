"""Functions of the user that the work on the I/O loop needs: they run where they cannot hold it up.

- A blocking call waits in its thread. That thread runs the function, so an interrupt ends the function, and what
  may be used only in one thread (a SQLite connection, a figure) works.
- Of an async call, and in the background, functions run in threads, and coroutines on the loop of the caller.
- Coroutines of blocking calls and of the background run on one separate loop, which stays from call to call.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

R = TypeVar("R")
Send = Callable[[Callable[[], object]], object]

_send: ContextVar[Send | None] = ContextVar("sollol_nb caller", default=None)
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_STOP_LIMIT_S = 5.0


def context_with_caller(send: Send | None) -> Context:
    """The present context, in which functions are given to `send`, for the thread that waits; None: to threads."""
    context = copy_context()
    context.run(_send.set, send)
    return context


async def called(function: Callable[[], Any], *, on_io_loop: bool) -> Any:
    """The result of a function, or of the coroutine that it returns.

    Args:
        on_io_loop: whether this is the I/O loop, else it is the caller's own.
    """
    if inspect.iscoroutinefunction(function):
        found: Any = function()  # a coroutine: nothing has run yet
    else:
        found = await _in_caller(function, _send.get() if on_io_loop else None)
    if not isinstance(found, Awaitable):
        return found
    if not on_io_loop:
        return await found
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_awaited(found), _functions_loop()))


async def _awaited(found: Awaitable[Any]) -> Any:
    try:
        return await found
    except (KeyboardInterrupt, SystemExit) as error:  # either would end the loop, and with it all later coroutines
        raise _ended_by(error) from error


def _ended_by(error: BaseException) -> RuntimeError:
    return RuntimeError(f"the function was ended by {type(error).__name__}")


async def _in_caller(function: Callable[[], R], send: Send | None) -> R:
    future: Future[R] = Future()

    def call() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except StopIteration:  # asyncio's futures refuse it, and whoever awaits would wait for ever
            future.set_exception(RuntimeError("the function raised StopIteration"))
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # an interrupt of the thread; asyncio would end the I/O loop with it
            future.set_exception(_ended_by(error))
            if send is not None:
                raise
        else:  # an interrupt that arrives here is raised as it is
            future.set_result(result)

    if send is None:
        context = copy_context()  # where a kernel looks up which cell an output belongs to
        threading.Thread(target=context.run, args=(call,), name="sollol_nb function", daemon=True).start()
    else:
        send(call)
    return await asyncio.wrap_future(future)


def _functions_loop() -> asyncio.AbstractEventLoop:
    """The loop for coroutines of the user."""
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_run, args=(_loop,), name="sollol_nb functions", daemon=True)
            _thread.start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def stop_functions_loop() -> None:
    """End the loop for coroutines, if there is one; the next coroutine starts another."""
    global _loop
    with _lock:
        loop, _loop = _loop, None
    if loop is not None and _thread is not None:
        loop.call_soon_threadsafe(loop.stop)
        _thread.join(_STOP_LIMIT_S)


def _forget_loop() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
