"""The `?` help of every magic: it has examples, and they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kernels import MAGICS, Kernel, notebook_kernel
from tests.support.magic_examples import run_examples

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded, in an empty folder."""
    folder = tmp_path_factory.mktemp("kernel")
    with notebook_kernel(folder / "state", f"%cd -q {folder}") as fresh:
        yield fresh


def test_all_magics_are_known_here(notebook: Kernel) -> None:
    known = "sorted(m for m in get_ipython().magics_manager.magics['line'] if m.startswith('sollol'))"
    assert notebook.value(known) == repr(list(MAGICS))


@pytest.mark.parametrize("magic", MAGICS)
def test_the_examples_of_a_magic_run(notebook: Kernel, magic: str) -> None:
    run_examples(notebook, magic)


@pytest.mark.parametrize("magic", MAGICS)
def test_the_question_mark_shows_the_help(notebook: Kernel, magic: str) -> None:
    payload = notebook.reply(notebook.client.execute(f"%{magic}?"))["payload"]
    assert "Example::" in payload[0]["data"]["text/plain"]
