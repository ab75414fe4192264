"""Endpoints as text."""

from __future__ import annotations

import socket

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings.endpoints import addresses_of, format_endpoint, is_loopback, parse_endpoint


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
def test_an_endpoint_is_split_into_host_and_port(text: str, endpoint: tuple[str, int]) -> None:
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
        "host:" + "9" * 5000,
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
def test_an_invalid_endpoint_is_refused_with_an_example(text: str) -> None:
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
def test_loopback_is_recognised_by_the_address(endpoint: str, here: bool) -> None:
    assert is_loopback(endpoint) is here


def test_a_name_that_could_not_be_resolved_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert addresses_of("gpu-box:50052") == frozenset()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.7", 50052))])
    assert addresses_of("gpu-box:50052") == {("10.0.0.7", 50052)}
