"""The answers of the journal in a notebook: a list of them, one of them again, and one that streams elsewhere.

An answer that streams into another kernel is followed by reading its row from time to time.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

from IPython.core.error import UsageError

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import RESTARTED
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ChatBook
from sollol_nb.chat.journal import CANCELLED, DONE, ID_CHARS, Journal, JournaledAnswer
from sollol_nb.chat.journal_state import END
from sollol_nb.errors import ChatBusyError, ConfigError
from sollol_nb.notebook.answers.views import LiveAnswer, View
from sollol_nb.text.safe_markdown import printable
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import shortened

FOLLOW_EVERY_S = 0.25
SHOWN_QUESTION_CHARS = 60


class AnswerList:
    """Answers of the journal, numbered, newest first.

    Attributes:
        answers: in this order.
    """

    def __init__(self, answers: Sequence[JournaledAnswer], *, with_owners: bool = False) -> None:
        self.answers = tuple(answers)
        self._with_owners = with_owners

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, position: int) -> JournaledAnswer:
        return self.answers[position]

    def _rows(self) -> list[list[str]]:
        return [
            [
                str(number),
                f"{datetime.fromtimestamp(answer.started_at):%Y-%m-%d %H:%M}",
                answer.status,
                short_name(answer.model),
                printable(shortened(answer.question, SHOWN_QUESTION_CHARS)),
                f"{len(answer.text):,}",
                *([printable(PurePath(answer.owner).name)] if self._with_owners else []),
            ]
            for number, answer in enumerate(self.answers, 1)
        ]

    @property
    def _header(self) -> list[str]:
        header = ["N", "asked", "status", "model", "question", "characters"]
        return [*header, "notebook or script"] if self._with_owners else header

    def __repr__(self) -> str:
        if not self.answers:
            return "no answers in the journal"
        rows = [self._header, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        if not self.answers:
            return html.escape(repr(self))

        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        return f"<table>{line(self._header, 'th')}{''.join(line(row, 'td') for row in self._rows())}</table>"


def listed(owner: str | None) -> AnswerList:
    """The newest answers of a notebook; None is of all notebooks and scripts.

    Raises:
        ConfigError: the journal cannot be read.
    """
    return AnswerList(journaling.journal().newest(owner), with_owners=owner is None)


def chosen(which: str | None, owner: str | None, *, default: Callable[[JournaledAnswer], bool]) -> JournaledAnswer:
    """One answer, with what is needed to continue it.

    Args:
        which: its number in the list of this owner, or its id; None is the newest that suits.
        default: which ones suit.

    Raises:
        UsageError: there is none.
        ConfigError: the journal cannot be read.
    """
    answers = listed(owner).answers
    if which is None:
        found = next(filter(default, answers), None)
        if found is None:
            raise UsageError("%sollol_answers: there is no such answer; %sollol_answers lists them")
        answer_id = found.id
    elif which.isdecimal() and len(which) < ID_CHARS:
        if not 1 <= int(which) <= len(answers):
            raise UsageError(
                f"%sollol_answers: there is no answer {which}; %sollol_answers lists them, with their numbers"
            )
        answer_id = answers[int(which) - 1].id
    else:
        answer_id = which
    whole = journaling.journal().get(answer_id)
    if whole is None:
        raise UsageError(f"%sollol_answers: there is no answer {answer_id}; %sollol_answers lists them")
    return whole


def completion_of(answer: JournaledAnswer) -> Completion:
    """An answer of the journal as its cell shows it."""
    end: Mapping[str, Any] = answer.state or {}
    end = end if end.get("kind") == END else {}
    known = {name: value for name, value in end.items() if name not in ("kind", "logprobs") and value is not None}
    message = {**(known.get("message") or {}), "role": "assistant", "content": answer.text}
    if answer.thinking:
        message["thinking"] = answer.thinking
    if answer.status != DONE:
        known |= {"done": False, "done_reason": "cancelled" if answer.status == CANCELLED else "error"}
    completion = Completion({"model": answer.model, **known, "message": message})
    completion.shown_as = shown_as(answer)
    return completion


def shown_as(answer: JournaledAnswer) -> str:
    """How an answer of the journal is shown: `json` where the model was held to it."""
    return "json" if ((answer.request or {}).get("options") or {}).get("format") else "markdown"


def follow(answer: JournaledAnswer, view: View) -> JournaledAnswer:
    """Show an answer that streams somewhere until it ends; returns it as it is then.

    An interrupt ends the showing, not the answer.

    Raises:
        ConfigError: the journal cannot be read.
    """
    live = LiveAnswer(answer.model)
    journal = Journal(journaling.journal().path)
    try:
        while answer.is_running:
            _update(live, answer)
            view.show(live)
            time.sleep(FOLLOW_EVERY_S)
            newer = journal.get(answer.id)
            if newer is None:  # it was deleted: it had ended without any text
                break
            answer = newer
    except KeyboardInterrupt:
        view.finish(completion_of(answer))
        print(f"it goes on; %sollol_answers show {answer.id} follows it again")
        return answer
    view.finish(completion_of(answer))
    return answer


def _update(live: LiveAnswer, answer: JournaledAnswer) -> None:
    """Bring a live answer up to date."""
    text, thinking = live.text, live.thinking
    if answer.text.startswith(text) and answer.thinking.startswith(thinking):
        content, more = answer.text[len(text) :], answer.thinking[len(thinking) :]
        if content or more:
            live.add({"message": {"content": content, "thinking": more}})
    else:
        live.add({"message": {"content": answer.text, "thinking": answer.thinking}, RESTARTED: True})
    if not live.has_begun:
        live.status = f"waiting for {short_name(answer.model)}"


def keep_in_conversation(answer: JournaledAnswer, whole: Completion, chats: ChatBook) -> str:
    """Put a continued answer into its conversation.

    Args:
        answer: as the journal had it before.
        whole: the answer now, complete or not.

    Returns:
        Why it is not there, as one line; "" where it is, and for an answer without a conversation.
    """
    messages = (answer.request or {}).get("messages")
    if not answer.conversation or not isinstance(messages, list) or not messages:
        return ""
    *before, question = messages
    try:
        if answer.conversation in chats:
            chat = chats[answer.conversation]
        else:
            earlier = [message for message in before if message]
            chat = Chat.from_messages(earlier, name=answer.conversation) if earlier else Chat(answer.conversation)
            chats.add(chat)
        history = chat.history
        if len(history) > 1 and _same(history[-2].message, question) and history[-1].done_reason in _ENDED_EARLY:
            chat.amend(whole)
        elif _turns(chat.messages) == _turns(before):
            chat.add(question, whole)
        else:
            return f"conversation {answer.conversation} has gone on meanwhile, so the answer is not in it"
    except (ChatBusyError, ConfigError) as error:
        return f"the answer is not in conversation {answer.conversation}: {error}"
    return ""


_ENDED_EARLY = ("error", "cancelled")


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [(each.get("role"), each.get("content")) for each in messages if each.get("role") != "system"]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one.get("role"), one.get("content")) == (other.get("role"), other.get("content"))
