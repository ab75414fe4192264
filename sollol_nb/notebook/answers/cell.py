"""Stream an answer into its cell until it ends, fails or is stopped. The text received so far is never lost.

The request runs on the I/O loop. Its chunks reach the cell's thread through a queue, since a kernel assigns output
to a cell by the thread that prints it. While no chunk arrives, the view shows the latest event.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import AnswerInterruptedError, RequestCancelledError, SollolError
from sollol_nb.notebook.answers.request import CellRequest
from sollol_nb.notebook.answers.views import (
    UPDATE_INTERVAL_S,
    LiveAnswer,
    NotebookView,
    NoView,
    PlainView,
    TerminalView,
    View,
)
from sollol_nb.notebook.pages import clients
from sollol_nb.notebook.pages.watch import ShownAnswer
from sollol_nb.runtime.events import Event, EventBus, EventKind
from sollol_nb.runtime.io_loop import iterate_blocking
from sollol_nb.text.short_names import short_name

if TYPE_CHECKING:
    import pandas as pd

STOP_GRACE_S = 0.8
"""How long a stopped cell waits for the engine to cancel its request; a slower engine cancels it later."""


def stream_into_cell(
    request: CellRequest,
    chunks: AsyncGenerator[Chunk, None],
    events: EventBus,
    view: View,
    *,
    keep: Callable[[Completion], None],
) -> Completion | pd.DataFrame:
    """Show an answer while it streams; returns the completion, or its frame if the request says so.

    Args:
        chunks: the answer's stream.
        events: the router's events, shown while no text arrives.
        keep: called with a partial completion, or with one that does not match the requested schema.

    Raises:
        RequestCancelledError: the stop button or Ctrl-C; the partial answer stays visible and was kept.
        SollolError: any other failure; the partial answer stays visible and was kept.
    """
    answer = LiveAnswer(request.model)
    with follow_events(events, request.model, answer):
        try:
            with closing(
                iterate_blocking(chunks, tick_s=UPDATE_INTERVAL_S, cancel_grace_s=STOP_GRACE_S)
            ) as stream:
                for chunk in stream:
                    if chunk is not None:
                        answer.add(chunk)
                    view.show(answer)
        except (KeyboardInterrupt, Exception) as error:
            partial = partial_completion(request, answer, error)
            if partial is not None:
                keep(partial)
            view.finish(partial)
            if isinstance(error, KeyboardInterrupt):
                raise stopped_error(request.model, partial) from None
            raise
    completion = request.apply_form(answer.completion())
    try:
        value = request.value(completion)
    except SollolError:  # it does not match the schema
        keep(completion)
        view.finish(completion)
        raise
    view.finish(completion, None if isinstance(value, Completion) else value)
    return value


@contextmanager
def cell_view(request: CellRequest, shown: ShownAnswer | None) -> Iterator[View]:
    """How the answer of a request is shown in the running cell.

    Args:
        shown: what looks after it when its page is closed; None in a terminal, and where nothing is shown.
    """
    if request.quiet:
        yield NoView()
    elif shown is None:
        yield PlainView() if request.raw else TerminalView()
    else:
        try:
            yield PlainView() if request.raw else NotebookView(partial(clients.make_display, shown))
        finally:
            shown.end()


def stopped_error(model: str, partial: Completion | None) -> RequestCancelledError:
    """The error of an answer that its user has stopped, with this much of it."""
    what = " before any text arrived" if partial is None else "; the partial answer is kept"
    return RequestCancelledError(f"{short_name(model)}: stopped{what}")


def partial_completion(request: CellRequest, answer: LiveAnswer, error: BaseException) -> Completion | None:
    """The completion of an answer that this error ended; None if no text had arrived."""
    if not answer.has_begun:
        return None
    partial = request.apply_form(answer.completion())
    cancelled = isinstance(error, KeyboardInterrupt | RequestCancelledError)
    partial["done_reason"] = "cancelled" if cancelled else "error"
    if isinstance(error, AnswerInterruptedError) and error.partial is not None:
        partial[ROUTING] = error.partial.routing
    return partial


@contextmanager
def follow_events(events: EventBus, model: str, answer: LiveAnswer) -> Iterator[None]:
    """Inside this context, the answer's status is the latest event of its model, or of engines and workers.

    After the loss of its coordinator the status begins with that, until the answer continues.
    """
    lost, lost_workers = "", set[str]()

    def note(event: Event) -> None:
        nonlocal lost
        source, is_about_model = event.kind.source, event.subject == short_name(model)
        worker = str(event.data.get("name") or event.subject)
        if event.kind is EventKind.WORKER_LOST:  # known before its coordinator has ended, or found after that
            lost_workers.add(worker)
        if event.kind is EventKind.COORDINATOR_LOST and is_about_model:
            named = [f"lost worker {name}" for name in sorted(lost_workers) if name in event.message]
            answer.status = lost = ", ".join(named) or event.message
        elif event.kind is EventKind.WORKER_LOST and lost:
            answer.status = lost = f"lost worker {worker}"
        elif event.kind is EventKind.ANSWER_CONTINUED and is_about_model:
            lost = ""
            if event.data.get("repeats"):  # exact recovery: nothing new arrives for a while
                answer.status = event.message
        elif source in ("engine", "worker", "link", "gateway") or (source == "coordinator" and is_about_model):
            answer.status = f"{lost}; {event.message}" if lost else event.message

    unsubscribe = events.subscribe(note)
    try:
        yield
    finally:
        unsubscribe()
