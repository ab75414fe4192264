"""Values of settings and the package's folders, from the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config


@pytest.mark.parametrize(
    ("value", "backends"),
    [
        (None, []),
        ("", []),
        (" , ,", []),
        ("10.0.0.1:50052", ["10.0.0.1:50052"]),
        (" 10.0.0.1 , 10.0.0.2:50053,[::1]:50054,", ["10.0.0.1:50052", "10.0.0.2:50053", "[::1]:50054"]),
    ],
)
def test_rpc_backends_are_read_from_the_environment(
    value: str | None, backends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RPC_BACKENDS", raising=False)
    if value is not None:
        monkeypatch.setenv("RPC_BACKENDS", value)

    assert config.default("workers") == backends


def test_an_invalid_entry_of_rpc_backends_is_shown_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPC_BACKENDS", "10.0.0.1:50052,10.0.0.2:fifty")

    with pytest.raises(ConfigError, match=r"'10\.0\.0\.2:fifty' is not an endpoint"):
        config.default("workers")


@pytest.mark.parametrize(
    ("value", "hosts"),
    [("", []), ("127.0.0.1", ["127.0.0.1"]), (" http://a:1 ,b, ", ["http://a:1", "b"])],
)
def test_ollama_hosts_are_kept_as_written(value: str, hosts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", value)

    assert config.default("ollama_hosts") == hosts


@pytest.mark.parametrize(("value", "requests"), [("", 1), ("4", 4), ("0", 0), (" 2 ", 2)])
def test_simultaneous_requests_of_a_node(value: str, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", value)

    assert config.default("ollama_num_parallel") == requests


@pytest.mark.parametrize("value", ["four", "-1", "1.5", "4x"])
def test_simultaneous_requests_must_be_a_whole_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", value)

    with pytest.raises(ConfigError, match=r"OLLAMA_NUM_PARALLEL=.* must be a whole number"):
        config.default("ollama_num_parallel")


@pytest.mark.parametrize(
    ("value", "wanted"), [("", True), ("1", True), ("yes", True), ("0", False), ("False", False), ("OFF", False)]
)
def test_the_nested_loop_can_be_switched_off(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_NEST_ASYNCIO", value)

    assert config.default("nest_asyncio") is wanted


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, 600.0), ("", 600.0), ("90s", 90.0), ("0", 0.0), ("forever", None), ("-1", None)]
)
def test_default_keep_alive_is_read_from_the_environment(
    value: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOLLOL_KEEP_ALIVE", raising=False)
    if value is not None:
        monkeypatch.setenv("SOLLOL_KEEP_ALIVE", value)

    assert config.default_keep_alive_s() == seconds


def test_an_invalid_default_keep_alive_is_shown_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_KEEP_ALIVE", "soon")

    with pytest.raises(ConfigError, match="SOLLOL_KEEP_ALIVE='soon' must be a time"):
        config.default_keep_alive_s()


def test_folders_are_created_for_the_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "a" / "state"))

    assert config.log_dir() == config.state_dir() / "logs" == tmp_path / "a" / "state" / "logs"
    assert config.registry_dir() == tmp_path / "a" / "state" / "registry"
    assert config.registry_dir().is_dir()
    if os.name == "posix":
        for folder in (config.state_dir(), config.log_dir(), config.registry_dir()):
            assert folder.stat().st_mode & 0o777 == 0o700


def test_folders_of_the_user_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", "~/cache")
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", "~/llama.cpp")
    monkeypatch.setenv("OLLAMA_MODELS", "~/models")

    assert config.cache_dir() == Path.home() / "cache"
    assert config.default("llama_cpp") == Path.home() / "llama.cpp"
    assert config.default("ollama_models") == Path.home() / "models"


def test_the_cache_has_its_own_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOLLOL_CACHE_DIR", raising=False)

    assert config.APP_NAME in str(config.cache_dir())


def test_programs_get_the_environment_without_what_changes_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_away = [
        *("LLAMA_ARG_N_GPU_LAYERS", "LLAMA_API_KEY", "LLAMA_SERVER_ROUTER_PORT", "LLAMA_SERVER_CHILD_MODE"),
        *("AIP_MODE", "AIP_HTTP_PORT", "AIP_HEALTH_ROUTE", "LLAMA_MEDIA_MARKER", "LLAMA_TRACE", "LLAMA_APP_CMD"),
        *("GGML_SCHED_DEBUG", "GGML_RPC_DEBUG", "GGML_SCHED_DEBUG_REALLOC", "MTMD_BACKEND_DEVICE"),
    ]
    kept = ["HTTPS_PROXY", "LLAMA_CACHE", "CUDA_VISIBLE_DEVICES", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "MY_AIP_MODE"]
    for name in [*kept_away, *kept]:
        monkeypatch.setenv(name, "1")

    given = config.child_environment()

    assert [name for name in kept_away if name in given] == []
    assert [given[name] for name in kept] == ["1"] * len(kept)
    assert given["GGML_NO_BACKTRACE"] == "1"
    assert config.child_environment(LLAMA_API_KEY="key")["LLAMA_API_KEY"] == "key"
