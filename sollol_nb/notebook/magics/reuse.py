"""`%sollol_insert` puts the code of an answer into the next cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import SollolError
from sollol_nb.notebook import magic_line, session
from sollol_nb.text.code_blocks import CodeBlock
from sollol_nb.text.safe_markdown import printable
from sollol_nb.text.tables import counted

PYTHON = ("", "python", "python3", "py", "ipython", "ipython3")
"""Languages of code blocks that a cell runs as they are."""


@magics_class
class ReuseMagics(Magics):
    """`%sollol_insert`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument(
        "block",
        nargs="?",
        type=magic_line.whole_number,
        metavar="N",
        help="the Nth code block of the answer; default: all of Python, or the first that a cell can run",
    )
    @argument("--answer", metavar="VAR", help="the answer in this variable; default: the last one")
    @line_magic
    def sollol_insert(self, call: magic_line.Call) -> None:
        """Put the code of the last answer into a new cell below, to be read, changed and run.

        Code in a language that has a cell magic, such as bash, gets its `%%bash`. Nothing is run.

        Example::

            %sollol demo --out reply "Write a function in Python."

            %sollol_insert

            %sollol_insert 2

            %sollol_insert --answer reply
        """
        assert self.shell is not None
        blocks = self._answer(call).code
        if not blocks:
            raise SollolError('the answer has no code block; ask for one, such as "as a ```python block"')
        number = call.arguments.block
        if number is not None and number > len(blocks):
            raise SollolError(f"the answer has {counted(len(blocks), 'code block')}, and so no block {number}")
        chosen = blocks if number is None else [blocks[number - 1]]
        self.shell.set_next_input(cell_of(chosen, self._has_cell_magic))

    def _answer(self, call: magic_line.Call) -> Completion:
        if call.arguments.answer is None:
            last = session.last_answers(1)
            if not last:
                raise UsageError("%sollol_insert: this notebook has no answer yet; ask with %%sollol first")
            return last[-1][1]
        answer = call.named_value(call.arguments.answer, "--answer")
        if isinstance(answer, Completion):
            return answer
        completion = getattr(answer, "completion", None)  # of an answer in the background
        if not isinstance(completion, Completion):
            raise UsageError(f"%sollol_insert: {call.arguments.answer} is not an answer that has ended")
        return completion

    def _has_cell_magic(self, name: str) -> bool:
        assert self.shell is not None
        return name.isidentifier() and self.shell.find_cell_magic(name) is not None


def cell_of(blocks: Sequence[CodeBlock], has_cell_magic: Callable[[str], bool]) -> str:
    """The cell for these code blocks: all that are Python, else the first that a cell magic runs.

    Raises:
        SollolError: a cell can run none of them.
    """
    python = [block for block in blocks if block.language in PYTHON]
    if python:
        return "\n\n".join(printable(block).strip("\n") for block in python)
    for block in blocks:
        if has_cell_magic(block.language):
            return f"%%{block.language}\n{printable(block)}"
    languages = ", ".join(dict.fromkeys(printable(block.language) for block in blocks))
    raise SollolError(f"no cell can run {languages}; the code is in the answer's `.code`")
