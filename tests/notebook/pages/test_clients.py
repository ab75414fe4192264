"""The clients of a real kernel."""

from __future__ import annotations

from tests.support.kernels import kernel

MISSED = """
%load_ext sollol_nb
from sollol_nb.notebook.pages import clients, watch
clients._clients[0].watch.add(watch.ShownAnswer("demo", "another page"))
"""


def test_the_hint_is_for_a_cell_and_not_for_code_that_the_page_runs_by_itself() -> None:
    with kernel() as fresh:
        assert fresh.run(MISSED).error == []
        hidden = fresh.client.execute("print('inspected')", store_history=False)
        assert fresh.collect(hidden).stream == "inspected\n"
        assert fresh.run("print('hello')").stream == (
            "The page was opened again while demo is answering; this shows the answer:\n%sollol_last\nhello\n"
        )
        assert fresh.run("print('hello')").stream == "hello\n"
