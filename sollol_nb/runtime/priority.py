"""Priorities: ten named levels, and which of them a role or a task deserves.

A request waits for a slot in this order (see `gate.py`; ageing keeps BATCH from starving). Any whole
number from 1 to 10 may be given wherever a `Priority` is expected.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeGuard

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import is_whole_number, shown


class Priority(IntEnum):
    """How soon a request is served when others wait; higher is sooner."""

    BATCH = 1
    LOWEST = 2
    LOW = 3
    BELOW_NORMAL = 4
    NORMAL = 5
    ABOVE_NORMAL = 6
    HIGH = 7
    HIGHER = 8
    URGENT = 9
    CRITICAL = 10


ROLE_PRIORITIES = {
    "researcher": 8,
    "analyst": 8,
    "assistant": 8,
    "qa": 8,
    "critic": 7,
    "reviewer": 7,
    "editor": 6,
    "summarizer": 5,
    "classifier": 5,
    "extractor": 5,
    "indexer": 3,
    "crawler": 3,
    "background": 2,
    "batch": 1,
}
"""What each role of a multi-agent program deserves; a role not named here is NORMAL."""

TASK_PRIORITIES = {
    # Someone is looking at the screen.
    "interactive": 9,
    "chat": 8,
    "question-answering": 8,
    "autocomplete": 8,
    # Someone waits, but not for every word.
    "code-generation": 7,
    "reasoning": 7,
    "review": 7,
    "translation": 6,
    "editing": 6,
    "summarization": 5,
    "classification": 5,
    "extraction": 5,
    "generation": 5,
    # A program waits.
    "embedding": 4,
    "reranking": 4,
    "indexing": 3,
    "crawling": 3,
    "evaluation": 3,
    # Nobody waits.
    "background": 2,
    "data-generation": 2,
    "batch": 1,
}
"""What each kind of task deserves; a task not named here is NORMAL."""


def get_priority_for_role(role: str) -> int:
    """The priority of a role such as "researcher", in any case; 5 (NORMAL) for a role not in the table."""
    return ROLE_PRIORITIES.get(role.strip().lower(), int(Priority.NORMAL))


def get_priority_for_task(task: str) -> int:
    """The priority of a task such as "summarization", in any case, words joined by space, `_` or `-`;
    5 (NORMAL) for a task not in the table."""
    parts = task.replace("_", " ").replace("-", " ").lower().split()
    return TASK_PRIORITIES.get("-".join(parts), int(Priority.NORMAL))


def priority_named(name: str) -> Priority | None:
    """The level of this name in any case, words joined by space, `_` or `-`; None if no level has it."""
    return Priority.__members__.get(name.strip().upper().replace("-", "_").replace(" ", "_"))


def is_priority(value: object) -> TypeGuard[int]:
    """Whether it is a whole number from 1 to 10."""
    return is_whole_number(value) and Priority.BATCH <= value <= Priority.CRITICAL


def checked_priority(priority: int) -> int:
    """The priority.

    Raises:
        ConfigError: it is not a whole number from 1 to 10.
    """
    if not is_priority(priority):
        raise ConfigError(f"priority={shown(priority)} must be a number from 1 (BATCH) to 10 (CRITICAL)")
    return int(priority)
