"""The `?` help of every magic: it has examples, and they run."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.kernels import MAGICS, Kernel, notebook_kernel

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded, in an empty folder."""
    folder = tmp_path_factory.mktemp("kernel")
    with notebook_kernel(folder / "state", f"%cd -q {folder}") as fresh:
        yield fresh


def examples(help_: str) -> list[str]:
    """The cells of a magic's examples: paragraphs after `Example::`, up to the next text at the margin."""
    indented = re.search(r"Example::\n\n((?: +.*\n|\n)+)", help_)
    assert indented is not None, help_
    paragraphs = re.split(r"\n\s*\n", indented[1].strip("\n"))
    return ["\n".join(line.strip() for line in text.splitlines()) for text in paragraphs if text.strip()]


def test_all_magics_are_known_here(notebook: Kernel) -> None:
    known = "sorted(m for m in get_ipython().magics_manager.magics['line'] if m.startswith('sollol'))"
    assert notebook.value(known) == repr(list(MAGICS))


@pytest.mark.parametrize("magic", MAGICS)
def test_the_examples_of_a_magic_run(notebook: Kernel, magic: str) -> None:
    help_ = eval(notebook.value(f"get_ipython().magics_manager.magics['line'][{magic!r}].__doc__"))
    cells = examples(help_)
    assert cells
    assert any(magic in cell for cell in cells)
    for cell in cells:
        shown = notebook.run(cell)
        if cell == "%sollol_cluster remove 192.168.1.10:50052":  # `add` has not taken it: nothing runs there
            assert "ConfigError: 192.168.1.10:50052 is not a known worker" in shown.error[0]
            continue
        if cell == "%sollol_connect http://head:11440":  # there is no such machine
            assert "GatewayUnavailableError: no gateway answers at http://head:11440" in shown.error[0]
            continue
        assert (shown.error, [line for line in shown.stream.splitlines() if "Error" in line]) == ([], []), cell


@pytest.mark.parametrize("magic", MAGICS)
def test_the_question_mark_shows_the_help(notebook: Kernel, magic: str) -> None:
    notebook.client.execute(f"%{magic}?")
    payload = notebook.reply("execute_reply")["content"]["payload"]
    assert "Example::" in payload[0]["data"]["text/plain"]
