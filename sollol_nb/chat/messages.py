"""Messages and options of a chat request, in Ollama's shape, checked before anything is sent. Pure.

Source of the shape: Ollama's `docs/api.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.chat.context_window import check_overflow
from sollol_nb.errors import ConfigError
from sollol_nb.text.nearest import nearest

_NUMBER = (int, float)
_TEXT_OR_LIST = (str, list, tuple)

SAMPLING_OPTIONS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "num_predict": (int,),
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": (int,),
    "min_p": _NUMBER,
    "typical_p": _NUMBER,
    "seed": (int,),
    "stop": _TEXT_OR_LIST,
    "repeat_penalty": _NUMBER,
    "repeat_last_n": (int,),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
}
"""Sampling options, with the types of their values."""

CHAT_OPTIONS: dict[str, tuple[type, ...]] = {
    "options": (dict,),
    "format": (str, dict),
    "tools": (list, tuple),
    "keep_alive": (str, int, float),
    "think": (bool, str),
    "overflow": (str,),
}
"""All other options, with the types of their values."""

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Sequence[Mapping[str, Any]] | str) -> list[dict[str, Any]]:
    """The messages as a list of dicts; a plain string is one user message.

    Raises:
        ConfigError: not a list of messages, or a message without a known role or content.
    """
    given: Sequence[Any] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(given, Sequence) or not given:
        raise ConfigError('messages must be a list such as [{"role": "user", "content": "Hello!"}]')
    for position, message in enumerate(given):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ConfigError(
                f'messages[{position}] must be a dict with "role" and "content", not {type(message).__name__}'
            )
        if message["role"] not in ROLES:
            raise ConfigError(
                f"messages[{position}] has role {message['role']!r}; known roles: {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise ConfigError(f'messages[{position}] needs "content" as text')
        images = message.get("images") or []
        if not isinstance(images, list | tuple) or not all(isinstance(image, str) for image in images):
            raise ConfigError(f'messages[{position}] has "images" that are not a list of base64 texts')
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list | tuple) or not all(map(_is_tool_call, calls)):
            raise ConfigError(
                f"messages[{position}] has tool_calls that are not a list such as "
                '[{"function": {"name": "f", "arguments": {}}}]'
            )
    return [dict(message) for message in given]


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's options without those that are None.

    Raises:
        ConfigError: an unknown option (with the nearest known name) or one of the wrong type.
    """
    known = SAMPLING_OPTIONS | CHAT_OPTIONS
    checked = {name: value for name, value in options.items() if value is not None}
    for name, value in checked.items():
        if name not in known:
            near = nearest(name, known)
            if name == "stream":
                raise ConfigError(
                    "unknown option 'stream': route_request returns whole answers; for chunks, iterate over "
                    "router.stream(...)"
                )
            hint = f"did you mean {near}?" if near else f"known options: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {name!r}; {hint}")
        types = known[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join(accepted.__name__ for accepted in types)
            raise ConfigError(f"option {name}={value!r} must be of type {expected}")
    if "overflow" in checked:
        check_overflow(checked["overflow"])
    return checked


def answer_schema(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that `format` requests; None without one.

    Raises:
        ConfigError: `format` is neither "json" nor a schema.
    """
    requested = options.get("format")
    if isinstance(requested, Mapping):
        return dict(requested)
    if requested and requested != "json":
        raise ConfigError(f'format={requested!r} must be "json" or a JSON schema as a dict')
    return {"type": "object"} if requested else None
