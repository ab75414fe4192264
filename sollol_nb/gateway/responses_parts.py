"""A body of OpenAI's Responses API as messages and options of the router. Pure.

The gateway stores nothing between requests: each request has the whole conversation, as with `store=false`. It
accepts items of earlier answers as clients send them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sollol_nb.chat.option_checks import SAMPLING_OPTIONS, Values
from sollol_nb.gateway.failures import invalid
from sollol_nb.gateway.openai_parts import (
    A_LIST,
    AN_OBJECT,
    EFFORT,
    EFFORTS,
    ENGINE_OPTIONS,
    METADATA,
    PRIORITY,
    TEXT,
    TEXT_OR_OBJECT,
    YES_OR_NO,
    Fields,
    answer_format,
    check_names,
    content_of,
    function_tool,
    only,
    tool_choice,
    without_empty,
)
from sollol_nb.runtime.amounts import is_whole_number, shown

_NOTHING_KEPT = "this gateway keeps no responses; send the whole conversation as input"
_ELSEWHERE = "the gateway has no such service"
_SHAPING: Mapping[str, Values] = {
    "model": TEXT,
    "input": Values(
        "a text or a list of items, not empty", lambda value: isinstance(value, str | list) and bool(value)
    ),
    "instructions": TEXT,
    "tools": A_LIST,
    "tool_choice": TEXT_OR_OBJECT,
    "parallel_tool_calls": YES_OR_NO,
    "text": AN_OBJECT,
    "reasoning": AN_OBJECT,
    "truncation": Values("auto or disabled", lambda value: value in ("auto", "disabled")),
    "priority": PRIORITY,
}
"""The fields that shape the prompt, and so its number of tokens."""
_REFUSED = {
    "background_options": "answers are not generated in the background",
    "context_management": "this gateway does not shorten conversations, except with truncation=auto",
    "conversation": _NOTHING_KEPT,
    "moderation": _ELSEWHERE,
    "previous_response_id": _NOTHING_KEPT,
    "prompt": "this gateway keeps no prompts; send instructions and input",
    "top_logprobs": "ask /v1/chat/completions for logprobs",
}
FIELDS = Fields(
    known={
        **_SHAPING,
        "background": only(False, "answers are not generated in the background"),
        "include": A_LIST,
        "max_output_tokens": Values(
            "a whole number of 1 or more", lambda value: is_whole_number(value) and value >= 1
        ),
        "store": YES_OR_NO,
        "stream": YES_OR_NO,
        "stream_options": AN_OBJECT,
        **{name: SAMPLING_OPTIONS[name] for name in ("temperature", "top_p", "seed")},
        **ENGINE_OPTIONS,
    },
    refused=_REFUSED,
    # `max_tool_calls` limits tools that OpenAI runs, which do not exist here. `image` is about their compression.
    ignored=METADATA | {"access_programs", "image", "max_tool_calls", "prompt_cache_options"},
    required=("model", "input"),
)
COUNTED_FIELDS = Fields(known=_SHAPING, refused=_REFUSED, ignored=("personality",), required=("model", "input"))
_INCLUDED = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Additional parts of answers from tools or encryption that do not exist here."""
_SUMMARY_FIELDS = ("summary", "generate_summary")
_SUMMARIES = ("auto", "concise", "detailed")


def checked_fields(body: Mapping[str, Any], *, only_counts: bool = False) -> dict[str, Any]:
    """The fields of a body that count.

    Args:
        only_counts: whether the tokens of the prompt are to be counted, not the prompt answered.

    Raises:
        ApiError: a field is missing, not known, or has a value that it does not take; it is named.
    """
    fields = (COUNTED_FIELDS if only_counts else FIELDS).checked(body)
    check_names(fields.get("stream_options", {}), ("include_obfuscation",), "stream_options")
    for position, name in enumerate(fields.get("include", ())):
        if not isinstance(name, str) or name not in _INCLUDED:
            raise invalid(
                f"include[{position}]={shown(name)} is not supported; leave it out", f"include[{position}]"
            )
    return fields


