"""What a keeper of contexts does where the engine refuses, is full, is used by others, or cannot use a file.

A real engine does none of this on demand, so a small one stands for it here; `tests/router/test_contexts.py` has
the real one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import HttpStatusError
from sollol_nb.llama_cpp.contexts import actions as actions_module
from sollol_nb.llama_cpp.contexts import keeper as keeper_module
from sollol_nb.llama_cpp.contexts.keeper import ContextKeeper
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.contexts.visit import Identity, Visit
from tests.support.engines import HANG_GUARD_S, eventually_async

LONG = "You are a careful assistant. " * 100
MADE_OF = {"model_file": "m1", "engine": "e1", "adapters": [], "kv": "f16"}
TOKENS = len(LONG) // 4


@dataclass
class SmallEngine:
    """Slots as numbers of tokens."""

    folder: Path
    slots: int = 2
    free_slots_needed: int = 0  # of other slots to be empty, for a restore
    refuses: str = ""
    taken: int | None = None  # the slot that a request of another kernel gets just before an action on it
    busy: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)
    actions: list[str] = field(default_factory=list)

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        number, action = int(path.split("/")[2].split("?")[0]), path.partition("=")[2]
        self.actions.append(f"{action} {number}")
        if number == self.taken:
            self.busy = {number}
            await asyncio.Event().wait()
        assert number not in self.busy, "the engine would wait for the slot"
        if action == "erase":
            self.tokens[number] = 0
            return {}
        if action == "save":
            if self.refuses:
                raise HttpStatusError("refused", status=500, reason=self.refuses)
            (self.folder / body["filename"]).write_bytes(b"x" * 10)
            return {"n_saved": self.tokens[number], "n_written": 10, "timings": {"save_ms": 1.0}}
        empty = sum(not self.tokens.get(other) for other in range(self.slots) if other != number)
        if self.refuses or empty < self.free_slots_needed:
            raise HttpStatusError("refused", status=400, reason=self.refuses or "No available space")
        self.tokens[number] = TOKENS
        return {"timings": {"restore_ms": 1.0}}

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        return [
            {"id": number, "is_processing": number in self.busy, "n_prompt_tokens": self.tokens.get(number, 0)}
            for number in range(self.slots)
        ]


@dataclass
class FreeLease:
    """A lease; others may have some, too."""

    others: int = 0
    uses_by_others: int = 0

    async def is_granted(self) -> bool:
        return True

    def free(self) -> None:
        """Nothing is held."""


@dataclass
class Setup:
    store: ContextStore
    engine: SmallEngine
    keeper: ContextKeeper
    reports: list[str]
    announced: list[float]

    def save_to_folder(self, **changes: Any) -> SavedContext:
        part = self.store.begin(10)
        assert part is not None
        part.write_bytes(b"x" * 10)
        facts: dict[str, Any] = {"id": "", "model": "m", "title": "t", "made_of": MADE_OF, "text": LONG}
        facts |= {"tokens": TOKENS, "size": 10, "prefill_ms": 5.0, **changes}
        context = self.store.keep(part, SavedContext(**facts))
        assert context is not None
        return context

    async def ask(self, text: str = LONG, cached: int | None = None, lease: FreeLease | None = None) -> Visit:
        """A request, of whose prompt the engine takes so many tokens from the slot, by default all that it has."""
        visit = await self.keeper.visit(text, is_cached=True, lease=lease)
        total = len(text) // 4
        number = visit.slot.number if visit.slot is not None else 0
        known = min(self.engine.tokens.get(number, 0), total) if cached is None else cached
        visit.read(
            {"timings": {"cache_n": known, "prompt_n": total - known, "predicted_n": 1, "prompt_ms": 5000.0}}
        )
        self.engine.tokens[number] = total
        self.keeper.end(visit, text)
        return visit


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(keeper_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(actions_module, "TAKEN_S", 0.01)
    store = ContextStore(tmp_path / "contexts", 10**6)
    engine = SmallEngine(store.prepare())
    announced: list[float] = []
    keeper = ContextKeeper(engine, engine.slots, FreeLease, announced.append)
    return Setup(store, engine, keeper, [], announced)


def used(setup: Setup) -> Setup:
    """Within the event loop: the keeper saves and restores."""
    identity = Identity(model="m", title="t", made_of=MADE_OF, bytes_per_token=1, context_tokens=10 * TOKENS)
    setup.keeper.use(setup.store, identity, lambda what, message, **_: setup.reports.append(what))
    return setup


async def used_once_read(setup: Setup) -> Setup:
    """The same, once the folder was read in the background."""
    read, is_read = setup.store.list, threading.Event()

    def listed() -> list[SavedContext]:
        try:
            return read()
        finally:
            is_read.set()

    setup.store.list = listed  # type: ignore[method-assign]
    used(setup)
    assert await asyncio.to_thread(is_read.wait, HANG_GUARD_S)
    return setup


def test_a_context_is_saved_once_and_replaces_what_it_goes_on_from(setup: Setup) -> None:
    async def main() -> None:
        await used(setup).ask()
        assert await setup.keeper.save() == 1
        assert await setup.keeper.save() == 0, "it is saved"
        await setup.ask(LONG * 2)
        assert await setup.keeper.save() == 1

    asyncio.run(main())
    assert [context.text for context in setup.store.list()] == [LONG * 2]
    assert setup.engine.actions == ["save 0", "save 0"]


def test_nothing_is_saved_while_a_slot_is_busy_also_with_a_request_of_another_kernel(setup: Setup) -> None:
    async def main() -> None:
        await used(setup).ask()
        other = await setup.keeper.visit("Hi", is_cached=True, lease=None)
        assert await setup.keeper.save() == 0
        setup.keeper.end(other, "Hi")
        setup.engine.busy = {1}
        assert await setup.keeper.save() == 0
        setup.engine.busy = set()
        assert await setup.keeper.save() == 1

    asyncio.run(main())


def test_a_short_request_looks_at_no_file_and_asks_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.save_to_folder(text="Hi")

    async def main() -> None:
        await used_once_read(setup)
        monkeypatch.setattr(setup.store, "list", None)
        monkeypatch.setattr(setup.engine, "get", None)
        visit = await setup.keeper.visit("Hi there", is_cached=True, lease=FreeLease())
        assert visit.body == {"id_slot": 0}

    asyncio.run(main())
    assert setup.engine.actions == []


def test_where_the_context_is_full_idle_slots_are_emptied_and_it_is_tried_again(setup: Setup) -> None:
    setup.save_to_folder()
    setup.engine.free_slots_needed = 1

    async def main() -> Visit:
        await used(setup).ask("Something else. " * 10)
        return await setup.ask()

    visit = asyncio.run(main())
    assert setup.engine.actions[:3] == ["restore 1", "erase 0", "restore 1"]
    assert visit.mark == {"cached_tokens": TOKENS, "restored_tokens": TOKENS, "context_note": ""}


def test_a_context_that_the_engine_does_not_take_is_not_tried_again(setup: Setup) -> None:
    setup.save_to_folder()
    setup.engine.refuses = "mismatched layers"

    async def main() -> tuple[Visit, int]:
        visit = await used(setup).ask(cached=0)
        count = len(setup.engine.actions)
        await setup.keeper.visit("Other. " + LONG, is_cached=True, lease=None)
        return visit, len(setup.engine.actions) - count

    visit, later = asyncio.run(main())
    assert visit.note == "llama.cpp did not take the saved context: mismatched layers"
    assert visit.mark["restored_tokens"] == 0
    assert later == 0
    assert "refused" in setup.reports


@pytest.mark.parametrize(
    ("part", "words"), [("model_file", "another version of the model's file"), ("engine", "another build")]
)
def test_a_context_of_something_else_is_not_used_and_the_answer_says_so(
    setup: Setup, part: str, words: str
) -> None:
    foreign = setup.save_to_folder(made_of={**MADE_OF, part: "other"})

    visit = asyncio.run(used_and_asked(setup))

    assert words in visit.note
    assert not any(action.startswith("restore") for action in setup.engine.actions)
    assert foreign.id in {context.id for context in setup.store.list()}, "another engine may use it"


async def used_and_asked(setup: Setup, **options: Any) -> Visit:
    return await used(setup).ask(**options)


def test_a_context_that_another_kernel_has_deleted_costs_only_time(setup: Setup) -> None:
    context = setup.save_to_folder()

    async def main() -> Visit:
        used(setup)
        await asyncio.to_thread(setup.store.list)
        (setup.store.folder / context.file_name).unlink()  # between the look at the folder and the use
        return await setup.ask(cached=0)

    visit = asyncio.run(main())
    assert (visit.restored, visit.note) == (None, "")


def test_a_model_for_which_a_restored_context_brings_nothing_is_left_alone(setup: Setup) -> None:
    setup.save_to_folder()

    async def main() -> tuple[Visit, Visit]:
        first = await used(setup).ask(cached=0)
        return first, await setup.ask("Other. " + LONG)

    first, second = asyncio.run(main())
    assert "cannot use saved contexts" in first.note
    assert second.note == ""
    assert not setup.keeper.keeps


def test_what_is_restored_while_others_use_the_engine_is_found_by_the_engine(setup: Setup) -> None:
    setup.save_to_folder()

    visit = asyncio.run(used_and_asked(setup, lease=FreeLease(others=1, uses_by_others=3)))

    assert setup.engine.actions[0] == "restore 0"
    assert visit.body == {}, "another kernel may take the slot"
    assert visit.restored is not None


def test_a_full_disk_costs_only_the_saving(setup: Setup) -> None:
    setup.engine.refuses = "Unable to save slot"

    async def main() -> None:
        await used(setup).ask()
        assert await setup.keeper.save() == 0
        assert await setup.keeper.save() == 0

    asyncio.run(main())
    assert setup.engine.actions == ["save 0"], "it is not tried again for the same answer"
    assert list(setup.store.folder.iterdir()) == []


def test_what_was_read_of_a_prompt_before_it_was_given_up_counts_for_the_next(setup: Setup) -> None:
    async def main() -> None:
        visit = await used(setup).keeper.visit(LONG, is_cached=True, lease=None)
        visit.read({"prompt_progress": {"total": 100, "cache": 0, "processed": 50}})
        setup.keeper.end(visit, LONG)
        assert visit.slot is not None
        assert visit.slot.text == LONG[: int(len(LONG) * 0.45)]
        again = await setup.keeper.visit(LONG, is_cached=True, lease=None)
        assert again.slot is visit.slot

    asyncio.run(main())


def test_a_forgotten_conversation_is_taken_out_of_its_slot(setup: Setup) -> None:
    async def main() -> None:
        await used(setup).ask("<user>My cat is Kim. " + LONG)
        await setup.ask("<user>My dog is Tom. " + LONG)
        await setup.keeper.forget(["My cat is Kim. " + LONG])

    asyncio.run(main())
    assert setup.keeper.slots.all[0].text == ""
    assert setup.keeper.slots.all[1].text != ""


def test_a_damaged_context_is_deleted_and_the_answer_says_so(setup: Setup) -> None:
    context = setup.save_to_folder()
    (setup.store.folder / context.file_name).write_bytes(b"x" * 5)

    visit = asyncio.run(used_and_asked(setup, cached=0))

    assert visit.mark["context_note"] == "the saved context was damaged, so it was deleted and not used"
    assert visit.mark["restored_tokens"] == 0


def test_what_was_saved_of_a_prompt_of_few_characters_is_looked_for(setup: Setup) -> None:
    setup.save_to_folder(text=LONG[:200], tokens=150, prefill_ms=10.0)

    visit = asyncio.run(used_and_asked(setup, text=LONG[:200]))

    assert visit.restored is not None, "1.5 s of processing"


def test_a_short_prompt_is_not_looked_for_where_processing_it_is_quick(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.save_to_folder(text=LONG[:200], tokens=150, prefill_ms=10.0)

    async def main() -> Visit:
        keeper = (await used_once_read(setup)).keeper
        keeper._actions.costs.add_prefill(1000, 1000.0)
        monkeypatch.setattr(setup.store, "list", None)
        return await keeper.visit(LONG[:200], is_cached=True, lease=None)

    assert asyncio.run(main()).restored is None


def test_who_waits_for_a_saving_is_not_cancelled_with_it(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        await used(setup).ask()
        hanging = Hanging()
        monkeypatch.setattr(setup.engine, "post", hanging)
        saving = asyncio.create_task(setup.keeper.save())
        await hanging.begun.wait()
        setup.keeper.close()  # the coordinator is ended for another reason
        return await saving

    assert asyncio.run(main()) == 0


class Hanging:
    """A request that is never answered."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def __call__(self, *_: Any, **__: Any) -> Any:
        self.begun.set()
        await asyncio.Event().wait()


