"""Options of a request: what is accepted, and what is refused with which reason, before anything is loaded."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sollol_nb.chat.option_checks import (
    CHAT_OPTIONS,
    SAMPLING_OPTIONS,
    check_llama_cpp_options,
    check_options,
)
from sollol_nb.chat.options import ChatOptions
from sollol_nb.errors import ConfigError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
NAN, INFINITY = float("nan"), float("inf")


def tool_with(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "now", **fields}}


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ({}, {}),
        ({"temperature": None, "seed": 3}, {"seed": 3}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"max_tokens": -1}, {"max_tokens": -1}),
        ({"num_predict": -2}, {"num_predict": -2}),
        ({"seed": -1}, {"seed": -1}),
        ({"top_p": 1, "min_p": 0.0, "top_k": 0}, {"top_p": 1, "min_p": 0.0, "top_k": 0}),
        ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
        ({"stop": "\n"}, {"stop": "\n"}),
        ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"stop": []}, {"stop": []}),
        ({"format": "json"}, {"format": "json"}),
        ({"format": SCHEMA}, {"format": SCHEMA}),
        ({"tools": (TOOL,)}, {"tools": [TOOL]}),
        ({"think": True}, {"think": True}),
        ({"think": "low"}, {"think": "low"}),
        ({"keep_alive": -1}, {"keep_alive": -1}),
        ({"options": {"num_ctx": 10, "seed": None}}, {"options": {"num_ctx": 10}}),
        ({"options": {"max_tokens": 10}}, {"options": {"num_predict": 10}}),
        ({"options": {"mirostat": 2, "use_mmap": False}}, {"options": {"mirostat": 2, "use_mmap": False}}),
        ({"overflow": "drop_oldest"}, {"overflow": "drop_oldest"}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 20}),
        ({"top_logprobs": 0}, {"top_logprobs": 0}),
    ],
)
def test_known_options_pass_and_none_is_left_out(given: dict[str, Any], checked: dict[str, Any]) -> None:
    assert check_options(given) == checked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "unknown option 'temprature'; did you mean temp"),
        ({"max_token": 1}, "did you mean max_tokens"),
        (
            {"zzz": 1},
            "unknown option 'zzz'; known options: conversation, deterministic, format, frequency_penalty, journal",
        ),
        ({"num_ctx": 512}, "unknown option 'num_ctx'"),
        ({"stream": True}, r"iterate over router.stream\(...\)"),
        ({"max_tokens": "5"}, "option max_tokens='5' must be a whole number from 1 to 2147483647"),
        ({"max_tokens": 5.0}, "option max_tokens=5.0 must be a whole number"),
        ({"max_tokens": True}, "option max_tokens=True must be a whole number"),
        ({"max_tokens": 0}, "option max_tokens=0 must be a whole number from 1 to 2147483647"),
        ({"num_predict": -3}, "option num_predict=-3 must be a whole number from 1 to 2147483647"),
        ({"max_tokens": 2**40}, "must be a whole number"),
        ({"max_tokens": 5, "num_predict": 6}, "give either max_tokens or num_predict, not both"),
        ({"options": {"max_tokens": 5, "num_predict": 6}}, "not both"),
        ({"temperature": False}, "option temperature=False must be a number of 0 or more"),
        ({"temperature": "hot"}, "must be a number"),
        ({"temperature": NAN}, "option temperature=nan must be a number"),
        ({"temperature": INFINITY}, "option temperature=inf must be a number"),
        ({"temperature": 10**400}, "must be a number"),
        ({"temperature": -0.1}, "option temperature=-0.1 must be a number of 0 or more"),
        ({"top_p": 3}, "option top_p=3 must be a number from 0 to 1"),
        ({"min_p": -1}, "from 0 to 1"),
        ({"typical_p": 1.5}, "from 0 to 1"),
        ({"top_k": -5}, "option top_k=-5 must be a whole number of 0 or more"),
        ({"seed": -2}, "option seed=-2 must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "option seed=4294967296 must be"),
        ({"repeat_penalty": 0}, "option repeat_penalty=0 must be a number above 0"),
        ({"repeat_last_n": -2}, "option repeat_last_n=-2 must be"),
        ({"presence_penalty": -INFINITY}, "must be a finite number"),
        ({"frequency_penalty": NAN}, "must be a finite number"),
        ({"stop": 5}, "option stop=5 must be a text, or a list of texts"),
        ({"stop": ""}, "option stop='' must be a text, or a list of texts, none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": [None]}, "none of them empty"),
        ({"stop": "\udc80"}, "stop contains '.udc80'"),
        ({"stop": ["a", "\udc80"]}, r"stop\[1\] contains '.udc80'"),
        ({"format": 1}, 'option format=1 must be "json", or a JSON schema'),
        ({"format": {"maximum": NAN}}, r"format\['maximum'\] is nan"),
        ({"tools": {"a": 1}}, "option tools={'a': 1} must be a list of dicts"),
        ({"tools": [time.sleep]}, r"tools\[0\] is the Python function sleep, which is not called here"),
        ({"tools": [TOOL, "now"]}, r"tools\[1\] must be a dict such as"),
        ({"tools": [{"name": "now"}]}, r"tools\[0\] must be a dict such as"),
        ({"tools": [tool_with(parameters={"default": time.sleep})]}, "of type builtin"),
        ({"tools": [tool_with(parameters="none")]}, r'tools\[0\] needs "parameters" as a JSON schema'),
        ({"tools": [tool_with(parameters=[])]}, r'"parameters" as a JSON schema, such as .*, not \[\]'),
        ({"tools": [tool_with(description=5)]}, r'tools\[0\] needs "description" as text, not 5'),
        ({"options": [1]}, "must be a dict"),
        (
            {"options": {"temprature": 1}},
            r"unknown option 'temprature' in options={...}; did you mean temperature",
        ),
        ({"options": {"temperature": "hot"}}, r"options\['temperature'\]='hot' must be a number"),
        ({"options": {"seed": "7"}}, r"options\['seed'\]='7' must be a whole number"),
        ({"options": {"stop": ""}}, r"options\['stop'\]='' must be a text"),
        ({"options": {"top_p": 3}}, "from 0 to 1"),
        ({"options": {"num_ctx": "big"}}, r"options\['num_ctx'\]='big' must be a whole number"),
        ({"options": {"num_ctx": -1}}, "must be a whole number of 0 or more"),
        ({"options": {"use_mmap": 1}}, "must be True or False"),
        ({"options": {"mirostat": 3}}, "must be 0, 1 or 2"),
        ({"options": {"keep_alive": 5}}, "unknown option 'keep_alive' in options"),
        ({"options": {5: 5}}, "unknown option 5 in options"),
        ({"keep_alive": True}, "must be a time"),
        ({"think": 1}, "option think=1 must be True, False, or a level: low, medium, high"),
        ({"think": "lo"}, "must be True, False, or a level"),
        ({"think": "false"}, "must be True, False, or a level"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=True"),
        ({"logprobs": True, "top_logprobs": 21}, "must be a whole number from 0 to 20"),
        ({"logprobs": 1}, "must be True or False"),
        ({"overflow": 1}, "must be a text"),
        ({"overflow": "drop"}, "overflow='drop' must be error or drop_oldest"),
    ],
)
def test_option_that_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_options(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"mirostat": 2}}, "llama.cpp does not take the option mirostat; leave it out, or ask with"),
        ({"options": {"num_gpu": 0}}, "does not take the option num_gpu"),
        ({"options": {"repeat_last_n": -1}}, "does not take repeat_last_n=-1; give a number of tokens"),
        ({"repeat_last_n": -1}, "does not take repeat_last_n=-1"),
        ({"format": "json", "tools": [TOOL]}, "offers no tools where it holds the answer to a format"),
        (
            {"logprobs": True, "tools": [TOOL]},
            "does not give logprobs with tools; leave out one",
        ),
    ],
)
def test_option_that_only_ollama_takes_is_refused_on_llama_cpp(given: dict[str, Any], message: str) -> None:
    checked = check_options(given)
    with pytest.raises(ConfigError, match=message):
        check_llama_cpp_options(checked)


def test_sampling_options_are_taken_by_both_backends() -> None:
    nested = {"top_k": 3, "stop": ["a"], "num_predict": 5, "num_ctx": 64}
    options = {"temperature": 0.5, "repeat_last_n": 64, "options": nested}
    check_llama_cpp_options(check_options(options))


def test_checked_options_are_copies() -> None:
    stop = ["a"]
    checked = check_options({"stop": stop})
    stop.append("b")

    assert checked == {"stop": ["a"]}


def test_the_options_that_are_checked_are_those_that_editors_know() -> None:
    assert ChatOptions.__annotations__.keys() == (SAMPLING_OPTIONS | CHAT_OPTIONS).keys()
