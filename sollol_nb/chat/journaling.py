"""Answers on their way into the journal: noted while they stream, written by a thread at once and twice a second.

A `JournalEntry` is one answer of this process. Whoever streams the answer gives it each chunk, which costs as much
as appending to a list. The writer's thread asks for a snapshot of each entry that has changed (its text, and its
state as `Answer.state` gives it); the I/O loop, on which answers change, makes them one by one, and the thread
writes them together. The pause between two rounds is many times as long as a round takes, so a gateway with
hundreds of answers does not journal all the time.

No answer waits for the journal, and none fails because of it: what cannot be written costs one warning.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.chunk import RESTARTED, Chunk
from sollol_nb.chat.journal import DONE, RUNNING, Journal, JournaledAnswer, Progress, new_id
from sollol_nb.chat.journal_state import END, plain_json, request_json, split_state
from sollol_nb.runtime.io_loop import io_loop
from sollol_nb.text.tables import shortened

INTERVAL_S = 0.5
FIRST_S = 0.05
"""After it, a new answer is written for the first time, so that its question outlives its process from then on."""
SHARE = 20
"""The pause after a round is at least so many times as long as the round."""
LONGEST_PAUSE_S = 10.0
KEEP_TRYING_S = 60.0
"""How long the end of an answer is tried to be written: the file may be locked for a while."""
TOUCH_S = 20.0
"""How often an answer that brings nothing new is reported as alive."""
SNAPSHOT_LIMIT_S = IDLE_S = READ_LIMIT_S = 5.0
EXIT_LIMIT_S = 2.0
QUESTION_CHARS = 200
TEXT = "text"
"""The kind of a state that says only how many chunks with text there were, since no tokens are known."""

State = Callable[[], Mapping[str, Any]]

logger = logging.getLogger(__name__)


class JournalEntry:
    """One answer of this process that is being journaled. It changes on the I/O loop.

    Attributes:
        id: of the answer.
        run: what its row is written with.
        state: gives what is needed to continue it; None as long as there is nothing.
        has_changed: since its last snapshot.
        is_new: nobody has tried to write it yet.
    """

    def __init__(
        self, answer_id: str, run: str, request: Mapping[str, Any], first: Callable[[], dict[str, Any]] | None
    ) -> None:
        """Args: first: gives the beginning of its row, in the writer's thread; None where it has one."""
        self.id, self.run = answer_id, run
        self.state: State | None = None
        self.has_changed = self.is_new = first is not None
        self.written_at = time.monotonic()
        self._first = first
        self._request = request
        self._fixed: Mapping[str, Any] | None = None
        self._is_request_written = first is None
        self._text, self._thinking = [""], [""]
        self._calls: list[Any] = []
        self._last_state: Mapping[str, Any] | None = None
        self._earlier: tuple[str, str, Mapping[str, Any] | None] = ("", "", None)
        self._texts = 0  # chunks with text: about as many as tokens
        self._end: tuple[str, str] | None = None
        self._ended_at = 0.0
        self._lock = threading.Lock()  # for the snapshot
        self._snapshot: _Snapshot | None = None
        self._taken: _Snapshot | None = None  # which is being written

    @classmethod
    def continuing(cls, answer: JournaledAnswer, run: str, text: str, thinking: str) -> JournalEntry:
        """The entry of an answer that was claimed, and continues after this much of it."""
        entry = cls(answer.id, run, answer.request or {}, None)
        entry._text, entry._thinking, entry._last_state = [text], [thinking], answer.state
        entry._earlier = (answer.text, answer.thinking, answer.state)
        entry._texts = answer.texts
        return entry

    @property
    def has_ended(self) -> bool:
        """Whether all of it is written, or was given up."""
        return self.has_end and self._snapshot is None

    @property
    def is_due(self) -> bool:
        """Whether a snapshot of it is to be taken."""
        return self.has_changed and self._end is None

    def add(self, chunk: Chunk) -> None:
        """Note a chunk of the answer."""
        message = chunk.get("message") or {}
        if chunk.get(RESTARTED):
            self._text, self._thinking, self._calls, self._texts = [], [], [], 0
        content, thinking = message.get("content"), message.get("thinking")
        self._calls += message.get("tool_calls") or ()
        if content:
            self._text.append(content)
        if thinking:
            self._thinking.append(thinking)
        if content or thinking:
            self._texts += 1
            self.has_changed = True
        if chunk.get("done"):
            rest = {name: value for name, value in message.items() if name not in ("content", "thinking")}
            if self._calls:  # Ollama sends them before the last chunk
                rest["tool_calls"] = self._calls
            self._last_state = {**chunk, "kind": END, "logprobs": None, "message": rest}

    def finish(self, status: str, error: str = "") -> None:
        """Note how the answer has ended."""
        self._ended_at = time.monotonic()
        self.take_snapshot((status, error))

    @property
    def has_end(self) -> bool:
        """Whether `finish` was called."""
        return self._end is not None

    def go_on_as_text(self) -> None:
        """Continue it from its text, also after `finish`, since its tokens are of no use."""
        self._end = self.state = self._last_state = None
        with self._lock:
            self._snapshot = None
        self.has_changed = True  # no other process may claim it, should its end have been written
        _writer.follow(self)

    def take_snapshot(self, end: tuple[str, str] | None = None) -> None:
        """Note the text and the state as they are now.

        Args:
            end: the status and the error with which the answer ends now.
        """
        end = end or self._end
        self.has_changed = False
        self._text, self._thinking = ["".join(self._text)], ["".join(self._thinking)]
        text, thinking = self._text[0], self._thinking[0]
        status, error = end or (RUNNING, "")
        if self.state is not None and status != DONE:
            try:
                self._last_state = self.state()
            except Exception:  # an answer is worth more than its journal
                logger.exception("the state of an answer cannot be journaled")
                self.state = None
        state = self._last_state
        if status != DONE and (state is None or state.get("kind") == TEXT):
            state = {"kind": TEXT, "texts": self._texts}
        if status != DONE and len(text) + len(thinking) < len(self._earlier[0]) + len(self._earlier[1]):
            # A continued answer that begins again must not cost the longer text that there was.
            text, thinking, state = self._earlier
        with self._lock:
            self._snapshot = _Snapshot(text, thinking, state, status, error)
            self._end = end  # after the snapshot: an end without one would mean that all is written

    def progress(self) -> Progress | None:
        """What is to be written of it now; None if that is nothing. For the writer's thread."""
        with self._lock:
            self._taken, self._snapshot = self._snapshot, None
        taken = self._taken
        if taken is None:
            return None
        self.is_new = False
        moving = request = None
        if taken.status == DONE:
            moving = None if taken.state is None else plain_json(taken.state)
        else:
            fixed = None
            if taken.state is not None:
                fixed, rest = split_state(taken.state)
                moving = plain_json(rest)
            if not self._is_request_written or fixed != self._fixed:
                self._is_request_written, self._fixed = True, fixed
                request = request_json(self._request, fixed)
        first = self._first() if self._first is not None else None
        return Progress(
            id=self.id,
            run=self.run,
            status=taken.status,
            error=_storable(taken.error),
            text=_storable(taken.text),
            thinking=_storable(taken.thinking),
            first=first,
            request=request,
            state=moving,
        )

    def written(self, *, is_done: bool) -> None:
        """Note whether its progress was written. For the writer's thread."""
        if is_done:
            self._first, self.written_at = None, time.monotonic()
            return
        self._is_request_written, self.has_changed = False, True
        with self._lock:
            may_wait = not self.has_end or time.monotonic() - self._ended_at < KEEP_TRYING_S
            if self._snapshot is None and may_wait:
                self._snapshot = self._taken


