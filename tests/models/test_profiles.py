"""A model's size comes from the user's table, its file's header or its name, in this order, never from a guess."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.models.profiles import (
    BYTES_PER_PARAMETER,
    MIXTURE_SHARE,
    MODEL_PROFILES,
    profile_of,
    size_from_name,
)
from tests.support.gguf_files import write_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def facts(tmp_path: Path) -> ModelFacts:
    return read_facts(write_llama(tmp_path / "blob.gguf"))


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen3:235b", 235),
        ("gpt-oss:120b", 120),
        ("deepseek-r1:671b", 671),
        ("codellama:13b", 13),
        ("llama3.1:8b-instruct-q4_K_M", 8),
        ("llama3.1:70b-instruct-q4_K_M", 70),
        ("qwen2.5-coder:1.5b", 1.5),
        ("phi3:3.8b", 3.8),
        ("qwen2.5:0.5b", 0.5),
        ("gemma3:270m", 0.27),
        ("all-minilm:22m", 0.022),
        ("kimi-k2:1t", 1000),
        ("TinyLlama-1.1B-intermediate-step-1431k-3T", 1.1),
        ("qwen3:30b-a3b", 30),
        ("Qwen3-235B-A22B", 235),
        ("olmoe-1b-7b", 7),
        ("gemma3n:e4b", 4),
        ("hf.co/user/Repo-70B-GGUF:Q4_K_M", 70),
        ("hf.co/7b-lovers/Repo-34B-GGUF:Q4_K_M", 34),
        ("user/model_3B_q8", 3),
        ("mixtral:8x7b", 56 * MIXTURE_SHARE),
        ("mixtral:8x22b-instruct", 176 * MIXTURE_SHARE),
    ],
)
def test_a_name_states_the_size(model: str, billions: float) -> None:
    assert size_from_name(model) == pytest.approx(billions)


@pytest.mark.parametrize(
    "model",
    [
        "llama3.1",
        "llama3.2:latest",
        "mistral:latest",
        "mistral:v0.3",
        "all-minilm:l6-v2",
        "qwen2.5",
        "gpt-4",
        "bge-m3",
        "foo:q4_0",
        "foo:Q4_K_M",
        "foo:iq3_m",
        "phi",
        "custom-70",
        "70b-lovers/foo",
        "foo:200k",
        "",
    ],
)
def test_a_name_without_a_size_states_none(model: str) -> None:
    assert size_from_name(model) is None


def test_the_rule_for_mixtures_comes_near_the_listed_mixture() -> None:
    assert size_from_name("mixtral:8x7b") == pytest.approx(
        MODEL_PROFILES["mixtral:8x7b"]["parameter_count"], rel=0.02
    )


@pytest.mark.parametrize("model", MODEL_PROFILES)
def test_listed_models_are_routed_as_listed(model: str) -> None:
    entry, profile = MODEL_PROFILES[model], profile_of(model)
    assert profile.requires_distributed is entry["requires_distributed"]
    assert profile.parameter_count_b == entry["parameter_count"]
    assert profile.memory_bytes == round(entry["estimated_memory_gb"] * 1e9)
    assert profile.source == f"profile {model!r}"


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("llama3.2", "llama3.2"),
        ("llama3.2:latest", "llama3.2"),
        ("llama3.1:70b", "llama3.1:70b"),
        ("mine", "mine:latest"),
        ("llama3.1", None),
        ("llama3.2:1b", None),
        ("llama3.1:70b-instruct-q4_K_M", None),
        ("demo:other", None),
    ],
)
def test_a_listed_name_matches_its_own_tag_only(model: str, key: str | None) -> None:
    profile = profile_of(model, profiles=MODEL_PROFILES | {"mine:latest": {"parameter_count": 5}})
    assert profile.source == f"profile {key!r}" if key else not profile.source.startswith("profile")


ONE_OF_EACH: dict[str, dict[str, Any]] = {
    "yes": {"parameter_count": 3, "requires_distributed": True},
    "no": {"parameter_count": 70, "requires_distributed": False},
    "no-without-size": {"requires_distributed": False},
    "large": {"parameter_count": 70},
    "small": {"parameter_count": 8},
    "empty": {},
    "empty:90b": {},
}


@pytest.mark.parametrize(
    ("model", "threshold", "sharded", "reason"),
    [
        ("yes", None, True, "listed in MODEL_PROFILES as needing sharding"),
        ("yes", 100, True, "listed in MODEL_PROFILES as needing sharding"),
        ("no", None, False, "listed in MODEL_PROFILES as not needing sharding"),
        (
            "no",
            30,
            True,
            "listed in MODEL_PROFILES as not needing sharding, but 70B parameters are above the threshold of 30B",
        ),
        ("no", 70, False, "listed in MODEL_PROFILES as not needing sharding"),
        ("no-without-size", 1, False, "listed in MODEL_PROFILES as not needing sharding"),
        ("large", None, True, "70B parameters (from MODEL_PROFILES), above the sharding threshold of 40B"),
        ("large", 70, False, "70B parameters (from MODEL_PROFILES), at the sharding threshold of 70B"),
        ("small", None, False, "8B parameters (from MODEL_PROFILES), below the sharding threshold of 40B"),
        ("small", 0, True, "8B parameters (from MODEL_PROFILES), above the sharding threshold of 0B"),
        ("empty", None, None, "size unknown"),
        ("empty:90b", None, True, "90B parameters (from its name), above the sharding threshold of 40B"),
        ("qwen3:235b", None, True, "235B parameters (from its name), above the sharding threshold of 40B"),
        ("qwen3:235b", 500, False, "235B parameters (from its name), below the sharding threshold of 500B"),
        ("gemma3:270m", 0.1, True, "270M parameters (from its name), above the sharding threshold of 100M"),
        ("foo", None, None, "size unknown"),
        ("foo", 1, None, "size unknown"),
    ],
)
def test_the_decision_follows_entry_threshold_and_size_with_its_reason(
    model: str, threshold: float | None, sharded: bool | None, reason: str
) -> None:
    profile = profile_of(model, threshold_params=threshold, profiles=ONE_OF_EACH)
    assert (profile.requires_distributed, profile.reason) == (sharded, reason)


def test_a_profile_is_shown_in_one_line() -> None:
    assert str(profile_of("llama3.1:70b")) == (
        "llama3.1:70b: 70B parameters, about 40 GB (from profile 'llama3.1:70b'); "
        "sharded: listed in MODEL_PROFILES as needing sharding"
    )
    assert str(profile_of("foo")) == (
        "foo: size unknown, so it will not be sharded. "
        "Set its size in MODEL_PROFILES, or with %sollol_profile foo --parameters N"
    )
    assert str(profile_of("/models/qwen3-8b.gguf")).startswith("qwen3-8b: 8B parameters, about 4.88 GB (")


def test_a_header_takes_precedence_over_the_name(facts: ModelFacts) -> None:
    profile = profile_of("foo:70b", facts=facts)
    assert profile.source == "GGUF header of blob.gguf"
    assert profile.requires_distributed is False
    assert profile.parameter_count_b == facts.parameter_count / 1e9
    assert profile.memory_bytes == facts.file_bytes + sum(facts.kv_bytes(4096))
    assert "(from its GGUF header), below the sharding threshold of 40B" in profile.reason


def test_an_entry_takes_precedence_over_the_header_which_fills_its_gaps(facts: ModelFacts) -> None:
    profile = profile_of("foo", facts=facts, profiles={"foo": {"estimated_memory_gb": 7}})
    assert profile.memory_bytes == 7_000_000_000
    assert profile.parameter_count_b == facts.parameter_count / 1e9
    assert profile.source == "profile 'foo'"


def test_memory_is_estimated_from_the_name_or_unknown() -> None:
    assert profile_of("qwen3:235b").memory_bytes == round(235e9 * BYTES_PER_PARAMETER)
    unknown = profile_of("foo")
    assert (unknown.memory_bytes, unknown.parameter_count_b, unknown.source) == (None, None, "unknown")


def test_the_table_is_read_at_each_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_of("custom-70b").source == "name"
    monkeypatch.setitem(MODEL_PROFILES, "custom-70b", {"parameter_count": 70, "requires_distributed": False})
    assert profile_of("custom-70b").requires_distributed is False
    monkeypatch.setitem(MODEL_PROFILES["custom-70b"], "requires_distributed", True)
    assert profile_of("custom-70b").requires_distributed is True


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("70b", r"MODEL_PROFILES\['mine'\] is '70b'"),
        (None, r"MODEL_PROFILES\['mine'\] is None"),
        ({"parameter_count": "70"}, r"\['mine'\]\['parameter_count'\] is '70'"),
        ({"parameter_count": -1}, r"\['parameter_count'\] is -1"),
        ({"parameter_count": True}, r"\['parameter_count'\] is True"),
        ({"estimated_memory_gb": float("nan")}, r"\['estimated_memory_gb'\] is nan"),
        ({"estimated_memory_gb": [40]}, r"\['estimated_memory_gb'\] is \[40\]"),
        ({"requires_distributed": "yes"}, r"\['requires_distributed'\] is 'yes'; give True or False"),
    ],
)
def test_a_malformed_entry_is_named_with_its_key(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of("mine", profiles={"mine": entry})


def test_a_malformed_entry_does_not_affect_other_models() -> None:
    assert profile_of("foo:8b", profiles={"mine": "70b"}).parameter_count_b == 8  # type: ignore[dict-item]


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf"), "30", True])
def test_an_unusable_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(ConfigError, match="distributed_threshold_params"):
        profile_of("foo", threshold_params=threshold)


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no model given"):
        profile_of(" ")
