"""`%sollol_answers`: the answers of the journal, also those whose kernel has ended."""

from __future__ import annotations

import argparse

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from sollol_nb.chat import journaling
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import escaped
from sollol_nb.chat.journal import JournaledAnswer
from sollol_nb.errors import RequestCancelledError, SollolError
from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.answers.cell import cell_view, stream_into_cell
from sollol_nb.notebook.answers.copying import offer_copying
from sollol_nb.notebook.answers.journaled import (
    AnswerList,
    chosen,
    completion_of,
    follow,
    keep_in_conversation,
    listed,
    shown_as,
)
from sollol_nb.notebook.answers.request import CellRequest
from sollol_nb.notebook.displays import hide_once
from sollol_nb.notebook.pages import clients
from sollol_nb.notebook.pages.watch import ShownAnswer
from sollol_nb.text.safe_markdown import printable
from sollol_nb.text.tables import counted

ACTIONS = ("show", "resume", "forget")


@magics_class
class AnswerMagics(Magics):
    """`%sollol_answers`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("action", nargs="?", choices=ACTIONS, help="what to do with one; default: list them")
    @argument("which", nargs="?", metavar="N", help="its number in the list, or its id")
    @argument("--all", dest="of_all", action="store_true", help="also answers of other notebooks and of scripts")
    @line_magic
    def sollol_answers(self, call: magic_line.Call) -> AnswerList | Completion | None:
        """The answers of this notebook, newest first: those that run, are done, or were interrupted.

        Answers are journaled while they stream, in a file that only you can read, for 30 days (setting `journal`).
        `show` shows one again, and follows one that runs, also in another kernel; an interrupt ends the following,
        not the answer. `resume` continues one whose end is missing, such as after a restart of the kernel, from
        where it was, with the options that it was asked with (`--recovery`, say). Without a number they take the
        newest one that suits. `forget` deletes one, or all of this notebook; with `--all`, also those of other
        notebooks and of scripts.

        Example::

            %sollol demo --max-tokens 20 "What is a worker?"

            %sollol_answers

            %sollol_answers show 1

            answer = %sollol_answers resume 1

            %sollol_answers --all

            %sollol_answers forget 1
        """
        try:
            return self._act(call.arguments)
        except KeyboardInterrupt:  # while the journal is read, say; an answer that is followed handles it itself
            raise RequestCancelledError(f"{call.name}: stopped") from None

    def _act(self, arguments: argparse.Namespace) -> AnswerList | Completion | None:
        owner = None if arguments.of_all else session.owner()
        if arguments.action is None:
            return listed(owner)
        if arguments.action == "forget":
            self._forget(arguments.which, owner)
            return None
        if arguments.action == "show":
            answer = chosen(arguments.which, owner, default=lambda _: True)
        else:
            answer = chosen(arguments.which, owner, default=lambda each: each.is_continuable)
        question = printable(answer.question)  # perhaps of a client of a gateway
        display({"text/plain": f"> {question}", "text/markdown": f"> {escaped(question)}"}, raw=True)
        if arguments.action == "resume" and answer.is_continuable:
            completion = self._resumed(answer)
        else:
            completion = self._shown(answer)
        hide_once(self.shell, completion)
        return completion

    def _shown(self, answer: JournaledAnswer) -> Completion:
        was_running = answer.is_running
        if was_running:
            with cell_view(_request_of(answer), _looked_after(answer)) as view:
                answer = follow(answer, view)
        completion = completion_of(answer)
        if not was_running:
            display(completion)
            offer_copying(completion)
        if answer.is_continuable:
            why = answer.error or "its end is missing"
            print(f"{answer.status}: {why}; %sollol_answers resume {answer.id} continues it")
        return completion

    def _resumed(self, answer: JournaledAnswer) -> Completion:
        router, request = session.router(), _request_of(answer)
        defaults = session.settings().request_defaults(answer.model)
        options = {name: defaults[name] for name in ("priority", "timeout") if name in defaults}
        chunks = router.resumed_async(answer.id, **options)

        def keep(completion: Completion) -> None:
            session.remember(answer.question, completion)
            self._keep_in_conversation(answer, completion)

        with cell_view(request, _looked_after(answer)) as view:
            completion = stream_into_cell(request, chunks, router.events, view, keep=keep)
        assert isinstance(completion, Completion)
        keep(completion)
        return completion

    def _keep_in_conversation(self, answer: JournaledAnswer, completion: Completion) -> None:
        if answer.owner != session.owner():  # the conversation is another notebook's
            return
        reason = keep_in_conversation(answer, completion, session.chats())
        if reason:
            print(reason)

    def _forget(self, which: str | None, owner: str | None) -> None:
        journal = journaling.journal()
        if which is None:
            forgotten = journal.forget(owner=owner)
        else:
            answer = chosen(which, owner, default=lambda _: True)
            if answer.is_running:
                raise SollolError("this answer still streams; stop it, then forget it")
            forgotten = journal.forget(answer.id)
        print(f"deleted {counted(len(forgotten), 'answer')}")


def _looked_after(answer: JournaledAnswer) -> ShownAnswer | None:
    """What looks after it when its page is closed, with its id from the beginning: no chunk may have it yet."""
    shown = clients.shown_answer(answer.model)
    if shown is not None:
        shown.answer_id = answer.id
    return shown


def _request_of(answer: JournaledAnswer) -> CellRequest:
    return CellRequest(
        model=answer.model, prompt=answer.question, system=None, options={}, shown_as=shown_as(answer)
    )
