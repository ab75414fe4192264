"""A worker that is lost repeatedly is avoided for a while."""

from __future__ import annotations

import pytest

from sollol_nb.llama_cpp.workers.losses import (
    FIRST_COOL_DOWN_S,
    LONGEST_COOL_DOWN_S,
    LOSSES_COUNT_FOR_S,
    WorkerLosses,
)

NAME = "10.0.0.1:50052"


@pytest.mark.parametrize(
    ("lost_at_s", "now_s", "left_s"),
    [
        ([], 0, 0),
        ([0], 1, 0),
        ([0, 10], 10, FIRST_COOL_DOWN_S),
        ([0, 10], 30, FIRST_COOL_DOWN_S - 20),
        ([0, 10], 10 + FIRST_COOL_DOWN_S, 0),
        ([0, 10, 20], 20, 2 * FIRST_COOL_DOWN_S),
        (list(range(10)), 9, LONGEST_COOL_DOWN_S),
        ([0, LOSSES_COUNT_FOR_S], LOSSES_COUNT_FOR_S, 0),
    ],
)
def test_a_worker_cools_down_from_its_second_loss_on(
    monkeypatch: pytest.MonkeyPatch, lost_at_s: list[float], now_s: float, left_s: float
) -> None:
    losses, clock = WorkerLosses(), [0.0]
    monkeypatch.setattr("sollol_nb.llama_cpp.workers.losses.time.monotonic", lambda: clock[0])
    for clock[0] in lost_at_s:
        losses.record(NAME)
    clock[0] = now_s

    assert losses.cool_down_s(NAME) == left_s
    assert losses.cool_down_s("another") == 0
    assert (NAME in losses) is bool(lost_at_s)
