"""Links over SSH are cut in the middle of answers; more of them: `python -m tests.chaos.links --n 20`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.links import CUTS, Answer, LinkedCluster, linked_cluster, smollm2
from tests.support.machines import short_folder

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="sshd and network namespaces"),
]


@pytest.fixture(scope="module")
def cluster(state: Path) -> Iterator[LinkedCluster]:
    with short_folder() as folder, linked_cluster(folder / "machines") as linked:
        yield linked


@pytest.fixture(scope="module")
def long_answers(cluster: LinkedCluster, endless: str) -> LinkedCluster:
    """The same machines with a model whose answers are far from their end when a cut strikes."""
    # Random weights waver between tokens, so the answer is recovered exactly.
    options = {"backend": "sharded", "deterministic": True, "recovery": "exact", "max_tokens": 1500}
    return replace(cluster, model=endless, options=options)


@pytest.fixture(scope="module")
def undisturbed(long_answers: LinkedCluster) -> Answer:
    return long_answers.ask()


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """These tests share links; `linked_cluster` checks at its end that nothing runs on a machine."""


@pytest.mark.parametrize("cut", CUTS)
def test_an_answer_survives_a_cut_link(long_answers: LinkedCluster, undisturbed: Answer, cut: str) -> None:
    rng = random.Random(cut)
    victim = rng.choice(long_answers.used())
    answer = long_answers.ask(rng.randint(1, undisturbed.chunks // 8), cut, victim)
    long_answers.make_well(victim)
    assert answer.text == undisturbed.text
    (failover,) = answer.failovers
    assert failover["continued"]


def test_an_answer_of_a_real_model_is_recovered_exactly(cluster: LinkedCluster) -> None:
    real = smollm2(cluster)
    undisturbed = real.ask()
    victim = real.used()[0]
    answer = real.ask(20, "network falls silent", victim)
    real.make_well(victim)
    assert answer.text == undisturbed.text
    assert len(answer.failovers) == 1


def test_machines_listen_on_loopback_only(cluster: LinkedCluster, undisturbed: Answer) -> None:
    assert cluster.listening() == {machine.name: {"127.0.0.1"} for machine in cluster.machines}
