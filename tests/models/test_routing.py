"""The route: a decision table, with its reasons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError, ModelFileError, ModelNotFoundError
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
DESCRIPTIONS = {OLLAMA: "Ollama", DISTRIBUTED: "sharded llama-server", LOCAL: "local llama-server"}


def profile(model: str, size: float | None, sharded: bool | None, reason: str) -> ModelProfile:
    return ModelProfile(
        model=model,
        parameter_count_b=size,
        memory_bytes=None,
        requires_distributed=sharded,
        source="name",
        reason=reason,
    )


LARGE = profile("llama3.1:70b", 70.6, True, "70.6B parameters need sharding")
SMALL = profile("llama3.2:3b", 3.2, False, "3.2B parameters fit on one machine")
UNKNOWN = profile("mystery", None, None, "size unknown")
FILE = profile("/models/a.gguf", 3.2, False, "small")


def decide(profile: ModelProfile, *, ollama: bool, path: Path | None, **settings: Any) -> Route:
    state = "an Ollama node has it" if ollama else "no Ollama node has it"
    return decide_route(profile, in_ollama=ollama, ollama_state=state, model_path=path, **settings)


@pytest.mark.parametrize(
    ("profile", "ollama", "path", "settings", "backend", "text"),
    [
        (LARGE, False, PATH, {}, DISTRIBUTED, "70.6B parameters need sharding"),
        (LARGE, True, PATH, {}, DISTRIBUTED, "70.6B parameters need sharding"),
        (LARGE, False, PATH, {"model_filter": ["llama3.1:70b"]}, DISTRIBUTED, "need sharding"),
        (LARGE, True, None, {"enable_distributed": False}, OLLAMA, "enable_distributed is off, so Ollama runs it"),
        (LARGE, True, PATH, {"enable_distributed": False, "model_filter": ["x"]}, OLLAMA, "so Ollama runs it"),
        (SMALL, True, PATH, {}, OLLAMA, "3.2B parameters fit on one machine; an Ollama node has it"),
        (SMALL, True, None, {"model_filter": ["x"]}, OLLAMA, "an Ollama node has it"),
        (SMALL, False, PATH, {}, LOCAL, "3.2B parameters fit on one machine; no Ollama node has it"),
        (SMALL, False, PATH, {"enable_distributed": False}, LOCAL, "fit on one machine"),
        (UNKNOWN, True, None, {}, OLLAMA, "size unknown; an Ollama node has it"),
        (LARGE, True, None, {}, OLLAMA, "but its GGUF file is not on this machine, so Ollama runs it"),
        (
            LARGE,
            True,
            None,
            {"file_trouble": "it is a cloud model"},
            OLLAMA,
            "70.6B parameters need sharding, but its GGUF file cannot be sharded (it is a cloud model), so Ollama",
        ),
        (UNKNOWN, False, PATH, {}, LOCAL, "size unknown"),
        # A requested backend goes before the model's size.
        (LARGE, True, PATH, {"backend": OLLAMA}, OLLAMA, "chosen with backend=ollama; an Ollama node has it"),
        (LARGE, True, PATH, {"backend": LOCAL}, LOCAL, "chosen with backend=local"),
        (LARGE, True, PATH, {"backend": LOCAL, "enable_distributed": False}, LOCAL, "chosen with backend=local"),
        (SMALL, True, PATH, {"backend": DISTRIBUTED}, DISTRIBUTED, "chosen with backend=sharded"),
        (
            SMALL,
            True,
            PATH,
            {"backend": DISTRIBUTED, "model_filter": ["llama3.2:3b"]},
            DISTRIBUTED,
            "chosen with backend=sharded",
        ),
        (UNKNOWN, False, PATH, {"backend": DISTRIBUTED}, DISTRIBUTED, "chosen with backend=sharded"),
    ],
)
def test_a_model_goes_where_it_can_run_and_the_route_says_why(
    profile: ModelProfile, ollama: bool, path: Path | None, settings: dict[str, Any], backend: str, text: str
) -> None:
    route = decide(profile, ollama=ollama, path=path, **settings)

    assert route.backend == backend
    assert text in route.reason
    assert route.model == profile.model
    assert route.profile is profile
    assert route.model_path == (None if backend == OLLAMA else path)
    assert str(route) == f"{profile.model} \u2192 {DESCRIPTIONS[backend]}: {route.reason}"


@pytest.mark.parametrize(
    ("profile", "ollama", "path", "settings", "error", "text"),
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
            "Run `ollama pull llama3.1:70b` here, or use the path of a .gguf file",
        ),
        (LARGE, False, None, {"file_trouble": "llama3.1:70b: no permission"}, ModelFileError, "no permission$"),
        (SMALL, False, None, {}, ModelNotFoundError, "try the built-in model: demo"),
        (UNKNOWN, False, None, {}, ModelNotFoundError, "mystery is not available: no Ollama node has it"),
        (
            SMALL,
            False,
            PATH,
            {"backend": OLLAMA},
            ModelNotFoundError,
            "^Ollama cannot run llama3.2:3b: no Ollama node has it. Run `ollama pull llama3.2:3b`$",
        ),
        (
            SMALL,
            True,
            None,
            {"backend": LOCAL},
            ModelNotFoundError,
            "^cannot run .*: its GGUF file",
        ),
        (
            LARGE,
            True,
            None,
            {"backend": DISTRIBUTED},
            ModelNotFoundError,
            "^cannot shard .*: its GGUF file",
        ),
        (
            SMALL,
            True,
            PATH,
            {"backend": DISTRIBUTED, "enable_distributed": False},
            ConfigError,
            "^cannot shard llama3.2:3b: enable_distributed is off$",
        ),
        (SMALL, True, PATH, {"backend": DISTRIBUTED, "model_filter": ["x"]}, ConfigError, "allows only x"),
    ],
)
def test_the_error_for_a_model_that_cannot_run_says_what_to_do(
    profile: ModelProfile,
    ollama: bool,
    path: Path | None,
    settings: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text) as caught:
        decide(profile, ollama=ollama, path=path, **settings)
    assert profile.model in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ollama_does_not_run_files() -> None:
    with pytest.raises(ModelNotFoundError, match="create a model from it with `ollama create`"):
        decide(FILE, ollama=False, path=PATH, backend=OLLAMA)


def test_the_route_of_a_file_shows_the_file_name_alone() -> None:
    route = decide_route(FILE, in_ollama=False, ollama_state="", model_path=PATH)
    assert str(route) == "a \u2192 local llama-server: small"


@pytest.mark.parametrize(
    ("profile", "backend", "needs_worker"),
    [
        (LARGE, None, False),
        (LARGE, DISTRIBUTED, True),
        (SMALL, DISTRIBUTED, True),
        (SMALL, LOCAL, False),
        (replace(LARGE, is_listed_as_sharded=True), None, True),
        (replace(LARGE, is_listed_as_sharded=True), LOCAL, False),
    ],
)
def test_only_who_wants_a_model_sharded_gets_a_worker_in_any_case(
    profile: ModelProfile, backend: str | None, needs_worker: bool
) -> None:
    assert decide(profile, ollama=False, path=PATH, backend=backend).needs_worker == needs_worker


@pytest.mark.parametrize(
    ("written", "backend"), [*BACKEND_NAMES.items(), (None, None), ("Ollama", OLLAMA), ("SHARDED", DISTRIBUTED)]
)
def test_a_backend_has_a_short_name(written: str | None, backend: str | None) -> None:
    assert checked_backend(written) == backend


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("olama", "backend='olama' is unknown; did you mean 'ollama'?"),
        ("xyz", "backend='xyz' is unknown; known backends: auto, ollama, sharded, local, ollama-pool, llama.cpp-"),
        (7, "backend=7 is unknown"),
    ],
)
def test_an_unknown_backend_is_refused_with_the_nearest(written: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_backend(written)
    assert text in str(caught.value)
