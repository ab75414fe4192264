"""What drafts brought in an answer: how many tokens were drafted and accepted, and what a token takes without.

llama-server states with each event how many tokens it has generated, in which time, and how many were drafted and
accepted so far. Tokens that were verified together come with the same time. So a token that took time while no
draft was made was computed alone, which is the time that calibrations and predictions are about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollol_nb.chat.chunk import Drafts

NO_DRAFTS: Drafts = {"drafted": 0, "accepted": 0, "single_tokens": 0, "single_ms": 0.0}


class DraftCounter:
    """Counts drafts of one answer, over all engines on which it ran.

    Args:
        before: counts of earlier engines.
    """

    def __init__(self, before: Mapping[str, Any] = NO_DRAFTS) -> None:
        self._before: Drafts = {
            "drafted": int(before["drafted"]),
            "accepted": int(before["accepted"]),
            "single_tokens": int(before["single_tokens"]),
            "single_ms": float(before["single_ms"]),
        }
        self._begin()

    def _begin(self) -> None:
        self._drafted = self._accepted = self._single_tokens = self._tokens = 0
        self._single_ms = self._ms = 0.0

    def next_engine(self) -> None:
        """The answer continues on another engine, which counts from 0."""
        self._before = self.total
        self._begin()

    def read(self, timings: Mapping[str, Any]) -> None:
        """Read the `timings` of an event."""
        tokens, ms = timings.get("predicted_n", 0), timings.get("predicted_ms", 0.0)
        drafted = timings.get("draft_n", 0)
        if tokens == self._tokens + 1 and self._tokens and drafted == self._drafted and ms > self._ms:
            self._single_tokens += 1
            self._single_ms += ms - self._ms
        self._tokens, self._ms = tokens, ms
        self._drafted, self._accepted = drafted, timings.get("draft_n_accepted", 0)

    @property
    def total(self) -> Drafts:
        """The counts so far."""
        return {
            "drafted": self._before["drafted"] + self._drafted,
            "accepted": self._before["accepted"] + self._accepted,
            "single_tokens": self._before["single_tokens"] + self._single_tokens,
            "single_ms": self._before["single_ms"] + self._single_ms,
        }
