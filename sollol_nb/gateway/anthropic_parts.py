"""What a body of Anthropic's API says, as messages and options of the router. Pure.

Everything that changes an answer is followed or refused by name. Marks for Anthropic's prompt cache and metadata
are accepted and not used; so is `context_management`, to which the answer says that no edit was applied. With
thinking enabled, `effort` is its level; with adaptive thinking, the model decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sollol_nb.chat.option_checks import SAMPLING_OPTIONS, Values
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.openai_parts import (
    A_LIST,
    AN_OBJECT,
    ENGINE_OPTIONS,
    PRIORITY,
    TEXT,
    TEXT_OR_LIST,
    YES_OR_NO,
    Fields,
    checked_base64,
    function_tool,
    without_empty,
)
from sollol_nb.runtime.amounts import is_whole_number, shown

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_EFFORT = Values(f"one of {', '.join(_EFFORTS)}", lambda value: isinstance(value, str) and value in _EFFORTS)
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_CLIENT_MARK = "x-anthropic-"
"""How a block of the system prompt begins that Claude Code addresses to Anthropic's servers. It changes with every
request, so no prompt would begin like the one before, and none could be taken from the engine's cache."""

_FIELDS = Fields(
    known={
        "model": TEXT,
        "messages": A_LIST,
        "system": TEXT_OR_LIST,
        "max_tokens": Values("a whole number of 1 or more", lambda value: is_whole_number(value) and value >= 1),
        "stop_sequences": Values(
            "a list of texts, none of them empty",
            lambda value: isinstance(value, list) and all(isinstance(text, str) and text for text in value),
        ),
        "stream": YES_OR_NO,
        "tools": A_LIST,
        "tool_choice": AN_OBJECT,
        "thinking": AN_OBJECT,
        "output_config": AN_OBJECT,
        "output_format": AN_OBJECT,
        "context_management": AN_OBJECT,
        "priority": PRIORITY,
        **{name: SAMPLING_OPTIONS[name] for name in ("temperature", "top_p", "seed")},
        **ENGINE_OPTIONS,
    },
    refused={
        "compaction": "this gateway does not summarize conversations; send the messages",
        "container": "this gateway does not run code",
        "mcp_servers": "this gateway calls no MCP servers; give tools with an input_schema",
        "thread": "this gateway keeps no conversations; send all messages",
    },
    ignored=frozenset(
        {
            "billing_policy",
            "cache_control",
            "diagnostics",
            "fallback_credit_token",
            "fallbacks",
            "inference_geo",
            "metadata",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    ),
)


def checked_fields(body: Mapping[str, Any], *, needs_max_tokens: bool = True) -> dict[str, Any]:
    """The fields of a body that count.

    Raises:
        ApiError: a field is missing, not known, or has a value that it does not take; it is named.
    """
    fields = _FIELDS.checked(body)
    if needs_max_tokens and "max_tokens" not in fields:
        raise invalid('give "max_tokens", the most tokens of the answer', "max_tokens")
    if not fields.get("messages"):
        raise invalid('give "messages", such as [{"role": "user", "content": "Hello!"}]', "messages")
    return fields


def options_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Router.stream` for these fields.

    Raises:
        ApiError: a tool, a choice or a format cannot be followed.
    """
    passed = ("max_tokens", "temperature", "top_p", "seed", *ENGINE_OPTIONS)
    choice = fields.get("tool_choice")
    return without_empty(
        {
            **{name: fields.get(name) for name in passed},
            "stop": fields.get("stop_sequences"),
            "tools": [_tool(tool, f"tools[{position}]") for position, tool in enumerate(fields.get("tools", ()))],
            "tool_choice": None if choice is None else _tool_choice(choice),
            "parallel_tool_calls": None if choice is None else _parallel(choice),
            "think": _think(fields),
            "format": _format(fields),
        }
    )


# --- messages -------------------------------------------------------------------------------------


def messages_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages in Ollama's shape; the system prompt is the first. Turns of one role that follow each other are
    one turn.

    Raises:
        ApiError: a message or a block cannot be used; it is named.
    """
    system = _system(_blocks(fields.get("system", ""), "system"))
    messages = [{"role": "system", "content": system}] if system else []
    tool_names: dict[str, str] = {}  # by the id of the call
    for role, blocks in _turns(fields["messages"]):
        if role == "system":
            messages.append({"role": "system", "content": _system(blocks)})
        elif role == "assistant":
            messages.append(_assistant(blocks, tool_names))
        else:
            messages.extend(_user(blocks, tool_names))
    return messages


_Block = tuple[str, dict[str, Any]]
"""Where it is, such as `messages[0].content[1]`, and a block with a `type`."""


def _turns(messages: Sequence[Any]) -> Iterator[tuple[str, list[_Block]]]:
    role, turn = "", list[_Block]()
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict):
            raise invalid(f'{where} must be an object with "role" and "content", not {shown(message)}', where)
        new_role = message.get("role")
        if new_role not in ("user", "assistant", "system"):
            raise invalid(
                f"{where}.role={shown(new_role)} must be user or assistant; the system prompt is the field system",
                f"{where}.role",
            )
        blocks = _blocks(message.get("content"), f"{where}.content")
        if new_role == role:
            turn.extend(blocks)
            continue
        if role:
            yield role, turn
        role, turn = new_role, blocks
    yield role, turn


def _blocks(content: Any, where: str) -> list[_Block]:
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})] if content else []
    if not isinstance(content, list):
        raise invalid(f"{where}={shown(content)} must be a text or a list of blocks", where)
    blocks = []
    for position, block in enumerate(content):
        place = f"{where}[{position}]"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(f'{place} must be a block such as {{"type": "text", "text": "Hello!"}}', place)
        blocks.append((place, block))
    return blocks


def _text(place: str, block: Mapping[str, Any], name: str = "text") -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise invalid(f"{place}.{name}={shown(text)} must be a text", f"{place}.{name}")
    return text


def _system(blocks: Sequence[_Block]) -> str:
    texts = []
    for place, block in blocks:
        if block["type"] != "text":
            raise _unknown(place, block, "the system prompt takes text")
        texts.append(_text(place, block))
    return "\n".join(text for text in texts if not text.startswith(_CLIENT_MARK))


def _assistant(blocks: Sequence[_Block], tool_names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for place, block in blocks:
        match block["type"]:
            case "text":
                texts.append(_text(place, block))
            case "thinking":
                thoughts.append(_text(place, block, "thinking"))
            case "redacted_thinking":  # only Anthropic's servers can read it
                pass
            case "tool_use":
                call_id, name = _text(place, block, "id"), _text(place, block, "name")
                if not isinstance(block.get("input"), dict):
                    raise invalid(f"{place}.input={shown(block.get('input'))} must be an object", f"{place}.input")
                calls.append({"id": call_id, "function": {"name": name, "arguments": block["input"]}})
                tool_names[call_id] = name
            case _:
                raise _unknown(place, block, "an assistant's turn takes text, thinking and tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if any(thoughts):
        message["thinking"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(blocks: Sequence[_Block], tool_names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages of a user's turn: a tool's results come first, and their images with the user's."""
    results, texts, images = [], [], []
    for place, block in blocks:
        match block["type"]:
            case "text":
                texts.append(_text(place, block))
            case "image":
                images.append(_image(place, block))
            case "tool_result":
                result, pictures = _tool_result(place, block, tool_names)
                results.append(result)
                images.extend(pictures)
            case _:
                raise _unknown(place, block, "a user's turn takes text, image and tool_result")
    if results and not texts and not images:
        return results
    message: dict[str, Any] = {"role": "user", "content": "\n".join(texts)}
    return [*results, message | ({"images": images} if images else {})]


def _tool_result(
    place: str, block: Mapping[str, Any], tool_names: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    call_id = _text(place, block, "tool_use_id")
    if call_id not in tool_names:
        raise invalid(
            f"{place}.tool_use_id={shown(call_id)} is not the id of a tool_use before it", f"{place}.tool_use_id"
        )
    texts, images = [], []
    for inner_place, inner in _blocks(block.get("content") or "", f"{place}.content"):
        match inner["type"]:
            case "text":
                texts.append(_text(inner_place, inner))
            case "image":
                images.append(_image(inner_place, inner))
            case _:
                raise _unknown(inner_place, inner, "a tool_result takes text and image")
    is_error = block.get("is_error")
    if not isinstance(is_error, bool | None):
        raise invalid(f"{place}.is_error={shown(is_error)} must be true or false", f"{place}.is_error")
    text = "\n".join(texts)
    return {
        "role": "tool",
        "content": f"Error: {text}" if is_error else text,  # chat templates have no other place for it
        "tool_name": tool_names[call_id],
        "tool_call_id": call_id,
    }, images


def _image(place: str, block: Mapping[str, Any]) -> str:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    where = f"{place}.source"
    if not isinstance(source, dict) or kind != "base64":
        raise invalid(f"{where} has type {shown(kind)}, which is not opened; send the image as base64", where)
    if source.get("media_type") not in _IMAGE_TYPES:
        given = shown(source.get("media_type"))
        raise invalid(
            f"{where}.media_type={given} must be one of {', '.join(_IMAGE_TYPES)}", f"{where}.media_type"
        )
    return checked_base64(source.get("data"), where)


def _unknown(place: str, block: Mapping[str, Any], known: str) -> ApiError:
    return invalid(f"{place} has type {shown(block['type'])}, which is not supported here: {known}", place)


# --- tools, thinking, formats ---------------------------------------------------------------------


def _tool(given: Any, where: str) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in (None, "custom"):
        raise invalid(
            f"{where} has type {shown(kind)}, which only Anthropic's own models and servers have; describe a tool "
            "with name, description and input_schema",
            where,
        )
    if not isinstance(given, dict) or not isinstance(given.get("input_schema"), dict):
        raise invalid(
            f'{where} must be a tool such as {{"name": "f", "input_schema": {{"type": "object"}}}}', where
        )
    return function_tool({**given, "parameters": given["input_schema"]}, where)


def _tool_choice(choice: Mapping[str, Any]) -> str | dict[str, Any] | None:
    match choice.get("type"):
        case "auto":
            return None
        case "any":
            return "required"
        case "none":
            return "none"
        case "tool":
            return {"type": "function", "function": {"name": _text("tool_choice", choice, "name")}}
    raise invalid(
        f"tool_choice.type={shown(choice.get('type'))} must be auto, any, tool or none", "tool_choice.type"
    )


def _parallel(choice: Mapping[str, Any]) -> bool | None:
    name = "disable_parallel_tool_use"
    disabled = choice.get(name)
    if not isinstance(disabled, bool | None):
        raise invalid(f"tool_choice.{name}={shown(disabled)} must be true or false", f"tool_choice.{name}")
    return False if disabled else None


def _think(fields: Mapping[str, Any]) -> bool | str | None:
    """The option `think`. Without the field, models do not think, as clients then expect; with adaptive thinking,
    it is left to the model."""
    effort = fields.get("output_config", {}).get("effort")
    if effort is not None and not _EFFORT.is_valid(effort):
        raise invalid(
            f"output_config.effort={shown(effort)} must be {_EFFORT.description}", "output_config.effort"
        )
    thinking = fields.get("thinking", {"type": "disabled"})
    match thinking.get("type"):
        case "disabled":
            return False
        case "adaptive":
            return None
        case "enabled":
            budget = thinking.get("budget_tokens")
            if budget is not None and not (is_whole_number(budget) and budget >= 1):
                raise invalid(
                    f"thinking.budget_tokens={shown(budget)} must be a whole number", "thinking.budget_tokens"
                )
            return _EFFORTS[effort] if effort else True
    raise invalid(
        f"thinking.type={shown(thinking.get('type'))} must be enabled, disabled or adaptive", "thinking.type"
    )


def _format(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of the answer. It was the field `output_format` before it moved into `output_config`."""
    moved = fields.get("output_config", {}).get("format")
    where = "output_format" if moved is None else "output_config.format"
    given = fields.get("output_format") if moved is None else moved
    if given is None:
        return None
    schema = given.get("schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        raise invalid(f'{where} must be {{"type": "json_schema", "schema": {{...}}}}', where)
    return schema