@dataclass(frozen=True, slots=True)
class _Snapshot:
    text: str
    thinking: str
    state: Mapping[str, Any] | None
    status: str
    error: str


class JournalWriter:
    """The thread that writes the entries of this process."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._entries: dict[str, JournalEntry] = {}
        self._thread: threading.Thread | None = None
        self._waiting = 0  # those that wait until all is written
        self._begun = self._ended = 0  # rounds
        self._has_failed = False

    def follow(self, entry: JournalEntry) -> None:
        """Write an entry from now on until it has ended; returns at once."""
        with self._changed:
            self._entries[entry.run] = entry
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="sollol_nb journal", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # too many threads; the next answer tries again
                    self._report(error)
                else:
                    self._thread = thread
            else:
                self._changed.notify_all()

    def wait_written(self, limit_s: float = READ_LIMIT_S) -> None:
        """Wait until all that has happened so far is written or given up, at most so long. Not on the I/O loop.

        The thread ends if no answer runs.
        """
        with self._changed:
            if self._thread is None:
                return
            goal = self._begun + 1
            self._waiting += 1
            try:
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._thread is None or (self._entries and self._ended >= goal), limit_s
                )
            finally:
                self._waiting -= 1

    def pause(self) -> None:
        """Write nothing until `resume`."""
        self._writing.acquire()

    def resume(self) -> None:
        """Allow writing again after `pause`, in the same thread."""
        self._writing.release()

    @property
    def _has_new(self) -> bool:
        return any(entry.is_new for entry in self._entries.values())

    def _run(self) -> None:
        pause_s, first_s = INTERVAL_S, FIRST_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._waiting, IDLE_S)
                if not self._entries:
                    self._thread = None
                    self._changed.notify_all()
                    return
                if not self._changed.wait_for(lambda: self._waiting, first_s):
                    self._changed.wait_for(lambda: self._waiting or self._has_new, pause_s - first_s)
                self._begun += 1
                entries = list(self._entries.values())
            began = time.monotonic()
            self._write(entries)
            least_s = min(SHARE * (time.monotonic() - began), LONGEST_PAUSE_S)
            pause_s, first_s = max(INTERVAL_S, least_s), max(FIRST_S, least_s)
            with self._changed:
                for entry in entries:
                    if entry.has_ended:
                        self._entries.pop(entry.run, None)
                self._ended = self._begun
                self._changed.notify_all()

    def _write(self, entries: Sequence[JournalEntry]) -> None:
        written: list[JournalEntry] = []
        is_done = False
        try:
            _take_snapshots([entry for entry in entries if entry.is_due])
            progress = []
            for entry in entries:
                try:
                    each = entry.progress()
                except Exception as error:  # the others are written
                    self._report(error)
                    continue
                if each is not None:
                    progress.append(each)
                    written.append(entry)
            now = time.monotonic()
            silent = [entry for entry in entries if entry not in written and now - entry.written_at > TOUCH_S]
            with self._writing:
                if progress:
                    self._journal.write(progress)
                if silent:
                    self._journal.touch([entry.run for entry in silent])
            written += silent
            is_done = True
        except Exception as error:  # an answer is worth more than its journal
            self._report(error)
        for entry in written:
            entry.written(is_done=is_done)

    def _report(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("answers are not journaled, so they cannot be continued after a loss: %s", error)


def _take_snapshots(entries: Sequence[JournalEntry]) -> None:
    """Have the I/O loop take a snapshot of each, one per turn, so that no token waits for all of them."""
    if not entries:
        return
    left, done = deque(entries), threading.Event()
    loop = io_loop()

    def step() -> None:
        if left:
            left.popleft().take_snapshot()
            loop.call_soon(step)
        else:
            done.set()

    with contextlib.suppress(RuntimeError):  # the loop was closed
        loop.call_soon_threadsafe(step)
        done.wait(SNAPSHOT_LIMIT_S)


_journal = Journal()
_writer = JournalWriter(_journal)
_owner: Callable[[], str | None] | None = None


def journal() -> Journal:
    """The journal of the state folder, with all that this process has to write in it. Not on the I/O loop."""
    flush()
    return _journal


def flush() -> None:
    """Wait until all is written, at most some seconds. Not on the I/O loop."""
    _writer.wait_written()


def use_owner(owner: Callable[[], str | None] | None) -> None:
    """Let the answers of this process belong to a notebook from now on.

    Args:
        owner: gives what identifies it; None where that is not known. None: to no notebook.
    """
    global _owner
    _owner = owner


def begin(
    model: str, question: str, request: Mapping[str, Any], *, conversation: str, own_name: Callable[[], str]
) -> JournalEntry:
    """Journal a new answer from now on.

    Args:
        model: as the request names it.
        question: what is asked; only its beginning is kept beside the request.
        request: what asks it again, as plain data.
        conversation: the name of the one that it belongs to; "" without one.
        own_name: gives the name of this process, for answers that belong to no notebook.
    """
    owner, started_at = _owner, time.time()
    beginning = shortened(" ".join(question[: 4 * QUESTION_CHARS].split()), QUESTION_CHARS)

    def first() -> dict[str, Any]:
        return {
            "owner": _storable((owner and owner()) or own_name()),
            "conversation": _storable(conversation),
            "model": _storable(model),
            "question": _storable(beginning),
            "started_at": started_at,
        }

    entry = JournalEntry(new_id(), new_id(), request, first)
    _writer.follow(entry)
    return entry


def resume(answer: JournaledAnswer, run: str, *, text: str, thinking: str) -> JournalEntry:
    """Journal a claimed answer further.

    Args:
        answer, run: as `Journal.claim` gave them.
        text, thinking: after which it continues.
    """
    entry = JournalEntry.continuing(answer, run, text, thinking)
    _writer.follow(entry)
    return entry


def _storable(text: str) -> str:
    """A text that SQLite takes: without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _begin_again() -> None:
    global _journal, _writer
    _journal = Journal()
    _writer = JournalWriter(_journal)  # a forked child has no copy of the thread


if hasattr(os, "register_at_fork"):  # SQLite does not survive a fork in the middle of a write
    os.register_at_fork(
        before=lambda: _writer.pause(), after_in_parent=lambda: _writer.resume(), after_in_child=_begin_again
    )
atexit.register(lambda: _writer.wait_written(EXIT_LIMIT_S))
