"""Why the chosen workers, or all workers, cannot be used: one line each."""

from __future__ import annotations

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.llama_cpp.workers.choice import SHOWN_WORKERS, check_free, describe_missing_workers
from sollol_nb.llama_cpp.workers.status import WorkerStatus

HELD = "held by the coordinator of big, started by this kernel"


def worker(number: int, state: str = "free", detail: str = "free") -> WorkerStatus:
    return WorkerStatus(
        endpoint=f"10.0.0.{number}:50052", state=state, detail=detail, held_by=None, probe=None, is_local=False
    )


def test_free_workers_can_be_used() -> None:
    check_free("demo", [worker(1), worker(2)], taken=["10.0.0.3:50052"])


@pytest.mark.parametrize(
    ("state", "detail", "taken", "problem"),
    [
        ("held", HELD, False, f"10.0.0.2:50052: {HELD}"),
        ("held", HELD, True, f"10.0.0.2:50052: {HELD}"),
        ("free", "free", True, "10.0.0.2:50052 was taken by another coordinator"),
        ("down", "nothing listens on 10.0.0.2:50052", False, "nothing listens on 10.0.0.2:50052"),
    ],
)
def test_a_worker_that_is_not_free_is_named_once(state: str, detail: str, taken: bool, problem: str) -> None:
    chosen = [worker(1), worker(2, state, detail)]
    with pytest.raises(WorkersUnavailableError) as caught:
        check_free("demo", chosen, taken=["10.0.0.2:50052"] if taken else [])
    assert str(caught.value) == f"cannot use this layout for demo: {problem}; choose other workers"


@pytest.mark.parametrize("count", [SHOWN_WORKERS, SHOWN_WORKERS + 1])
def test_the_problems_of_the_first_workers_are_shown(count: int) -> None:
    message = describe_missing_workers("demo", [worker(number, "held", HELD) for number in range(count)])
    assert message.startswith(f"demo needs RPC workers, but none of {count} is free: 10.0.0.0:50052: {HELD}; ")
    assert message.count(HELD) == SHOWN_WORKERS
    assert (" ...; " in message) == (count > SHOWN_WORKERS)
