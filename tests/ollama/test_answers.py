"""Chunks and lists of models as nodes send them: what is kept, what is left out, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sollol_nb.ollama.answers import MOST_MODELS, checked_chunk, listed_models
from sollol_nb.ollama.requests import AnswerSoFar

CALL = {"id": "c1", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.mark.parametrize(
    "chunk",
    [
        {"model": "m", "created_at": "2026", "message": {"role": "assistant", "content": "x"}, "done": False},
        {"message": {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [CALL]}, "done": True},
        {
            "response": "x",
            "thinking": "y",
            "done": True,
            "done_reason": "stop",
            "context": [1, 2],
            "eval_count": 2,
        },
        {"embeddings": [[0.5, 1], []], "total_duration": 5, "prompt_eval_count": 0},
        {"status": "pulling", "digest": "sha256:1", "total": 10, "completed": 5},
        {"_debug_info": {"rendered_template": "x"}},
        {"model_info": {"general.architecture": "llama"}, "capabilities": ["completion"]},
        {"message": {"content": "x"}, "logprobs": [{"token": "x", "logprob": -1.5}]},
        {},
    ],
)
def test_an_answer_of_a_real_ollama_is_passed_on_unchanged(chunk: dict[str, Any]) -> None:
    assert checked_chunk(chunk) == chunk


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_count", "5"),
        ("eval_count", True),
        ("eval_count", -1),
        ("eval_count", 2**63),
        ("eval_duration", float("nan")),
        ("total", 1e300),
        ("completed", None),
        ("done_reason", 5),
        ("model", ["m"]),
        ("logprobs", "x"),
        ("_routing", {"node": "x"}),
        ("_anything", 1),
    ],
)
def test_wrong_figures_and_marks_are_left_out(name: str, value: Any) -> None:
    assert checked_chunk({"response": "x", name: value}) == {"response": "x"}


def test_only_well_formed_logprobs_are_kept() -> None:
    good = {"token": "x", "logprob": -1.5, "bytes": [120], "top_logprobs": [{"token": "x", "logprob": -1}]}
    odd = {"token": "y", "logprob": -1, "bytes": [256], "top_logprobs": [{**good, "_mark": 1}, 5], "_mark": 1}
    given = [good, odd, None, 5, {"token": 5, "logprob": -1}, {"token": "x", "logprob": "-1"}]
    alternative = {"token": "x", "logprob": -1.5, "bytes": [120]}
    expected = [good, {"token": "y", "logprob": -1, "top_logprobs": [alternative]}]
    assert checked_chunk({"response": "x", "logprobs": given})["logprobs"] == expected


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (None, "not null"),
        ("text", "not text"),
        ([], "not a list"),
        ({"message": []}, "message is a list, not an object"),
        ({"response": 1.5}, "response is a number, not text"),
        ({"thinking": {}}, "thinking is an object, not text"),
        ({"done": 1}, "done is a number, not true or false"),
        ({"embeddings": [["x"]]}, "embeddings is not a list of vectors"),
        ({"embeddings": [[True]]}, "embeddings is not a list of vectors"),
        ({"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}, "tool_calls"),
        ({"message": {"tool_calls": [None]}}, "tool_calls"),
    ],
)
def test_a_wrong_type_where_the_answer_is_read_is_refused(chunk: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked_chunk(chunk)


def test_null_is_nothing() -> None:
    assert checked_chunk({"message": None}) == {"message": {}}
    message = {"content": None, "thinking": None, "tool_calls": None}
    assert checked_chunk({"message": message}) == {"message": {"content": "", "thinking": "", "tool_calls": []}}
    assert listed_models({"models": None}) == []


def test_a_list_of_models_has_a_limit() -> None:
    models = [{"name": f"m{number}"} for number in range(MOST_MODELS + 5)]
    assert len(listed_models({"models": models})) == MOST_MODELS
    for wrong in (None, [], "x", {}, {"models": {}}, {"models": "x"}):
        with pytest.raises(ValueError, match="no list of models"):
            listed_models(wrong)


def test_pieces_of_an_answer_become_one() -> None:
    answer = AnswerSoFar()
    chunks: list[dict[str, Any]] = [
        {"message": {"role": "assistant", "content": "", "thinking": "h"}, "logprobs": [1]},
        {"message": {"role": "assistant", "content": "a", "thinking": "m"}, "logprobs": [2]},
        {"message": {"role": "assistant", "content": "b", "tool_calls": [CALL]}},
        {"message": {"role": "assistant", "content": "", "tool_calls": [CALL]}, "done": True, "eval_count": 4},
    ]
    assert [answer.add(chunk) for chunk in chunks] == [True, True, True, True]
    assert answer.merged() == {
        "message": {"role": "assistant", "content": "ab", "thinking": "hm", "tool_calls": [CALL, CALL]},
        "logprobs": [1, 2],
        "done": True,
        "eval_count": 4,
    }
    assert answer.tokens == 4
    answer.message["content"] = "changed"
    assert answer.message["content"] == "ab"
