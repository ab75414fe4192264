"""Answers whose page is gone: their end is put into the saved notebook, or the next cell says how to see them.

A kernel's output reaches the page that asked, and no other: a page that was opened again shows nothing more of a
running cell. So while answers stream, the Jupyter server is asked how many pages are connected. When none has
been for `CLOSED_S`, nobody edits the notebook, and its file is changed: an answer that still streams gets a line
that says so, and one that has ended gets its end.

A page may also come back as it was, on a laptop that was asleep: the server gives it what it has missed, and it
may have changes that are not saved. Then the file is restored, so that this page saves without asking. The kernel
knows such a page by its session, which a page that is loaded anew does not have.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.errors import HttpStatusError, SollolError
from sollol_nb.notebook.pages import saved_file
from sollol_nb.notebook.pages.saved_file import FileChange
from sollol_nb.notebook.pages.saved_outputs import SavedDisplay, has_text_file, put
from sollol_nb.runtime.io_loop import io_loop
from sollol_nb.text.short_names import short_name

if TYPE_CHECKING:
    from sollol_nb.notebook.pages.jupyter_server import JupyterServer

POLL_S = 1.0
SLOW_POLL_S = 5.0
"""Where all answers have ended, and no page has come or gone."""
CLOSED_S = 10.0
"""How long no page is connected before the file is changed: one that is loaded again connects sooner. While it
loads, it has read the file already."""
DOUBT_S = 1.5
"""A page that connects so soon after the file was changed may have read it before."""
SETTLE_S = 3.0
"""How long after its end an answer may turn out to have missed its page: a page that was loaded again while the
kernel was busy is heard only then. As long, a page that has connected may take to say which one it is."""
MOST_FAILURES = 10
"""In a row, of a server that does not answer as it should; then it is asked no more for these answers."""
MOST_WATCHED = 100
ALL_COMMAND = "%sollol_answers"

logger = logging.getLogger(__name__)


class ShownAnswer:
    """An answer, and the page that asked for it.

    Args:
        model: the model's name.
        session: of the client that asked.

    Attributes:
        answer_id: of the answer in the journal; "" where it is not journaled, or not yet.
        displays: what shows it in the notebook.
        is_missed: the page was closed, or another one opened, while it streamed, and no cell has said so yet.
        is_stale: what pages show of it may lack its end.
        was_closed: no page was connected while it streamed, nor since.
    """

    def __init__(self, model: str, session: str) -> None:
        self.model = short_name(model)
        self.session = session
        self.answer_id = ""
        self.displays: list[SavedDisplay] = []
        self.is_missed = False
        self.is_stale = False
        self.was_closed = False
        self._told: set[str] = set()
        self._ended_at: float | None = None

    @property
    def command(self) -> str:
        """The magic that shows the answer again."""
        return f"{ALL_COMMAND} show {self.answer_id}" if self.answer_id else "%sollol_last"

    async def follow(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """Its chunks, from which its id is taken."""
        async with aclosing(chunks):
            async for chunk in chunks:
                self.answer_id = str((chunk.get(ROUTING) or {}).get("answer_id") or self.answer_id)
                yield chunk

    @property
    def has_ended(self) -> bool:
        """Whether its displays show its end."""
        return self._ended_at is not None

    @property
    def has_settled(self) -> bool:
        """Whether it ended so long ago that a page that missed it is known."""
        return self._ended_at is not None and time.monotonic() - self._ended_at > SETTLE_S

    def end(self) -> None:
        """Its displays show its end now."""
        if self._ended_at is None:
            self._ended_at = time.monotonic()

    def note(self, session: str) -> None:
        """A client of this session was heard."""
        if session == self.session:
            self.is_missed = self.is_stale = False
        elif not self.has_settled and session not in self._told:
            self.is_missed = self.is_stale = True

    def tell(self, session: str) -> None:
        """A cell of this session says so."""
        self.is_missed = False
        self._told.add(session)

    @property
    def needs_server(self) -> bool:
        """Whether it may have to be put into the file."""
        return not self.has_settled or (self.is_stale and bool(self.displays))

    def note_closed(self) -> None:
        """No page is connected."""
        if not self.has_settled:  # it may have ended since the page was closed
            self.is_missed = self.is_stale = self.was_closed = True

    def put_into(self, document: dict[str, Any]) -> bool:
        """Put what it shows into the notebook; returns whether all of it is there."""
        shown = [
            put(document, display, self._saved_form(display.bundle), may_add=self.was_closed)
            for display in list(self.displays)
        ]
        return bool(shown) and all(shown)

    def _saved_form(self, bundle: dict[str, Any]) -> dict[str, Any]:
        if self.has_ended:
            return bundle
        line = f"{self.model} was still answering when this page was closed; {{}} shows the answer."
        lines = {"text/plain": line.format(self.command), "text/markdown": f"*{line.format(f'`{self.command}`')}*"}
        return {kind: f"{bundle.get(kind, '')}\n\n{each}".lstrip() for kind, each in lines.items()}


@dataclass(frozen=True)
class _Change:
    """What was done to the file while no page was connected, which answers it has since, and which clients were
    known before."""

    file: FileChange
    answers: tuple[ShownAnswer, ...]
    known: frozenset[str]
    at: float


class PageWatch:
    """Looks after the answers of one kernel. Threads may use it.

    Args:
        find: finds the kernel's Jupyter server; None if there is none.
    """

    def __init__(self, find: Callable[[], JupyterServer | None]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._answers: list[ShownAnswer] = []
        self._heard_at: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_ended = False
        # Of the I/O loop alone:
        self._wake = asyncio.Event()
        self._change: _Change | None = None
        self._holds_notebooks: bool | None = None
        self._closed_at: float | None = None
        self._opened_at: float | None = None
        self._says_running = False

    def add(self, answer: ShownAnswer) -> None:
        """Look after an answer that begins."""
        with self._lock:
            self._answers = [*(each for each in self._answers if _is_open(each)), answer][-MOST_WATCHED:]
        io_loop().call_soon_threadsafe(self._start)

    def note(self, session: str) -> None:
        """A client of this session was heard."""
        with self._lock:
            self._heard_at[session] = time.monotonic()
            for answer in self._answers:
                answer.note(session)
        if self._change is not None:  # a page that is back must not save before the file is restored
            io_loop().call_soon_threadsafe(self._wake.set)

    def hint(self, session: str) -> str:
        """The text for a cell that a client of this session runs: what its page has missed, once; else ""."""
        with self._lock:
            missed = [each for each in self._answers if each.is_missed and each.session != session]
            for answer in missed:
                answer.tell(session)
        if not missed:
            return ""
        if len(missed) > 1:
            return f"The page was opened again while {len(missed)} answers were written; {ALL_COMMAND} lists them."
        (answer,) = missed
        did = "answered" if answer.has_ended else "is answering"
        return f"The page was opened again while {answer.model} {did}; this shows the answer:\n{answer.command}"

    def end(self) -> None:
        """Look after nothing any more."""
        self._is_ended = True
        io_loop().call_soon_threadsafe(lambda: self._task.cancel() if self._task is not None else None)

    def _start(self) -> None:
        if not self._is_ended and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        server = await asyncio.to_thread(self._find)
        if server is None:
            return
        self._closed_at = self._opened_at = None
        self._says_running, failures = False, 0
        try:
            while self._change is not None or any(each.needs_server for each in self._answers):
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S if self._is_moving() else SLOW_POLL_S):
                        await self._wake.wait()
                self._wake.clear()
                try:
                    await self._look(server)
                    failures = 0
                except HttpStatusError as error:
                    logger.debug("the Jupyter server refuses: %s", error)
                    return
                except (SollolError, ValueError, RecursionError) as error:  # a notebook with NaN is no JSON
                    logger.debug("cannot use the Jupyter server: %s", error)
                    failures += 1
                    if failures == MOST_FAILURES:
                        return
        finally:
            self._task = None  # an answer that begins now is looked after by the next one
            await server.close()

    def _is_moving(self) -> bool:
        """Whether answers stream, or a page has come or gone and what follows from that is not done yet."""
        if any(not each.has_settled for each in self._answers):
            return True
        if self._closed_at is None:
            return self._change is not None
        return any(each.needs_server for each in self._answers)

    async def _look(self, server: JupyterServer) -> None:
        page = await server.page()
        now = time.monotonic()
        if page is None:
            return
        if page.connections:
            self._opened_at = self._opened_at if self._opened_at is not None else now
            self._closed_at, self._says_running = None, False
            if self._change is not None:
                await self._settle(server, self._change, self._opened_at)
            with self._lock:
                for answer in self._answers:
                    answer.was_closed = False
                self._answers = [each for each in self._answers if _is_open(each)]
            return
        self._opened_at = None
        self._closed_at = self._closed_at if self._closed_at is not None else now
        with self._lock:
            for answer in self._answers:
                answer.note_closed()
        if now - self._closed_at >= CLOSED_S:
            await self._save(server, page.path)

    async def _save(self, server: JupyterServer, path: str) -> None:
        """Put the ends of answers into the file, and once for each time that the page is closed, those that
        stream."""
        answers = [each for each in self._answers if each.displays and each.is_stale]
        ended = [each for each in answers if each.has_ended]
        if not answers or (not ended and self._says_running):
            return
        if self._holds_notebooks is None:
            self._holds_notebooks = await server.holds_notebooks()
        saved: list[ShownAnswer] = []
        if not self._holds_notebooks and path.endswith(".ipynb"):  # others are text files of jupytext

            def edit(document: dict[str, Any]) -> None:
                if not has_text_file(document):
                    saved.extend(each for each in answers if each.put_into(document))

            earlier = self._change
            done = await saved_file.change(server, path, edit, earlier.file if earlier is not None else None)
            if done is None:
                return
            if done.before != done.after and (earlier is None or done is not earlier.file):
                logger.debug("put %d answers into %s, which no page shows", len(saved), path)
                has_them = (*(earlier.answers if earlier is not None else ()), *saved)
                self._change = _Change(done, has_them, frozenset(self._heard_at), time.monotonic())
        self._says_running = True
        with self._lock:
            for answer in ended:
                answer.displays.clear()  # what has no place in the file is named in the next cell
            self._answers = [each for each in self._answers if not (each in ended and each in saved)]

    async def _settle(self, server: JupyterServer, change: _Change, opened_at: float) -> None:
        """A page is connected: restore the file if it is the page that was there before, and has not loaded it."""
        with self._lock:
            heard = {session for session, at in self._heard_at.items() if at > change.at}
        is_new, is_back = bool(heard - change.known), bool(heard & change.known)
        if not is_new and not is_back and time.monotonic() - opened_at < SETTLE_S:
            return
        if not is_new and await saved_file.restore(server, change.file):
            logger.debug("restored %s for the page that is back", change.file.path)
        self._change = None
        if is_new and opened_at - change.at < DOUBT_S:
            with self._lock:
                for answer in change.answers:
                    answer.is_missed = True
                self._answers = [*(each for each in change.answers if each not in self._answers), *self._answers]


def _is_open(answer: ShownAnswer) -> bool:
    """Whether there is still something to do for it."""
    return answer.needs_server or answer.is_missed
