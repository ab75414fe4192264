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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sollol_nb.chat.chunk import Cached
from sollol_nb.errors import ConfigError, HttpStatusError, TransportError
from sollol_nb.llama_cpp.contexts.slots import COUNTING_ERROR_TOKENS, Slot, Slots, now, shared_characters
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext

logger = logging.getLogger(__name__)

PAUSE_S = 0.3
"""So long after an answer its context is saved: the next question of a program comes sooner, and would wait."""
LONG_CHARACTERS = 1000
"""For a shorter prompt saved contexts are not looked at."""
LEAST_TOKENS = 32
"""So many tokens a saved context must have more than any slot, to be restored."""
LEAST_GAIN_MS = 500.0
"""A context that is processed sooner than this is not saved."""
BYTES_PER_MS = 200_000.0
"""Of a file that is saved or restored, until it was measured."""
MEASURED_TOKENS = 16
SURE_TOKENS = 256
"""So many tokens of a prompt must have been processed for their time to count, and to count alone."""
BUSY_PAUSE_S, BUSY_TRIES = 1.0, 30
"""So often, and for so long, it is looked whether other kernels have let go of all slots."""
SLOTS_LIMIT_S = 5.0
LIMIT_S = 15.0
LIMIT_FACTOR = 20.0
"""Saving and restoring may take so many times as long as expected, and this longer."""
SURE_SHARE = 0.9
"""Of the share of a prompt's tokens that were processed, so much are the share of its characters for sure."""
USELESS_SHARE = 0.5
"""Of the tokens that a restored context shares with the prompt, the engine takes at least this many from the slot,
or else this model cannot use them."""
WHAT_DIFFERS = {
    "model_file": "another version of the model's file",
    "engine": "another build of llama.cpp",
    "adapters": "other adapters",
    "kv": "another kind of KV cache",
}


class Engine(Protocol):
    """What a keeper needs of its coordinator."""

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """Post a body to the engine; raises TransportError."""

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The engine's answer; raises TransportError."""


class Held(Protocol):
    """A lease on the engine."""

    async def is_granted(self) -> bool:
        """Whether it was granted."""

    @property
    def others(self) -> int:
        """How many leases others had by then."""

    @property
    def uses_by_others(self) -> int:
        """How many leases others had ever had by then."""

    def free(self) -> None:
        """End it."""


Report = Callable[..., None]
"""Called with what happened (`saved`, `restored`, `refused`), a message, and data for an event."""


@dataclass(slots=True)
class Visit:
    """A request at the engine, from before it is sent until its stream has ended.

    Attributes:
        text: what the model reads; None if that is not known.
        slot: where it runs; None where the engine chooses.
        restored: the context that was restored for it.
        note: why a saved one was not used.
        expected_tokens: how many tokens the restored context shares with the prompt, about.
        may_be_saved: whether what it leaves in the slot may be used later.
        cached_tokens, processed_tokens, generated_tokens: as the engine reports; None until it does.
    """

    text: str | None = None
    slot: Slot | None = None
    restored: SavedContext | None = None
    note: str = ""
    expected_tokens: int = 0
    may_be_saved: bool = True
    cached_tokens: int | None = None
    processed_tokens: int = 0
    generated_tokens: int = 0
    prompt_ms: float = 0.0
    reported_slot: int | None = None
    progress: float = 0.0  # share of the prompt

    @property
    def body(self) -> dict[str, Any]:
        """For the body of the request."""
        return {} if self.slot is None else {"id_slot": self.slot.number}

    def read(self, event: Mapping[str, Any]) -> None:
        """Note what an event of the engine says about its prompt."""
        number, timings = event.get("id_slot"), event.get("timings")
        if isinstance(number, int) and number >= 0:  # -1 where the engine chose the slot: it does not say which
            self.reported_slot = number
        if timings:
            self.cached_tokens = int(timings.get("cache_n") or 0)
            self.processed_tokens = int(timings.get("prompt_n") or 0)
            self.generated_tokens = int(timings.get("predicted_n") or 0)
            self.prompt_ms = float(timings.get("prompt_ms") or 0.0)
        if (progress := event.get("prompt_progress")) is not None:
            if self.cached_tokens is None:
                self.cached_tokens = int(progress.get("cache") or 0)
            self.processed_tokens = int(progress.get("processed") or 0) - self.cached_tokens
            self.progress = int(progress.get("processed") or 0) / max(1, int(progress.get("total") or 1))

    @property
    def restored_tokens(self) -> int:
        """Those of the cached tokens that the restored context has brought."""
        return min(self.cached_tokens or 0, self.restored.tokens) if self.restored is not None else 0

    @property
    def mark(self) -> Cached:
        """For a chunk."""
        return {
            "cached_tokens": self.cached_tokens,
            "restored_tokens": self.restored_tokens,
            "context_note": self.note,
        }


