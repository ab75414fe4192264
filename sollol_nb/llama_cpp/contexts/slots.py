"""What each slot of one coordinator holds, and which slot a request shall use. Sends nothing.

llama-server itself takes the slot with the longest common beginning, whatever else would be lost there, so a short
question with the system prompt of a long chat takes the chat's slot. Texts are compared here, not tokens: no
request waits for a tokenizer, and the engine compares the tokens anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.llama_cpp.contexts.store import SavedContext

KEPT_SHARE = 0.5
"""Of what a slot holds, so much must be of use to a request that takes it, or else another slot is looked for."""
CHEAP_TOKENS = 512
"""A slot that holds less is taken before one that holds more: to process this again costs little."""

COUNTING_ERROR_TOKENS = 4
"""The last tokens of an answer may be in the slot or not."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot.

    Attributes:
        number: as the engine counts.
        text: the beginning of what it holds; "" if it is empty, None if that is not known.
        tokens: how many it holds, as far as known.
        saved: what was saved of it, or restored into it.
        requests: how many of this router run in it.
        used_at: `time.monotonic()` of the last one.
        task: the engine's number of the last request in it; None where it is not known yet.
        is_taken: whether a request of another kernel ran in it when it was last looked at.
        may_be_saved: whether what it holds would be of use to a later request.
    """

    number: int
    text: str | None = ""
    tokens: int = 0
    saved: SavedContext | None = None
    requests: int = 0
    used_at: float = 0.0
    task: int | None = None
    is_taken: bool = False
    may_be_saved: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether no request runs in it, as far as known."""
        return not self.requests and not self.is_taken

    @property
    def unsaved_tokens(self) -> int:
        """How many of its tokens no saved context has."""
        if not self.text or not self.may_be_saved:
            return 0
        if self.saved is None or not self.text.startswith(self.saved.text):
            return self.tokens
        return max(0, self.tokens - self.saved.tokens)

    def clear(self, text: str | None = "") -> None:
        """Note that it holds something else: nothing, or nobody knows what (None)."""
        self.text, self.tokens, self.saved, self.may_be_saved = text, 0, None, False


@dataclass(slots=True)
class Slots:
    """The slots of one coordinator.

    Attributes:
        all: them, by number.
    """

    all: list[Slot] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> Slots:
        """So many empty slots."""
        return cls([Slot(number) for number in range(count)])

    def choose(self, text: str | None) -> Slot | None:
        """The slot for a request; None if all are busy.

        That which holds the longest common beginning, unless most of what it holds would be lost and another one
        is empty or was not used for longer.

        Args:
            text: what the model is to read; None if that is not known.
        """
        idle = [slot for slot in self.all if slot.is_idle]
        if not idle:
            return None
        if text:
            best = max(idle, key=lambda slot: (shared_characters(slot.text or "", text), slot.used_at))
            shared = shared_characters(best.text or "", text)
            if shared and shared >= KEPT_SHARE * len(best.text or ""):
                return best
        return self.replaceable()

    def replaceable(self, *, but: Sequence[Slot] = ()) -> Slot | None:
        """The idle slot whose contents cost the least to lose: an empty one, else one that holds little, else the
        one that was not used for the longest time; None if there is none."""
        idle = [slot for slot in self.all if slot.is_idle and slot not in but]
        return min(idle, key=_cost, default=None)

    def holding(self) -> list[Slot]:
        """Idle slots that hold something, those that cost the least to lose first."""
        return sorted((slot for slot in self.all if slot.text != "" and slot.is_idle), key=_cost)

    @property
    def is_idle(self) -> bool:
        """Whether no request of this router runs."""
        return not any(slot.requests for slot in self.all)

    @property
    def tokens(self) -> int:
        """How many they hold together, as far as known."""
        return sum(slot.tokens for slot in self.all)

    def compare(self, reported: Iterable[Any]) -> bool:
        """Compare with what the engine says (`GET /slots`): others may have used a slot, and the engine empties
        some where the context is full.

        Returns:
            Whether no slot is busy.
        """
        is_idle = True
        for entry in reported:
            number, is_busy = int(entry["id"]), bool(entry["is_processing"])
            is_idle = is_idle and not is_busy
            if not 0 <= number < len(self.all):
                continue
            slot, task, tokens = self.all[number], entry.get("id_task"), entry.get("n_prompt_tokens")
            slot.is_taken = is_busy and not slot.requests
            if slot.is_taken:
                slot.clear(None)
            elif tokens == 0 and not slot.requests:
                slot.clear()
            elif not slot.requests and _is_anothers(slot, task, tokens):
                slot.clear(None)
            if not slot.requests:
                slot.task = task
                if isinstance(tokens, int):
                    slot.tokens = tokens
        return is_idle


def _is_anothers(slot: Slot, task: int | None, tokens: int | None) -> bool:
    """Whether the last request in a slot was not ours."""
    if slot.task is not None:
        return task != slot.task
    if not tokens:
        return False
    # The engine may have gone on for some tokens after the reader has left.
    return slot.text == "" or tokens < slot.tokens - COUNTING_ERROR_TOKENS


def _cost(slot: Slot) -> tuple[bool, bool, float]:
    return slot.text != "", slot.tokens >= CHEAP_TOKENS, slot.used_at


def shared_characters(first: str, second: str) -> int:
    """Length of the common beginning of two texts. A text has up to a million characters, so whole pieces are
    compared."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        if first[least:middle] == second[least:middle]:
            least = middle
        else:
            most = middle
    return least


def now() -> float:
    """The clock of `used_at`."""
    return time.monotonic()
