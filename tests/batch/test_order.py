"""In which order questions are asked: those that begin alike follow each other, and one of many leads."""

from __future__ import annotations

from sollol_nb.batch.order import DEEPEST, LONG_CHARACTERS, Step, in_order, text_of

A, B, C = ("a" * LONG_CHARACTERS, "b" * LONG_CHARACTERS, "c" * LONG_CHARACTERS)


def steps(texts: list[str], *, slots: int = 4, are_kept: bool = True, are_saved: bool = True) -> list[Step]:
    found = in_order(texts, slots=slots, are_kept=are_kept, are_saved=are_saved)
    assert sorted(question for step in found for question in step.questions) == list(range(len(texts)))
    return found


def test_questions_that_begin_differently_stay_as_they_are() -> None:
    texts = ["z", "a", f"{A[1:]}2", f"{A[1:]}1", "b"]

    assert steps(texts) == [Step((position,)) for position in range(5)]
    assert steps([]) == []


def test_of_many_one_leads_and_the_others_follow_in_order() -> None:
    texts = [f"{A} {number}" for number in (3, 1, 2, 4)]

    assert steps(texts) == [Step((1,), leads=True), Step((0,)), Step((2,)), Step((3,))]
    assert steps(texts, are_saved=False) == [Step((1,)), Step((0,)), Step((2,)), Step((3,))]


def test_two_follow_each_other_in_one_slot() -> None:
    assert steps(["z", f"{A}2", "b", f"{A}1"]) == [Step((0,)), Step((3, 1)), Step((2,))]


def test_few_that_begin_alike_among_many_are_a_chain() -> None:
    texts = [f"{letter * LONG_CHARACTERS}{number}" for number in range(4) for letter in "abcdefghijklmnopqrst"]

    found = steps(texts)

    assert found == [Step((first, first + 20, first + 40, first + 60)) for first in range(20)]


def test_one_slot_needs_no_leader() -> None:
    texts = [f"{letter}{number}" for number in range(30) for letter in (A, B)]

    assert [len(step.questions) for step in steps(texts, slots=1)] == [30, 30]
    assert not any(step.leads for step in steps(texts, slots=1))


def test_where_no_slot_is_kept_only_the_order_counts() -> None:
    texts = [f"{A}1", "z", f"{A}2", f"{B}1", f"{A}3", f"{B}2"]

    assert [step.questions for step in steps(texts, are_kept=False)] == [(0,), (2,), (4,), (1,), (3,), (5,)]


def test_a_beginning_within_a_beginning_has_its_own_leader() -> None:
    texts = [*(f"{A}{B}{number}" for number in range(4)), *(f"{A}{C}{number}" for number in range(4))]

    leaders = [step.questions for step in steps(texts) if step.leads]

    assert leaders == [(0,), (1,), (4,)]


def test_a_text_that_grows_from_row_to_row_does_not_nest_for_ever() -> None:
    texts = ["x" * LONG_CHARACTERS * rows for rows in range(1, 60)]

    assert sum(step.leads for step in steps(texts)) == DEEPEST


def test_the_text_of_messages_is_that_of_all_of_them_in_turn() -> None:
    parts = [{"type": "text", "text": "x"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]

    assert text_of(messages) == 'system\nBe brief.\0user\n[{"type": "text", "text": "x"}]'
    assert text_of([{"role": "user", "content": None}]) == "user\nnull"
