from __future__ import annotations

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.priority import (
    Priority,
    checked_priority,
    get_priority_for_role,
    get_priority_for_task,
    priority_named,
)


def test_the_levels_are_those_of_the_guide() -> None:
    assert [(level.name, int(level)) for level in Priority] == [
        ("BATCH", 1),
        ("LOWEST", 2),
        ("LOW", 3),
        ("BELOW_NORMAL", 4),
        ("NORMAL", 5),
        ("ABOVE_NORMAL", 6),
        ("HIGH", 7),
        ("HIGHER", 8),
        ("URGENT", 9),
        ("CRITICAL", 10),
    ]


@pytest.mark.parametrize(
    ("role", "priority"),
    [
        *((role, 8) for role in ("researcher", "analyst", "assistant", "qa")),
        *((role, 7) for role in ("critic", "reviewer")),
        ("editor", 6),
        *((role, 5) for role in ("summarizer", "classifier", "extractor")),
        *((role, 3) for role in ("indexer", "crawler")),
        ("background", 2),
        ("batch", 1),
        ("Researcher", 8),
        (" QA ", 8),
        ("poet", 5),
        ("", 5),
    ],
)
def test_a_role_has_its_priority(role: str, priority: int) -> None:
    assert get_priority_for_role(role) == priority


@pytest.mark.parametrize(
    ("task", "priority"),
    [
        ("interactive", 9),
        ("chat", 8),
        ("Question Answering", 8),
        ("code_generation", 7),
        ("summarization", 5),
        ("EMBEDDING", 4),
        ("indexing", 3),
        ("background", 2),
        ("batch", 1),
        ("something else", 5),
    ],
)
def test_a_task_has_its_priority(task: str, priority: int) -> None:
    assert get_priority_for_task(task) == priority


@pytest.mark.parametrize("priority", [1, 10, Priority.HIGH])
def test_a_level_is_taken_as_a_number(priority: int) -> None:
    assert checked_priority(priority) == priority
    assert type(checked_priority(priority)) is int


@pytest.mark.parametrize("priority", [0, 11, -1, 5.0, 5.5, True, "5", "high", None])
def test_anything_else_is_refused(priority: object) -> None:
    with pytest.raises(ConfigError, match=r"must be a number from 1 \(BATCH\) to 10 \(CRITICAL\)"):
        checked_priority(priority)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "level"),
    [("high", Priority.HIGH), (" Below normal", 4), ("above-NORMAL", 6), ("LOW_EST", None), ("5", None)],
)
def test_a_level_is_found_by_its_name(name: str, level: int | None) -> None:
    assert priority_named(name) == level
