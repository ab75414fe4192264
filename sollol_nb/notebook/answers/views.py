"""An answer on the screen, while it streams and at its end.

In a notebook one display is updated at most ten times a second, whatever the speed of the model; the first token
is shown immediately. The final answer replaces it, so that a saved notebook holds only that. A terminal prints the
text as it arrives.
"""

from __future__ import annotations

import html
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from sollol_nb.chat.chunk import CALLING, RESTARTED, ROUTING, STEP, Chunk, Step
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import folded_footer, live_markdown, tail
from sollol_nb.chat.tool_steps import LINE_CHARS, call_text, folded_steps, lines_of
from sollol_nb.notebook.answers.copying import offer_copying
from sollol_nb.text.safe_markdown import printable, safe_markdown, without_begun_escape

if TYPE_CHECKING:
    import pandas as pd

UPDATE_INTERVAL_S = 0.1
LIVE_STEP_CHARS = 500
"""Of the arguments and the result of a call, while the answer streams: all of it is sent with each update."""


class LiveAnswer:
    """An answer while it streams. Threads may read it while another adds chunks.

    Attributes:
        status: what happens while no text arrives: a model is loading, a lost worker is being replaced.
        restarts: how often the answer started over.
        steps: the functions that were called so far.
        is_calling: a function runs now.
    """

    def __init__(self, model: str) -> None:
        self.status = ""
        self.restarts = 0
        self.steps: tuple[Step, ...] = ()
        self.is_calling = False
        self._model = model
        self._lock = threading.Lock()
        self._chunks: list[Chunk] = []
        self._text: list[str] = []
        self._thinking: list[str] = []

    @property
    def text(self) -> str:
        """The text received so far."""
        with self._lock:
            self._text = ["".join(self._text)]
            return self._text[0]

    @property
    def thinking(self) -> str:
        """The reasoning received so far."""
        with self._lock:
            self._thinking = ["".join(self._thinking)]
            return self._thinking[0]

    @property
    def has_begun(self) -> bool:
        """Whether any text or reasoning has arrived, or a function was called."""
        return any(self._text) or any(self._thinking) or bool(self.steps)

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk."""
        message = chunk.get("message") or {}
        with self._lock:
            if chunk.get(RESTARTED):  # the text so far is void
                self.restarts += 1
                self._text, self._thinking = [], []
            if STEP in chunk:  # the text so far belongs to it
                self.steps += (chunk[STEP],)
                self._text, self._thinking = [], []
            self._chunks.append(chunk)
            self._text.append(message.get("content") or "")
            self._thinking.append(message.get("thinking") or "")
        self.is_calling = CALLING in chunk
        call = chunk.get(CALLING)
        self.status = f"calling {call_text(call['call'], call['arguments'], LINE_CHARS)}" if call else ""

    def completion(self) -> Completion:
        """The completion of the chunks received so far."""
        completion = Completion.from_chunks(self._chunks)
        completion.setdefault("model", self._model)
        if ROUTING not in completion:  # a partial one: the first chunk from each backend says where it ran
            routings = (chunk[ROUTING] for chunk in reversed(self._chunks) if ROUTING in chunk)
            completion[ROUTING] = next(routings, {})
        return completion


class View(Protocol):
    """How an answer is shown."""

    def show(self, answer: LiveAnswer) -> None:
        """Show the answer received so far; called often."""

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Show the final answer, as a frame if there is one. None: there is no answer to show."""


class NotebookView:
    """One display, updated at a steady rate.

    Args:
        make_display: shows a mime bundle, and returns the function that replaces it.
    """

    def __init__(self, make_display: Callable[[dict[str, Any]], Callable[[dict[str, Any]], None]]) -> None:
        self._make_display = make_display
        self._updates: list[Callable[[dict[str, Any]], None]] = []
        self._shown_at = 0.0
        self._shown = ""
        self._has_text = False
        self._is_copied = False

    def show(self, answer: LiveAnswer, *, at_once: bool = False) -> None:
        """Show the new text, if it is time; `at_once` all text, also if it was shown already."""
        first_token = answer.has_begun and not self._has_text
        now = time.monotonic()
        is_due = now - self._shown_at >= UPDATE_INTERVAL_S or answer.is_calling  # which may hold up this thread
        if not (is_due or first_token or at_once):
            return
        live = live_markdown(answer.text, answer.thinking, answer.status)
        markdown = "\n\n".join(filter(None, [folded_steps(answer.steps, limit_chars=LIVE_STEP_CHARS), live]))
        if not markdown or (markdown == self._shown and not at_once):
            return
        self._shown, self._shown_at, self._has_text = markdown, now, answer.has_begun
        plain = lines_of(answer.steps) + (tail(answer.text) or answer.status)
        self._put({"text/markdown": markdown, "text/plain": plain})

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None, *, error: str = "") -> None:
        """Replace the live answer with the final one, followed by the error if no cell raises it."""
        if error:
            end = completion._repr_mimebundle_() if completion is not None else {"text/plain": ""}
            errors = error_bundle(error)
            self._put({kind: f"{text}\n\n{errors[kind]}".lstrip() for kind, text in end.items()})
            if completion is not None:
                self._offer_copying(completion)
        elif completion is None:
            if self._updates:
                self._put({"text/plain": ""})
        elif frame is None:
            self._put(dict(completion._repr_mimebundle_()))
            self._offer_copying(completion)
        else:
            table = {"text/plain": str(frame), "text/html": frame.to_html(max_rows=60, notebook=True)}
            self._put(table)
            parts = [folded_steps(completion.steps), folded_footer(completion)]
            footer = {"text/markdown": "\n\n".join(filter(None, parts)), "text/plain": f"[{completion.footer()}]"}
            self._put(footer, place=1)
            self._offer_copying(completion)

    def _offer_copying(self, completion: Completion) -> None:
        if not self._is_copied:
            self._is_copied = True
            offer_copying(completion)

    def _put(self, bundle: dict[str, Any], *, place: int = 0) -> None:
        if place == len(self._updates):
            self._updates.append(self._make_display(bundle))
        else:
            self._updates[place](bundle)


