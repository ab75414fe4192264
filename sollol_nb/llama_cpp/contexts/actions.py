"""What the engine is asked to do with a slot (save, restore, erase), and what that costs here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sollol_nb.errors import HttpStatusError, TransportError
from sollol_nb.llama_cpp.contexts.slots import Slot, Slots, shared_characters
from sollol_nb.llama_cpp.contexts.store import SavedContext
from sollol_nb.llama_cpp.contexts.visit import Engine

BYTES_PER_MS = 200_000.0
"""Of a file that is saved or restored, until it was measured."""
MEASURED_TOKENS = 16
SURE_TOKENS = 256
"""So many tokens of a prompt must have been processed for their time to count, and to count alone."""
LIMIT_S = 15.0
LIMIT_FACTOR = 20.0
"""An action may take so many times as long as expected, and this longer."""
WAIT_TOKENS = 4096
"""Before it, the engine may have to process a batch of the prompt of another slot (2,048 tokens)."""
ERASE_MS = 100.0
ANNOUNCED_MS = 500.0
"""A longer action is announced to other kernels: without that they would take the busy engine for dead."""
TAKEN_S = 1.0
"""After so long, and again after as long, it is looked whether the engine waits for the end of an answer."""


class SlotTakenError(Exception):
    """A request of another kernel has taken the slot; the engine would act only after its end."""


@dataclass(slots=True)
class Costs:
    """What things take here.

    Attributes:
        prefill_ms: of a token of a prompt; None until it was measured.
        bytes_per_token: of the KV cache.
        save_rate, restore_rate: bytes per millisecond.
    """

    prefill_ms: float | None = None
    bytes_per_token: float = 0.0
    save_rate: float = BYTES_PER_MS
    restore_rate: float = BYTES_PER_MS
    characters_per_token: float = 4.0

    def add_prefill(self, tokens: int, took_ms: float) -> None:
        """Note what the tokens of a prompt took: those of a few are no measure of many."""
        if tokens >= MEASURED_TOKENS and took_ms > 0:
            share = min(1.0, tokens / SURE_TOKENS) if self.prefill_ms is not None else 1.0
            self.prefill_ms = share * took_ms / tokens + (1 - share) * (self.prefill_ms or 0.0)

    def save_ms(self, tokens: int) -> float:
        """Of saving so many tokens."""
        return tokens * self.bytes_per_token / self.save_rate

    def restore_ms(self, context: SavedContext) -> float:
        """Of restoring a context, with its checksum."""
        return context.size / self.restore_rate


class SlotActions:
    """The actions on the slots of one engine.

    Args:
        announce: informs other kernels how many seconds the action may take.

    Attributes:
        costs: as measured.
        context_tokens: which all slots share; None if unknown.
        running: the engine does this now, and nothing else; None if it does none.
    """

    def __init__(self, engine: Engine, slots: Slots, announce: Callable[[float], None]) -> None:
        self.costs = Costs()
        self.context_tokens: int | None = None
        self.running: asyncio.Task[Any] | None = None
        self._engine = engine
        self._slots = slots
        self._announce = announce

    async def make_room(self, slot: Slot, text: str, characters: int) -> None:
        """Empty slots that the engine would have to empty, where the context that all share is full: it would take
        them by their number."""
        new = int(characters / self.costs.characters_per_token) - shared_tokens(slot.text or "", slot.tokens, text)
        await self.erase_for(slot, slot.tokens + max(0, new))

    async def erase_for(self, slot: Slot, tokens: int) -> None:
        """Empty other slots, until one has room for so many tokens."""
        if self.context_tokens is None:
            return
        for other in self._slots.holding():
            others = self._slots.tokens - slot.tokens
            if others + tokens <= self.context_tokens:
                return
            if other is not slot and other.tokens:
                await self.erase(other)

    async def erase(self, slot: Slot) -> None:
        """Empty a slot, unless it is in use by now."""
        if not slot.is_idle:
            return
        with suppress(HttpStatusError, SlotTakenError):  # the former: an engine without this action
            await self.act(slot, "erase", {}, ERASE_MS)
            slot.clear()
            slot.task = None

    async def act(self, slot: Slot, action: str, body: Mapping[str, Any], expected_ms: float) -> Any:
        """Have the engine save, restore or erase a slot. Nothing cancels it, since the engine does it anyway.

        Raises:
            HttpStatusError: it refuses.
            SlotTakenError: it would have to wait for a request of another kernel.
            TransportError: it was lost, or takes far too long.
        """
        wait_ms = WAIT_TOKENS * (self.costs.prefill_ms or 0.0)
        limit_s = LIMIT_S + (LIMIT_FACTOR * expected_ms + wait_ms) / 1000
        path = f"/slots/{slot.number}?action={action}"
        post = self._engine.post(path, body, timeout_s=limit_s)
        announced_s = limit_s if expected_ms >= ANNOUNCED_MS else 0.0
        self.running = task = asyncio.create_task(self._unless_taken(slot, post, announced_s))
        task.add_done_callback(self._ended)  # also where who asked has left
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if self.running is task:
            self.running = None
        if not task.cancelled():
            task.exception()  # else asyncio reports it

    async def _unless_taken(self, slot: Slot, post: Coroutine[Any, Any, Any], announced_s: float) -> Any:
        """The engine's answer. The engine acts only after the end of a request in the slot, so where another
        kernel was quicker, nothing is asked of it any more: that answer may take minutes."""
        posting = asyncio.create_task(post)
        if announced_s:
            self._announce(announced_s)
        try:
            while not (await asyncio.wait({posting}, timeout=TAKEN_S))[0]:
                if await self._is_taken(slot) and not posting.done():
                    slot.clear(None)
                    slot.is_taken = True
                    raise SlotTakenError
            return posting.result()
        finally:
            posting.cancel()
            if announced_s:
                self._announce(0.0)

    async def _is_taken(self, slot: Slot) -> bool:
        try:
            reported = await self._engine.get("/slots", timeout_s=TAKEN_S)
            return any(entry["is_processing"] for entry in reported if entry["id"] == slot.number)
        except (TransportError, KeyError, TypeError):
            return False  # it does not answer while it acts


def shared_tokens(held: str, tokens: int, text: str) -> int:
    """About how many of the tokens of a text are the beginning of another text."""
    return int(shared_characters(held, text) / len(held) * tokens) if held else 0


def milliseconds(answer: Any, name: str) -> float:
    """A time that the engine reports; 0 if it does not."""
    try:
        return float(answer["timings"][name])
    except (KeyError, TypeError, ValueError):
        return 0.0