def options_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Router.stream` for these fields.

    Raises:
        ApiError: a tool, a choice or a format cannot be followed.
    """
    passed = ("temperature", "top_p", "seed", "parallel_tool_calls", *ENGINE_OPTIONS)
    choice = fields.get("tool_choice")
    options = {
        **{name: fields.get(name) for name in passed},
        "max_tokens": fields.get("max_output_tokens"),
        "tools": [_tool(tool, f"tools[{position}]") for position, tool in enumerate(fields.get("tools", ()))],
        "tool_choice": None if choice is None else _tool_choice(choice),
        "format": _format(fields.get("text", {})),
        "think": _think(fields.get("reasoning", {})),
    }
    if fields.get("truncation") == "auto":
        options["overflow"] = "drop_oldest"
    return without_empty(options)


def wants_summary(fields: Mapping[str, Any]) -> bool:
    """Whether the client shows thoughts only where they come as a summary. Nothing is summarized here, so the
    thoughts themselves are sent as one."""
    reasoning = fields.get("reasoning") or {}
    return any(reasoning.get(name) for name in _SUMMARY_FIELDS)


# --- messages -------------------------------------------------------------------------------------


def messages_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages in Ollama's shape: the instructions, then the items of the input.

    Raises:
        ApiError: an item cannot be used; it is named.
    """
    instructions, given = fields.get("instructions"), fields["input"]
    messages = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    tool_names: dict[str, str] = {}  # by the id of the call
    images: list[str] = []  # of results of tools, which the next message of the user has
    for position, item in enumerate(given):
        where = f"input[{position}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if images and kind != "function_call_output":
            messages.append({"role": "user", "content": "", "images": images})
            images = []
        match kind:
            case "message":
                _add_message(messages, item, where)
            case "reasoning":
                if thoughts := _thoughts(item, where):
                    _append(_answer_in(messages), "thinking", thoughts)
            case "function_call":
                call = _call(item, where)
                tool_names[call["id"]] = call["function"]["name"]
                _answer_in(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                result, pictures = _result(item, where, tool_names)
                messages.append(result)
                images += pictures
            case None:
                raise invalid(f'{where} must be an item such as {{"role": "user", "content": "Hello!"}}', where)
            case _:
                raise invalid(
                    f"{where} has type {shown(kind)}, which is not supported here; known types: message, "
                    "reasoning, function_call and function_call_output",
                    where,
                )
    return [*messages, {"role": "user", "content": "", "images": images}] if images else messages


def _answer_in(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer to which the next thoughts, text or calls of the assistant belong."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _append(message: dict[str, Any], name: str, text: str) -> None:
    if text:
        message[name] = "\n".join(filter(None, (message.get(name), text)))


def _add_message(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{where}.role={shown(role)} must be user, assistant, system or developer", f"{where}.role")
    if item.get("content") is None:
        raise invalid(f"{where}.content must be a text or a list of parts", f"{where}.content")
    text, images = content_of(item["content"], where)
    if role == "assistant":
        _append(_answer_in(messages), "content", text)
    elif role != "user" and len(messages) == 1 and messages[0]["role"] == "system":
        _append(messages[0], "content", text)  # many chat templates take one only
    elif role == "user":
        messages.append({"role": role, "content": text, **({"images": images} if images else {})})
    else:
        messages.append({"role": "system", "content": text})


def _thoughts(item: Mapping[str, Any], where: str) -> str:
    """The thoughts of an earlier answer. Encrypted ones, which only OpenAI's servers can read, are left out."""
    for name in ("content", "summary"):
        parts = item.get(name)
        if not isinstance(parts, list | None):
            raise invalid(f"{where}.{name}={shown(parts)} must be a list", f"{where}.{name}")
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts or ()]
        if not all(isinstance(text, str) for text in texts):
            raise invalid(f'{where}.{name} must have parts with "text"', f"{where}.{name}")
        if texts:
            return "\n".join(map(str, texts))
    return ""


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = _text(item, "arguments", where)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.arguments={shown(text)} must be the JSON text of an object", f"{where}.arguments")
    function = {"name": _text(item, "name", where), "arguments": arguments}
    return {"id": _text(item, "call_id", where), "function": function}


def _result(
    item: Mapping[str, Any], where: str, tool_names: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    call_id = _text(item, "call_id", where)
    if call_id not in tool_names:
        raise invalid(
            f"{where}.call_id={shown(call_id)} is not that of a function_call before it", f"{where}.call_id"
        )
    if not isinstance(item.get("output"), str | list):
        raise invalid(f"{where}.output must be a text or a list of parts", f"{where}.output")
    text, images = content_of(item["output"], where)
    return {"role": "tool", "content": text, "tool_name": tool_names[call_id], "tool_call_id": call_id}, images


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    text = item.get(name)
    if not isinstance(text, str):
        raise invalid(f"{where}.{name}={shown(text)} must be a text", f"{where}.{name}")
    return text


# --- tools, thinking, formats ---------------------------------------------------------------------


def _tool(given: Any, where: str) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind != "function":
        raise invalid(f"{where} has type {shown(kind)}; only functions of the client are supported", where)
    return function_tool(given, where)


def _tool_choice(given: Any) -> str | dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else "function"
    if kind != "function":
        raise invalid(
            f"tool_choice.type={shown(kind)} must be function; others are not supported", "tool_choice.type"
        )
    return tool_choice(given)


def _format(text: Mapping[str, Any]) -> str | dict[str, Any] | None:
    check_names(text, ("format", "verbosity"), "text")
    if text.get("verbosity") not in (None, "medium"):
        raise invalid(
            f"text.verbosity={shown(text['verbosity'])} is not supported: ask for short or long answers in a "
            "message",
            "text.verbosity",
        )
    given = text.get("format")
    if given is None:
        return None
    return answer_format(given.get("type") if isinstance(given, dict) else given, given, "text.format")


def _think(reasoning: Mapping[str, Any]) -> bool | str | None:
    # `context`: which thoughts of earlier answers the prompt has is up to the chat template.
    check_names(reasoning, ("effort", *_SUMMARY_FIELDS, "context"), "reasoning")
    for name in _SUMMARY_FIELDS:
        if reasoning.get(name) not in (None, *_SUMMARIES):
            raise invalid(
                f"reasoning.{name}={shown(reasoning[name])} must be one of {', '.join(_SUMMARIES)}",
                f"reasoning.{name}",
            )
    effort = reasoning.get("effort")
    if effort is None:
        return None
    if not EFFORT.is_valid(effort):
        raise invalid(f"reasoning.effort={shown(effort)} must be {EFFORT.description}", "reasoning.effort")
    return EFFORTS[effort]
