"""A request at an engine, as its keeper of contexts sees it, and what the keeper needs to know of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sollol_nb.chat.chunk import Cached
from sollol_nb.llama_cpp.contexts.slots import Slot, shared_characters
from sollol_nb.llama_cpp.contexts.store import SavedContext

SURE_SHARE = 0.9
"""Of the share of a prompt's tokens that were processed, so much are the share of its characters for sure."""


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


@dataclass(slots=True, eq=False, weakref_slot=True)
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


def keep_beginning(slot: Slot, visit: Visit) -> None:
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
