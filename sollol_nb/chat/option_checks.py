"""The options of a request: which values each one takes, checked before anything is loaded or sent. Pure.

An option that no backend knows is refused here. One that only Ollama knows is refused by
`check_llama_cpp_options` where the request goes to llama.cpp: nothing is dropped silently. Sources: Ollama's
`docs/api.md` and `api/types.go`, and the limits in llama.cpp's `tools/server/server-schema.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.context_window import check_overflow
from sollol_nb.chat.plain_data import checked_text, plain_data
from sollol_nb.chat.tool_choice import is_tool_choice
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import is_number, is_whole_number, shown
from sollol_nb.text.nearest import nearest

_MOST_WHOLE = 2**31 - 1
_MOST_FLOAT = 3.4e38  # both engines compute with 32-bit floats
THINK_LEVELS = ("low", "medium", "high")
RECOVERIES = ("fast", "exact")
SPECULATIONS = ("auto", "off", "ngram", "draft")


@dataclass(frozen=True, slots=True)
class Values:
    """Which values an option takes: `description` completes "must be ..."."""

    description: str
    is_valid: Callable[[Any], bool]


def _whole(description: str, least: int, most: int = _MOST_WHOLE) -> Values:
    return Values(description, lambda value: is_whole_number(value) and least <= value <= most)


def _number(
    description: str, least: float = -_MOST_FLOAT, most: float = _MOST_FLOAT, *, above: bool = False
) -> Values:
    # NaN fails too: it compares as False.
    return Values(
        description,
        lambda value: is_number(value) and (least < value if above else least <= value) and value <= most,
    )


def _of_type(description: str, *types: type) -> Values:
    return Values(
        description,
        lambda value: isinstance(value, types) and (not isinstance(value, bool) or bool in types),
    )


_TOKENS = Values(
    f"a whole number from 1 to {_MOST_WHOLE} (or -1: no limit)",
    lambda value: is_whole_number(value) and (1 <= value <= _MOST_WHOLE or value in (-1, -2)),
)
_SHARE = _number("a number from 0 to 1", 0, 1)
_FINITE = _number("a finite number")
_TOKEN_ID = re.compile("[0-9]{1,9}")
_COUNT = _whole("a whole number of 0 or more", 0)
_YES_OR_NO = _of_type("True or False", bool)
_STOP = Values(
    "a text, or a list of texts, none of them empty",
    lambda value: all(
        isinstance(stop, str) and stop for stop in (value if isinstance(value, list | tuple) else [value])
    ),
)

SAMPLING_OPTIONS: dict[str, Values] = {
    "max_tokens": _TOKENS,
    "num_predict": _TOKENS,
    "temperature": _number("a number of 0 or more", 0),
    "top_p": _SHARE,
    "top_k": _COUNT,
    "min_p": _SHARE,
    "typical_p": _SHARE,
    "seed": _whole("a whole number from 0 to 4294967295 (or -1: random)", -1, 2**32 - 1),
    "stop": _STOP,
    "repeat_penalty": _number("a number above 0", 0, above=True),
    "repeat_last_n": _whole("a whole number of 0 or more (or -1: the whole context)", -1),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
}
"""Sampling options, which mean the same on both backends."""

OLLAMA_OPTIONS: dict[str, Values] = {
    **dict.fromkeys(("main_gpu", "num_batch", "num_ctx", "num_thread"), _COUNT),
    **{name: _whole("a whole number of -1 or more", -1) for name in ("num_gpu", "num_keep")},
    **dict.fromkeys(("low_vram", "numa", "penalize_newline", "use_mlock", "use_mmap"), _YES_OR_NO),
    **dict.fromkeys(("mirostat_eta", "mirostat_tau", "tfs_z"), _FINITE),
    "mirostat": _whole("0, 1 or 2", 0, 2),
}
"""What else Ollama takes in `options`, with the names of older versions."""

CHAT_OPTIONS: dict[str, Values] = {
    "options": _of_type("a dict of Ollama's options", dict),
    "format": _of_type('"json", or a JSON schema as a dict', str, dict),
    "tools": _of_type("a list of dicts that describe functions", list, tuple),
    "tool_choice": Values(
        '"auto", "none", "required", or {"type": "function", "function": {"name": ...}}', is_tool_choice
    ),
    "parallel_tool_calls": _YES_OR_NO,
    "logprobs": _YES_OR_NO,
    "top_logprobs": _whole("a whole number from 0 to 20", 0, 20),
    "logit_bias": Values(
        'a dict of token ids (as text) to numbers from -100 to 100, such as {"42": -100}',
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(token, str) and _TOKEN_ID.fullmatch(token) for token in value)
            and all(is_number(bias) and -100 <= bias <= 100 for bias in value.values())
        ),
    ),
    "keep_alive": _of_type('a time: seconds, "10m", 0 or "forever"', str, int, float),
    "think": Values(
        f"True, False, or a level: {', '.join(THINK_LEVELS)}",
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value in THINK_LEVELS),
    ),
    "overflow": _of_type("a text", str),
    "recovery": Values('"fast" or "exact"', lambda value: isinstance(value, str) and value in RECOVERIES),
    "deterministic": _YES_OR_NO,
    "speculation": Values(
        f"one of {', '.join(SPECULATIONS)}", lambda value: isinstance(value, str) and value in SPECULATIONS
    ),
    "journal": _YES_OR_NO,
    "conversation": _of_type("the name of a conversation", str),
}
"""All other options of a request."""


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's options without those that are None, as plain data.

    Raises:
        ConfigError: an unknown option (with the nearest known name), or a value that it does not take.
    """
    checked = {name: value for name, value in options.items() if value is not None}
    for name, value in checked.items():
        if name == "stream":
            raise ConfigError(
                "unknown option 'stream': route_request returns whole answers; for chunks, iterate over "
                "router.stream(...)"
            )
        _check_value(name, value, SAMPLING_OPTIONS | CHAT_OPTIONS, f"option {name}", "")
    _check_one_limit(checked)
    if "options" in checked:
        checked["options"] = _checked_ollama_options(checked["options"])
    if checked.get("top_logprobs") and not checked.get("logprobs"):
        raise ConfigError("top_logprobs needs logprobs=True")
    if "overflow" in checked:
        check_overflow(checked["overflow"])
    for position, tool in enumerate(checked.get("tools", ())):
        _check_tool(tool, f"tools[{position}]")
    return {name: plain_data(value, name) for name, value in checked.items()}


