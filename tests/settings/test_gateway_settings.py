"""The address of a gateway, and its key, which is never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import gateway_url
from sollol_nb.settings.kinds import Secret, checked_gateway
from sollol_nb.settings.table import FILE_NAME
from sollol_nb.settings.trust import describe_files, review
from sollol_nb.sync_wrapper import HybridRouter

KEY = "sk-sollol-secret"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://head:11440", "http://head:11440"),
        ("http://head:11440/", "http://head:11440"),
        ("head", "http://head:11440"),
        ("head:80", "http://head:80"),
        ("https://head.example.org", "https://head.example.org:443"),
        ("HTTPS://hub.example.org/user/ada/proxy/11440/", "https://hub.example.org:443/user/ada/proxy/11440"),
        ("[::1]:5", "http://[::1]:5"),
        (" 10.0.0.1 ", "http://10.0.0.1:11440"),
    ],
)
def test_an_address_becomes_a_url(text: str, url: str) -> None:
    assert gateway_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://head", "http://a:b:c", "head:0", "http://head?x", "a b", "#"]
)
def test_an_invalid_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a gateway; use a URL such as http://head:11440"):
        gateway_url(text)


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="must not contain a password; give the key as gateway_key") as refused:
        gateway_url("http://me:hunter2@head")
    assert "hunter2" not in str(refused.value)


def test_local_means_own_engines() -> None:
    assert checked_gateway("Local") is None
    assert checked_gateway(None) is None


def test_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_GATEWAY_KEY", f" {KEY} ")
    found = config.find("gateway_key")
    assert found.value == KEY
    assert KEY not in repr(found)
    assert repr([Secret(KEY)]) == "[(hidden)]"
    monkeypatch.setenv("SOLLOL_GATEWAY_KEY", f"{KEY}\u2011")
    with pytest.raises(ConfigError, match="characters that no key has") as refused:
        config.find("gateway_key")
    assert KEY not in str(refused.value)


def test_a_key_that_is_not_a_text_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / FILE_NAME
    file.write_text(f'gateway_key = ["{KEY}"]\n')
    monkeypatch.setenv("SOLLOL_CONFIG", str(file))
    with pytest.raises(ConfigError, match="gateway_key: the key must be a text") as refused:
        config.find("gateway_key")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", ["", 5, KEY.encode(), [KEY], f"{KEY}\u00e9"])
def test_a_router_refuses_a_key_that_no_gateway_has_without_showing_it(key: Any) -> None:
    with pytest.raises(ConfigError, match=r"^gateway_key: the key ") as refused:
        HybridRouter(gateway="head", gateway_key=key)
    assert KEY not in str(refused.value)


def test_the_file_of_a_folder_needs_consent_and_its_key_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOLLOL_CONFIG")
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / FILE_NAME).write_text(f'gateway = "http://evil:1"\ngateway_key = "{KEY}"\n')
    monkeypatch.chdir(folder)
    assert config.find("gateway").value is None
    assert config.find("gateway_key").value is None
    texts = [*describe_files("sollol-nb trust"), review(None, "sollol-nb trust")]
    assert "gateway_key = (hidden)" in texts[-1]
    review(None, "sollol-nb trust", give=True)
    assert config.find("gateway").value == "http://evil:1"
    assert config.find("gateway_key").value == KEY
    texts += [*describe_files("sollol-nb trust"), review(None, "sollol-nb trust")]
    assert KEY not in "".join(texts)
