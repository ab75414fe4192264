"""An answer on the screen while it is written, and when it has ended.

In a notebook one display is updated ten times a second at most, whatever the speed of the model; the first token
is shown at once. The final answer takes its place, so that a saved notebook holds that and nothing else. In a
terminal the text is printed as it comes.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from sollol_nb.chat.chunk import RESTARTED, ROUTING, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import folded_footer, live_markdown, tail
from sollol_nb.text.safe_markdown import printable, safe_markdown

if TYPE_CHECKING:
    import pandas as pd

UPDATE_INTERVAL_S = 0.1


class LiveAnswer:
    """An answer as far as it came. Threads may read it while another adds to it.

    Attributes:
        status: what is going on where no text comes: a model is loaded, a lost one replaced.
        restarts: how often it has begun again.
    """

    def __init__(self, model: str) -> None:
        self.status = ""
        self.restarts = 0
        self._model = model
        self._lock = threading.Lock()
        self._chunks: list[Chunk] = []
        self._text: list[str] = []
        self._thinking: list[str] = []

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def text(self) -> str:
        """Its text so far."""
        with self._lock:
            self._text = ["".join(self._text)]
            return self._text[0]

    @property
    def thinking(self) -> str:
        """The model's reasoning so far."""
        with self._lock:
            self._thinking = ["".join(self._thinking)]
            return self._thinking[0]

    @property
    def has_begun(self) -> bool:
        """Whether anything of the answer has come."""
        return any(self._text) or any(self._thinking)

    def add(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        message = chunk.get("message") or {}
        with self._lock:
            if chunk.get(RESTARTED):  # what came before was void
                self.restarts += 1
                self._text, self._thinking = [], []
            self._chunks.append(chunk)
            self._text.append(message.get("content") or "")
            self._thinking.append(message.get("thinking") or "")
        self.status = ""

    def completion(self) -> Completion:
        """The completion of what came; whole, if the last chunk did."""
        completion = Completion.from_chunks(self._chunks)
        completion.setdefault("model", self._model)
        if ROUTING not in completion:  # cut short: the first chunk from each place says where it ran
            completion[ROUTING] = next((one[ROUTING] for one in reversed(self._chunks) if ROUTING in one), {})
        return completion


class View(Protocol):
    """Where an answer is shown."""

    def show(self, answer: LiveAnswer) -> None:
        """Show it as far as it came; called often."""

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Show it for the last time, or None if there is nothing to show; as a frame, if there is one."""


class NotebookView:
    """One display, updated at a steady rate.

    Args:
        make_display: shows a mime bundle, and gives a function that replaces it.
    """

    def __init__(self, make_display: Callable[[dict[str, Any]], Callable[[dict[str, Any]], None]]) -> None:
        self._make_display = make_display
        self._update: Callable[[dict[str, Any]], None] | None = None
        self._shown_at = 0.0
        self._shown = ""
        self._has_text = False

    def show(self, answer: LiveAnswer) -> None:
        """Show what is new, if it is time."""
        first_token = answer.has_begun and not self._has_text
        now = time.monotonic()
        if now - self._shown_at < UPDATE_INTERVAL_S and not first_token:
            return
        markdown = live_markdown(answer.text, answer.thinking, answer.status)
        if not markdown or markdown == self._shown:
            return
        self._shown, self._shown_at, self._has_text = markdown, now, answer.has_begun
        self._put({"text/markdown": markdown, "text/plain": tail(answer.text) or answer.status})

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None, *, error: str = "") -> None:
        """The final answer in the place of the live one, and the error where no cell tells it."""
        if error:
            end = completion._repr_mimebundle_() if completion is not None else {"text/plain": ""}
            words = {"text/plain": error, "text/markdown": safe_markdown(error), "text/html": html.escape(error)}
            self._put({kind: f"{text}\n\n{words[kind]}".lstrip() for kind, text in end.items()})
        elif completion is None:
            if self._update is not None:
                self._put({"text/plain": ""})
        elif frame is None:
            self._put(dict(completion._repr_mimebundle_()))
        else:
            table = {"text/plain": str(frame), "text/html": frame.to_html(max_rows=60, notebook=True)}
            self._put(table)
            self._update = None
            self._put({"text/markdown": folded_footer(completion), "text/plain": f"[{completion.footer()}]"})

    def _put(self, bundle: dict[str, Any]) -> None:
        if self._update is None:
            self._update = self._make_display(bundle)
        else:
            self._update(bundle)


BEGINS_AGAIN = "[the answer begins again]"


class TerminalView:
    """Prints what is new; the reasoning dimmed, and what is going on to stderr."""

    DIM, PLAIN = "\x1b[2m", "\x1b[0m"

    def __init__(self) -> None:
        self._printed = {"text": 0, "thinking": 0}
        self._restarts = 0
        self._status = ""
        self._colors = sys.stdout.isatty()

    def show(self, answer: LiveAnswer) -> None:
        """Print what is new."""
        if answer.status and answer.status != self._status:
            self._status = answer.status
            print(f"[{answer.status}]", file=sys.stderr, flush=True)
        if answer.restarts != self._restarts:
            self._restarts, self._printed = answer.restarts, {"text": 0, "thinking": 0}
            print(f"\n{BEGINS_AGAIN}", file=sys.stderr, flush=True)
        thinking = self._new("thinking", answer.thinking)
        if thinking:
            print(f"{self.DIM}{thinking}{self.PLAIN}" if self._colors else thinking, end="", flush=True)
        text = self._new("text", answer.text)
        if text:
            if self._printed["text"] == len(text) and self._printed["thinking"]:
                print("\n")
            print(text, end="", flush=True)

    def _new(self, kind: str, text: str) -> str:
        new = text[self._printed[kind] :]
        self._printed[kind] = len(text)
        return printable(new)

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """The rest, and the footer."""
        if completion is None:
            return
        print(self._new("text", completion.text))
        if frame is not None:
            print(frame)
        print(f"[{completion.footer()}]")


class PlainView:
    """The model's text and nothing else, as the output of the cell."""

    def __init__(self) -> None:
        self._printed = 0
        self._restarts = 0
        self._shown_at = 0.0

    def show(self, answer: LiveAnswer) -> None:
        """Print what is new, if it is time."""
        if answer.restarts != self._restarts:
            self._restarts, self._printed = answer.restarts, 0
            print(f"\n{BEGINS_AGAIN}", file=sys.stderr, flush=True)
        now = time.monotonic()
        if now - self._shown_at < UPDATE_INTERVAL_S and self._printed:
            return
        self._shown_at = now
        self._print(answer.text)

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """The rest."""
        if completion is not None:
            self._print(f"{completion.text}\n")

    def _print(self, text: str) -> None:
        print(printable(text[self._printed :]), end="", flush=True)
        self._printed = len(text)


class NoView:
    """Shows nothing."""

    def show(self, answer: LiveAnswer) -> None:
        """Nothing."""

    def finish(self, completion: Completion | None, frame: pd.DataFrame | None = None) -> None:
        """Nothing."""
