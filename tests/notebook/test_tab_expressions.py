"""Tab inside `{{ }}`: what is offered there, whatever prose is around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import polars
import pytest

from sollol_nb.notebook.tab_expressions import offers, open_expression
from tests.support.kernels import Kernel, kernel

ran: list[str] = []


class Person:
    """Says when its code runs."""

    name = "Ada"

    @property
    def age(self) -> int:
        ran.append("age")
        return 36


class Broken:
    def __dir__(self) -> list[str]:
        raise RuntimeError

    def _ipython_key_completions_(self) -> list[str]:
        raise RuntimeError


NAMESPACE: dict[str, Any] = {
    "frame": pd.DataFrame({"column_one": [1], "two words": [2]}),
    "table": polars.DataFrame({"column_two": [1]}),
    "conf": {"alpha": {"beta": 1}, "two words": 2, 3: 4},
    "fruit": "apple",
    "person": Person(),
    "broken": Broken(),
    "_hidden": 1,
}


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("a {{ fra", " fra"),
        ("It's {{ fra", " fra"),
        ("{{ a }} {{ b", " b"),
        ('{{ {"a": x', ' {"a": x'),
        ("a {{\nb", "\nb"),
        ("{{ a }} b", None),
        ("{ a", None),
        ("", None),
    ],
)
def test_the_expression_at_the_cursor(text: str, expression: str | None) -> None:
    assert open_expression(text) == expression


@pytest.mark.parametrize(
    ("expression", "fragment", "texts"),
    [
        (" fr", "fr", {"frame", "fruit", "frozenset"}),
        (" ", "", {"frame", "table", "conf", "fruit", "person", "broken"}),
        (" _h", "_h", {"_hidden"}),
        (" reada", "reada", {"readable"}),
        (" len(fru", "fru", {"fruit"}),
        (" x + fru", "fru", {"fruit"}),
        (" frame.column_", "column_", {"column_one"}),
        (" frame['", "'", {"'column_one'", "'two words'"}),
        (' frame["two', '"two', {'"two words"'}),
        (" table['col", "'col", {"'column_two'"}),
        (" conf.al", "al", {"alpha"}),
        (" conf['alpha']['", "'", {"'beta'"}),
        (" conf.alpha.be", "be", {"beta"}),
        (" conf.it", "it", {"items"}),
        (" person.na", "na", {"name"}),
        (" person.__cla", "__cla", {"__class__"}),
        (" fruit | upp", "upp", {"upper"}),
        (" fruit|upp", "upp", {"upper"}),
    ],
)
def test_what_may_stand_there_is_offered(expression: str, fragment: str, texts: set[str]) -> None:
    offered = offers(expression, NAMESPACE)
    assert offered is not None
    assert (offered.fragment, set(offered.texts)) == (fragment, texts)


@pytest.mark.parametrize(
    "expression",
    [" nothing", " nothing.at", " broken.a", " broken['", " f(x).a", " 'text", " 3.", " person.age.re"],
)
def test_nothing_is_offered_where_nothing_is_known(expression: str) -> None:
    assert offers(expression, NAMESPACE) is None
    assert ran == []


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path_factory.mktemp("state"))) as fresh:
        assert fresh.run("%load_ext sollol_nb\nfrukt = 'epple'\nconf = {'alpha': 1}").error == []
        yield fresh


@pytest.mark.parametrize(
    ("code", "completed"),
    [
        ("%%sollol demo\nIt's a {{ fru", "%%sollol demo\nIt's a {{ frukt"),
        (
            "%%sollol demo\nOne\n\nIt's {{ frukt }}, {{ conf.al",
            "%%sollol demo\nOne\n\nIt's {{ frukt }}, {{ conf.alpha",
        ),
        ("%sollol demo \"Don't say {{ fruk", "%sollol demo \"Don't say {{ frukt"),
        ("%sollol demo --system {{ fruk", "%sollol demo --system {{ frukt"),
    ],
)
def test_a_kernel_completes_expressions(notebook: Kernel, code: str, completed: str) -> None:
    content = notebook.reply(notebook.client.complete(code, len(code)))
    assert [code[: content["cursor_start"]] + match for match in content["matches"]] == [completed]


@pytest.mark.parametrize("code", ["%%sollol demo\nIt's fru", "%%time\nx = '{{ fru", "x = '{{ fru"])
def test_other_text_is_left_to_ipython(notebook: Kernel, code: str) -> None:
    content = notebook.reply(notebook.client.complete(code, len(code)))
    assert "frukt" not in content["matches"]
