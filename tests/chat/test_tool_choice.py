"""Which tools are offered and must be called, and how a text that is held to a call becomes one."""

from __future__ import annotations

import gc
import json
from typing import Any

import jsonschema
import pytest

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.option_checks import check_options
from sollol_nb.chat.tool_choice import CALL_CUT_NOTE, CallFilter, apply_tool_choice, resumed_call
from sollol_nb.errors import ConfigError

NESTED = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Place"}, "again": {"$ref": "#"}},
    "required": ["at"],
    "$defs": {"Place": {"enum": ["here", "there"]}},
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
GO = {"type": "function", "function": {"name": "go", "parameters": NESTED}}
BARE = {"type": "function", "function": {"name": "bare"}}
NAMED = {"type": "function", "function": {"name": "go"}}
CALL = {"id": "call_1", "function": {"name": "now", "arguments": {}}}


def applied(**options: Any) -> dict[str, Any]:
    return apply_tool_choice(check_options(options))


def chunk(content: str = "", **more: Any) -> Chunk:
    calls = more.pop("tool_calls", None)
    message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    return {"message": message, "done": False, **more}  # type: ignore[typeddict-item]


def shown(options: dict[str, Any], *chunks: Chunk) -> list[Chunk]:
    calls = CallFilter(options)
    return [seen for given in chunks if (seen := calls.shown(given)) is not None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"tools": [NOW]}, {"tools": [NOW]}),
        ({"tools": [NOW], "tool_choice": "auto"}, {"tools": [NOW]}),
        ({"tools": [NOW], "tool_choice": "none", "parallel_tool_calls": False}, {}),
        ({"tool_choice": "auto"}, {}),
        ({"tool_choice": "none"}, {}),
        ({"parallel_tool_calls": False}, {}),
        ({"tools": [NOW], "parallel_tool_calls": False}, {"tools": [NOW], "parallel_tool_calls": False}),
    ],
)
def test_a_choice_that_requires_no_call_decides_about_the_tools(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert applied(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"tool_choice": NAMED, "tools": [NOW]}, "the function 'go', which is not among the tools"),
        (
            {"tool_choice": "required", "tools": [NOW], "format": "json"},
            "either a required tool_choice or a",
        ),
        ({"tool_choice": "any"}, 'must be "auto", "none", "required", or {"type"'),
        ({"tool_choice": {"type": "function"}}, "must be"),
        ({"tool_choice": {"type": "function", "function": {"name": ""}}}, "must be"),
        ({"parallel_tool_calls": 1}, "must be True or False"),
    ],
)
def test_a_choice_that_cannot_be_followed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ({"name": "now", "arguments": {}}, True),
        ({"name": "bare", "arguments": {}}, True),
        ({"name": "go", "arguments": {"at": "here", "again": {"at": "there"}}}, True),
        ({"name": "go", "arguments": {"at": "elsewhere"}}, False),
        ({"name": "go", "arguments": {"at": "here", "again": {}}}, False),
        ({"name": "go", "arguments": {}}, False),
        ({"name": "stop", "arguments": {}}, False),
        ({"name": "now"}, False),
    ],
)
def test_a_required_call_is_held_to_the_parameters_of_one_tool(call: dict[str, Any], fits: bool) -> None:
    options = applied(tools=[NOW, GO, BARE], tool_choice="required")
    assert options["tools"] == [NOW, GO, BARE]
    assert jsonschema.Draft202012Validator(options["format"]).is_valid(call) is fits


def test_a_named_function_is_the_only_tool() -> None:
    options = applied(tools=[NOW, GO], tool_choice=NAMED)
    assert (options["tools"], options["tool_choice"]) == ([GO], "required")
    validator = jsonschema.Draft202012Validator(options["format"])
    assert validator.is_valid({"name": "go", "arguments": {"at": "here"}})
    assert not validator.is_valid({"name": "now", "arguments": {}})


def test_the_text_of_a_required_call_is_held_back_and_comes_as_a_call() -> None:
    options = applied(tools=[GO], tool_choice="required")
    first, thinking, last = shown(
        options,
        chunk('{"name": "go", ', _routing={}),
        chunk('"arguments": '),
        {"message": {"role": "assistant", "content": "", "thinking": "Hm."}, "done": False},
        chunk('{"at": "here"}}'),
        {**chunk(), "done": True, "done_reason": "stop"},
    )
    assert (first["message"]["content"], thinking["message"]["thinking"]) == ("", "Hm.")
    (call,) = last["message"]["tool_calls"]
    assert call["function"] == {"name": "go", "arguments": {"at": "here"}}
    assert call["id"].startswith("call_")
    assert (last["message"]["content"], last["done_reason"]) == ("", "tool_calls")


def test_text_from_before_a_restart_is_not_part_of_the_call() -> None:
    options = applied(tools=[NOW], tool_choice="required")
    chunks = shown(
        options,
        chunk('{"name": "no'),
        chunk('{"name": "now", "arguments": {}}', _restarted=True),
        {**chunk(), "done": True},
    )
    assert [call["function"]["name"] for call in chunks[-1]["message"]["tool_calls"]] == ["now"]


@pytest.mark.parametrize("text", ['{"name": "now", "argu', "5", '{"name": "now", "arguments": 5}', "[" * 5000])
def test_a_call_that_was_cut_comes_as_text_with_a_note(text: str) -> None:
    options = applied(tools=[NOW], tool_choice="required")
    gc.disable()  # pytest cannot report what is collected at the limit of recursion, which the last text reaches
    try:
        (last,) = shown(options, chunk(text), {**chunk(), "done": True, "done_reason": "length"})
    finally:
        gc.enable()
    assert last["message"] == {"role": "assistant", "content": text}
    assert (last["done_reason"], last["_note"]) == ("length", CALL_CUT_NOTE)


def test_a_call_that_the_engine_has_parsed_itself_stays() -> None:
    options = applied(tools=[NOW], tool_choice="required")
    called, last = shown(options, chunk(tool_calls=[CALL]), {**chunk(), "done": True, "done_reason": "stop"})
    assert called["message"]["tool_calls"] == [CALL]
    assert "tool_calls" not in last["message"]


def test_calls_after_the_first_are_left_out_where_only_one_may_come() -> None:
    options = applied(tools=[NOW], parallel_tool_calls=False)
    chunks = shown(options, chunk("Now: "), chunk(tool_calls=[CALL, CALL]), chunk("!", tool_calls=[CALL]))
    assert [seen["message"]["content"] for seen in chunks] == ["Now: ", "", "!"]
    assert [seen["message"].get("tool_calls") for seen in chunks] == [None, [CALL], None]


def test_other_answers_are_not_touched() -> None:
    given = chunk("Hi", tool_calls=[CALL, CALL])
    assert shown(applied(tools=[NOW]), given) == [given]


def test_an_answer_that_was_continued_is_a_call_too() -> None:
    options = applied(tools=[NOW], tool_choice="required")
    text = json.dumps(CALL["function"])
    whole = Completion(message={"role": "assistant", "content": text}, eval_count=7, done=True)
    message = resumed_call(whole, options)["message"]
    assert (message["content"], whole["eval_count"]) == ("", 7)
    assert [call["function"] for call in message["tool_calls"]] == [CALL["function"]]
