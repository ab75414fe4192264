"""When a running model moves to a better layout: pure decisions, so that it never moves back and forth.

A move ends a coordinator and loads the model again, so an offer of a better layout is taken only if

- it is at least `MIN_GAIN` faster, for `CONFIRMATIONS` answers one after the other;
- what it saves within `HORIZON_S`, at the rate of the last requests, is more than the load takes;
- the last move was long enough ago. That pause doubles after each move that failed, or brought less than half of
  what was predicted, and is the first one again after a move that kept its promise;
- it does not lead back to a layout that was left a short time ago. That time doubles each time the same layout is
  left, so a worker that is slow every other hour causes a few moves, not hundreds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from sollol_nb.layers.plan import LayerPlan

MIN_GAIN = 0.2
"""Share of the time per token. Predictions are off by up to 10 %, and measured times vary by as much."""
CONFIRMATIONS = 5
HORIZON_S = 1800.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 120.0, 86_400.0
FIRST_RETURN_S = 600.0
KEPT_PROMISE = 0.5
ALIKE_SHARE = 0.2
"""Two layouts are the same if at most this share of the units is on other workers."""
LAYOUTS_KEPT = 20

Layout: TypeAlias = tuple[tuple[str, int], ...]
"""Endpoints with their units, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A better layout for a running model, as predicted at one moment.

    Attributes:
        layout: the better one.
        now_ms, then_ms: time per token with the running layout, and with the better one.
        load_s: how long the model takes to load.
        tokens_per_s: generated in the last minutes, on average, pauses between the requests included.
    """

    layout: Layout
    now_ms: float
    then_ms: float
    load_s: float
    tokens_per_s: float

    @property
    def gain(self) -> float:
        """Share of the time per token that it saves."""
        return 1 - self.then_ms / self.now_ms if self.now_ms > 0 else 0.0

    @property
    def saved_s(self) -> float:
        """Seconds that it would save within `HORIZON_S` if as many requests follow."""
        return max(0.0, self.now_ms - self.then_ms) / 1000 * self.tokens_per_s * HORIZON_S


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftLayout:
    """A layout that was left.

    Attributes:
        layout: the layout.
        until_s: before this time it is not used again.
        pause_s: how long that was after it had been left.
    """

    layout: Layout
    until_s: float
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveHistory:
    """What is known of the moves of one model.

    Attributes:
        layout: the running one.
        confirmed: answers one after the other, up to now, after which there was an offer.
        moved_s: when it moved last; None before the first move.
        pause_s: how long it stays after a move.
        before_ms, promised_ms: time per token before the last move, and as predicted for after it; None once the
            move was judged.
        left: layouts that were left, the last one at the end.
    """

    layout: Layout
    confirmed: int = 0
    moved_s: float | None = None
    pause_s: float = FIRST_PAUSE_S
    before_ms: float | None = None
    promised_ms: float | None = None
    left: tuple[LeftLayout, ...] = ()


def after_answer(history: MoveHistory, offer: Offer | None) -> MoveHistory:
    """The history after an answer with, or without, an offer."""
    is_better = offer is not None and offer.gain >= MIN_GAIN
    return replace(history, confirmed=history.confirmed + 1 if is_better else 0)


def reason_to_stay(history: MoveHistory, offer: Offer, now_s: float) -> str:
    """Why the offer is not taken now; "" if it is."""
    if offer.gain < MIN_GAIN:
        return f"it is only {offer.gain:.0%} faster"
    if history.confirmed < CONFIRMATIONS:
        return f"it was better after {history.confirmed} of {CONFIRMATIONS} answers"
    if offer.saved_s <= offer.load_s:
        saved = f"within {HORIZON_S / 60:g} min it would save {offer.saved_s:.0f} s"
        return f"{saved}, and loading takes {offer.load_s:.0f} s"
    if history.moved_s is not None and now_s < history.moved_s + history.pause_s:
        return f"the last move was {now_s - history.moved_s:.0f} s ago, less than {history.pause_s:.0f} s"
    for left in history.left:
        if now_s < left.until_s and are_alike(left.layout, offer.layout):
            wait_s = left.until_s - now_s
            return f"this layout was left a short time ago; it is used again in {wait_s:.0f} s at the earliest"
    return ""


def after_move(history: MoveHistory, offer: Offer, now_s: float) -> MoveHistory:
    """The history after the offer was taken."""
    before = next((left for left in history.left if are_alike(left.layout, history.layout)), None)
    pause_s = min(before.pause_s * 2, LONGEST_PAUSE_S) if before else FIRST_RETURN_S
    others = tuple(left for left in history.left if left is not before)
    left = LeftLayout(layout=history.layout, until_s=now_s + pause_s, pause_s=pause_s)
    return replace(
        history,
        layout=offer.layout,
        confirmed=0,
        moved_s=now_s,
        before_ms=offer.now_ms,
        promised_ms=offer.then_ms,
        left=(*others, left)[-LAYOUTS_KEPT:],
    )


def after_failed_move(history: MoveHistory, now_s: float) -> MoveHistory:
    """The history after the offer was taken and the model could not be started with it: like a move that brought
    nothing."""
    pause_s = min(history.pause_s * 2, LONGEST_PAUSE_S)
    return replace(history, confirmed=0, moved_s=now_s, pause_s=pause_s, before_ms=None, promised_ms=None)


def after_judgement(history: MoveHistory, measured_ms: float) -> MoveHistory:
    """The history once the time per token after the last move was measured."""
    if history.before_ms is None or history.promised_ms is None:
        return history
    brought, promised = history.before_ms - measured_ms, history.before_ms - history.promised_ms
    kept = brought >= KEPT_PROMISE * promised
    pause_s = FIRST_PAUSE_S if kept else min(history.pause_s * 2, LONGEST_PAUSE_S)
    return replace(history, pause_s=pause_s, before_ms=None, promised_ms=None)


def layout_of(plan: LayerPlan) -> Layout:
    """The layout of a plan."""
    return tuple((shard.endpoint, shard.unit_count) for shard in plan.shards)


def are_alike(one: Layout, other: Layout) -> bool:
    """Whether both give nearly the same number of units to each worker."""
    first, second = dict(one), dict(other)
    moved = sum(abs(first.get(name, 0) - second.get(name, 0)) for name in {*first, *second}) / 2
    return moved <= ALIKE_SHARE * max(sum(first.values()), sum(second.values()))
