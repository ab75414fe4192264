"""`{{ expression }}` is replaced by its value; everything else in a prompt stays as it is."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.text.expansion import Template, expand


async def later() -> None:
    """Is never awaited."""


class Moody:
    """Fails when it is looked at."""

    @property
    def mood(self) -> str:
        raise RuntimeError("not\ntoday")

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.fixture
def variables() -> dict[str, Any]:
    return {
        "df": pd.DataFrame({"x": [1, 2], "y z": [3, 4]}),
        "x": 3,
        "name": "Ünï",
        "nested": {"a": {"b": 1}},
        "html": "<b>&</b>",
        "braces": "{{ x }}",
        "result": 7,
        "answer": Completion(message={"content": "said"}),
        "moody": Moody(),
        "config": {"alpha": 1},
        "rows": ["a", "b"],
        "later": later,
        "_": "the last",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain\n",
        '{"a": {"b": 1}}',
        '{"a": {"b": {"c": []}}}}}',
        "{% for i in x %}{# note #}{% endfor %}",
        "f'{x}' % {x} ${x} {x",
        "line\r\nends\r",
        "```css\na { b: c }}\n```",
    ],
)
def test_text_without_double_braces_is_untouched(text: str) -> None:
    assert expand(text, {"x": 1}) == text


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("{{ x }}", "3"),
        ("a {{x}} b\n\n", "a 3 b\n\n"),
        ("{{x}}{{ x }}", "33"),
        ("{{ x\n + 1 }}", "4"),
        ("{{ name }}", "Ünï"),
        ("{{ name | upper }}", "ÜNÏ"),
        ("{{ nested.a.b + 1 }}", "2"),
        ("{{ nested }}", '{"a": {"b": 1}}'),
        ("{{ df.shape }}", "[2, 2]"),
        ("{{ df['y z'].sum() }}", "7"),
        ("{{ df.iloc[0, 1] }}", "3"),
        ("{{ len(df[df.x > 1]) }}", "1"),
        ("{{ answer }}", "said"),
        ("{{ html }}", "<b>&</b>"),
        ("{{ result }} {{ result + 1 }}", "7 8"),
        ("{{ _ }}", "the last"),
        # Values are not expanded again, and braces can be written.
        ("{{ braces }}", "{{ x }}"),
        ("{{ '{{' }} x {{ '}}' }}", "{{ x }}"),
        # What else has braces stays, beside and inside of an expression.
        ('{"a": {"b": {{ x }} }}', '{"a": {"b": 3 }}'),
        ('{{ {"a": {"b": x}} }}', '{"a": {"b": 3}}'),
        ('{{ {"a": x}}}', '{"a": 3}'),
        ("{% raw %}{{ x }}{# no #}", "{% raw %}3{# no #}"),
        ("{{ '{%' }} %} #}", "{% %} #}"),
        ("```jinja\n{% if a %}\n```\n# {{ x }}\n## b", "```jinja\n{% if a %}\n```\n# 3\n## b"),
        (r"\frac{{x}}{{x}}", r"\frac33"),  # by design
        # Python's own names, unless the notebook has its own.
        ("{{ rows | map('upper') | list }}", '["A", "B"]'),
        ("{{ later }}", 'async def later() -> None:\n    """Is never awaited."""'),
        ("{{ len('abc') }} {{ list(range(3)) }} {{ str(x) + '!' }}", "3 [0, 1, 2] 3!"),
        ("{{ True }} {{ None }}", "True None"),
        ("{{ readable('text') }}", "text"),
        # Jinja's ways with what may not exist.
        ("{{ nothing | default('none') }}", "none"),
        ("{{ nothing if nothing is defined else 'none' }}", "none"),
        ("a  {{- x -}}  b", "a3b"),
    ],
)
def test_expressions_become_values(text: str, expanded: str, variables: dict[str, Any]) -> None:
    assert expand(text, variables) == expanded


def test_values_become_readable(variables: dict[str, Any]) -> None:
    assert "| x | y z |\n| --- | --- |\n| 1 | 3 |" in expand("The data:\n{{ df }}", variables)


def test_self_in_a_method_is_its_object() -> None:
    """In Jinja `self` is the template."""
    variables = {"self": {"name": "Ada", "self": 2}}
    assert expand("{{ self.name }} {{ self['name'] }} {{ self.self }} {{ 'self' }}", variables) == "Ada Ada 2 self"
    with pytest.raises(ConfigError, match=r"^{{ self.name }}: there is no variable self$"):
        expand("{{ self.name }}", {})


def test_a_limit_can_be_given_in_the_expression() -> None:
    text = expand("{{ readable(numbers, limit_chars=200) }}", {"numbers": list(range(1000))})
    assert len(text) <= 200


def test_names_of_the_notebook_come_before_those_of_python() -> None:
    assert expand("{{ len }} {{ readable }} {{ namespace }}", {"len": 1, "readable": 2, "namespace": 3}) == "1 2 3"


def test_variables_are_only_read(variables: dict[str, Any]) -> None:
    before = dict(variables)
    expand("{{ result }} {{ x }}", variables)
    assert list(variables) == list(before)
    assert all(variables[name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ dff }}", "{{ dff }}: there is no variable dff (did you mean df?); --no-expand"),
        ("{{ dff.shape }}", "there is no variable dff (did you mean df?)"),
        ("{{ [qqq, x] }}", "there is no variable qqq; --no-expand"),
        ("{{ 0 or qqq }}", "there is no variable qqq"),
        ("{{ df.nope }}", "has no attribute or item 'nope'"),
        (
            "{{ df.shpae }}",
            "{{ df.shpae }}: DataFrame has no attribute or item 'shpae' (did you mean shape?); --no",
        ),
        ("{{ config.alhpa }}", "{{ config.alhpa }}: dict has no attribute or item 'alhpa' (did you mean alpha?)"),
        ("{{ config['alhpa'] }}", "dict has no attribute or item 'alhpa' (did you mean alpha?)"),
        (
            "{{ rows | map('upper') }}",
            "this is a generator, not its values; write {{ rows | map('upper') | list }}",
        ),
        ("{{ later() }}", "{{ later() }}: this is a coroutine, not its result; await it in another cell"),
        ("{{ nested['nope'] }}", "has no attribute or item 'nope'"),
        ("{{ nested.nope.more }}", "has no attribute or item 'nope'"),
        ("{{ x / 0 }}", "{{ x / 0 }}: ZeroDivisionError: division by zero"),
        ("{{ moody }}", "{{ moody }}: ValueError: no text"),
        ("{{ [moody] }}", "ValueError: no text"),
        ("{{ moody.mood }}", "{{ moody.mood }}: RuntimeError: not today"),
        ("{{ x", "{{ at line 1, column 1 is never closed by }}; --no-expand"),
        ("one {{ x }}\ntwo {{ x }", "{{ at line 2, column 5: unexpected '}'; --no-expand"),
        ("{{ x & 1 }}", "{{ at line 1, column 1: unexpected char '&'"),
        ("{{ 'text }}", "{{ at line 1, column 1: unexpected char"),
        ("\n {{ }}", "at line 2, column 2: "),
        ("{{ [i for i in df] }}", "{{ [i for i in df] }} at line 1, column 1: expected token ',', got 'for'"),
        ("{{ lambda: 1 }}", "{{ lambda: 1 }} at line 1, column 1: "),
        ("{{ x | nofilter }}", "No filter named 'nofilter'"),
        ("{{{ x }}}", "--no-expand"),
        ("{{ input }}", "{{ input }}: this is Python's built-in function, not a variable; --no-expand"),
        ("{{ " + "x + " * 1000 + "nope }}", "…"),
    ],
)
def test_errors_are_one_line_that_names_the_expression(
    text: str, expected: str, variables: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(text, variables, hint="--no-expand sends braces as they are")
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 500


def test_nothing_runs_if_a_later_expression_is_not_closed() -> None:
    calls: list[int] = []
    with pytest.raises(ConfigError):
        expand("{{ calls.append(1) }} {{ x", {"calls": calls})
    assert calls == []


def test_nothing_runs_if_a_later_expression_is_none() -> None:
    calls: list[int] = []
    with pytest.raises(ConfigError, match="nofilter"):
        expand("{{ calls.append(1) }} {{ x | nofilter }}", {"calls": calls, "x": 1})
    assert calls == []


def test_a_template_is_filled_many_times() -> None:
    template = Template("{{ x + 1 }} of {{ y }}")
    assert [template.fill({"x": x, "y": "z"}) for x in range(3)] == ["1 of z", "2 of z", "3 of z"]
    with pytest.raises(ConfigError, match=r"^\{\{ x \+ 1 \}\}: there is no variable x$"):
        template.fill({"y": 1})
