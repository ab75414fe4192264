"""Shared by OpenAI's APIs: fields of bodies, contents of messages, tools, formats, errors. Pure.

Fields that change an answer are followed or refused by name. Metadata is accepted and ignored.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.chat.chunk import ROUTING
from sollol_nb.chat.option_checks import CHAT_OPTIONS, SAMPLING_OPTIONS, Values
from sollol_nb.chat.tool_choice import MODES, new_call_id
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.nearest import nearest

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
_CODES = {
    "context_length": "context_length_exceeded",
    "unauthorized": "invalid_api_key",
    "busy": "rate_limit_exceeded",
}


def error_shape(error: ApiError) -> Any:
    """An error as OpenAI's APIs write it."""
    kind, code = "invalid_request_error", _CODES.get(error.kind)
    if error.kind == "busy":
        kind = "rate_limit_error"
    elif error.status >= 500:
        kind = "server_error"
    if error.kind == "not_found" and error.parameter == "model":
        code = "model_not_found"
    return {"error": {"message": error.message, "type": kind, "param": error.parameter, "code": code}}


# --- fields of a body -----------------------------------------------------------------------------

YES_OR_NO = Values("true or false", lambda value: isinstance(value, bool))
TEXT = Values("a text", lambda value: isinstance(value, str))
A_LIST = Values("a list", lambda value: isinstance(value, list))
AN_OBJECT = Values("an object", lambda value: isinstance(value, dict))
TEXT_OR_OBJECT = Values("a text or an object", lambda value: isinstance(value, str | dict))
TEXT_OR_LIST = Values("a text or a list", lambda value: isinstance(value, str | list))
PRIORITY = Values("1 to 10, or a name such as high", lambda value: isinstance(value, str | int))
EFFORTS: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
"""OpenAI's levels of `reasoning_effort` as the option `think`."""
EFFORT = Values(f"one of {', '.join(EFFORTS)}", lambda value: isinstance(value, str) and value in EFFORTS)
METADATA = frozenset(
    {
        "client_metadata",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
"""Fields that do not change an answer."""
ENGINE_OPTIONS: Mapping[str, Values] = {
    name: (SAMPLING_OPTIONS | CHAT_OPTIONS)[name]
    for name in (
        *("top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n"),
        *("keep_alive", "overflow", "recovery", "deterministic", "speculation"),
    )
}
"""Options of this package that OpenAI's APIs do not have."""


LONGEST_NAME_CHARS = 100


def only(value: Any, why: str) -> Values:
    """A field that may have only the given value, which changes nothing."""
    return Values(f"{shown(value)}: {why}", lambda given: type(given) is type(value) and given == value)


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a body.

    Attributes:
        known: which values each one takes.
        refused: why fields that the API has cannot be followed.
        ignored: those that do not change an answer.
        required: those that a body must have.
    """

    known: Mapping[str, Values]
    refused: Mapping[str, str] = field(default_factory=dict)
    ignored: Collection[str] = METADATA
    required: tuple[str, ...] = ()

    def checked(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The known fields of a body that have a value.

        Raises:
            ApiError: a field is missing, not known or refused, or has a value that it does not take; it is named.
        """
        checked = {}
        for name, value in body.items():
            if value is None or name in self.ignored:
                continue
            values = self.known.get(name)
            if values is None:
                raise invalid(self._reason(name), name[:LONGEST_NAME_CHARS])
            if not values.is_valid(value):
                raise invalid(f"{name}={shown(value)} must be {values.description}", name)
            checked[name] = value
        for name in self.required:
            if name not in checked:
                raise invalid(f'give "{name}": {self.known[name].description}', name)
        return checked

    def _reason(self, name: str) -> str:
        if name in self.refused:
            return f"{name} is not supported: {self.refused[name]}"
        near = nearest(name, self.known)
        return f"unknown field {shown(name)}" + (f"; did you mean {near}?" if near else "; leave it out")


def check_names(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Check that an object within a body has no other fields.

    Raises:
        ApiError: it has one with a value; it is named.
    """
    for name, value in given.items():
        if name not in known and value is not None:
            raise invalid(f"{where} has {shown(name)}, which is not supported; it takes {', '.join(known)}", where)


def maximum_tokens(fields: Mapping[str, Any], *names: str) -> int | None:
    """The most tokens of an answer, by whichever of two names it is given.

    Raises:
        ApiError: they differ.
    """
    given = {fields[name] for name in names if name in fields}
    if len(given) > 1:
        raise invalid(f"give either {' or '.join(names)}, not both: each limits the answer's tokens", names[0])
    return given.pop() if given else None


def without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that are None or an empty list, which stand for "not given"."""
    return {name: value for name, value in options.items() if value is not None and value != []}


# --- contents -------------------------------------------------------------------------------------


def content_of(given: Any, where: str) -> tuple[str, list[str]]:
    """The text of a message's content, and its images in base64; parts of text are joined by line breaks.

    Args:
        given: a text, a list of parts, or None.
        where: such as `messages[0]`.

    Raises:
        ApiError: a part is neither text nor an image with its data.
    """
    if given is None or isinstance(given, str):
        return given or "", []
    if not isinstance(given, list):
        raise invalid(f"{where}.content must be a text or a list of parts, not {shown(given)}", f"{where}.content")
    texts, images = [], []
    for position, part in enumerate(given):
        place = f"{where}.content[{position}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                raise invalid(f'{place} needs "text" as text', place)
            texts.append(part["text"])
        elif kind in _IMAGE_PARTS:
            image = part.get("image_url")
            images.append(image_of(image.get("url") if isinstance(image, dict) else image, place))
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif isinstance(kind, str):
            raise invalid(f"{place} has type {shown(kind)}, which is not supported; give text, or images", place)
        else:
            raise invalid(f'{place} must be a part such as {{"type": "text", "text": "Hello!"}}', place)
    return "\n".join(texts), images


def image_of(url: Any, where: str) -> str:
    """The base64 text of an image that is given as a data URL.

    Raises:
        ApiError: it is not one. Image URLs are refused: a server that opens URLs of its clients can read data that
            they must not see.
    """
    if not isinstance(url, str):
        raise invalid(f'{where} needs "image_url" with the image as "data:image/png;base64,..."', where)
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise invalid(
            f"{where} has an image URL ({shown(url[:60])}), which the gateway does not open; send the image as "
            "data:image/png;base64,...",
            where,
        )
    return checked_base64(data, where)


def checked_base64(data: Any, where: str) -> str:
    """The text, if it is base64. Raises ApiError otherwise."""
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise invalid(f"{where} has an image whose data is not base64", where) from None
    return str(data)


# --- tools and formats ----------------------------------------------------------------------------


def function_tool(given: Any, where: str) -> dict[str, Any]:
    """A tool in Ollama's and OpenAI's form, from the description of its function.

    Args:
        given: `name`, and perhaps `description` and `parameters` (a JSON schema). Other fields, such as `strict`,
            change nothing: the engine holds each call to its schema where it can.

    Raises:
        ApiError: it is not such a description.
    """
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or not name:
        raise invalid(f'{where} must be a function such as {{"name": "f", "parameters": {{...}}}}', where)
    function: dict[str, Any] = {"name": name}
    for key, kind, description in (
        ("description", str, "a text"),
        ("parameters", dict, 'a JSON schema such as {"type": "object", "properties": {...}}'),
    ):
        value = given.get(key)
        if not isinstance(value, kind | None):
            raise invalid(f"{where}.{key}={shown(value)} must be {description}", f"{where}.{key}")
        if value is not None:
            function[key] = value
    return {"type": "function", "function": function}


def tool_choice(given: Any) -> str | dict[str, Any]:
    """The option `tool_choice`, from one of OpenAI's modes or the name of a function as `{"name": ...}`.

    Raises:
        ApiError: it is neither.
    """
    if isinstance(given, str) and given in MODES:
        return given
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or not name:
        message = f"tool_choice={shown(given)} must be {', '.join(MODES)}, or name a function"
        raise invalid(message, "tool_choice")
    return {"type": "function", "function": {"name": name}}


def answer_format(kind: Any, description: Any, where: str) -> str | dict[str, Any] | None:
    """The option `format` for a type of OpenAI's formats: `text`, `json_object` or `json_schema`.

    Args:
        description: has the `schema`, for the type `json_schema`.

    Raises:
        ApiError: another type, or no schema.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return "json"
    if kind != "json_schema":
        known = "text, json_object and json_schema"
        raise invalid(f"{where} has type {shown(kind)}; known types: {known}", where)
    schema = description.get("schema") if isinstance(description, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f'{where} needs "schema", a JSON schema as an object', where)
    return schema


# --- answers --------------------------------------------------------------------------------------


def call_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a tool call of an answer, for the APIs in which they must be an object. A text that is not
    the JSON of one, such as the beginning of it, is in `{"arguments": ...}`."""
    arguments = call["function"].get("arguments") or {}
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def wire_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call of an answer as OpenAI's API writes it: the arguments are JSON text."""
    function = call["function"]
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id") or new_call_id(),
        "type": "function",
        "function": {"name": function.get("name", ""), "arguments": text},
    }


def usage_of(last: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of a request, from its last chunk; 0 where the engine does not report them."""
    prompt, answer = last.get("prompt_eval_count") or 0, last.get("eval_count") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached_tokens_of(last)},
    }


def cached_tokens_of(last: Mapping[str, Any]) -> int:
    """How many tokens of the prompt were not processed again, from the last chunk of an answer; 0 where the engine
    does not report it."""
    return last.get(ROUTING, {}).get("cached_tokens") or 0
