"""The flags of llama-server for a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.planner import plan_layers
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings, server_flags
from sollol_nb.models.files import DEMO_MODEL_PATH
from tests.support.layer_plans import GB, workers

KNOWN = frozenset({"--flash-attn"})


@pytest.mark.parametrize(
    ("head_widths", "may_use_gpus", "is_off"),
    [
        ((32, 32), True, True),
        ((64, 64), True, False),
        ((128, 128), True, False),
        ((128, 64), True, True),
        ((576, 512), True, False),
        ((0, 0), True, True),
        ((32, 32), False, False),
    ],
)
def test_attention_that_would_abort_a_gpu_worker_is_switched_off(
    head_widths: tuple[int, int], may_use_gpus: bool, is_off: bool
) -> None:
    facts = replace(read_facts(DEMO_MODEL_PATH), head_widths=head_widths)
    settings = CoordinatorSettings(
        model="demo",
        model_path=Path("demo.gguf"),
        facts=facts,
        plan=plan_layers(facts, workers(GB, GB)),
        context_tokens=2048,
        may_use_gpus=may_use_gpus,
    )
    flags = server_flags(settings, 18080, KNOWN)
    assert ("--flash-attn" in flags) == is_off


def test_a_model_that_runs_here_keeps_what_the_engine_chooses() -> None:
    facts = read_facts(DEMO_MODEL_PATH)
    assert facts.head_widths == (32, 32)
    settings = CoordinatorSettings(
        model="demo", model_path=DEMO_MODEL_PATH, facts=facts, plan=None, context_tokens=2048, may_use_gpus=True
    )
    assert "--flash-attn" not in server_flags(settings, 18080, KNOWN)
