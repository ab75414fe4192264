"""What a router's requests write into the journal of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.journal import CANCELLED, DONE, FAILED, INTERRUPTED
from sollol_nb.chat.journaling import JournalEntry, State
from sollol_nb.chat.request import ChatRequest
from sollol_nb.errors import AnswerInterruptedError, GatewayUnavailableError, WorkersUnavailableError
from sollol_nb.llama_cpp.processes.registry import own_name
from sollol_nb.router.record import RequestRecord
from sollol_nb.settings import config

_LOST = (AnswerInterruptedError, WorkersUnavailableError, GatewayUnavailableError)
"""Errors after which an answer may continue as it is, once what was lost is back."""


class AnswerJournal:
    """The journal of one request: from its check to its end. Does nothing where it is not to be journaled.

    Args:
        record: of the request; gets the id of the answer.
        entry: where the answer was begun earlier.
    """

    def __init__(self, record: RequestRecord, entry: JournalEntry | None) -> None:
        self._record = record
        self._entry = entry
        self._is_continued = entry is not None
        if entry is not None:
            record.answer_id = entry.id

    def begin(self, request: ChatRequest, body: Mapping[str, Any] | None = None) -> None:
        """Journal a new answer from now on, if the request or else the setting says so.

        Args:
            body: what asks again, where it is not simply the request.
        """
        is_wanted = config.default("journal") if request.journal is None else request.journal
        if self._is_continued or not is_wanted:
            return
        self._entry = journaling.begin(
            str(self._record.model),
            request.question,
            body or body_of(request),
            conversation=request.conversation,
            own_name=_own_name,
        )
        self._record.answer_id = self._entry.id

    def set_state(self, state: State) -> None:
        """Note what gives the state of the answer."""
        if self._entry is not None:
            self._entry.state = state

    def set_state_of(self, error: AnswerInterruptedError) -> None:
        """Note the state of an interrupted answer, if the error has it."""
        state = error.state
        if state is not None:
            self.set_state(lambda: state)

    def add(self, chunk: Chunk) -> None:
        """Note a chunk; the last one ends the answer."""
        if self._entry is not None:
            self._entry.add(chunk)
            if chunk.get("done"):
                self._entry.finish(DONE)
                self._entry = None

    def end(self, failure: Exception | None) -> None:
        """Note that the answer has ended early, unless its last chunk was there; without a failure its reader left
        it."""
        if self._entry is None:
            return
        if failure is None:
            self._entry.finish(CANCELLED)
        else:
            is_lost = self._is_continued or isinstance(failure, _LOST)
            self._entry.finish(INTERRUPTED if is_lost else FAILED, str(failure))
        self._entry = None


def body_of(request: ChatRequest) -> dict[str, Any]:
    """What asks a request again, as plain data."""
    return {
        "messages": request.messages,
        "prompt": None if request.prompt is None else asdict(request.prompt),
        "options": request.options,
        "backend": request.backend,
        "priority": request.priority,
        "timeout": request.timeout_s,
    }


def _own_name() -> str:
    return config.session_path() or own_name()
