"""The name that somebody meant: near ones are found, far ones are not guessed."""

from __future__ import annotations

import pytest

from sollol_nb.text.nearest import nearest, nearest_variable


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("temprature", ["temperature", "top_p"], "temperature"),
        ("--tempratur", ["--temperature", "--top-p"], "--temperature"),
        ("--max_token", ["--max-tokens", "--model"], "--max-tokens"),
        ("strat", ["start", "stop"], "start"),
        ("STOP", ["start", "stop"], "stop"),
        ("evn", ["even", "memory_aware"], "even"),
        ("trop", ["plan", "trip"], "trip"),
        ("nope", ["start", "stop", "discover", "add", "remove"], None),
        ("--help", ["--schema", "--temperature"], None),
        ("-h", ["--chat"], None),
        ("-t", ["--out", "--temperature"], None),
        ("pie", ["speed", "total", "ttft"], None),
        ("ab", ["ac"], None),
        ("x" * 10_000, ["x" * 9_999], None),
        ("", ["a"], None),
    ],
)
def test_only_a_near_name_is_suggested(name: str, known: list[str], found: str | None) -> None:
    assert nearest(name, known) == found


def test_variables_that_everybody_has_are_not_suggested() -> None:
    assert nearest_variable("opne", ["open", "In", "Out", "_topic", 3]) is None
    assert nearest_variable("topc", ["open", "topic", "_topc"]) == "topic"
