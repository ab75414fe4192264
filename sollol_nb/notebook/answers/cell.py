"""An answer streams into the cell that asks, until it ends, fails, or is stopped; nothing of it is lost.

The request runs on the I/O loop; its chunks come to the cell's thread through a queue, since output is tied to a
cell by the thread that makes it. A tick without a chunk shows what goes on: a model that is being loaded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import shown_name
from sollol_nb.errors import AnswerInterruptedError, RequestCancelledError, SollolError
from sollol_nb.notebook.answers.views import UPDATE_INTERVAL_S, LiveAnswer, View
from sollol_nb.runtime.events import Event, EventBus
from sollol_nb.runtime.io_loop import iterate_blocking

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.notebook.answers.request import CellRequest

STOP_GRACE_S = 0.8
"""How long a stopped cell waits until the engine has let go of its request; it lets go all the same, a bit
later."""


def ask(
    request: CellRequest,
    chunks: AsyncGenerator[Chunk, None],
    events: EventBus,
    view: View,
    *,
    keep: Callable[[Completion], None],
) -> Completion | pd.DataFrame:
    """Show an answer as it comes; gives the completion, or its frame if that is asked for.

    Args:
        chunks: the answer's stream.
        events: of the router, for what goes on before and between.
        keep: called with a completion that was cut short, or does not have the structure that was asked for.

    Raises:
        RequestCancelledError: the stop button or Ctrl-C; the text so far stays shown and was kept.
        SollolError: of the kind that fits; text that came before stays shown and was kept.
    """
    answer = LiveAnswer(request.model)
    with told(events, request.model, answer):
        try:
            with closing(
                iterate_blocking(chunks, tick_s=UPDATE_INTERVAL_S, cancel_grace_s=STOP_GRACE_S)
            ) as stream:
                for chunk in stream:
                    if chunk is not None:
                        answer.add(chunk)
                    view.show(answer)
        except (KeyboardInterrupt, Exception) as error:
            partial = broken_off(request, answer, error)
            if partial is not None:
                keep(partial)
            view.finish(partial)
            if isinstance(error, KeyboardInterrupt):
                raise stopped(request.model) from None
            raise
    completion = request.dressed(answer.completion())
    try:
        value = request.result(completion)
    except SollolError:  # not the structure that was asked for
        keep(completion)
        view.finish(completion)
        raise
    view.finish(completion, None if isinstance(value, Completion) else value)
    return value


def stopped(model: str) -> RequestCancelledError:
    """The error of an answer that its user has stopped."""
    return RequestCancelledError(f"{shown_name(model)}: stopped; what came so far is kept")


def broken_off(request: CellRequest, answer: LiveAnswer, error: BaseException) -> Completion | None:
    """The completion of an answer that did not end well; None if nothing of it had come."""
    if not answer.has_begun:
        return None
    partial = request.dressed(answer.completion())
    cancelled = isinstance(error, KeyboardInterrupt | RequestCancelledError)
    partial["done_reason"] = "cancelled" if cancelled else "error"
    if isinstance(error, AnswerInterruptedError) and error.partial is not None:
        partial[ROUTING] = error.partial.routing
    return partial


@contextmanager
def told(events: EventBus, model: str, answer: LiveAnswer) -> Iterator[None]:
    """While in here, the answer's status is what the bus tells of its model, and of engines and workers."""

    def note(event: Event) -> None:
        source = event.kind.source
        if source in ("engine", "worker") or (source == "coordinator" and event.subject == model):
            answer.status = event.message

    unsubscribe = events.subscribe(note)
    try:
        yield
    finally:
        unsubscribe()