@dataclass(slots=True, kw_only=True)
class Identity:
    """What the contexts of a coordinator are of.

    Attributes:
        model: its name.
        title: of this process or notebook.
        made_of: what must be the same where a context is restored.
        bytes_per_token: of the KV cache, for the first estimate.
        context_tokens: which all slots share.
        brings: whether a restored context can be of use to this kind of model.
    """

    model: str
    title: str
    made_of: Mapping[str, Any]
    bytes_per_token: int
    context_tokens: int
    brings: bool = True


@dataclass(slots=True)
class _Costs:
    """What things take here."""

    prefill_ms: float | None = None  # of a token
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
        return tokens * self.bytes_per_token / self.save_rate

    def restore_ms(self, context: SavedContext) -> float:
        return context.size / self.restore_rate


class ContextKeeper:
    """The contexts of one coordinator. Lives on the I/O loop.

    Args:
        engine: sends to it.
        slots: how many it has.
        ask_lease: takes a lease, without waiting.
    """

    def __init__(self, engine: Engine, slots: int, ask_lease: Callable[[], Held]) -> None:
        self.slots = Slots.of(slots)
        self._engine = engine
        self._ask_lease = ask_lease
        self._identity: Identity | None = None
        self._store: ContextStore | None = None
        self._report: Report = _nothing
        self._costs = _Costs()
        self._refused: set[str] = set()  # saved contexts that this engine does not take
        self._uses_by_others = 0
        self._is_current = True  # whether `slots` is what the engine has, as far as others are concerned
        self._saving: asyncio.Task[int] | None = None
        self._action: asyncio.Task[Any] | None = None  # the engine does nothing else
        self._is_urgent = asyncio.Event()
        self._is_closed = False

    def use(self, store: ContextStore, identity: Identity, report: Report) -> None:
        """Save contexts there from now on, and restore those that are there."""
        self._store, self._identity, self._report = store, identity, report
        self._costs.bytes_per_token = float(identity.bytes_per_token)
        self._background(asyncio.to_thread(store.list))

    @property
    def keeps(self) -> bool:
        """Whether contexts are saved and restored."""
        return self._store is not None and self._identity is not None and self._identity.brings

    def close(self) -> None:
        """Stop what runs in the background."""
        self._is_closed = True
        if self._saving is not None:
            self._saving.cancel()

    # --- a request --------------------------------------------------------------------------------

    async def visit(self, text: str | None, *, is_cached: bool, lease: Held | None) -> Visit:
        """Choose a slot for a request, and restore a saved context there if that saves time.

        Args:
            text: what the model will read; None if that is not known.
            is_cached: whether the request may begin with what a slot holds.
            lease: the request's, granted.

        Raises:
            TransportError: the engine was lost.
        """
        if self._action is not None:  # it would wait in the engine, where nobody knows why it is silent
            await asyncio.wait({self._action})
        is_shared = False
        if lease is not None:
            is_shared = lease.others > 0
            if lease.uses_by_others != self._uses_by_others:
                self._is_current = False
        visit = Visit(text=text, may_be_saved=is_cached)
        is_long = text is not None and len(text) >= LONG_CHARACTERS
        if not self._is_current and is_long and not is_shared:
            await self._look(lease)
        if is_shared or not self._is_current:
            return self._begun(visit)
        visit.slot = self.slots.choose(text if is_cached else None)
        self._begun(visit)
        if visit.slot is None or text is None:
            return visit
        try:
            if is_long and is_cached and self.keeps:
                await self._restore(visit, visit.slot, text)
            if self._is_better_elsewhere(visit, visit.slot, text):
                self._left(visit)
                visit.slot = None
            else:
                await self._make_room(visit.slot, text if is_cached else "", len(text))
        except BaseException:
            self._left(visit)
            raise
        return visit

    def _is_better_elsewhere(self, visit: Visit, slot: Slot, text: str) -> bool:
        """Whether the engine should choose: what some slots hold is not known, so it may be this prompt."""
        if visit.restored is not None or len(text) < LONG_CHARACTERS or not visit.may_be_saved:
            return False
        return not shared_characters(slot.text or "", text) and any(
            slot.text is None and slot.tokens >= LEAST_TOKENS for slot in self.slots.all
        )

    def _begun(self, visit: Visit) -> Visit:
        if visit.slot is not None:
            visit.slot.requests += 1
        return visit

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
            _keep_beginning(slot, visit)
        else:
            tokens = visit.cached_tokens + visit.processed_tokens + visit.generated_tokens - 1
            if text is not None:
                self._costs.characters_per_token = max(1.0, len(text) / max(1, tokens))
            saved = slot.saved
            slot.text, slot.tokens, slot.may_be_saved = text, tokens, visit.may_be_saved
            slot.saved = saved if saved is not None and text is not None and text.startswith(saved.text) else None
            self._costs.add_prefill(visit.processed_tokens, visit.prompt_ms)
            self._learn(visit)
        if self._worth_saving():
            self._save_later()
        elif not self._is_current and self.keeps and not self._is_closed:
            self._background(self._look())

    def _learn(self, visit: Visit) -> None:
        """Notice a model for which a restored context is of no use: one with a sliding window, say."""
        if visit.restored is None or visit.cached_tokens is None or self._identity is None:
            return
        if visit.cached_tokens < USELESS_SHARE * visit.expected_tokens - LEAST_TOKENS:
            self._refused.add(visit.restored.id)
            if visit.cached_tokens == 0:
                self._identity.brings = False
                visit.note = "this model cannot use saved contexts, so its prompt was processed again"

    # --- restoring --------------------------------------------------------------------------------

    async def _restore(self, visit: Visit, slot: Slot, text: str) -> None:
        """Bring the best saved context into a slot, if there is one that saves time."""
        assert self._store is not None
        with suppress(OSError):
            await asyncio.to_thread(self._store.list)
        has_tokens = self._shared_tokens(slot.text or "", slot.tokens, text)
        while (found := self._best(text, has_tokens, visit)) is not None:
            context, expected = found
            is_whole = await asyncio.to_thread(self._store.is_whole, context)
            if is_whole is None:  # another kernel has deleted it
                await asyncio.to_thread(self._store.list)
                continue
            if not is_whole:
                await asyncio.to_thread(self._store.list)
                self._refuse(visit, context, "the saved context was damaged, so it was deleted and not used")
                continue
            try:
                await self._bring(slot, context)
            except HttpStatusError as error:
                slot.clear()
                why = f"llama.cpp did not take the saved context: {error.reason}"
                self._refuse(visit, context, why)
                has_tokens = 0
                continue
            visit.restored, visit.expected_tokens, visit.note = context, expected, ""
            self._costs.prefill_ms = self._costs.prefill_ms or context.prefill_ms or None
            slot.text, slot.tokens, slot.saved, slot.may_be_saved = context.text, context.tokens, context, True
            self._background(asyncio.to_thread(self._store.use, context))
            return

    def _best(self, text: str, has_tokens: int, visit: Visit) -> tuple[SavedContext, int] | None:
        """The saved context that saves the most, and how many tokens it shares with the prompt; None if none saves
        anything. Notes in the visit if one of something else would have."""
        assert self._store is not None
        assert self._identity is not None
        best: tuple[SavedContext, int] | None = None
        for context in self._store.known:
            if (
                context.id in self._refused
                or not context.text
                or context.text[:64] != text[: len(context.text)][:64]
            ):
                continue
            tokens = self._shared_tokens(context.text, context.tokens, text)
            prefill_ms = self._costs.prefill_ms or context.prefill_ms
            if tokens - has_tokens < LEAST_TOKENS or context.tokens > self._identity.context_tokens:
                continue
            if (tokens - has_tokens) * prefill_ms < self._costs.restore_ms(context):
                continue
            if (differs := self._differs(context)) != "":
                if context.model == self._identity.model and not visit.note:
                    visit.note = f"a saved context of this prompt was not used: it is of {differs}"
            elif best is None or tokens > best[1]:
                best = (context, tokens)
        return best

    def _differs(self, context: SavedContext) -> str:
        """Why a saved context is not one of this engine; "" if it is."""
        assert self._identity is not None
        made_of = self._identity.made_of
        for name, what in WHAT_DIFFERS.items():
            if context.made_of.get(name) != made_of.get(name):
                return what
        return ""

    def _shared_tokens(self, held: str, tokens: int, text: str) -> int:
        return int(shared_characters(held, text) / len(held) * tokens) if held else 0

    async def _bring(self, slot: Slot, context: SavedContext) -> None:
        """Restore a context into a slot; where there is no space, empty other slots and try once again.

        Raises:
            HttpStatusError: the engine does not take it.
            TransportError: the engine was lost.
        """
        body, expected_ms = {"filename": context.file_name}, self._costs.restore_ms(context)
        await self._erase_for(slot, context.tokens)
        try:
            answer = await self._act(slot, "restore", body, expected_ms)
        except HttpStatusError:
            for other in self.slots.holding():
                if other is not slot:
                    await self._erase(other)
            answer = await self._act(slot, "restore", body, expected_ms)
        took_ms = _milliseconds(answer, "restore_ms")
        if took_ms > 0:
            self._costs.restore_rate = context.size / took_ms
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

    # --- room ---------------------------------------------------------------------------------------

    async def _make_room(self, slot: Slot, text: str, characters: int) -> None:
        """Empty slots that the engine would have to empty, where the context that all share is full: it would take
        them by their number."""
        new = int(characters / self._costs.characters_per_token) - self._shared_tokens(
            slot.text or "", slot.tokens, text
        )
        await self._erase_for(slot, slot.tokens + max(0, new))

    async def _erase_for(self, slot: Slot, tokens: int) -> None:
        if self._identity is None:
            return
        for other in self.slots.holding():
            others = self.slots.tokens - slot.tokens
            if others + tokens <= self._identity.context_tokens:
                return
            if other is not slot and other.tokens:
                await self._erase(other)

    async def _erase(self, slot: Slot) -> None:
        with suppress(HttpStatusError):  # an engine without this action
            await self._act(slot, "erase", {}, 100.0)
            slot.clear()
            slot.task = None

    async def _act(self, slot: Slot, action: str, body: Mapping[str, Any], expected_ms: float) -> Any:
        """Have the engine save, restore or erase a slot. Nothing cancels it, since the engine does it anyway.

        Raises:
            HttpStatusError: it refuses.
            TransportError: it was lost, or takes far too long.
        """
        limit_s = LIMIT_S + LIMIT_FACTOR * expected_ms / 1000
        path = f"/slots/{slot.number}?action={action}"
        self._action = task = asyncio.create_task(self._engine.post(path, body, timeout_s=limit_s))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio reports it
        try:
            return await asyncio.shield(task)
        finally:
            if self._action is task and task.done():
                self._action = None

    # --- saving -------------------------------------------------------------------------------------

    def _worth_saving(self) -> list[Slot]:
        """The slots whose contexts are worth it, the most recently used first."""
        if not self.keeps or self._costs.prefill_ms is None:
            return []
        prefill_ms = self._costs.prefill_ms
        return sorted(
            (
                slot
                for slot in self.slots.all
                if not slot.requests
                and slot.tokens * prefill_ms >= LEAST_GAIN_MS
                and slot.unsaved_tokens >= LEAST_TOKENS // 2
                and slot.unsaved_tokens * prefill_ms >= self._costs.save_ms(slot.tokens)
            ),
            key=lambda slot: -slot.used_at,
        )

    def _save_later(self) -> None:
        """Save what is worth it after a pause; meanwhile a lease keeps the engine alive."""
        if not self._is_closed and (self._saving is None or self._saving.done()):
            # The lease is requested before that of the answer ends.
            self._saving = asyncio.create_task(self._save_all(self._ask_lease(), PAUSE_S))

    async def save(self) -> int:
        """Save now what is worth it; returns how many contexts. Nothing is saved while any slot is busy."""
        if self._is_closed or not self.keeps:
            return 0
        if self._saving is not None and not self._saving.done():
            self._is_urgent.set()  # ends its pause
            return await asyncio.shield(self._saving)
        if not self._worth_saving():
            return 0
        self._saving = asyncio.create_task(self._save_all(self._ask_lease(), 0.0))
        return await asyncio.shield(self._saving)

    async def _save_all(self, lease: Held, pause_s: float) -> int:
        count = 0
        try:
            self._is_urgent.clear()
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
        except (TransportError, ConfigError, OSError) as error:
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
        text, tokens, before = slot.text, slot.tokens, slot.saved
        assert text
        size = int(tokens * self._costs.bytes_per_token)
        part = await asyncio.to_thread(self._store.begin, size)
        if part is None or not self.slots.is_idle:
            return 0
        try:
            answer = await self._act(slot, "save", {"filename": part.name}, self._costs.save_ms(tokens))
        except HttpStatusError as error:  # the disk is full, or the model's contexts cannot be saved
            await asyncio.to_thread(self._store.drop, part)
            self._report("refused", f"{self._identity.model}: its context was not saved: {error.reason}")
            slot.may_be_saved = False
            return 0
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._store.drop, part))
            raise
        written, took_ms = int(answer["n_written"]), _milliseconds(answer, "save_ms")
        if abs(int(answer["n_saved"]) - tokens) > COUNTING_ERROR_TOKENS or slot.text != text:
            await asyncio.to_thread(self._store.drop, part)  # another request has used it
            return 0
        self._costs.bytes_per_token = written / max(1, int(answer["n_saved"]))
        if took_ms > 0:
            self._costs.save_rate = written / took_ms
        context = SavedContext(
            id="",
            model=self._identity.model,
            title=self._identity.title,
            made_of=self._identity.made_of,
            text=text,
            tokens=int(answer["n_saved"]),
            size=written,
            prefill_ms=self._costs.prefill_ms or 0.0,
        )
        kept = await asyncio.to_thread(self._store.keep, part, context)
        if kept is None:
            slot.may_be_saved = False
            self._report("refused", f"{context.model}: its context was not saved; is the disk full?")
            return 0
        if slot.text is not None and slot.text.startswith(text):
            slot.saved = kept
        if before is not None and text.startswith(before.text) and before.made_of == kept.made_of:
            await asyncio.to_thread(self._store.forget, lambda context: context.id == before.id)
        self._report(
            "saved",
            f"saved {kept.tokens:,} tokens of a conversation with {kept.model} in {took_ms:.0f} ms",
            tokens=kept.tokens,
            bytes=kept.size,
            ms=took_ms,
        )
        return 1

    async def forget(self, contents: Sequence[str]) -> None:
        """Empty the idle slots that hold a conversation, so that it is not saved again.

        Args:
            contents: of its messages; none for all slots.
        """
        for slot in self.slots.holding():
            if slot.text is not None and contents:
                probe = SavedContext(id="", model="", title="", made_of={}, text=slot.text, tokens=0, size=0)
                if not probe.has_turns(contents):
                    continue
            await self._erase(slot)

    def _background(self, work: Awaitable[Any]) -> None:
        async def run() -> None:
            with suppress(OSError, ConfigError):
                await work

        task = asyncio.ensure_future(run())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


def _keep_beginning(slot: Slot, visit: Visit) -> None:
    """After a request that was given up before its first token: the slot has at least the beginning that it had in
    common with the prompt, and what was processed of that."""
    if visit.text is None or not visit.may_be_saved or slot.text is None:
        slot.clear(None)
        return
    shared = max(shared_characters(slot.text, visit.text), int(len(visit.text) * visit.progress * SURE_SHARE))
    before, tokens = len(slot.text), slot.tokens
    if visit.progress:
        tokens = (visit.cached_tokens or 0) + visit.processed_tokens
    elif before:
        tokens = int(tokens * shared / before)
    saved = slot.saved
    slot.text, slot.tokens, slot.may_be_saved = visit.text[:shared], tokens, True
    slot.saved = saved if saved is not None and slot.text.startswith(saved.text) else None


_tasks: set[asyncio.Task[None]] = set()


def _nothing(*_: object, **__: object) -> None:
    """Nobody is told."""


def _milliseconds(answer: Any, name: str) -> float:
    try:
        return float(answer["timings"][name])
    except (KeyError, TypeError, ValueError):
        return 0.0
