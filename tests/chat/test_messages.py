"""Messages and options of a request: what is accepted, and what is refused with which reason."""

from __future__ import annotations

from typing import Any

import pytest

from sollol_nb.chat.messages import CHAT_OPTIONS, SAMPLING_OPTIONS, check_messages, check_options
from sollol_nb.chat.options import ChatOptions
from sollol_nb.errors import ConfigError

HELLO = [{"role": "user", "content": "Hello!"}]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ("Hello!", HELLO),
        ("", [{"role": "user", "content": ""}]),
        (HELLO, HELLO),
        (tuple(HELLO), HELLO),
        (
            [{"role": "system", "content": "Be brief."}, *HELLO],
            [{"role": "system", "content": "Be brief."}, *HELLO],
        ),
        ([{"role": "assistant", "tool_calls": [CALL]}], [{"role": "assistant", "tool_calls": [CALL]}]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}],) * 2,
        ([{"role": "user", "content": "a", "images": ["aGk="]}],) * 2,
        ([{"role": "tool", "content": "2", "tool_name": "add"}],) * 2,
    ],
)
def test_messages_are_a_list_of_dicts(given: Any, checked: list[dict[str, Any]]) -> None:
    assert check_messages(given) == checked


def test_checked_messages_are_copies() -> None:
    checked = check_messages(HELLO)
    checked[0]["content"] = "changed"

    assert HELLO[0]["content"] == "Hello!"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "messages must be a list such as"),
        ({"role": "user", "content": "a"}, "messages must be a list such as"),
        (None, "messages must be a list such as"),
        (b"Hello", r"messages\[0\] must be a dict"),
        (["Hello"], r"messages\[0\] must be a dict .* not str"),
        ([*HELLO, {"content": "a"}], r"messages\[1\] must be a dict"),
        ([{"role": "robot", "content": "a"}], "role 'robot'; known roles: system, user, assistant, tool"),
        ([{"role": ["user"], "content": "a"}], "known roles"),
        ([{"role": "user"}], 'needs "content" as text'),
        ([{"role": "user", "content": None}], 'needs "content" as text'),
        ([{"role": "user", "content": 5}], 'needs "content" as text'),
        ([{"role": "user", "content": "a", "images": "aGk="}], '"images" that are not a list'),
        ([{"role": "user", "content": "a", "images": [b"\x89PNG"]}], '"images" that are not a list'),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": [{"name": "add"}]}], "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": ["add"]}], "tool_calls that are not a list"),
    ],
)
def test_message_that_cannot_be_used_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_messages(given)
    assert "\n" not in str(caught.value)


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ({}, {}),
        ({"temperature": None, "seed": 3}, {"seed": 3}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"stop": "\n"}, {"stop": "\n"}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"format": "json"}, {"format": "json"}),
        ({"format": SCHEMA}, {"format": SCHEMA}),
        ({"think": True}, {"think": True}),
        ({"keep_alive": -1}, {"keep_alive": -1}),
        ({"options": {"num_ctx": 10}}, {"options": {"num_ctx": 10}}),
        ({"overflow": "drop_oldest"}, {"overflow": "drop_oldest"}),
    ],
)
def test_known_options_pass_and_none_is_left_out(given: dict[str, Any], checked: dict[str, Any]) -> None:
    assert check_options(given) == checked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "unknown option 'temprature'; did you mean temperature"),
        ({"max_token": 1}, "did you mean max_tokens"),
        ({"zzz": 1}, "unknown option 'zzz'; known options: format, frequency_penalty, keep_alive"),
        ({"stream": True}, r"iterate over router.stream\(...\)"),
        ({"max_tokens": "5"}, "option max_tokens='5' must be of type int"),
        ({"max_tokens": 5.0}, "option max_tokens=5.0 must be of type int"),
        ({"max_tokens": True}, "option max_tokens=True must be of type int"),
        ({"temperature": False}, "option temperature=False must be of type int or float"),
        ({"temperature": "hot"}, "must be of type int or float"),
        ({"stop": 5}, "option stop=5 must be of type str or list or tuple"),
        ({"format": 1}, "must be of type str or dict"),
        ({"tools": {"a": 1}}, "must be of type list or tuple"),
        ({"options": [1]}, "must be of type dict"),
        ({"keep_alive": True}, "must be of type str or int or float"),
        ({"think": 1}, "must be of type bool or str"),
        ({"overflow": 1}, "must be of type str"),
        ({"overflow": "drop"}, "overflow='drop' must be error or drop_oldest"),
    ],
)
def test_option_that_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(given)


def test_the_options_that_are_checked_are_those_that_editors_know() -> None:
    assert ChatOptions.__annotations__.keys() == (SAMPLING_OPTIONS | CHAT_OPTIONS).keys()