def error_bundle(error: str) -> dict[str, str]:
    """An error as one line, by MIME type: its name stands out, and what to run is code."""
    name, colon, message = error.partition(": ")
    markdown = safe_markdown(f"**{name}**{colon}{message}")
    code = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(message))
    return {"text/plain": error, "text/markdown": markdown, "text/html": f"<p><b>{name}</b>{colon}{code}</p>"}


STARTS_OVER = "[the answer starts over]"


class TerminalView:
    """Prints new text, and dimmed reasoning; the status goes to stderr."""

    DIM, PLAIN = "\x1b[2m", "\x1b[0m"

    def __init__(self) -> None:
        self._printed = {"text": 0, "thinking": 0}
        self._restarts = self._steps = 0
        self._has_text = False
        self._status = ""
        self._colors = sys.stdout.isatty()

    def show(self, answer: LiveAnswer) -> None:
        """Print the new text."""
        if answer.status and answer.status != self._status:
            self._status = answer.status
            print(f"[{answer.status}]", file=sys.stderr, flush=True)
        if answer.restarts != self._restarts:
            self._restarts, self._printed = answer.restarts, {"text": 0, "thinking": 0}
            self._has_text = False
            print(f"\n{STARTS_OVER}", file=sys.stderr, flush=True)
        if len(answer.steps) != self._steps:
            begins = "\n" if self._printed["text"] else ""
            print(begins + lines_of(answer.steps[self._steps :]), end="", flush=True)
            self._steps, self._printed = len(answer.steps), {"text": 0, "thinking": 0}
            self._has_text = False
        thinking = self._new("thinking", answer.thinking)
        if thinking:
            print(f"{self.DIM}{thinking}{self.PLAIN}" if self._colors else thinking, end="", flush=True)
        text = self._new("text", answer.text)
        if text:
            if not self._has_text and self._printed["thinking"]:
                print("\n")
            self._has_text = True
            print(text, end="", flush=True)

    def _new(self, kind: str, text: str) -> str:
        new = without_begun_escape(text[self._printed[kind] :])
        self._printed[kind] += len(new)
        return printable(new)

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Print the rest, and the footer."""
        if completion is None:
            return
        print(self._new("text", completion.text))
        if frame is not None:
            print(frame)
        print(f"[{completion.footer()}]")


class PlainView:
    """Prints the model's text and nothing else."""

    def __init__(self) -> None:
        self._printed = 0
        self._restarts = self._steps = 0
        self._shown_at = 0.0

    def show(self, answer: LiveAnswer) -> None:
        """Print the new text, if it is time."""
        if answer.restarts != self._restarts:
            self._restarts, self._printed = answer.restarts, 0
            print(f"\n{STARTS_OVER}", file=sys.stderr, flush=True)
        if len(answer.steps) != self._steps:  # what was printed before is not the answer
            print(end="\n" if self._printed else "", flush=True)
            self._steps, self._printed = len(answer.steps), 0
        now = time.monotonic()
        if now - self._shown_at < UPDATE_INTERVAL_S and self._printed:
            return
        self._shown_at = now
        self._print(answer.text)

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Print the rest."""
        if completion is not None:
            self._print(f"{completion.text}\n")

    def _print(self, text: str) -> None:
        new = without_begun_escape(text[self._printed :])
        print(printable(new), end="", flush=True)
        self._printed += len(new)


class NoView:
    """Shows nothing."""

    def show(self, answer: LiveAnswer) -> None:
        """Nothing."""

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Nothing."""
