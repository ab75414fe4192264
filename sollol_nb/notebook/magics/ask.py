"""`%%sollol` asks a model, `%sollol_last` shows answers again, `%sollol_chat` shows the conversations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import escaped
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ChatBook, ask_in_chat
from sollol_nb.chat.option_checks import RECOVERIES, SPECULATIONS
from sollol_nb.models.routing import BACKENDS
from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.answers.background import BackgroundAnswer
from sollol_nb.notebook.answers.cell import cell_view, stream_into_cell
from sollol_nb.notebook.answers.copying import offer_copying
from sollol_nb.notebook.answers.request import CellRequest, cell_request, named_model
from sollol_nb.notebook.answers.tools import check_can_ask
from sollol_nb.notebook.displays import hide_once
from sollol_nb.notebook.pages import clients
from sollol_nb.settings.table import FORMATS
from sollol_nb.text.tables import counted, shortened

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.sync_wrapper import HybridRouter

SHOWN_QUESTION_CHARS = 200


@magics_class
class AskMagics(Magics):
    """`%%sollol`, `%sollol_last` and `%sollol_chat`."""

    @magic_line.options_magic(shell_style=False)
    @magic_arguments()
    @argument(
        "model_and_prompt",
        nargs="*",
        metavar="MODEL [PROMPT]",
        help="model name; in the line form followed by the prompt",
    )
    @argument("--temperature", type=magic_line.number, help="0 is greedy: the most likely token each time")
    @argument("--top-p", type=magic_line.number, help="sample only the most likely tokens, up to this probability")
    @argument("--max-tokens", type=magic_line.whole_number, help="maximum length of the answer, in tokens")
    @argument("--seed", type=magic_line.seed, help="seed of the sampling")
    @argument("--stop", action="append", help="end the answer before this text (may be repeated)")
    @argument("--system", help="system message")
    @argument("--priority", type=magic_line.priority, help="1 to 10 (highest), or a name such as high")
    @argument("--timeout", type=magic_line.number, help="time limit in seconds, once the model is ready")
    @argument(
        "--recovery",
        choices=RECOVERIES,
        help="if a coordinator is lost: fast continues at once, exact generates the known tokens again first",
    )
    @argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="the same answer each time (at temperature 0 or with a seed): runs alone, with empty slots",
    )
    @argument(
        "--speculation",
        choices=SPECULATIONS,
        help="drafts of several tokens: off restarts a coordinator that drafts; others count when it starts",
    )
    @argument("--backend", choices=BACKENDS, help="where to run it; default: the model's profile decides")
    @argument("--chat", metavar="NAME", help="continue this conversation")
    @argument("--reset", action="store_true", help="start the conversation over")
    @argument(
        "--no-journal", dest="journal", action="store_false", default=None, help="do not journal this answer"
    )
    @argument("--format", choices=FORMATS, help="how to show the answer; json also makes the model write JSON")
    @argument(
        "--schema",
        metavar="VAR",
        help="pydantic model, dataclass, JSON schema or example frame the answer must match",
    )
    @argument(
        "--tools",
        metavar="F,G",
        action="append",
        help="Python functions that the model may call: their names, with commas (may be repeated)",
    )
    @argument(
        "--max-steps",
        type=magic_line.whole_number,
        metavar="N",
        help="how many answers of the model may call functions; default: 10",
    )
    @argument("--confirm", action="store_true", default=None, help="ask before each call of a function")
    @argument("--frame", action="store_true", help="return a DataFrame")
    @argument("--out", metavar="NAME", help="store the answer in this variable")
    @argument("--quiet", action="store_true", help="show nothing")
    @argument("--raw", action="store_true", help="print the plain text, without Markdown and footer")
    @argument("--background", action="store_true", help="run in the background and return a handle")
    @argument(
        "--var", action="append", metavar="NAME=VALUE", help="set {{ NAME }} for this cell only (may be repeated)"
    )
    @argument("--no-expand", dest="expand", action="store_false", help="send {{ }} unchanged")
    @line_cell_magic
    def sollol(self, call: magic_line.Call) -> Completion | pd.DataFrame | BackgroundAnswer:
        """Ask a model. The answer streams into the cell and is its value.

        `{{ expression }}` in the cell or the options is replaced by its value: frames and arrays as text that a
        model can read, images and figures as images if the model reads them. `%%sollol name << MODEL` is short for
        `%%sollol MODEL --out name`.

        With `--tools f,g` the model may call these Python functions: type hints and docstrings tell it what they
        do. They run in this kernel, each call is shown as a fold, the stop button ends them, and `.steps` of the
        answer has all calls. `--confirm` asks before each one. A model whose chat template takes no tools
        is refused.

        Example::

            %%sollol demo --max-tokens 100 --out answer
            What is model sharding?

            topic = "a worker"

            %sollol demo --temperature 0 "What is {{ topic }}?"

            %%sollol reply << demo --chat tour
            What is a coordinator?

            %%sollol demo --background --quiet --out handle
            What is a layer plan?

            handle.result(60).text
        """
        assert self.shell is not None
        model = named_model(call.arguments.model_and_prompt, call.cell)
        request = cell_request(call, session.settings().request_defaults(model))
        check_can_ask(
            self.shell,
            request.options,
            by_default=bool(session.settings().confirm_tools),
            background=request.background,
        )
        router = session.router()
        chunks = _stream(router, request)
        shown = clients.shown_answer(request.model) if not request.quiet else None
        if shown is not None:
            chunks = shown.follow(chunks)
        if request.background:
            handle = BackgroundAnswer(
                request,
                chunks,
                router.events,
                partial(clients.make_display, shown) if shown is not None else None,
                keep=partial(session.remember, request.prompt),
                on_shown=shown.end if shown is not None else None,
            )
            self._keep_as(request.out, handle)
            return handle

        def keep(completion: Completion) -> None:
            session.remember(request.prompt, completion)
            self._keep_as(request.out, completion)
            self.shell.displayhook.update_user_ns(completion)  # type: ignore[union-attr]  # as `_`, Out[n]

        with cell_view(request, shown) as view:
            value = stream_into_cell(request, chunks, router.events, view, keep=keep)
        self._keep_as(request.out, value)
        completion = value if isinstance(value, Completion) else value.attrs["completion"]
        session.remember(request.prompt, completion)
        hint = "" if request.quiet or request.raw else session.hint(completion)
        if hint:
            print(hint)
        hide_once(self.shell, value)
        return value

    def _keep_as(self, name: str | None, value: object) -> None:
        assert self.shell is not None
        if name is not None:
            self.shell.user_ns[name] = value

    @magic_line.options_magic()
    @magic_arguments()
    @argument("count", nargs="?", type=magic_line.whole_number, metavar="N", help="the newest N; default: 1")
    @line_magic
    def sollol_last(self, call: magic_line.Call) -> Completion | list[Completion]:
        """Show the newest answers of this notebook again, with their questions: also those that ended early, and
        those whose output is lost, since the page was closed while they were generated.

        Example::

            %sollol demo "What is a worker?"

            %sollol_last

            answers = %sollol_last 3
        """
        count = call.arguments.count
        last = session.last_answers(count or 1)
        if not last:
            raise UsageError("%sollol_last: this notebook has no answer yet")
        for prompt, answer in last:
            question = shortened(" ".join(prompt.split()), SHOWN_QUESTION_CHARS)
            display({"text/plain": f"> {question}", "text/markdown": f"> {escaped(question)}"}, raw=True)
            display(answer)
            offer_copying(answer)
        answers = [answer for _, answer in last]
        value = answers if count else answers[-1]
        hide_once(self.shell, value)
        return value

    @magic_line.options_magic()
    @magic_arguments()
    @argument("name", nargs="?", help="the conversation; default: list all")
    @argument("--messages", action="store_true", help="return its messages as a list")
    @argument("--save", metavar="FILE", help="save it to a JSON file")
    @argument("--load", metavar="FILE", help="load it from such a file, replacing a conversation of this name")
    @argument("--forget", action="store_true", help="delete it; without a name, all of this notebook")
    @argument("--clear", action="store_true", help="delete it")
    @line_magic
    def sollol_chat(self, call: magic_line.Call) -> Chat | ChatBook | list[dict[str, Any]] | None:
        """Show a conversation, return its messages, save it, load it, or delete it.

        Conversations are kept for the next kernel of this notebook, in a file that only you can read (setting
        `keep_chats`), until you delete them. With a conversation its saved contexts are deleted, too (see
        `sollol-nb contexts`).

        Example::

            %sollol demo --chat tour "What is a worker?"

            %sollol_chat

            %sollol_chat tour

            messages = %sollol_chat tour --messages

            %sollol_chat tour --save tour.json

            %sollol_chat copy --load tour.json

            %sollol_chat tour --clear

            %sollol_chat --forget
        """
        arguments = call.arguments
        chats = session.chats()
        if arguments.name is None:
            if arguments.forget:
                forgotten = [*chats.values()]
                print(f"deleted {counted(len(chats.forget()), 'conversation')}")
                _forget_contexts(forgotten)
                return None
            if arguments.messages or arguments.save or arguments.load or arguments.clear:
                raise UsageError("%sollol_chat: name the conversation, such as %sollol_chat tour")
            return chats
        if arguments.load is not None:
            chats.add(Chat.load(arguments.load, name=arguments.name), replace=True)
        chat = chats.find(arguments.name)
        if arguments.save is not None:
            print(f"saved conversation {chat.name} to {chat.export(arguments.save)}")
        if arguments.clear or arguments.forget:
            _forget_contexts([chats.remove(arguments.name)])
        if arguments.messages:
            return chat.to_messages()
        return None if arguments.save is not None or arguments.clear or arguments.forget else chat


def _forget_contexts(chats: Sequence[Chat]) -> None:
    why = session.forget_contexts(chats)
    if why:
        print(why)


def _stream(router: HybridRouter, request: CellRequest) -> AsyncGenerator[Chunk, None]:
    """The answer's stream, which continues its conversation if it belongs to one."""
    if request.chat is None:
        return router.stream_async(request.model, request.messages, **request.stream_options)
    chats = session.chats()
    if request.reset:
        chats.add(Chat(request.chat), replace=True)
    chat = chats.open(request.chat)
    restored = chats.restored(request.chat)
    if restored is not None and not (request.quiet or request.raw):
        print(f"continuing {restored.title} (from an earlier kernel; --reset starts it over)")
    if request.system is not None and not (request.system_is_default and chat.system):
        chat.system = request.system
    options = {**request.stream_options, "conversation": chat.name}
    return ask_in_chat(router.stream_async, chat, request.model, request.message, **options)
