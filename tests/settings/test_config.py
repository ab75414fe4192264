"""Settings: read when asked for, and told plainly where they cannot be used."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import addresses_of, format_endpoint, is_loopback, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.168.1.10:50052", ("192.168.1.10", 50052)),
        ("192.168.1.10", ("192.168.1.10", 50052)),
        (" worker-3.lab:1 ", ("worker-3.lab", 1)),
        ("worker_3:65535", ("worker_3", 65535)),
        ("[::1]:50053", ("::1", 50053)),
        ("[::1]", ("::1", 50052)),
        ("[::1]:", ("::1", 50052)),
        ("::1", ("::1", 50052)),
        ("fe80::1%eth0", ("fe80::1%eth0", 50052)),
    ],
)
def test_endpoint_is_split_into_host_and_port(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(format_endpoint(*endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":50052",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:http",
        "host:5.0",
        "host:\u00b2",
        "host name:50052",
        "http://host:50052",
        "user@host:50052",
        "host,other",
        "host;rm",
        "a\0b",
        "host:50052:1",
        "not:an:address",
        "[::1",
        "[]:50052",
        "[::1]50052",
        "[::1]:x",
        "::1]:50052",
    ],
)
def test_what_is_no_endpoint_is_told_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an endpoint; use host:port") as caught:
        parse_endpoint(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "here"),
    [
        ("127.0.0.1:50052", True),
        ("127.1.2.3:50052", True),
        ("localhost:50052", True),
        ("[::1]:50052", True),
        ("192.168.1.10:50052", False),
        ("127.example.com:50052", False),
        ("[fe80::1]:50052", False),
    ],
)
def test_loopback_is_told_by_the_address(endpoint: str, here: bool) -> None:
    assert is_loopback(endpoint) is here


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


def test_bad_entry_of_rpc_backends_is_told_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_requests_at_once_of_a_node(value: str, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", value)

    assert config.default("ollama_num_parallel") == requests


@pytest.mark.parametrize("value", ["four", "-1", "1.5", "4x"])
def test_requests_at_once_must_be_a_whole_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", value)

    with pytest.raises(ConfigError, match=r"OLLAMA_NUM_PARALLEL=.* must be a whole number"):
        config.default("ollama_num_parallel")


@pytest.mark.parametrize(
    ("value", "wanted"), [("", True), ("1", True), ("yes", True), ("0", False), ("False", False), ("OFF", False)]
)
def test_reentrant_loop_can_be_switched_off(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_NEST_ASYNCIO", value)

    assert config.default("nest_asyncio") is wanted


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300.0),
        (0.5, 0.5),
        (0, 0.0),
        ("0", 0.0),
        ("300", 300.0),
        (" 10M ", 600.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("2m3s500ms", 123.5),
        ("0s", 0.0),
        (-1, None),
        ("-1", None),
        ("-5m", None),
        ("forever", None),
        (" Forever", None),
        ("inf", None),
        (float("inf"), None),
    ],
)
def test_keep_alive_is_read_as_ollama_writes_it(value: object, seconds: float | None) -> None:
    assert keep_alive_seconds(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "-", "m", "10 m", "10d", "5m3", "1..5m", "ten", "10m;", "nan"),
        *(float("nan"), True, None, [], b"10m"),
        pytest.param(10**400, id="too large"),
    ],
    ids=repr,
)
def test_what_is_no_keep_alive_is_told_with_an_example(value: object) -> None:
    with pytest.raises(ConfigError, match=r'is not a time; use seconds, "10m", 0, or "forever"') as caught:
        keep_alive_seconds(value)
    assert "\n" not in str(caught.value)


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


def test_bad_default_keep_alive_is_told_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cache_has_a_place_of_its_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOLLOL_CACHE_DIR", raising=False)

    assert config.APP_NAME in str(config.cache_dir())


def test_programs_get_our_environment_without_leftover_engine_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_N_GPU_LAYERS", "0")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")

    given = config.child_environment(LLAMA_API_KEY="key")

    assert "LLAMA_ARG_N_GPU_LAYERS" not in given
    assert given["HTTPS_PROXY"] == "http://proxy:1"
    assert given["LLAMA_API_KEY"] == "key"
    assert given["GGML_NO_BACKTRACE"] == "1"


def test_a_name_that_could_not_be_resolved_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert addresses_of("gpu-box:50052") == frozenset()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.7", 50052))])
    assert addresses_of("gpu-box:50052") == {("10.0.0.7", 50052)}
