"""A body of Anthropic's API without its messages, as options of the router. Pure.

Fields that change an answer are followed or refused by name. Marks for Anthropic's prompt cache and metadata
are accepted and not used; so is `context_management`, to which the answer says that no edit was applied. With
thinking enabled, `effort` is its level; with adaptive thinking, the model decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollol_nb.chat.option_checks import SAMPLING_OPTIONS, Values
from sollol_nb.gateway.failures import invalid
from sollol_nb.gateway.openai_parts import (
    A_LIST,
    AN_OBJECT,
    ENGINE_OPTIONS,
    PRIORITY,
    TEXT,
    TEXT_OR_LIST,
    YES_OR_NO,
    Fields,
    without_empty,
)
from sollol_nb.runtime.amounts import is_whole_number, shown

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_EFFORT = Values(f"one of {', '.join(_EFFORTS)}", lambda value: isinstance(value, str) and value in _EFFORTS)

FIELDS = Fields(
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
    required=("model",),
)


def checked_fields(body: Mapping[str, Any], *, needs_max_tokens: bool = True) -> dict[str, Any]:
    """The fields of a body that count.

    Raises:
        ApiError: a field is missing, not known, or has a value that it does not take; it is named.
    """
    fields = FIELDS.checked(body)
    if needs_max_tokens and "max_tokens" not in fields:
        raise invalid('give "max_tokens", the most tokens of the answer', "max_tokens")
    if not fields.get("messages"):
        raise invalid('give "messages", such as [{"role": "user", "content": "Hello!"}]', "messages")
    return fields


def options_of(fields: Mapping[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The options of `Router.stream` for these fields.

    Args:
        tools: those of the conversation.

    Raises:
        ApiError: a choice or a format cannot be followed.
    """
    passed = ("max_tokens", "temperature", "top_p", "seed", *ENGINE_OPTIONS)
    choice = fields.get("tool_choice")
    return without_empty(
        {
            **{name: fields.get(name) for name in passed},
            "stop": fields.get("stop_sequences"),
            "tools": tools,
            "tool_choice": None if choice is None else _tool_choice(choice),
            "parallel_tool_calls": None if choice is None else _parallel(choice),
            "think": _think(fields),
            "format": _format(fields),
        }
    )


# --- tool choice, thinking, formats -----------------------------------------------------------------


def _tool_choice(choice: Mapping[str, Any]) -> str | dict[str, Any] | None:
    match choice.get("type"):
        case "auto":
            return None
        case "any":
            return "required"
        case "none":
            return "none"
        case "tool":
            if not isinstance(name := choice.get("name"), str):
                raise invalid(f"tool_choice.name={shown(name)} must be the name of a tool", "tool_choice.name")
            return {"type": "function", "function": {"name": name}}
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
    """The option `think`. Without the field, models do not think, as clients expect; with adaptive thinking, the
    model decides."""
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
