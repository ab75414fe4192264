"""A model moves to a better layout where that pays, and never back and forth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from sollol_nb.layers.replan import (
    CONFIRMATIONS,
    FIRST_PAUSE_S,
    FIRST_RETURN_S,
    Layout,
    MoveHistory,
    Offer,
    after_answer,
    after_failed_move,
    after_judgement,
    after_move,
    are_alike,
    reason_to_stay,
)

OVER_THREE: Layout = (("w0", 10), ("w1", 10), ("w2", 11))
OVER_TWO: Layout = (("w0", 15), ("w1", 16))
OFFER = Offer(layout=OVER_TWO, now_ms=30.0, then_ms=20.0, load_s=20.0, tokens_per_s=5.0)
CONFIRMED = MoveHistory(layout=OVER_THREE, confirmed=CONFIRMATIONS)


def test_an_offer_is_taken_that_is_better_for_some_answers_and_earns_the_load() -> None:
    history = MoveHistory(layout=OVER_THREE)
    for _ in range(CONFIRMATIONS):
        assert reason_to_stay(history, OFFER, 0.0)
        history = after_answer(history, OFFER)

    assert reason_to_stay(history, OFFER, 0.0) == ""


@pytest.mark.parametrize(
    ("history", "offer", "reason"),
    [
        (CONFIRMED, replace(OFFER, then_ms=25.0), "it is only 17% faster"),
        (after_answer(CONFIRMED, None), OFFER, "it was better after 0 of 5 answers"),
        (CONFIRMED, replace(OFFER, tokens_per_s=0.5), "within 30 min it would save 9 s, and loading takes 20 s"),
        (replace(CONFIRMED, moved_s=990.0), OFFER, "the last move was 10 s ago, less than 120 s"),
        (
            replace(after_move(replace(CONFIRMED, layout=OVER_TWO), OFFER, 500.0), confirmed=9),
            OFFER,
            "this layout was left a short time ago; it is used again in 100 s at the earliest",
        ),
    ],
)
def test_an_offer_is_not_taken(history: MoveHistory, offer: Offer, reason: str) -> None:
    assert reason_to_stay(history, offer, 1000.0) == reason


def test_the_pause_doubles_after_each_move_that_does_not_bring_what_was_predicted() -> None:
    moved = after_move(CONFIRMED, OFFER, 0.0)

    disappointed = after_judgement(after_move(after_judgement(moved, 28.0), OFFER, 1.0), 26.0)
    assert disappointed.pause_s == 4 * FIRST_PAUSE_S
    assert after_judgement(disappointed, 1.0) == disappointed, "each move is judged once"
    assert after_judgement(after_move(disappointed, OFFER, 2.0), 21.0).pause_s == FIRST_PAUSE_S


def test_a_move_that_fails_is_not_tried_again_at_once() -> None:
    failed = replace(after_failed_move(CONFIRMED, 0.0), confirmed=CONFIRMATIONS)

    assert failed.layout == OVER_THREE
    assert reason_to_stay(failed, OFFER, 2 * FIRST_PAUSE_S - 1)
    assert reason_to_stay(failed, OFFER, 2 * FIRST_PAUSE_S + 1) == ""
    assert after_failed_move(failed, 0.0).pause_s == 4 * FIRST_PAUSE_S


def test_each_time_that_a_layout_is_left_it_is_avoided_for_twice_as_long() -> None:
    back = replace(OFFER, layout=OVER_THREE)
    history, pauses = CONFIRMED, []
    for _ in range(3):
        history = after_move(history, OFFER, 0.0)
        pauses.append(next(left.pause_s for left in history.left if left.layout == OVER_THREE))
        history = after_move(history, back, 0.0)

    assert pauses == [FIRST_RETURN_S, 2 * FIRST_RETURN_S, 4 * FIRST_RETURN_S]


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (OVER_THREE, True),
        ((("w1", 9), ("w0", 11), ("w2", 11)), True),
        ((("w0", 14), ("w1", 13), ("w2", 4)), False),
        (OVER_TWO, False),
    ],
)
def test_layouts_that_differ_by_a_few_units_are_alike(other: Layout, alike: bool) -> None:
    assert are_alike(OVER_THREE, other) is alike


# --- hours of requests ------------------------------------------------------------------------


@dataclass
class Session:
    """A model on three workers, of which the last changes its speed; an answer of 100 tokens every few seconds.

    Speeds are estimated from what the last answers took, which varies.
    """

    slowness: Callable[[float], float]
    noise: float
    seed: int
    hours: float = 12.0
    moves: list[float] = field(default_factory=list)
    waited_s: float = 0.0

    UNIT_MS = 1.0
    LOAD_S = 20.0
    TOKENS = 100

    def token_ms(self, layout: Layout, slowness: float) -> float:
        return sum(units * self.UNIT_MS * (slowness if name == "w2" else 1.0) for name, units in layout)

    def run(self, *, is_moving: bool = True) -> Session:
        chance, now_s, seen = random.Random(self.seed), 0.0, [1.0] * 5
        history = MoveHistory(layout=OVER_THREE)
        since_move = 0
        while now_s < self.hours * 3600:
            factor = self.slowness(now_s)
            token_ms = self.token_ms(history.layout, factor) * chance.lognormvariate(0, self.noise)
            now_s += token_ms * self.TOKENS / 1000 + chance.expovariate(1 / 5)
            self.waited_s += token_ms * self.TOKENS / 1000
            seen = [*seen[1:], factor * chance.lognormvariate(0, self.noise)]
            estimate, since_move = sorted(seen)[2], since_move + 1
            if since_move == 5:
                history = after_judgement(history, token_ms)
            best = min((OVER_THREE, OVER_TWO), key=lambda layout: self.token_ms(layout, estimate))
            # Every worker that takes part costs a hop, so the two are never equal.
            now_ms, then_ms = (self.token_ms(layout, estimate) for layout in (history.layout, best))
            offer = Offer(
                layout=best, now_ms=now_ms, then_ms=then_ms, load_s=self.LOAD_S, tokens_per_s=self.TOKENS / 10
            )
            history = after_answer(history, offer)
            if is_moving and not reason_to_stay(history, offer, now_s):
                history, since_move = after_move(history, offer, now_s), 0
                now_s += self.LOAD_S
                self.waited_s += self.LOAD_S
                self.moves.append(now_s)
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_noise_alone_causes_no_move(noise: float, seed: int) -> None:
    assert Session(lambda _: 1.0, noise, seed).run().moves == []


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_that_becomes_slow_for_hours_causes_one_move_and_one_back(seed: int) -> None:
    session = Session(lambda now_s: 4.0 if 3600 < now_s < 4 * 3600 else 0.4, 0.15, seed)

    assert len(session.run().moves) == 2
    assert session.waited_s < Session(session.slowness, 0.15, seed).run(is_moving=False).waited_s


@pytest.mark.parametrize("period_s", [60.0, 300.0, 1200.0, 3600.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_oscillates_causes_a_few_moves(period_s: float, seed: int) -> None:
    """However it oscillates: at most as many as doubled pauses fit into the time."""
    slowness: Callable[[float], float] = lambda now_s: 4.0 if now_s % period_s < period_s / 2 else 0.3  # noqa: E731
    session = Session(slowness, 0.2, seed).run()

    doublings = math.log2(session.hours * 3600 / FIRST_RETURN_S)
    assert len(session.moves) <= 2 * (doublings + 1)
    assert all(later - earlier >= FIRST_PAUSE_S for earlier, later in pairwise(session.moves))
