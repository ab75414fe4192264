"""Which of the free workers a plan may use, and why chosen workers, or all, cannot be used: one line each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.layers.plan import CPU, own_endpoint
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds
from sollol_nb.llama_cpp.workers.choice import (
    SHOWN_WORKERS,
    best_plan,
    check_free,
    describe_missing_workers,
)
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from tests.support.layer_plans import GB, TWELVE, workers

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


# --- which devices a plan may use -------------------------------------------------------------


def speeds_of(*endpoints: str) -> WorkerSpeeds:
    """Calibrated, all alike."""
    return WorkerSpeeds(dict.fromkeys(endpoints, 1 / GB), None, 0.0, dict.fromkeys(endpoints, 0.0))


def own_cpu(free_gb: int, domain: str | None = None) -> WorkerCapacity:
    return WorkerCapacity(own_endpoint(CPU), free_gb * GB, free_gb * GB, memory_domain=domain, device=CPU)


def test_by_memory_three_workers_are_used_or_more_if_the_model_needs_them() -> None:
    for free_gb, used in ((20, 3), (4, 5)):  # three units in 4 GB, beside buffers
        free = workers(*[free_gb * GB] * 6)
        assert len(best_plan(TWELVE, free, strategy="auto", context_tokens=256).shards) == used
    with pytest.raises(ModelDoesNotFitError):
        best_plan(TWELVE, free, strategy="auto", context_tokens=256, wanted=3)


def test_by_speed_this_machine_takes_part_once_it_is_calibrated() -> None:
    free = [replace(found, round_trip_ms=5.0) for found in workers(20 * GB)]
    for known, used in ((("w0:1",), "w0:1"), (("w0:1", own_endpoint(CPU)), own_endpoint(CPU))):
        plan = best_plan(
            TWELVE, free, strategy="auto", context_tokens=256, own=[own_cpu(20)], speeds=speeds_of(*known)
        )
        assert [shard.endpoint for shard in plan.shards] == [used]


@pytest.mark.parametrize("strategy", ["auto", "latency_aware", "throughput"])
def test_this_machine_may_hold_a_model_alone_while_no_worker_is_free(strategy: str) -> None:
    speeds = speeds_of(own_endpoint(CPU))
    plan = best_plan(TWELVE, [], strategy=strategy, context_tokens=256, own=[own_cpu(20)], speeds=speeds)
    assert [shard.endpoint for shard in plan.shards] == [own_endpoint(CPU)]


def test_workers_here_hold_a_model_for_which_this_machines_own_layers_would_leave_too_little_memory() -> None:
    free = [replace(found, round_trip_ms=0.1) for found in workers(20 * GB, domains="a")]
    speeds = speeds_of("w0:1", own_endpoint(CPU))
    plan = best_plan(
        TWELVE, free, strategy="auto", context_tokens=256, own=[own_cpu(10, domain="a")], speeds=speeds
    )
    assert (plan.strategy, plan.endpoints, plan.own) == ("latency_aware", ("w0:1",), ())