def check_llama_cpp_options(options: Mapping[str, Any]) -> None:
    """Check that a request (already checked) has no option that llama.cpp cannot follow. Whether `num_ctx` fits
    depends on the coordinator.

    Raises:
        ConfigError: it has one; the message says what to use instead.
    """
    nested = options.get("options") or {}
    for name in nested:
        if name in OLLAMA_OPTIONS and name != "num_ctx":
            raise ConfigError(
                f"llama.cpp does not take the option {name}; leave it out, or ask with backend=ollama "
                f"(llama.cpp takes {', '.join(sorted(set(SAMPLING_OPTIONS) - {'max_tokens'}))})"
            )
    if options.get("tools") and options.get("format") and options.get("tool_choice") != "required":
        raise ConfigError("llama.cpp offers no tools where it holds the answer to a format; leave out one of them")
    if options.get("logprobs") and options.get("tools"):
        raise ConfigError("llama.cpp does not give logprobs with tools; leave out one of them")
    if options.get("repeat_last_n", nested.get("repeat_last_n", 0)) < 0:
        raise ConfigError("llama.cpp does not take repeat_last_n=-1; give a number of tokens, such as 64")


def check_ollama_options(options: Mapping[str, Any]) -> None:
    """Check that a request (already checked) has no option that Ollama ignores.

    Raises:
        ConfigError: it has one.
    """
    if options.get("logit_bias"):
        raise ConfigError("Ollama does not take logit_bias; leave it out, or ask with backend=sharded or local")


def speculation_of(options: Mapping[str, Any]) -> str | None:
    """What a request wants its engine to draft; None leaves it to the router.

    It is `off` for answers that must be exact, since tokens that are verified together may round differently, and
    for those with log probabilities, which llama-server does not give for drafted tokens.
    """
    if options.get("recovery") == "exact" or options.get("deterministic") or options.get("logprobs"):
        return "off"
    wanted: str | None = options.get("speculation")
    return wanted


def answer_schema(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that `format` requests; None without one.

    Raises:
        ConfigError: `format` is neither "json" nor a schema.
    """
    requested = options.get("format")
    if isinstance(requested, Mapping):
        return dict(requested)
    if requested and requested != "json":
        raise ConfigError(f'format={shown(requested)} must be "json" or a JSON schema as a dict')
    return {"type": "object"} if requested else None


def _checked_ollama_options(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Ollama's own dict of options, with `max_tokens` by Ollama's name."""
    checked = {name: value for name, value in options.items() if value is not None}
    for name, value in checked.items():
        _check_value(name, value, SAMPLING_OPTIONS | OLLAMA_OPTIONS, f"options[{name!r}]", " in options={...}")
    _check_one_limit(checked)
    if "max_tokens" in checked:
        checked["num_predict"] = checked.pop("max_tokens")
    return checked


def _check_value(name: object, value: Any, known: Mapping[str, Values], label: str, where: str) -> None:
    values = known.get(name) if isinstance(name, str) else None
    if values is None:
        raise ConfigError(f"unknown option {shown(name)}{where}; {_hint(name, known)}")
    if not values.is_valid(value):
        raise ConfigError(f"{label}={shown(value)} must be {values.description}")
    if isinstance(value, str):
        checked_text(value, label)


def _hint(name: object, known: Collection[str]) -> str:
    near = nearest(str(name), known)
    return f"did you mean {near}?" if near else f"known options: {', '.join(sorted(known))}"


def _check_one_limit(options: Mapping[str, Any]) -> None:
    if "max_tokens" in options and "num_predict" in options:
        raise ConfigError("give either max_tokens or num_predict, not both: each limits the answer's tokens")


def _check_tool(tool: Any, where: str) -> None:
    if callable(tool):
        name = getattr(tool, "__name__", type(tool).__name__)
        raise ConfigError(
            f"{where} is the Python function {name}, which is not called here; ask with route_request or stream, "
            f'or describe it as {{"type": "function", "function": {{"name": "{name}", "parameters": {{...}}}}}}'
        )
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(
            f'{where} must be a dict such as {{"type": "function", "function": {{"name": "f", "parameters": '
            "{...}}}"
        )
    if not isinstance(function.get("parameters"), Mapping | None):
        raise ConfigError(
            f'{where} needs "parameters" as a JSON schema, such as {{"type": "object", "properties": {{...}}}}, '
            f"not {shown(function['parameters'])}"
        )
    if not isinstance(function.get("description"), str | None):
        raise ConfigError(f'{where} needs "description" as text, not {shown(function["description"])}')
