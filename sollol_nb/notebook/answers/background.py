"""An answer in the background: a handle that shows the answer live, and that can be awaited, cancelled and read.

The request runs on the I/O loop. A separate thread updates every display of the handle. It runs in the context of
the cell, where a kernel looks up which cell an output belongs to.

nbclient (papermill, `nbconvert --execute`) takes updates of the running cell only, and so none of this thread once
a later one runs. So each cell updates the displays once more at its end, see `show_in_cell`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import RequestCancelledError, RequestTimeoutError
from sollol_nb.notebook.answers.cell import follow_events, partial_completion, stopped_error
from sollol_nb.notebook.answers.request import CellRequest
from sollol_nb.notebook.answers.views import UPDATE_INTERVAL_S, LiveAnswer, NotebookView
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import io_loop
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd

MakeDisplay = Callable[[dict[str, Any]], Callable[[dict[str, Any]], None]]
_WAIT_S = 0.5  # a wait without a limit cannot be interrupted on Windows

_running: weakref.WeakSet[BackgroundAnswer] = weakref.WeakSet()
_to_show: set[BackgroundAnswer] = set()
"""Those whose end no cell has shown yet."""


class BackgroundAnswer:
    """An answer in the background.

    `result()` and `await` wait for it, `cancel()` stops it, `text` is the text received so far.

    Args:
        request: the request.
        chunks: the answer's stream.
        events: the router's events.
        make_display: how a notebook shows a mime bundle and updates it; None in a terminal.
        keep: called at the end with the completion, whole or partial; not without any text.
        on_shown: called when its displays show its end.
    """

    def __init__(
        self,
        request: CellRequest,
        chunks: AsyncGenerator[Chunk, None],
        events: EventBus,
        make_display: MakeDisplay | None,
        *,
        keep: Callable[[Completion], object] | None = None,
        on_shown: Callable[[], object] | None = None,
    ) -> None:
        self.model = request.model
        self._request = request
        self._answer = LiveAnswer(request.model)
        self._events = events
        self._make_display = make_display
        self._keep = keep
        self._on_shown = on_shown
        self._views: list[NotebookView] = []
        self._views_lock = threading.Lock()
        self._end_is_shown = False
        self._ended = threading.Event()
        self._partial: Completion | None = None
        self._future: Future[Completion | pd.DataFrame] = Future()
        self._task: asyncio.Task[Completion | pd.DataFrame]
        loop = io_loop()

        def begin() -> None:
            self._task = loop.create_task(self._read(chunks))
            self._task.add_done_callback(self._end)

        loop.call_soon_threadsafe(begin)
        _running.add(self)
        self._showing: threading.Thread | None = None
        if make_display is not None:
            run = contextvars.copy_context().run
            self._showing = threading.Thread(
                target=run, args=(self._keep_shown,), name="sollol_nb display", daemon=True
            )
            self._showing.start()

    async def _read(self, chunks: AsyncGenerator[Chunk, None]) -> Completion | pd.DataFrame:
        try:
            with follow_events(self._events, self.model, self._answer):
                async with aclosing(chunks):
                    async for chunk in chunks:
                        self._answer.add(chunk)
            self._partial = completion = self._request.apply_form(self._answer.completion())
            return await asyncio.to_thread(self._request.value, completion)
        except asyncio.CancelledError:
            self._partial = partial_completion(self._request, self._answer, RequestCancelledError())
            raise
        except Exception as error:
            self._partial = self._partial or partial_completion(self._request, self._answer, error)
            raise

    def _end(self, task: asyncio.Task[Completion | pd.DataFrame]) -> None:
        if self._keep is not None and self._partial is not None:
            self._keep(self._partial)
        if task.cancelled():
            self._future.set_exception(stopped_error(self.model, self._partial))
        elif (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())
        self._ended.set()

    # --- reading ----------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._future.done()  # not `_ended`, which is set later: a waiter may run in between

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._answer.text

    @property
    def completion(self) -> Completion | None:
        """The completion once it has ended, or the partial one if it was stopped or failed; None before that,
        and if no text arrived."""
        return self._partial if self.done else None

    @property
    def error(self) -> BaseException | None:
        """Why it failed or was stopped; None if it is running or succeeded."""
        return self._future.exception() if self.done else None

    def result(self, timeout: float | None = None) -> Completion | pd.DataFrame:
        """Wait for the answer. An interrupt ends the waiting, not the answer.

        Args:
            timeout: the longest wait in seconds; None waits as long as the request may take.

        Raises:
            RequestTimeoutError: it has not ended within the timeout; it continues.
            RequestCancelledError: it was cancelled; `.completion` has the partial answer.
            SollolError: it failed for any other reason.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left_s = _WAIT_S if deadline is None else min(deadline - time.monotonic(), _WAIT_S)
            if left_s <= 0:
                raise RequestTimeoutError(
                    f"{short_name(self.model)} has not answered within {timeout:g} s; it continues"
                )
            self._ended.wait(left_s)
        return self._future.result()

    def _prompt_text_(self) -> str:
        """Its text in a prompt, which waits for the end of it. Errors are those of `result`."""
        self.result()
        return self._partial.text if self._partial is not None else ""

    def __await__(self) -> Generator[Any, None, Completion | pd.DataFrame]:
        return self._wait().__await__()

    async def _wait(self) -> Completion | pd.DataFrame:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wake(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(ended.set)

        self._future.add_done_callback(wake)
        await ended.wait()
        return self._future.result()

    def cancel(self) -> bool:
        """Stop it, and free its slot on the engine; False if it had ended already."""
        if self.done:
            return False
        io_loop().call_soon_threadsafe(lambda: self._task.cancel())  # `begin` has created the task by then
        return True

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended and its end is shown."""
        deadline = time.monotonic() + timeout_s
        self._ended.wait(timeout_s)
        if self._showing is not None:
            self._showing.join(max(0.0, deadline - time.monotonic()))

    # --- showing ----------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """`waiting`, `writing`, `done`, `cancelled` or `failed`."""
        if not self.done:
            return "writing" if self._answer.has_begun else "waiting"
        if self.error is None:
            return "done"
        return "cancelled" if isinstance(self.error, RequestCancelledError) else "failed"

    def __repr__(self) -> str:
        length = counted(len(self.text), "character")
        return f"<BackgroundAnswer of {short_name(self.model)}: {self.state}, {length}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def _ipython_display_(self) -> None:
        if self._make_display is None:
            raise NotImplementedError  # a terminal prints the repr
        view = NotebookView(self._make_display)
        with self._views_lock:
            if self._end_is_shown:
                self._show_end(view)
                return
            if not self._answer.has_begun and not self._answer.status:
                self._answer.status = f"asking {short_name(self.model)}"
            view.show(self._answer)
            self._views.append(view)
            _to_show.add(self)

    def show_in_cell(self) -> bool:
        """Update all displays as part of the running cell; returns whether this was the end."""
        with self._views_lock:
            is_end = self.done
            for view in self._views:
                if is_end:
                    self._show_end(view)
                else:
                    view.show(self._answer, at_once=True)
        return is_end

    def _keep_shown(self) -> None:
        while not self._ended.wait(UPDATE_INTERVAL_S):
            with self._views_lock:
                for view in self._views:
                    view.show(self._answer)
        with self._views_lock:
            for view in self._views:
                self._show_end(view)
            self._end_is_shown = True
        if self._on_shown is not None:
            self._on_shown()

    def _show_end(self, view: NotebookView) -> None:
        error = self.error
        value = None if error is not None else self._future.result()
        frame = None if value is None or isinstance(value, Completion) else value
        message = "" if error is None else f"{type(error).__name__}: {error}"
        view.finish(self._partial, frame, error=message)


def show_in_cell(_: object = None) -> None:
    """Update the displays of all answers in the background as part of the running cell (for IPython's event
    `post_run_cell`)."""
    for answer in list(_to_show):
        if answer.show_in_cell():
            _to_show.discard(answer)


def cancel_all(*, wait_s: float) -> None:
    """Stop all answers in the background, and wait at most this long for them and their threads to end."""
    deadline = time.monotonic() + wait_s
    answers = list(_running)
    for answer in answers:
        answer.cancel()
    for answer in answers:
        answer.join(max(0.0, deadline - time.monotonic()))
    _to_show.clear()