def test_a_slot_whose_restore_was_not_awaited_holds_nobody_knows_what(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.save_to_folder(text="Another. " + LONG)

    async def main() -> None:
        await used(setup).ask("First. " * 20)
        await setup.ask("Second. " * 20)
        hanging = Hanging()
        monkeypatch.setattr(setup.engine, "post", hanging)
        asking = asyncio.create_task(setup.keeper.visit("Another. " + LONG, is_cached=True, lease=None))
        await hanging.begun.wait()
        asking.cancel()
        await asyncio.wait({asking})

    asyncio.run(main())
    assert sum(slot.text is None for slot in setup.keeper.slots.all) == 1
    assert not any(slot.requests for slot in setup.keeper.slots.all)


def test_an_action_that_nobody_waits_for_any_more_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the silence of the engine does not count."""
    setup.save_to_folder()
    is_reading, is_read = asyncio.Event(), asyncio.Event()

    async def late(*_: Any, **__: Any) -> Any:
        is_reading.set()
        await is_read.wait()
        return {}

    async def main() -> None:
        used(setup)
        monkeypatch.setattr(setup.engine, "post", late)
        asking = asyncio.create_task(setup.keeper.visit(LONG, is_cached=True, lease=None))
        await is_reading.wait()
        asking.cancel()
        await asyncio.wait({asking})
        assert setup.keeper.is_acting, "the engine does it anyway"
        is_read.set()
        await eventually_async(lambda: not setup.keeper.is_acting, "the action has ended")

    asyncio.run(main())


def test_a_restore_does_not_wait_for_the_answer_of_another_kernel_that_took_the_slot(setup: Setup) -> None:
    setup.save_to_folder()
    setup.engine.taken = 0

    async def main() -> Visit:
        return await used(setup).keeper.visit(LONG, is_cached=True, lease=FreeLease())

    visit = asyncio.run(main())
    assert setup.engine.actions == ["restore 0"]
    assert (visit.body, visit.restored, visit.note) == ({}, None, "")
    assert not setup.keeper.is_acting
    assert not setup.keeper.slots.all[0].is_idle


def test_nor_does_a_saving(setup: Setup) -> None:
    async def main() -> int:
        await used(setup).ask()
        setup.engine.taken = 0
        return await setup.keeper.save()

    assert asyncio.run(main()) == 0
    assert setup.engine.actions == ["save 0"]
    assert list(setup.store.folder.iterdir()) == []
    assert setup.reports == []


def test_nor_does_a_request_that_empties_the_slots_and_it_gets_another(setup: Setup) -> None:
    setup.engine.taken = 0

    async def main() -> Visit:
        return await used(setup).keeper.visit(LONG, is_cached=False, lease=None, is_repeatable=True)

    visit = asyncio.run(main())
    assert setup.engine.actions[0] == "erase 0"
    assert visit.body == {"id_slot": 1}


def test_other_kernels_are_told_of_what_takes_long(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        await used(setup).ask()
        setup.keeper._actions.costs.save_rate = 0.001
        monkeypatch.setattr(setup.keeper._actions.costs, "prefill_ms", 1e6)
        assert await setup.keeper.save() == 1
        await setup.keeper.forget([])

    asyncio.run(main())
    assert setup.engine.actions == ["save 0", "erase 0"]
    first, last = setup.announced
    assert first > actions_module.LIMIT_S
    assert last == 0.0


def test_no_slot_is_emptied_in_vain_while_another_kernel_has_a_request_there(setup: Setup) -> None:
    setup.engine.busy = {1}

    async def main() -> None:
        lease = FreeLease(others=1, uses_by_others=1)
        await used(setup).keeper.visit("Hi", is_cached=False, lease=lease, is_repeatable=True)

    asyncio.run(main())
    assert setup.engine.actions == []


def test_what_was_answered_is_saved_before_the_slots_are_emptied(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "PAUSE_S", 60.0)

    async def main() -> None:
        await used(setup).ask()
        await setup.keeper.visit("Hi", is_cached=False, lease=None, is_repeatable=True)

    asyncio.run(main())
    assert setup.engine.actions == ["save 0", "erase 0", "erase 1"]


def test_no_slot_is_emptied_that_has_got_a_request_meanwhile(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, erases, chosen = asyncio.Event(), asyncio.Event(), asyncio.Event()
    get, post = setup.engine.get, setup.engine.post

    async def get_late(*arguments: Any, **options: Any) -> Any:
        looks.set()
        await erases.wait()
        return await get(*arguments, **options)

    async def post_late(*arguments: Any, **options: Any) -> Any:
        erases.set()
        await chosen.wait()
        return await post(*arguments, **options)

    async def main() -> None:
        await used(setup).ask("First. " * 100)
        await setup.ask("Second. " * 100)
        setup.engine.actions.clear()
        monkeypatch.setattr(setup.engine, "get", get_late)
        monkeypatch.setattr(setup.engine, "post", post_late)
        asking = asyncio.create_task(
            setup.keeper.visit("Second. " * 100, is_cached=True, lease=FreeLease(uses_by_others=1))
        )
        await looks.wait()
        forgetting = asyncio.create_task(setup.keeper.forget([]))
        assert (await asking).slot is setup.keeper.slots.all[1]
        chosen.set()
        await forgetting

    asyncio.run(main())
    assert setup.engine.actions == ["erase 0"]
