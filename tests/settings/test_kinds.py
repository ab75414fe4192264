"""Kinds of settings: how a keep_alive and a command are read."""

from __future__ import annotations

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings.kinds import keep_alive_seconds, split_command


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
        (1e300, None),
        ("876000h", None),
    ],
)
def test_keep_alive_is_read_in_ollamas_form(value: object, seconds: float | None) -> None:
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
def test_an_invalid_keep_alive_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ConfigError, match=r'is not a time; use seconds, "10m", 0, or "forever"') as caught:
        keep_alive_seconds(value)
    assert "\n" not in str(caught.value)


def test_a_command_may_have_quotes_and_on_windows_paths_with_backslashes() -> None:
    assert split_command("ssh -F 'my config'", is_windows=False) == ["ssh", "-F", "my config"]
    assert split_command(r'"C:\Program Files\OpenSSH\ssh.exe" -v', is_windows=True) == [
        r"C:\Program Files\OpenSSH\ssh.exe",
        "-v",
    ]
