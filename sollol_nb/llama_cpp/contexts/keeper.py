"""When the contexts of a coordinator's slots are saved, and when a saved one is restored before a request.

A context is saved after an answer, in the background, when no slot is busy: the engine does nothing else
meanwhile. It is saved if processing what is not saved yet would take longer than saving, both as measured here. A
saved context is restored before a request if that is quicker than processing the part of the prompt that it has
and no slot has. Both are only about time: without them the engine processes the prompt. So whatever fails here, no
answer does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakSet

from sollol_nb.errors import ConfigError, HttpStatusError, TransportError
from sollol_nb.llama_cpp.contexts.actions import SlotActions, SlotTakenError, milliseconds
from sollol_nb.llama_cpp.contexts.restoring import LEAST_TOKENS, Restorer
from sollol_nb.llama_cpp.contexts.slots import COUNTING_ERROR_TOKENS, Slot, Slots, now, shared_characters
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.contexts.visit import Engine, Held, Identity, Report, Visit, keep_beginning

logger = logging.getLogger(__name__)

PAUSE_S = 0.3
"""So long after an answer its context is saved: the next question of a program comes sooner, and would wait."""
LEAST_GAIN_MS = 500.0
"""A context that is processed sooner than this is not saved, and none is looked for."""
BUSY_PAUSE_S, BUSY_TRIES = 1.0, 30
"""So often, and for so long, it is looked whether other kernels have let go of all slots."""
SLOTS_LIMIT_S = 5.0
REPLACED_SHARE = 0.9
"""A saved context is deleted when a newer one has so much of it."""


class ContextKeeper:
    """The contexts of one coordinator. Lives on the I/O loop.

    Args:
        engine: sends to it.
        slots: how many it has.
        ask_lease: takes a lease, without waiting.
        announce: informs other kernels how many seconds an action on a slot may take.
    """

    def __init__(
        self, engine: Engine, slots: int, ask_lease: Callable[[], Held], announce: Callable[[float], None]
    ) -> None:
        self.slots = Slots.of(slots)
        self._engine = engine
        self._ask_lease = ask_lease
        self._identity: Identity | None = None
        self._store: ContextStore | None = None
        self._report: Report = _nothing
        self._actions = SlotActions(engine, self.slots, announce)
        self._restorer: Restorer | None = None
        self._uses_by_others = 0
        self._is_current = True  # whether `slots` is what the engine has, as far as others are concerned
        self._saving: asyncio.Task[int] | None = None
        self._is_urgent = asyncio.Event()
        self._visits: WeakSet[Visit] = WeakSet()  # with those that have ended
        self._forgotten = 0  # how often something was forgotten
        self._is_closed = False

    def use(self, store: ContextStore, identity: Identity, report: Report) -> None:
        """Save contexts there from now on, and restore those that are there."""
        self._store, self._identity, self._report = store, identity, report
        self._actions.costs.bytes_per_token = float(identity.bytes_per_token)
        self._actions.context_tokens = identity.context_tokens
        self._restorer = Restorer(store, identity, self.slots, self._actions, report)
        self._background(asyncio.to_thread(store.list))

    @property
    def keeps(self) -> bool:
        """Whether contexts are saved and restored."""
        return self._store is not None and self._identity is not None and self._identity.brings

    @property
    def is_acting(self) -> bool:
        """Whether the engine saves, restores or empties a slot for this process now, and does nothing else."""
        return self._actions.running is not None

    def close(self) -> None:
        """Stop what runs in the background."""
        self._is_closed = True
        if self._saving is not None:
            self._saving.cancel()

    # --- a request --------------------------------------------------------------------------------

    async def visit(
        self, text: str | None, *, is_cached: bool, lease: Held | None, is_repeatable: bool = False
    ) -> Visit:
        """Choose a slot for a request, and restore a saved context there if that saves time.

        Args:
            text: what the model will read; None if that is not known.
            is_cached: whether the request may begin with what a slot holds.
            lease: the request's, granted.
            is_repeatable: whether it must be computed as the first request of a fresh engine is.

        Raises:
            TransportError: the engine was lost.
        """
        if self._actions.running is not None:  # it would wait in the engine, where nobody knows why it is silent
            await asyncio.wait({self._actions.running})
        is_shared = False
        if lease is not None:
            is_shared = lease.others > 0
            if lease.uses_by_others != self._uses_by_others:
                self._is_current = False
        visit = Visit(text=text, may_be_saved=is_cached)
        self._visits.add(visit)
        is_long = text is not None and self._is_long(text)
        if (is_long or is_repeatable) and (is_shared or not self._is_current):
            await self._look(lease)
        if is_repeatable and not any(slot.is_taken for slot in self.slots.all):
            await self.save()  # of the answer before it, which is saved only after a pause
            await self._empty()
        is_known = self._is_current and not is_shared and (text is not None or not is_cached)
        if not is_known and not (is_long and is_cached and self.keeps):
            return visit  # the engine chooses
        visit.slot = self.slots.choose(text if is_cached else None)
        if visit.slot is None:
            return visit
        visit.slot.requests += 1
        try:
            if text is None:
                return visit
            if is_long and is_cached and self.keeps and self._restorer is not None:
                try:
                    await self._restorer.restore(visit, visit.slot, text)
                except SlotTakenError:
                    is_known = False
            # Another kernel may take the slot meanwhile; the engine finds what was restored.
            if not is_known or self._is_better_elsewhere(visit, visit.slot, text):
                self._left(visit)
                visit.slot = None
            else:
                await self._actions.make_room(visit.slot, text if is_cached else "", len(text))
        except BaseException:
            self._left(visit)
            raise
        return visit

    async def _empty(self) -> None:
        """Empty all slots, so that a prompt gets the first cells of the shared context: in others the engine may
        round otherwise. While another kernel has some cells, that is in vain, and would wait for its prompt."""
        for slot in self.slots.all:
            await self._actions.erase(slot)

    def _is_long(self, text: str) -> bool:
        """Whether processing a prompt may take so long that its context was saved. How many characters a token has
        depends on the language; it may be one."""
        prefill_ms = self._actions.costs.prefill_ms
        return len(text) >= max(LEAST_TOKENS, LEAST_GAIN_MS / prefill_ms if prefill_ms else 0)

    def _is_better_elsewhere(self, visit: Visit, slot: Slot, text: str) -> bool:
        """Whether the engine should choose: what some slots hold is not known, so it may be this prompt."""
        if visit.restored is not None or not self._is_long(text) or not visit.may_be_saved:
            return False
        return not shared_characters(slot.text or "", text) and any(
            slot.text is None and slot.tokens >= LEAST_TOKENS for slot in self.slots.all
        )

    def _left(self, visit: Visit) -> None:
        if visit.slot is not None:
            visit.slot.requests -= 1
            visit.slot.used_at, visit.slot.task = now(), None

    def end(self, visit: Visit, text: str | None) -> None:
        """Note that the stream of a request has ended, and have its context saved later.

        Args:
            text: what the slot holds now, as far as known.
        """
        self._left(visit)
        slot = visit.slot
        if slot is None and visit.reported_slot is not None and visit.reported_slot < len(self.slots.all):
            slot = self.slots.all[visit.reported_slot]
            slot.used_at, slot.task = now(), None
        if slot is None:
            self._is_current = False  # it ran nobody knows where
        elif visit.cached_tokens is None or not visit.generated_tokens:  # it was given up
            keep_beginning(slot, visit)
        else:
            tokens = visit.cached_tokens + visit.processed_tokens + visit.generated_tokens - 1
            if text is not None:
                self._actions.costs.characters_per_token = max(1.0, len(text) / max(1, tokens))
            saved = slot.saved
            slot.text, slot.tokens, slot.may_be_saved = text, tokens, visit.may_be_saved
            slot.saved = saved if saved is not None and text is not None and text.startswith(saved.text) else None
            self._actions.costs.add_prefill(visit.processed_tokens, visit.prompt_ms)
            if self._restorer is not None:
                self._restorer.learn(visit)
        if self._worth_saving():
            self._save_later()
        elif not self._is_current and self.keeps and not self._is_closed:
            self._background(self._look())

    # --- saving -------------------------------------------------------------------------------------

    def _worth_saving(self) -> list[Slot]:
        """The slots whose contexts are worth it, the most recently used first."""
        if not self.keeps or self._actions.costs.prefill_ms is None:
            return []
        prefill_ms = self._actions.costs.prefill_ms
        return sorted(
            (
                slot
                for slot in self.slots.all
                if not slot.requests
                and slot.tokens * prefill_ms >= LEAST_GAIN_MS
                and slot.unsaved_tokens >= LEAST_TOKENS // 2
                and slot.unsaved_tokens * prefill_ms >= self._actions.costs.save_ms(slot.tokens)
            ),
            key=lambda slot: -slot.used_at,
        )

    def _save_later(self) -> None:
        """Save what is worth it after a pause; meanwhile a lease keeps the engine alive."""
        if not self._is_closed and (self._saving is None or self._saving.done()):
            self._is_urgent.clear()
            # The lease is requested before that of the answer ends.
            self._saving = asyncio.create_task(self._save_all(self._ask_lease(), PAUSE_S))

    async def save(self) -> int:
        """Save now what is worth it; returns how many contexts. Nothing is saved while any slot is busy."""
        if self._is_closed or not self.keeps:
            return 0
        self._is_urgent.set()  # ends a pause
        if self._saving is None or self._saving.done():
            if not self._worth_saving():
                return 0
            self._saving = asyncio.create_task(self._save_all(self._ask_lease(), 0.0))
        saving = self._saving
        await asyncio.wait({saving})
        return 0 if saving.cancelled() else saving.result()  # `close` cancels it, not who waits for it

    async def _save_all(self, lease: Held, pause_s: float) -> int:
        count = 0
        try:
            tries_left = BUSY_TRIES if await lease.is_granted() else 0
            while tries_left:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._is_urgent.wait()
                if not self.slots.is_idle:  # when the request ends, all is looked at again
                    break
                if not self._worth_saving():
                    break
                if not await self._look():  # another kernel has a request there
                    tries_left, pause_s = tries_left - 1, BUSY_PAUSE_S
                    if self._is_urgent.is_set():
                        break
                    continue
                for slot in self._worth_saving()[:1]:
                    count += await self._save(slot)
                if not self._worth_saving():
                    break
                pause_s = 0.0
        except (TransportError, ConfigError, OSError, KeyError, TypeError, ValueError) as error:
            logger.info("a context was not saved: %s", error)
        finally:
            lease.free()
        return count

    async def _look(self, lease: Held | None = None) -> bool:
        """Compare the slots with what the engine says; returns whether all of them are idle."""
        held = lease if lease is not None else self._ask_lease()
        try:
            if not await held.is_granted():
                return False
            others, uses = held.others, held.uses_by_others
            is_idle = self.slots.compare(await self._engine.get("/slots", timeout_s=SLOTS_LIMIT_S))
        except (TransportError, KeyError, TypeError, ValueError) as error:
            logger.info("the slots are not known: %s", error)
            return False
        finally:
            if lease is None:
                held.free()
        if is_idle and not others:
            self._uses_by_others, self._is_current = uses, True
        return is_idle and self.slots.is_idle

    async def _save(self, slot: Slot) -> int:
        assert self._store is not None
        assert self._identity is not None
        text, tokens, forgotten = slot.text, slot.tokens, self._forgotten
        assert text
        size = int(tokens * self._actions.costs.bytes_per_token)
        part = await asyncio.to_thread(self._store.begin, size)
        if part is None or not self.slots.is_idle:
            slot.may_be_saved = slot.may_be_saved and part is not None  # there is no room for as much
            return 0
        try:
            answer = await self._actions.act(
                slot, "save", {"filename": part.name}, self._actions.costs.save_ms(tokens)
            )
        except SlotTakenError:
            await asyncio.to_thread(self._store.drop, part)
            return 0
        except HttpStatusError as error:  # the disk is full, or the model's contexts cannot be saved
            await asyncio.to_thread(self._store.drop, part)
            self._report("refused", f"{self._identity.model}: its context was not saved: {error.reason}")
            slot.may_be_saved = False
            return 0
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._store.drop, part))
            raise
        written, took_ms = int(answer["n_written"]), milliseconds(answer, "save_ms")
        if abs(int(answer["n_saved"]) - tokens) > COUNTING_ERROR_TOKENS or slot.text != text:
            await asyncio.to_thread(self._store.drop, part)
            if slot.text == text:  # the request of another kernel has used it
                slot.clear(None)
            return 0
        self._actions.costs.bytes_per_token = written / max(1, int(answer["n_saved"]))
        if took_ms > 0:
            self._actions.costs.save_rate = written / took_ms
        context = SavedContext(
            id="",
            model=self._identity.model,
            title=self._identity.title,
            made_of=self._identity.made_of,
            text=text,
            tokens=int(answer["n_saved"]),
            size=written,
            prefill_ms=self._actions.costs.prefill_ms or 0.0,
        )
        kept = await asyncio.to_thread(self._store.keep, part, context)
        if kept is None:
            slot.may_be_saved = False
            self._report("refused", f"{context.model}: its context was not saved; is the disk full?")
            return 0
        if forgotten != self._forgotten:  # perhaps this, after it was looked for
            await asyncio.to_thread(self._store.forget, lambda context: context.id == kept.id)
            return 0
        if slot.text is not None and slot.text.startswith(text):
            slot.saved = kept
        await asyncio.to_thread(self._store.forget, partial(_is_replaced, by=kept))
        self._report(
            "saved",
            f"saved {kept.tokens:,} tokens of a conversation with {kept.model} in {took_ms:.0f} ms",
            tokens=kept.tokens,
            bytes=kept.size,
            ms=took_ms,
        )
        return 1

    async def forget(self, contents: Sequence[str]) -> None:
        """Empty the idle slots that hold a conversation, so that it is not saved again; what requests that run now
        leave of it is not saved, either.

        Args:
            contents: of its messages; none for all slots.
        """
        self._forgotten += 1
        for visit in self._visits:
            visit.may_be_saved = visit.may_be_saved and not _may_have(visit.text, contents)
        for slot in self.slots.holding():
            if _may_have(slot.text, contents):
                await self._actions.erase(slot)

    def _background(self, work: Awaitable[Any]) -> None:
        async def run() -> None:
            with suppress(OSError, ConfigError):
                await work

        task = asyncio.ensure_future(run())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


def _may_have(text: str | None, contents: Sequence[str]) -> bool:
    """Whether a text may be that of a conversation with these messages; without messages any may."""
    if text is None or not contents:
        return True
    probe = SavedContext(id="", model="", title="", made_of={}, text=text, tokens=0, size=0)
    return probe.has_turns(contents)


def _is_replaced(context: SavedContext, by: SavedContext) -> bool:
    """Whether a newer context has nearly all that a saved one has: the conversation went on, or its last answer
    was generated again, or has lost the thoughts of the model."""
    if context.id == by.id or context.made_of != by.made_of:
        return False
    return shared_characters(context.text, by.text) >= REPLACED_SHARE * len(context.text)


_tasks: set[asyncio.Task[None]] = set()


def _nothing(*_: object, **__: object) -> None:
    """Nobody is told."""
