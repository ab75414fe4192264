"""A death costs a switch to the standby, with a model that never wavers and with a real one."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from tests.lasting import standby
from tests.support.engines import posix_only
from tests.support.mid_answer import wire_to

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("alone"), posix_only]


@pytest.mark.parametrize(("subject", "trials"), [(standby.demo, 2), (standby.real, 1)])
def test_nothing_is_lost_and_no_model_is_loaded_before_the_next_token(subject: object, trials: int) -> None:
    with ExitStack() as wires:

        def wired(port: int) -> str:  # while an answer is read late, the workers wait
            return wires.enter_context(wire_to(port))

        switches = list(standby.play(subject(), trials, random.Random(1), wired))  # type: ignore[operator]
    assert [switch.is_whole for switch in switches] == [True] * trials
    assert [switch.failovers for switch in switches] == [1] * trials


def test_the_goal_is_missed_where_too_many_switches_cost_too_much() -> None:
    def cost(ms: float) -> standby.Switch:
        return standby.Switch("worker", gap_ms=ms + 5000, engine_ms=5000, is_whole=True, failovers=1)

    assert standby.within([cost(100)] * 96 + [cost(2000)] * 4).is_met
    assert not standby.within([cost(100)] * 90 + [cost(2000)] * 10).is_met
    assert not standby.within([cost(100), cost(float("inf"))]).is_met
