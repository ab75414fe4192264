"""Counts that decide whether a goal is met."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.lasting.__main__ import count
from tests.lasting.goals import Goal, Show, all_of, at_most, percent


def test_all_values_must_be_within_the_limit() -> None:
    assert at_most("tokens", [1, 32, 5], 32).is_met
    missed = at_most("shares", [0.1, 0.2, 0.3], 0.25, percent)
    assert str(missed) == "MISSED shares: median 20.0 %, most 30.0 %, 2 of 3 within (goal: <= 25.0 %)"


def test_nothing_counted_meets_no_goal() -> None:
    assert not at_most("tokens", [], 32).is_met
    assert not all_of("identical", []).is_met
    assert all_of("identical", [True, True]).is_met
    assert not all_of("identical", [True, False]).is_met


@pytest.mark.parametrize("is_met", [True, False])
def test_the_command_prints_every_goal(is_met: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def run(n: int, seed: int, show: Show) -> list[Goal]:
        show(f"trial {n} with seed {seed}")
        return [Goal("first", "1", "1", True), Goal("second", "0", "1", is_met)]

    module = ModuleType("trials", "What it shows.\n\nMore.")
    module.run = run  # type: ignore[attr-defined]
    assert count(module, 3, 7) is is_met
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["What it shows. 3 trials.", "trial 3 with seed 7"]
    assert len(printed) == 6
