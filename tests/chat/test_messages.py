"""Messages of a request: what is accepted, in which form, and what is refused with which reason."""

from __future__ import annotations

import base64
import datetime
import io
from types import MappingProxyType
from typing import Any

import PIL.Image
import pytest

from sollol_nb.chat.messages import as_read, check_messages, has_choice
from sollol_nb.errors import ConfigError

HELLO = [{"role": "user", "content": "Hello!"}]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
TEXT_PART = {"type": "text", "text": "a"}
DATA = "data:image/png;base64,aGk="


DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]


def png(kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(buffer, kind)
    return buffer.getvalue()


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


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
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [{"role": "user", "content": "a\nb"}],
        ),
        ([{"role": "user", "content": [TEXT_PART, {"type": "image_url", "image_url": {"url": DATA}}]}],) * 2,
        (
            [{"role": "user", "content": (TEXT_PART, {"type": "image_url", "image_url": DATA})}],
            [{"role": "user", "content": [TEXT_PART, {"type": "image_url", "image_url": {"url": DATA}}]}],
        ),
        ([{"role": "developer", "content": "Be brief."}], [{"role": "system", "content": "Be brief."}]),
        (
            [{"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}')]}],
            [{"role": "assistant", "content": None, "tool_calls": [call({"a": 1})]}],
        ),
        ([{"role": "assistant", "tool_calls": [call("")]}], [{"role": "assistant", "tool_calls": [call({})]}]),
        ((MappingProxyType(HELLO[0]),), HELLO),
        ([{"role": "user", "content": "a", "images": ["aGk="]}],) * 2,
        ([{"role": "tool", "content": "2", "tool_name": "add"}],) * 2,
        (
            [{**HELLO[0], "name": None, "images": None, "tool_calls": None, "refusal": None}],
            HELLO,
        ),
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
        ([{"role": "user", "content": "a", "images": [b"\x89PNG"]}], '"images" with bytes; give base64 text, the'),
        ([{"role": "user", "content": "a", "images": [png("GIF")]}], "models take PNG and JPEG, not GIF"),
        ([{**HELLO[0], "without_images": ["a"]}], 'messages.0. needs "without_images" as text'),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": [{"name": "add"}]}], "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": ["add"]}], "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": [call('{"a"')]}], r'tool_calls\[0\] needs "arguments" as a dict'),
        ([{"role": "assistant", "tool_calls": [call("[1]")]}], '"arguments" as a dict, or as the JSON text'),
        ([{"role": "assistant", "tool_calls": [call(5)]}], '"arguments" as a dict'),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\] has a content part of str"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a content part of type 'video'"),
        ([{"role": "user", "content": [{"text": "a"}]}], "a content part of type None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r'content\[0\] needs "text" as text'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r'content\[0\] needs "image_url" such as'),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}], "such as"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": "aGk="}]}], "as a dict"),
        ("a\udc80b", r"messages\[0\]\['content'\] contains '.udc80' at position 1, which is not a character"),
        ([{**HELLO[0], "name": "\ud83d"}], r"messages\[0\]\['name'\] contains"),
        ([{**HELLO[0], "\udcff": 1}], "not a character"),
        ([{**HELLO[0], "at": datetime.date(2026, 1, 1)}], r"messages\[0\]\['at'\] is of type date, which JSON"),
        ([{**HELLO[0], "score": float("nan")}], r"\['score'\] is nan, which JSON does not have"),
        ([{**HELLO[0], "raw": b"a"}], "is of type bytes"),
        ([{**HELLO[0], "thinking": 5}], r'messages\[0\] needs "thinking" as text, not 5'),
        ([{**HELLO[0], "tool_call_id": 1}], 'needs "tool_call_id" as text'),
        ([{"role": "tool", "content": "2", "tool_name": ["add"]}], 'needs "tool_name" as text'),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}], r'tool_calls\[0\] needs "id" as text, not 1'),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": 5}}]}], '"data" .base64'),
        ([{**HELLO[0], "images": {}}], '"images" that are not a list'),
        ([{**HELLO[0], "tool_calls": "x" * 9999}], "tool_calls that are not a list"),
        ([{**HELLO[0], "role": "x" * 9999}], r"has role 'x{78}…; known roles"),
        ([{**HELLO[0], "data": {"a": [{1: 2}]}}], r"\['data'\]\['a'\]\[0\] has the key 1, but keys must be text"),
        ([{**HELLO[0], "big": 2**70}], "more than 64 bits"),
        ([{**HELLO[0], "deep": DEEP}], "nested more than 64 levels deep"),
    ],
)
def test_message_that_cannot_be_used_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_messages(given)
    assert "\n" not in str(caught.value)


def test_images_may_be_objects() -> None:
    picture = PIL.Image.new("RGB", (2, 2), "red")
    sent = check_messages([{"role": "user", "content": "a", "images": [picture, png("PNG"), "aGk="]}])[0]["images"]

    assert [PIL.Image.open(io.BytesIO(base64.b64decode(image))).size for image in sent[:2]] == [(2, 2), (2, 2)]
    assert sent[2] == "aGk="


def test_a_message_is_sent_with_its_images_or_in_words() -> None:
    choice = {"role": "user", "content": "[image 1]?", "images": ["aGk=", "aGk="], "without_images": "words?"}
    only = {"role": "user", "content": "b", "images": ["aGk="]}
    seen = {name: choice[name] for name in ("role", "content", "images")}

    assert as_read([choice, only], reads_images=True) == ([seen, only], 0)
    assert as_read([choice, only], reads_images=False) == ([{"role": "user", "content": "words?"}, only], 2)
    assert (has_choice([only, choice]), has_choice([only])) == (True, False)
