"""The route: a decision table, with the reason in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError, ModelNotFoundError
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import (
    BACKEND_NAMES,
    DISTRIBUTED,
    LOCAL,
    OLLAMA,
    Route,
    checked_backend,
    decide_route,
)

PATH = Path("/models/large.gguf")
LARGE = ModelProfile("llama3.1:70b", 70.6, 40 * 2**30, True, "name", "70.6B parameters need sharding")
SMALL = ModelProfile("llama3.2:3b", 3.2, 2 * 2**30, False, "name", "3.2B parameters fit on one machine")
UNKNOWN = ModelProfile("mystery", None, None, None, "unknown", "its size is unknown")
WORDS = "no Ollama node has it"


def decide(profile: ModelProfile, *, ollama: bool, path: Path | None, **settings: Any) -> Route:
    words = "an Ollama node has it" if ollama else WORDS
    return decide_route(profile, in_ollama=ollama, ollama_words=words, model_path=path, **settings)


@pytest.mark.parametrize(
    ("profile", "ollama", "path", "settings", "backend", "words"),
    [
        (LARGE, False, PATH, {}, DISTRIBUTED, "70.6B parameters need sharding"),
        (LARGE, True, PATH, {}, DISTRIBUTED, "70.6B parameters need sharding"),
        (LARGE, False, PATH, {"model_filter": ["llama3.1:70b"]}, DISTRIBUTED, "need sharding"),
        (LARGE, True, None, {"enable_distributed": False}, OLLAMA, "enable_distributed is off, so Ollama tries"),
        (LARGE, True, PATH, {"enable_distributed": False, "model_filter": ["x"]}, OLLAMA, "so Ollama tries"),
        (SMALL, True, PATH, {}, OLLAMA, "3.2B parameters fit on one machine; an Ollama node has it"),
        (SMALL, True, None, {"model_filter": ["x"]}, OLLAMA, "an Ollama node has it"),
        (SMALL, False, PATH, {}, LOCAL, "no Ollama node has it, so a local llama-server runs large.gguf"),
        (SMALL, False, PATH, {"enable_distributed": False}, LOCAL, "a local llama-server runs"),
        (UNKNOWN, True, None, {}, OLLAMA, "its size is unknown; an Ollama node has it"),
        (UNKNOWN, False, PATH, {}, LOCAL, "its size is unknown"),
        # What was asked for goes before the model's size.
        (LARGE, True, PATH, {"backend": OLLAMA}, OLLAMA, "asked for; an Ollama node has it"),
        (LARGE, True, PATH, {"backend": LOCAL}, LOCAL, "asked for"),
        (LARGE, True, PATH, {"backend": LOCAL, "enable_distributed": False}, LOCAL, "asked for"),
        (SMALL, True, PATH, {"backend": DISTRIBUTED}, DISTRIBUTED, "asked for"),
        (SMALL, True, PATH, {"backend": DISTRIBUTED, "model_filter": ["llama3.2:3b"]}, DISTRIBUTED, "asked for"),
        (UNKNOWN, False, PATH, {"backend": DISTRIBUTED}, DISTRIBUTED, "asked for"),
    ],
)
def test_model_goes_where_it_can_run_and_the_route_says_why(
    profile: ModelProfile, ollama: bool, path: Path | None, settings: dict[str, Any], backend: str, words: str
) -> None:
    route = decide(profile, ollama=ollama, path=path, **settings)

    assert route.backend == backend
    assert words in route.reason
    assert route.model == profile.model
    assert route.profile is profile
    assert route.model_path == (None if backend == OLLAMA else path)
    assert str(route) == f"{profile.model} \u2192 {backend}: {route.reason}"


@pytest.mark.parametrize(
    ("profile", "ollama", "path", "settings", "error", "words"),
    [
        (LARGE, True, PATH, {"model_filter": ["a", "b"]}, ConfigError, "model_filter allows only a, b"),
        (LARGE, False, PATH, {"enable_distributed": False}, ConfigError, "but enable_distributed is off"),
        (LARGE, False, None, {"enable_distributed": False}, ConfigError, "but enable_distributed is off"),
        (
            LARGE,
            False,
            None,
            {},
            ModelNotFoundError,
            "fetch it with `ollama pull llama3.1:70b`, or give gguf_path=",
        ),
        (LARGE, True, None, {}, ModelNotFoundError, "its GGUF file is not on this machine"),
        (SMALL, False, None, {}, ModelNotFoundError, "try the built-in model: demo"),
        (UNKNOWN, False, None, {}, ModelNotFoundError, r"no place has mystery \(no Ollama node has it\)"),
        (
            SMALL,
            False,
            PATH,
            {"backend": OLLAMA},
            ModelNotFoundError,
            "^ollama-pool was asked for .* no Ollama node",
        ),
        (SMALL, True, None, {"backend": LOCAL}, ModelNotFoundError, "its GGUF file is not on this machine; fetch"),
        (LARGE, True, None, {"backend": DISTRIBUTED}, ModelNotFoundError, "its GGUF file is not on this machine"),
        (
            SMALL,
            True,
            PATH,
            {"backend": DISTRIBUTED, "enable_distributed": False},
            ConfigError,
            "^llama.cpp-distributed was asked for llama3.2:3b, but enable_distributed is off$",
        ),
        (SMALL, True, PATH, {"backend": DISTRIBUTED, "model_filter": ["x"]}, ConfigError, "allows only x"),
    ],
)
def test_model_that_can_run_nowhere_is_an_error_that_says_what_to_do(
    profile: ModelProfile,
    ollama: bool,
    path: Path | None,
    settings: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        decide(profile, ollama=ollama, path=path, **settings)
    assert profile.model in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cannot_be_asked_of_ollama() -> None:
    profile = ModelProfile("/models/a.gguf", 3.2, None, False, "name", "small")
    with pytest.raises(ModelNotFoundError, match="Ollama knows no files; make a model of it with `ollama create`"):
        decide(profile, ollama=False, path=PATH, backend=OLLAMA)


@pytest.mark.parametrize(
    ("written", "backend"), [*BACKEND_NAMES.items(), (None, None), ("Ollama", OLLAMA), ("SHARDED", DISTRIBUTED)]
)
def test_a_backend_has_a_short_name(written: str | None, backend: str | None) -> None:
    assert checked_backend(written) == backend


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("olama", "backend='olama' is unknown; did you mean 'ollama'?"),
        ("xyz", "backend='xyz' is unknown; known are auto, ollama, sharded, local, ollama-pool, llama.cpp-"),
        (7, "backend=7 is unknown"),
    ],
)
def test_an_unknown_backend_is_refused_with_the_nearest(written: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_backend(written)
    assert words in str(caught.value)
