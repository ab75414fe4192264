"""A real model wavers between tokens that are nearly equally likely: what recovery gives there, and determinism.

More of them: `python -m tests.chaos --model smollm2 --recovery exact`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from sollol_nb.llama_cpp.coordinators import readiness
from tests.chaos.faults import COORDINATOR_KILLED, WORKER_KILLED, Fault
from tests.chaos.machines import Cluster
from tests.chaos.trials import STALL_S, Chaos, ask, one_fault, smollm2

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]


def new_chaos(cluster: Cluster, **options: Any) -> Chaos:
    subject = smollm2(**options)
    return Chaos(cluster, replace(subject, questions=(subject.long,), long_prompt=subject.long))


@pytest.fixture(scope="module")
def exact(cluster: Cluster) -> Iterator[Chaos]:
    """The cluster with the undisturbed deterministic answer of a real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readiness, "LOAD_STALL_S", STALL_S)
        yield new_chaos(cluster, deterministic=True)


@pytest.mark.parametrize("fault", [WORKER_KILLED, COORDINATOR_KILLED], ids=str)
def test_with_exact_recovery_the_answer_is_the_undisturbed_one(exact: Chaos, fault: Fault) -> None:
    rng, long = random.Random(f"{fault} 1"), exact.subject.long
    (answer,) = one_fault(fault, exact, rng, long, at=exact.before_the_end(rng, long))
    assert not exact.differences([answer])
    assert [failover["recovery"] for failover in answer.failovers] == ["exact"]


def test_with_fast_recovery_the_answer_is_finished_and_says_that_it_may_differ(cluster: Cluster) -> None:
    fast = new_chaos(cluster)
    rng, long = random.Random("fast"), fast.subject.long
    (answer,) = one_fault(WORKER_KILLED, fast, rng, long, at=fast.before_the_end(rng, long))
    assert fast.outcome(answer) in ("identical", "finished")
    assert [failover["recovery"] for failover in answer.failovers] == ["fast"]


def test_a_deterministic_answer_depends_on_nothing_that_was_or_is_asked(exact: Chaos) -> None:
    long = exact.subject.long
    other = replace(long, text="Write a long story about a lighthouse in a storm.")
    usual = {"deterministic": False, "recovery": "fast"}
    with exact.scene(random.Random(0)) as scene, ThreadPoolExecutor() as threads:
        strike = partial(scene.strike, COORDINATOR_KILLED)
        ask(scene, long, {20: strike}, **usual)  # leaves a cache that was computed in another batch
        after_a_fault = ask(scene, long)
        beside = [threads.submit(ask, scene, question, **more) for question, more in ((other, usual), (long, {}))]
        meanwhile = ask(scene, long)
        answers = [after_a_fault, meanwhile, beside[1].result(60)]
        beside[0].result(60)
    assert not exact.differences(answers)
