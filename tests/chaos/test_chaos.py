"""Each fault, at a moment and on a victim that a seed decides: the answer is the undisturbed one.

More of them: `make chaos N=200`.
"""

from __future__ import annotations

import random
import sys

import pytest

from tests.chaos.faults import COORDINATOR_KILLED, WORKER_KILLED, Fault
from tests.chaos.trials import ACCENTS, JSON, TRIALS, Chaos, Question, one_fault

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]


@pytest.mark.parametrize("name", TRIALS)
def test_answers_continue_as_if_nothing_had_happened(chaos: Chaos, name: str) -> None:
    answers = TRIALS[name](chaos, random.Random(f"{name} 0"))
    assert answers
    assert not chaos.differences(answers)


@pytest.mark.parametrize("question", [ACCENTS, JSON], ids=str)
@pytest.mark.parametrize("fault", [WORKER_KILLED, COORDINATOR_KILLED], ids=str)
def test_neither_characters_nor_grammars_break_at_the_cut(chaos: Chaos, fault: Fault, question: Question) -> None:
    assert not chaos.differences(one_fault(fault, chaos, random.Random(f"{fault} {question}"), question))
