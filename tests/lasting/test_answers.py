"""An answer outlives its page and its kernel, tried twice; `make lasting` tries it more often."""

from __future__ import annotations

import pytest

from tests.lasting import answers

pytestmark = [pytest.mark.engine, pytest.mark.lab]


def test_an_answer_outlives_its_page_and_its_kernel(engine: object) -> None:
    lines: list[str] = []
    goals = answers.run(2, 1, lines.append)
    assert all(goal.is_met for goal in goals), "\n".join([*lines, *map(str, goals)])
