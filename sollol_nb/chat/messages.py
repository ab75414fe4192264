"""The messages of a chat request, checked before anything is loaded or sent, in one form for both backends. Pure.

That form is Ollama's (its `docs/api.md`). Messages in OpenAI's form are accepted and converted: content parts that
are all text become one text, the arguments of tool calls become a dict, the role `developer` is `system`, and
fields that are None, as OpenAI's library writes them, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sollol_nb.chat.plain_data import plain_data
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.images import image_of

ROLES = ("system", "user", "assistant", "tool")
_OPENAI_ROLES = {"developer": "system"}
_PART_TYPES = ("text", "image_url", "input_audio")
WITHOUT_IMAGES = "without_images"
_TEXT_FIELDS = ("thinking", "reasoning_content", "reasoning", "tool_name", "tool_call_id", "name", WITHOUT_IMAGES)


def check_messages(messages: Sequence[Mapping[str, Any]] | str) -> list[dict[str, Any]]:
    """The messages as a list of dicts of plain data; a plain string is one user message.

    Raises:
        ConfigError: not a list of messages, or a message without a known role or content, or with something that
            cannot be sent.
    """
    given: Sequence[Any] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(given, Sequence) or not given:
        raise ConfigError('messages must be a list such as [{"role": "user", "content": "Hello!"}]')
    return [_checked(message, f"messages[{position}]") for position, message in enumerate(given)]


def _checked(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or "role" not in given:
        raise ConfigError(f'{where} must be a dict with "role" and "content", not {type(given).__name__}')
    role = given["role"]
    if isinstance(role, str):
        role = _OPENAI_ROLES.get(role, role)
    if not isinstance(role, str) or role not in ROLES:
        raise ConfigError(f"{where} has role {shown(role)}; known roles: {', '.join(ROLES)}")
    calls = given.get("tool_calls")
    if given.get("images") is not None:
        given = {**given, "images": _checked_images(given["images"], where)}
    if not (calls is None or _is_list(calls, _is_tool_call)):
        raise ConfigError(
            f"{where} has tool_calls that are not a list such as "
            '[{"function": {"name": "f", "arguments": {}}}]'
        )
    if not calls and not isinstance(given.get("content"), str | list | tuple):
        raise ConfigError(f'{where} needs "content" as text')
    for name in _TEXT_FIELDS:
        if not isinstance(given.get(name), str | None):
            raise ConfigError(f'{where} needs "{name}" as text, not {shown(given[name])}')
    present = {name: value for name, value in given.items() if value is not None or name == "content"}
    message: dict[str, Any] = {**plain_data(present, where), "role": role}
    if isinstance(message.get("content"), list):
        message["content"] = _checked_parts(message["content"], where)
    for position, call in enumerate(message.get("tool_calls") or []):
        if not isinstance(call.get("id"), str | None):
            raise ConfigError(f'{where} tool_calls[{position}] needs "id" as text, not {shown(call["id"])}')
        _read_arguments(call["function"], f"{where} tool_calls[{position}]")
    return message


def has_choice(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message has both images and what to send instead of them."""
    return any(WITHOUT_IMAGES in message for message in messages)


def as_read(messages: Sequence[Mapping[str, Any]], *, reads_images: bool) -> tuple[list[dict[str, Any]], int]:
    """The messages as they are sent to a model, and how many images were left out.

    Where it reads no images, `without_images` takes the place of content and images.
    """
    sent, left_out = [], 0
    for message in messages:
        changed = dict(message)
        words = changed.pop(WITHOUT_IMAGES, None)
        if words is not None and not reads_images:
            left_out += len(changed.pop("images", ()))
            changed["content"] = words
        sent.append(changed)
    return sent, left_out


def _checked_images(images: Any, where: str) -> list[str]:
    """Images as base64 texts."""
    if not isinstance(images, list | tuple):
        raise ConfigError(f'{where} has "images" that are not a list of images or base64 texts')
    checked = []
    for image in images:
        if isinstance(image, str):
            checked.append(str(image))
            continue
        made = image_of(image)
        if made is None:
            raise ConfigError(
                f'{where} has "images" with {type(image).__name__}; give base64 text, the bytes of a PNG or JPEG '
                "file, an image of PIL, or a figure"
            )
        if made.data is None:
            raise ConfigError(f"{where}: {made.problem}")
        checked.append(made.base64)
    return checked


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(is_item, value))


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _checked_parts(parts: list[Any], where: str) -> str | list[dict[str, Any]]:
    """The parts of a content; one text where all of them are text, joined as llama.cpp joins them."""
    for position, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in _PART_TYPES:
            what = type(part).__name__ if not isinstance(part, Mapping) else f"type {shown(kind)}"
            raise ConfigError(
                f'{where} has a content part of {what}; a part is {{"type": "text", "text": "Hello!"}} or one of '
                f"type {' or '.join(_PART_TYPES[1:])}"
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ConfigError(f'{where} content[{position}] needs "text" as text')
        if kind == "image_url":
            part["image_url"] = _checked_image(part.get("image_url"), f"{where} content[{position}]")
        audio = part.get("input_audio")
        if kind == "input_audio" and not (isinstance(audio, Mapping) and isinstance(audio.get("data"), str)):
            raise ConfigError(
                f'{where} content[{position}] needs "input_audio" as a dict with "data" (base64 text) and "format"'
            )
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _checked_image(image: Any, where: str) -> dict[str, Any]:
    image = {"url": image} if isinstance(image, str) else image
    url = image.get("url") if isinstance(image, Mapping) else None
    if not isinstance(url, str) or not url.startswith(("data:", "http:", "https:")):
        raise ConfigError(f'{where} needs "image_url" such as {{"url": "data:image/png;base64,..."}}')
    return dict(image)


def _read_arguments(function: dict[str, Any], where: str) -> None:
    """Replace OpenAI's JSON text of arguments by the dict that it spells."""
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        function["arguments"] = plain_data(arguments, f"{where} arguments")
    if not isinstance(arguments, Mapping):
        raise ConfigError(f'{where} needs "arguments" as a dict, or as the JSON text of one')
