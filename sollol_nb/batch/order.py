"""In which order the questions of a batch are asked, so that what they have in common is processed once. Pure.

Questions that begin alike follow each other, sorted by their text. Few of them are asked one after the other: then
each finds the common beginning in the slot of the one before. Of many, the first is asked alone; then its context
is saved, and the others begin with it in all slots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sollol_nb.llama_cpp.contexts.slots import shared_characters

LONG_CHARACTERS = 2000
"""A common beginning of fewer characters is processed as quickly as its questions are put in order."""
CHAINS_FOR_EACH_SLOT = 4
"""Questions that begin alike are asked one after the other only where there are so many other things to ask for
each slot, or else slots would be idle."""
DEEPEST = 3
"""So many beginnings within each other are parted; further ones are left to the engine."""


@dataclass(frozen=True, slots=True)
class Step:
    """Questions that are asked one after the other.

    Attributes:
        questions: their positions.
        leads: whether the steps after it begin alike, so that it is asked alone, and its context saved.
    """

    questions: tuple[int, ...]
    leads: bool = False


def in_order(texts: Sequence[str], *, slots: int, are_kept: bool, are_saved: bool) -> list[Step]:
    """The steps in which questions are asked; as given where no two begin alike for long.

    Args:
        texts: what each asks, as the model reads it.
        slots: how many are asked at the same time.
        are_kept: whether the next question of a chain gets the slot of the one before.
        are_saved: whether a slot can begin with the saved context of another one.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    shared = [shared_characters(texts[first], texts[second]) for first, second in pairwise(order)]
    if not are_kept:
        return [Step((question,)) for run in _runs(order, shared, 0) for question in run.questions]
    return _steps(order, shared, 0, slots, are_saved)


def text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a question begins with, as a text to compare with others."""
    parts = []
    for message in messages:
        content = message.get("content")
        parts.append(f"{message.get('role')}\n{content if isinstance(content, str) else json.dumps(content)}")
    return "\0".join(parts)


@dataclass(frozen=True, slots=True)
class _Run:
    """Sorted questions that begin alike, and how many characters each shares with the one before it."""

    questions: list[int]
    shared: list[int]


def _runs(order: Sequence[int], shared: Sequence[int], beginning: int) -> list[_Run]:
    """Sorted questions, parted where one shares no long text with the one before, besides a beginning of so many
    characters; in the order in which the first question of each was given."""
    runs = [_Run([order[0]], [])] if order else []
    for question, characters in zip(order[1:], shared, strict=True):
        if characters < beginning + LONG_CHARACTERS:
            runs.append(_Run([question], []))
        else:
            runs[-1].questions.append(question)
            runs[-1].shared.append(characters)
    return sorted(runs, key=lambda run: min(run.questions))


def _steps(
    order: Sequence[int], shared: Sequence[int], beginning: int, slots: int, are_saved: bool, depth: int = 0
) -> list[Step]:
    if depth == DEEPEST:
        return [Step((question,)) for question in order]
    steps = []
    runs = _runs(order, shared, beginning)
    most = max(2, len(order) // (CHAINS_FOR_EACH_SLOT * slots)) if slots > 1 else len(order)
    for run in runs:
        if len(run.questions) <= most:
            steps.append(Step(tuple(run.questions)))
            continue
        first, *others = run.questions
        steps.append(Step((first,), leads=are_saved))
        steps += _steps(others, run.shared[1:], min(run.shared), slots, are_saved, depth + 1)
    return steps
