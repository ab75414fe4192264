"""Which slot a request gets, and what is believed of the slots after others have used them."""

from __future__ import annotations

import pytest

from sollol_nb.llama_cpp.contexts.slots import CHEAP_TOKENS, Slot, Slots, shared_characters

SYSTEM = "<system>You are a careful assistant that answers in one sentence. " * 4
CHAT = SYSTEM + "<user>Tell me about Rome.<assistant>Rome is a city." * 20


def slots_with(*texts: str | None, tokens: int = CHEAP_TOKENS) -> Slots:
    """Slots that hold these texts, each used after the one before it."""
    slots = Slots.of(len(texts))
    for number, text in enumerate(texts):
        slot = slots.all[number]
        slot.text, slot.used_at = text, float(number)
        slot.tokens = tokens if text else 0
    return slots


def number_of(slot: Slot | None) -> int | None:
    return None if slot is None else slot.number


@pytest.mark.parametrize(
    ("held", "text", "expected"),
    [
        (("", CHAT, ""), CHAT + "<user>And Paris?", 1),
        ((CHAT, CHAT + "<user>And Paris?"), CHAT + "<user>And Paris?<assistant>Yes.", 1),
        ((CHAT, ""), SYSTEM + "<user>Hi", 1),
        ((CHAT, "<user>older"), SYSTEM + "<user>Hi", 0),
        (("<user>older", CHAT), SYSTEM + "<user>Hi", 0),
        ((SYSTEM + "<user>One?", SYSTEM + "<user>Two?"), SYSTEM + "<user>Three?", 1),
        ((None, "", CHAT), "<user>Hi", 1),
        ((CHAT, CHAT), None, 0),
    ],
    ids=[
        *("its own", "the longest beginning", "an empty one", "the older one is that of the chat"),
        *("the older one", "the beginning is most of it", "not an unknown one", "an unknown prompt"),
    ],
)
def test_the_slot_of_a_request(held: tuple[str | None, ...], text: str | None, expected: int) -> None:
    assert number_of(slots_with(*held).choose(text)) == expected


def test_short_questions_take_slots_from_each_other_and_not_from_a_long_chat() -> None:
    slots = slots_with(CHAT, "<user>One?", "<user>Two?")
    slots.all[1].tokens = slots.all[2].tokens = 10

    assert number_of(slots.choose("Three?")) == 1, "though the chat was not used for longer"


def test_busy_slots_are_left_alone() -> None:
    slots = slots_with(CHAT, "<user>Hi")
    slots.all[0].requests = 1
    assert number_of(slots.choose(CHAT)) == 1

    slots.all[1].requests = 1
    assert slots.choose(CHAT) is None
    assert slots.holding() == []


def entry(number: int, *, task: int | None, tokens: int, busy: bool = False) -> dict[str, object]:
    return {"id": number, "is_processing": busy, "id_task": task, "n_prompt_tokens": tokens}


def test_what_the_engine_says_counts() -> None:
    slots = slots_with(CHAT, CHAT, CHAT, "", CHAT, tokens=100)
    for slot, task in zip(slots.all, (10, 11, None, None, 14), strict=True):
        slot.task = task
    reported = [
        entry(0, task=10, tokens=103),  # as it was
        entry(1, task=77, tokens=100),  # another request
        entry(2, task=12, tokens=130),  # ours, whose reader has left early
        entry(3, task=70, tokens=50),  # used by others
        entry(4, task=14, tokens=0),  # emptied by the engine
    ]

    assert slots.compare(reported)
    assert [slot.text for slot in slots.all] == [CHAT, None, CHAT, None, ""]
    assert [slot.task for slot in slots.all] == [10, 77, 12, 70, 14]
    assert slots.all[2].tokens == 130


def test_a_slot_in_which_others_work_is_busy_and_unknown() -> None:
    slots = slots_with(CHAT, "")

    assert not slots.compare([entry(0, task=3, tokens=5, busy=True), entry(1, task=None, tokens=0)])
    assert [slot.text for slot in slots.all] == [None, ""]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 999, 1000])
def test_the_common_beginning_of_two_texts(length: int) -> None:
    same = ("abcdefghij" * 100)[:length]

    assert shared_characters(same + "x" * 500, same + "y" * 700) == length
    assert shared_characters(same, same + "y") == length
    assert shared_characters(same, same) == length
