from __future__ import annotations

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.priority import (
    Priority,
    checked_priority,
    get_priority_for_role,
    get_priority_for_task,
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


@pytest.mark.parametrize("priority", [0, 11, -1, 5.5])
def test_a_priority_outside_the_levels_is_refused(priority: float) -> None:
    with pytest.raises(ConfigError, match=r"1 \(BATCH\) to 10 \(CRITICAL\)"):
        checked_priority(priority)  # type: ignore[arg-type]
