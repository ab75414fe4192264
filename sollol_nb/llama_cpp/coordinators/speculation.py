"""Speculation: whether a coordinator drafts tokens, how, and how many at once. Pure.

A drafted token that the model accepts saves the time of one token; verified or not, it makes a batch longer, and
that costs a part of the time of a token: little where round trips dominate, more where a processor computes. So a
draft pays where

    share of drafted tokens that is accepted > cost of a further token in a batch / time of a token alone

N-gram drafts copy what followed the last tokens before, in the same text (`ngram-simple`) or in any text that the
coordinator has seen (`ngram-mod`). They cost nothing where nothing matches. A draft model also costs its own time.
llama-server fixes all this at its start (the fields of a request are compiled out in server-schema.cpp), so it is
chosen there, and what answers have shown counts at the next start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

AUTO, OFF, NGRAM, DRAFT = "auto", "off", "ngram", "draft"

USUAL_COST = 0.45
"""Of a further token in a batch, in times of a token, where it is not known: that of a slow processor nearby."""
LONGEST_COST = 2.0
"""The longest draft costs as much as so many tokens if all of it is wrong."""
SHORTEST, LONGEST = 6, 24
MATCH = 4
"""Tokens that must match in the same text; the draft is as long or longer."""
POOL_MATCH = 16
"""Tokens that must match in another text: llama.cpp advises against fewer."""

ACCEPTED_OF_MODEL = 0.6
"""Share of tokens of a draft model that is accepted, where it was not measured."""
LONGEST_OF_MODEL = 16
GAIN_OF_MODEL = 1.2
"""A draft model takes memory and processor time, so it is used unasked only where this much faster."""

MIN_TOKENS = 200
MIN_SINGLE_TOKENS = 20
"""With fewer tokens measured, nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What a coordinator drafts.

    Attributes:
        kind: `off`, `ngram` or `draft`.
        max_tokens: of a draft.
        match_tokens: how many tokens of the text must match before an n-gram draft.
        draft_model: the GGUF file of the draft model.
        why: the reason, as a part of a sentence.
    """

    kind: str = OFF
    max_tokens: int = 0
    match_tokens: int = 0
    draft_model: Path | None = None
    why: str = ""

    @property
    def is_on(self) -> bool:
        """Whether anything is drafted."""
        return self.kind != OFF

    def describe(self) -> str:
        """One line, such as `n-gram drafts of up to 16 tokens (round trips take 62 % of a token)`."""
        what = "no drafts"
        if self.kind == NGRAM:
            what = f"n-gram drafts of up to {self.max_tokens} tokens"
        elif self.draft_model is not None:
            what = f"drafts of up to {self.max_tokens} tokens from {self.draft_model.name}"
        return f"{what} ({self.why})" if self.why else what

    def flags(self) -> list[str]:
        """llama-server's arguments."""
        if self.kind == DRAFT:
            return [
                *("--spec-type", "draft-simple", "--spec-draft-model", str(self.draft_model)),
                *("--spec-draft-device", "none", "--spec-draft-n-max", str(self.max_tokens)),
            ]
        if self.kind == NGRAM:
            return [
                *("--spec-type", "ngram-simple,ngram-mod"),
                *("--spec-ngram-simple-size-n", str(self.match_tokens)),
                *("--spec-ngram-simple-size-m", str(self.max_tokens)),
                *("--spec-ngram-mod-n-match", str(POOL_MATCH), "--spec-ngram-mod-n-min", "0"),
                *("--spec-ngram-mod-n-max", str(self.max_tokens)),
            ]
        return []

    def with_known(self, flags: frozenset[str]) -> Speculation:
        """This, as far as a build of llama-server has the flags for it: else none."""
        missing = [flag for flag in self.flags() if flag.startswith("--") and flag not in flags]
        if not missing:
            return self
        return Speculation(why=f"this llama-server has no {missing[0]}; update llama.cpp")

    def as_dict(self) -> dict[str, Any]:
        """For a registry entry."""
        return {
            "kind": self.kind,
            "max_tokens": self.max_tokens,
            "match_tokens": self.match_tokens,
            "draft_model": str(self.draft_model) if self.draft_model else None,
            "why": self.why,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Speculation:
        """What `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        return cls(
            kind=str(data["kind"]),
            max_tokens=int(data["max_tokens"]),
            match_tokens=int(data["match_tokens"]),
            draft_model=Path(data["draft_model"]) if data["draft_model"] else None,
            why=str(data["why"]),
        )


NO_SPECULATION = Speculation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What tokens of a model take under its plan, in milliseconds; None where unknown.

    Attributes:
        token_ms: a token alone.
        wait_ms: of that, round trips.
        further_ms: each further token in a batch.
        draft_ms: a token of the draft model.
    """

    token_ms: float | None = None
    wait_ms: float | None = None
    further_ms: float | None = None
    draft_ms: float | None = None

    @property
    def further(self) -> float:
        """The cost of a further token in a batch, in times of a token."""
        if not self.token_ms or self.further_ms is None:
            return USUAL_COST
        return min(self.further_ms / self.token_ms, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftResults:
    """What drafts of one kind have brought to a model, in sums in which older answers count less.

    Attributes:
        tokens, ms: all that was generated, and how long it took.
        drafted, accepted: tokens.
        single_tokens, single_ms: tokens that were computed alone, and how long they took.
    """

    tokens: float = 0.0
    ms: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    single_tokens: float = 0.0
    single_ms: float = 0.0

    @property
    def accepted_share(self) -> float | None:
        """Share of drafted tokens that was accepted; None before any."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def speed(self) -> float | None:
        """Speed with drafts relative to that without; None while too little is known."""
        if self.tokens < MIN_TOKENS or self.single_tokens < MIN_SINGLE_TOKENS or not self.ms:
            return None
        return (self.single_ms / self.single_tokens) / (self.ms / self.tokens)


def choose(
    wanted: str,
    costs: Costs,
    results: Mapping[str, DraftResults],
    *,
    draft_model: Path | None = None,
    is_given: bool = False,
) -> Speculation:
    """What a starting coordinator drafts.

    Args:
        wanted: `auto`, `off`, `ngram` or `draft` (which needs a draft model).
        results: of earlier answers, by kind of speculation.
        draft_model: one that fits the model.
        is_given: whether the user has named the draft model, which is used then unless it has not paid.
    """
    if wanted == OFF:
        return NO_SPECULATION
    model = _of_model(costs, draft_model) if draft_model is not None else None
    if wanted == DRAFT:
        assert model is not None
        return replace(model[0], why="")
    if wanted == NGRAM:
        return replace(_ngram(costs), why="")
    refused = []
    if model is not None:
        speculation, gain = model
        refused += [_refusal("drafts", results.get(DRAFT))]
        if not refused[-1] and (is_given or (gain or 0.0) >= GAIN_OF_MODEL):
            return speculation
    refused += [_refusal("n-gram drafts", results.get(NGRAM))]
    if not refused[-1]:
        return _ngram(costs)
    return Speculation(why="; ".join(filter(None, refused)))


def _refusal(name: str, results: DraftResults | None) -> str:
    """Why drafts of a kind do not pay, as measured; "" if they do or it is not known."""
    if results is None or results.speed is None or results.speed >= 1.0:
        return ""
    cost = 1 / results.speed - 1
    return f"{name} were accepted at {results.accepted_share or 0.0:.0%} and cost {cost:.1%}"


def _ngram(costs: Costs) -> Speculation:
    further = costs.further
    longest = int(LONGEST_COST / further) if further > 0 else LONGEST
    return Speculation(
        kind=NGRAM,
        max_tokens=max(SHORTEST, min(longest, LONGEST)),
        match_tokens=MATCH,
        why=_share_of_waiting(costs),
    )


def _share_of_waiting(costs: Costs) -> str:
    if not costs.token_ms or costs.wait_ms is None:
        return ""
    return f"round trips take {costs.wait_ms / costs.token_ms:.0%} of a token's time"


def _of_model(costs: Costs, draft_model: Path) -> tuple[Speculation, float | None]:
    """Drafts of a model, of the best length; and how much faster that is, None if unknown."""
    usual = Speculation(kind=DRAFT, max_tokens=SHORTEST, draft_model=draft_model, why=_share_of_waiting(costs))
    if not costs.token_ms or costs.draft_ms is None:
        return usual, None
    own, further = costs.draft_ms / costs.token_ms, costs.further

    def gain(length: int) -> float:
        accepted = sum(ACCEPTED_OF_MODEL**position for position in range(1, length + 1))
        return (1 + accepted) / (1 + length * (own + further))

    best = max(range(1, LONGEST_OF_MODEL + 1), key=gain)
    return replace(usual, max_tokens=best), gain(best)
