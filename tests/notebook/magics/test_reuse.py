"""`%sollol_insert` in a real kernel: the code of an answer of a real engine comes into the next cell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sollol_nb.errors import SollolError
from sollol_nb.notebook.magics.reuse import cell_of
from sollol_nb.text.code_blocks import CodeBlock
from tests.support.coder_model import CODE, write_coder
from tests.support.kernels import Kernel, Shown, notebook_kernel

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel whose variable `coder` names a model that writes code."""
    folder = tmp_path_factory.mktemp("models")
    coder = write_coder(folder / "coder.gguf")
    with notebook_kernel(folder / "state", f"coder = {str(coder)!r}") as fresh:
        yield fresh


def inserted(notebook: Kernel, line: str) -> tuple[Shown, list[str]]:
    """What a cell shows, and the texts that it puts into the next cell."""
    message_id = notebook.client.execute(line)
    reply = notebook.reply(message_id)
    notebook._replies[message_id] = reply
    shown = notebook.collect(message_id)
    inputs = [payload for payload in reply["payload"] if payload["source"] == "set_next_input"]
    assert not any(payload["replace"] for payload in inputs)
    return shown, [payload["text"] for payload in inputs]


def test_without_an_answer_the_message_says_what_to_do(notebook: Kernel) -> None:
    shown, texts = inserted(notebook, "%sollol_insert")
    assert (texts, shown.status) == ([], "error")
    assert "this notebook has no answer yet" in shown.stream


def test_the_code_of_the_last_answer_comes_into_the_next_cell_and_runs_there(notebook: Kernel) -> None:
    asked = notebook.run("%sollol {{ coder }} --temperature 0 --out answer go")
    assert asked.error == []
    assert notebook.value("[(block, block.language) for block in answer.code]") == repr(list(CODE))
    shown, (text,) = inserted(notebook, "%sollol_insert")
    assert (text, shown.displays, shown.stream) == ("total = 40\n\ntotal += 2", [], "")
    notebook.run(text)
    assert notebook.value("total") == "42"


def test_one_block_of_an_answer_in_a_variable_comes_with_its_cell_magic(notebook: Kernel) -> None:
    notebook.run("%sollol {{ coder }} --temperature 0 --out answer go\n%sollol demo --max-tokens 5 later")
    _, (text,) = inserted(notebook, "%sollol_insert 2 --answer answer")
    assert text == "%%bash\nls -l"
    shown, texts = inserted(notebook, "%sollol_insert 9 --answer answer")
    assert (shown.error, texts) == (["SollolError: the answer has 3 code blocks, and so no block 9"], [])


def test_an_answer_without_code_is_named(notebook: Kernel) -> None:
    notebook.run("%sollol demo --max-tokens 5 hi")
    shown, texts = inserted(notebook, "%sollol_insert")
    assert texts == []
    assert shown.error[0].startswith("SollolError: the answer has no code block")
    shown, texts = inserted(notebook, "%sollol_insert --answer coder")
    assert (texts, "coder is not an answer that has ended" in shown.stream) == ([], True)


def test_an_answer_in_the_background_gives_its_code(notebook: Kernel) -> None:
    handle = "%sollol {{ coder }} --temperature 0 --background --quiet --out handle go"
    notebook.run(f"{handle}\nhandle.result(60)")
    _, (text,) = inserted(notebook, "%sollol_insert 1 --answer handle")
    assert text == "total = 40"


def magic_of(name: str) -> bool:
    return name in ("bash", "html")


@pytest.mark.parametrize(
    ("blocks", "cell"),
    [
        ([("x = 1\n", "py"), ("ls", "bash"), ("\ny = 2", "")], "x = 1\n\ny = 2"),
        ([("fn main() {}", "rust"), ("<b>x</b>", "html")], "%%html\n<b>x</b>"),
        ([("a\x1b[31m = \u202e1", "python")], "a = 1"),
    ],
)
def test_the_cell_holds_all_python_or_the_first_block_that_has_a_magic(
    blocks: list[tuple[str, str]], cell: str
) -> None:
    assert cell_of([CodeBlock(*block) for block in blocks], magic_of) == cell


def test_code_that_no_cell_runs_is_not_inserted() -> None:
    with pytest.raises(SollolError, match="no cell can run rust, c"):
        cell_of([CodeBlock("a", "rust"), CodeBlock("b", "c"), CodeBlock("d", "rust")], magic_of)
