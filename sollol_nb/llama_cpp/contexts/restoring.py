"""Which saved context is brought into a slot before a request, and what happens if the engine does not take it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sollol_nb.errors import HttpStatusError
from sollol_nb.llama_cpp.contexts.actions import SlotActions, milliseconds, shared_tokens
from sollol_nb.llama_cpp.contexts.slots import Slot, Slots, now
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.contexts.visit import Identity, Report, Visit

LEAST_TOKENS = 32
"""So many tokens a saved context must have more than any slot, to be restored."""
USELESS_SHARE = 0.5
"""Of the tokens that a restored context shares with the prompt, the engine takes at least this many from the slot,
or else this model cannot use them."""
WHAT_DIFFERS = {
    "model_file": "another version of the model's file",
    "engine": "another build of llama.cpp",
    "adapters": "other adapters",
    "kv": "another kind of KV cache",
}


class Restorer:
    """Restores saved contexts into the slots of one engine.

    Attributes:
        identity: what the engine runs; its `brings` becomes False where a restored context was of no use.
    """

    def __init__(
        self, store: ContextStore, identity: Identity, slots: Slots, actions: SlotActions, report: Report
    ) -> None:
        self.identity = identity
        self._store = store
        self._slots = slots
        self._actions = actions
        self._report = report
        self._refused: set[str] = set()  # saved contexts that this engine does not take

    async def restore(self, visit: Visit, slot: Slot, text: str) -> None:
        """Bring the best saved context into a slot, if there is one that saves time.

        Raises:
            SlotTakenError: another kernel has taken the slot.
            TransportError: the engine was lost.
        """
        with suppress(OSError):
            await asyncio.to_thread(self._store.list)
        has_tokens = shared_tokens(slot.text or "", slot.tokens, text)
        while (found := self._best(text, has_tokens, visit)) is not None:
            (context, expected), began = found, now()
            is_whole = await asyncio.to_thread(self._store.is_whole, context)
            if is_whole is None:  # another kernel has deleted it
                self._refused.add(context.id)
                continue
            if not is_whole:
                await asyncio.to_thread(self._store.list)
                self._refuse(visit, context, "the saved context was damaged, so it was deleted and not used")
                continue
            costs = self._actions.costs
            costs.prefill_ms = costs.prefill_ms or context.prefill_ms or None
            slot.clear(None)  # who asks may leave meanwhile
            try:
                await self._bring(slot, context)
            except HttpStatusError as error:
                slot.clear()
                why = f"llama.cpp did not take the saved context: {error.reason}"
                self._refuse(visit, context, why)
                has_tokens = 0
                continue
            visit.restored, visit.expected_tokens, visit.note = context, expected, ""
            costs.restore_rate = context.size / max(1.0, (now() - began) * 1000)
            slot.text, slot.tokens, slot.saved, slot.may_be_saved = context.text, context.tokens, context, True
            await asyncio.to_thread(self._store.use, context)
            return

    def _best(self, text: str, has_tokens: int, visit: Visit) -> tuple[SavedContext, int] | None:
        """The saved context that saves the most, and how many tokens it shares with the prompt; None if none saves
        anything. Notes in the visit if one of something else would have."""
        best: tuple[SavedContext, int] | None = None
        for context in self._store.known:
            if (
                context.id in self._refused
                or not context.text
                or context.text[:64] != text[: len(context.text)][:64]
            ):
                continue
            tokens = shared_tokens(context.text, context.tokens, text)
            prefill_ms = self._actions.costs.prefill_ms or context.prefill_ms
            if tokens - has_tokens < LEAST_TOKENS or context.tokens > self.identity.context_tokens:
                continue
            if (tokens - has_tokens) * prefill_ms < self._actions.costs.restore_ms(context):
                continue
            if (differs := self._differs(context)) != "":
                if context.model == self.identity.model and not visit.note:
                    visit.note = f"a saved context of this prompt was not used: it is of {differs}"
            elif best is None or tokens > best[1]:
                best = (context, tokens)
        return best

    def _differs(self, context: SavedContext) -> str:
        """Why a saved context is not one of this engine; "" if it is."""
        made_of = self.identity.made_of
        for name, what in WHAT_DIFFERS.items():
            if context.made_of.get(name) != made_of.get(name):
                return what
        return ""

    async def _bring(self, slot: Slot, context: SavedContext) -> None:
        """Restore a context into a slot; where there is no space, empty other slots and try once again.

        Raises:
            HttpStatusError: the engine does not take it.
            SlotTakenError: another kernel has taken the slot.
            TransportError: the engine was lost.
        """
        body, expected_ms = {"filename": context.file_name}, self._actions.costs.restore_ms(context)
        await self._actions.erase_for(slot, context.tokens)
        try:
            answer = await self._actions.act(slot, "restore", body, expected_ms)
        except HttpStatusError:
            for other in self._slots.holding():
                if other is not slot:
                    await self._actions.erase(other)
            answer = await self._actions.act(slot, "restore", body, expected_ms)
        took_ms = milliseconds(answer, "restore_ms")
        self._report(
            "restored",
            f"restored {context.tokens:,} tokens of a conversation with {context.model} in {took_ms:.0f} ms",
            tokens=context.tokens,
            bytes=context.size,
            ms=took_ms,
        )

    def _refuse(self, visit: Visit, context: SavedContext, why: str) -> None:
        self._refused.add(context.id)
        visit.note = why
        self._report("refused", f"{context.model}: {why}", tokens=context.tokens)

    def learn(self, visit: Visit) -> None:
        """Notice a model for which a restored context is of no use: one with a sliding window, say."""
        if visit.restored is None or visit.cached_tokens is None:
            return
        if visit.cached_tokens < USELESS_SHARE * visit.expected_tokens - LEAST_TOKENS:
            self._refused.add(visit.restored.id)
            if visit.cached_tokens == 0:
                self.identity.brings = False
                visit.note = "this model cannot use saved contexts, so its prompt was processed again"
