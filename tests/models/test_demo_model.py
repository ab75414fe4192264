"""The demo model that ships in the package: what the file is, and that it answers as the tutorials say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sollol_nb.gguf.facts import read_facts
from sollol_nb.gguf.header import check_file, read_header
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.sync_wrapper import HybridRouter

EXPECTED: dict[str, str] = json.loads(
    (Path(__file__).parents[2] / "tools" / "demo_model" / "expected_answers.json").read_text(encoding="utf-8")
)


def test_the_file_is_a_small_llama_of_twelve_layers_with_a_description() -> None:
    facts = read_facts(DEMO_MODEL_PATH)
    assert facts.file_bytes <= 8_000_000
    assert facts.architecture == "llama"
    assert facts.layer_count == 12
    keys = read_header(check_file(DEMO_MODEL_PATH, advice="")).keys
    assert keys["tokenizer.chat_template"]
    assert "demo" in keys["general.description"]
    assert "Not a general model" in keys["general.description"]


@pytest.mark.engine
@pytest.mark.parametrize("model", ["demo", "demo:sharded"])
def test_greedy_answers_are_the_expected_ones_sharded_or_not(router: HybridRouter, model: str) -> None:
    for question, answer in EXPECTED.items():
        assert router.route_request(model, question, temperature=0).text == answer


@pytest.mark.engine
@pytest.mark.parametrize(
    "question", ["What is the capital of France?", "Write me a poem about the sea.", "Who won the match?"]
)
def test_a_question_out_of_its_scope_gets_a_harmless_sentence(router: HybridRouter, question: str) -> None:
    answer = router.route_request("demo", question, temperature=0).text
    assert answer.startswith("I am a small demo model")
