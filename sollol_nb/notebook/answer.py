"""An answer as it streams into a cell: status while a model loads, then text at a steady rate, then Markdown.

In a notebook one display handle is updated at most ten times a second, from the main thread (since ipykernel 7
output from other threads is not tied to the cell). In a terminal the text is printed as it comes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sollol_nb.completion import Completion
from sollol_nb.errors import AnswerInterruptedError, RequestCancelledError, SollolError
from sollol_nb.events import Event
from sollol_nb.io_loop import iterate_blocking

if TYPE_CHECKING:
    from sollol_nb.sync_wrapper import HybridRouter

UPDATE_INTERVAL_S = 0.1


def ask(
    router: HybridRouter,
    model: str,
    messages: list[dict[str, str]],
    *,
    in_notebook: bool,
    keep: Callable[[Completion], None],
    **options: Any,
) -> Completion:
    """Ask, showing the answer as it comes.

    Args:
        keep: called with the completion when it ended, also one that was cut short by an interrupt or error.

    Raises:
        RequestCancelledError: the stop button or Ctrl-C; the text so far stays shown and was kept.
        SollolError: of the kind that fits; text that came before stays shown and was kept.
    """
    view = _NotebookView() if in_notebook else _TerminalView()
    chunks: list[dict[str, Any]] = []
    status: list[str] = []

    def note(event: Event) -> None:
        if event.kind.startswith(("engine.", "coordinator.", "worker.")):
            status.append(event.words)  # what is going on, until the next chunk comes

    unsubscribe = router.events.subscribe(note)
    try:
        # None comes at each tick without a chunk: time to show what has changed meanwhile.
        for chunk in iterate_blocking(router.stream_async(model, messages, **options), tick_s=UPDATE_INTERVAL_S):
            if chunk is not None:
                chunks.append(chunk)
                status.clear()
            view.show(chunks, status[-1] if status else "")
    except (KeyboardInterrupt, SollolError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        partial = Completion.from_chunks(chunks)
        partial.setdefault("model", model)
        partial["done_reason"] = "cancelled" if interrupted else "error"
        if isinstance(error, AnswerInterruptedError) and error.partial is not None:
            partial["_routing"] = error.partial.routing
        if chunks:
            keep(partial)
        view.finish(partial if chunks else None)
        if interrupted:
            raise RequestCancelledError(f"{model}: stopped; what came so far is kept") from None
        raise
    finally:
        unsubscribe()
    completion = Completion.from_chunks(chunks)
    keep(completion)
    view.finish(completion)
    return completion


class _NotebookView:
    """One display handle, updated at a steady rate, gone once the final answer is shown in its place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_at = 0.0
        self._shown = ""

    def show(self, chunks: list[dict[str, Any]], status: str) -> None:
        from IPython.display import Markdown, display

        if not chunks and not status:
            return
        now = time.monotonic()
        if now - self._shown_at < UPDATE_INTERVAL_S:
            return
        text = Completion.from_chunks(chunks).text
        if status:  # a model is being loaded, or a lost one replaced
            text = f"{text}\n\n*{status} …*" if text else f"*{status} …*"
        if text == self._shown:
            return
        self._shown, self._shown_at = text, now
        if self._handle is None:
            self._handle = display(Markdown(text), display_id=True)
        else:
            self._handle.update(Markdown(text))

    def finish(self, completion: Completion | None) -> None:
        from IPython.display import Markdown, display

        if self._handle is not None:
            self._handle.update(completion if completion is not None else Markdown(""))
        elif completion is not None:
            display(completion)


class _TerminalView:
    """Prints what is new."""

    def __init__(self) -> None:
        self._printed = 0
        self._status = ""

    def show(self, chunks: list[dict[str, Any]], status: str) -> None:
        if status and status != self._status:
            self._status = status
            print(f"[{status}]", file=sys.stderr, flush=True)
        for chunk in chunks[self._printed :]:
            print(chunk["message"]["content"], end="", flush=True)
        self._printed = len(chunks)

    def finish(self, completion: Completion | None) -> None:
        if completion is not None:
            print(f"\n[{completion.footer()}]")
