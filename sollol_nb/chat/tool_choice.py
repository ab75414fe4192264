"""Which tools a model may or must call: the options `tool_choice` and `parallel_tool_calls`. Pure.

Neither backend supports them fully: Ollama has neither, and llama-server's parser allows text before a required
call, and several calls where one is allowed. So, for both:

* `"none"` leaves the tools out of the request, `"auto"` changes nothing.
* `"required"`, or a function by name, holds the engine to a JSON schema of one call (`{"name": ..., "arguments":
  ...}`), as vLLM does. The text is held back, and the last chunk has the call.
* `parallel_tool_calls=False` leaves out all calls but the first.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.chat.chunk import NOTE, RESTARTED, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown

MODES = ("auto", "none", "required")
CALL_CUT_NOTE = "the answer ended before its tool call was complete; this is its text"


def is_tool_choice(value: Any) -> bool:
    """Whether it is a mode, or names a function in OpenAI's form."""
    return value in MODES if isinstance(value, str) else _named(value) is not None


def apply_tool_choice(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options (already checked) as both backends take them: with the tools that may be called, and with
    `format` where one must be called. Then `tool_choice` is "required"; else it is left out.

    Raises:
        ConfigError: a call is required without tools, or of a function that is not among them, or with a format.
    """
    applied = dict(options)
    choice, tools = applied.pop("tool_choice", "auto"), applied.get("tools") or ()
    if choice == "none":
        applied.pop("tools", None)
    if not tools or choice == "none":
        applied.pop("parallel_tool_calls", None)
    if choice in ("auto", "none"):
        return applied
    name = _named(choice)
    if not tools:
        raise ConfigError(f"tool_choice={shown(choice)} needs tools; give tools, or leave tool_choice out")
    if name is not None:
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ConfigError(f"tool_choice names the function {shown(name)}, which is not among the tools")
    if applied.get("format"):
        raise ConfigError("give either a required tool_choice or a format, not both: each describes the answer")
    return {**applied, "tools": list(tools), "tool_choice": "required", "format": _call_schema(tools)}


class CallFilter:
    """The chunks of one answer as `tool_choice` and `parallel_tool_calls` require.

    Args:
        options: as `apply_tool_choice` returns them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._is_required = options.get("tool_choice") == "required"
        self._only_one = options.get("parallel_tool_calls") is False
        self._held = ""
        self._has_call = False

    def shown(self, chunk: Chunk) -> Chunk | None:
        """The chunk to show; None where it has only text that is held back."""
        if chunk.get(RESTARTED):
            self._held, self._has_call = "", False
        message = chunk.get("message")
        if message is None or not (self._is_required or self._only_one):
            return chunk
        message = message.copy()
        calls = message.pop("tool_calls", [])
        if self._is_required:
            self._held += message.get("content") or ""
            message["content"] = ""
            if chunk.get("done") and not calls and not self._has_call:
                calls = _spelled_call(self._held)
                message["content"] = "" if calls else self._held
            if chunk.get("done"):
                has_call = bool(calls) or self._has_call
                chunk = {**chunk, "done_reason": "tool_calls"} if has_call else {**chunk, NOTE: CALL_CUT_NOTE}
        if self._only_one:
            calls = [] if self._has_call else calls[:1]
        self._has_call = self._has_call or bool(calls)
        if calls:
            message["tool_calls"] = calls
        has_text = message.get("content") or message.get("thinking")
        is_marked = any(name.startswith("_") for name in chunk)
        if self._is_required and not (calls or has_text or is_marked or chunk.get("done")):
            return None
        return {**chunk, "message": message}


def resumed_call(completion: Completion, options: Mapping[str, Any]) -> Completion:
    """A whole answer that was interrupted and continued, with the calls that `options` require."""
    calls = CallFilter(options)
    last = calls.shown({"message": completion["message"], "done": True})
    completion.update(last or {})
    return completion


def new_call_id() -> str:
    """An id for a tool call, in the form that Ollama and OpenAI use."""
    return f"call_{secrets.token_hex(8)}"


def _spelled_call(text: str) -> list[dict[str, Any]]:
    """The call that the text of an answer spells; none if it was cut."""
    try:
        spelled = json.loads(text)
        function = {"name": str(spelled["name"]), "arguments": dict(spelled["arguments"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [{"id": new_call_id(), "function": function}]


def _named(choice: Any) -> str | None:
    """The function that a choice names, if it names one."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A JSON schema of one call of one of the tools."""
    calls, parameters = [], {}
    for position, tool in enumerate(tools):
        function, place = tool["function"], f"parameters_{position}"
        given = function.get("parameters") or {"type": "object", "properties": {}}
        parameters[place] = _moved(given, f"#/$defs/{place}")
        arguments = {"$ref": f"#/$defs/{place}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": parameters}


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands elsewhere in another one: its references to itself are those to its new place."""
    if isinstance(schema, Mapping):
        return {
            name: place + value[1:]
            if name == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for name, value in schema.items()
        }
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema
