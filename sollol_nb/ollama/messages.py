"""Chat messages in the shape that Ollama takes, from those that OpenAI's clients write. Pure.

Ollama's own `openai/openai.go` translates in the same way: text parts become text, images base64, the arguments of
a tool call an object, and a tool's answer gets the name of the tool. Anything else is passed on as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.errors import ConfigError


def ollama_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as `/api/chat` takes them.

    Raises:
        ConfigError: a part is neither text nor an image with its data, or a tool's arguments are not an object.
    """
    tool_names: dict[str, str] = {}  # by the id of the call
    converted = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(
                f'messages[{position}] must be a dict with "role" and "content", not {message!r:.80}'
            )
        changed = dict(message)
        if "content" in message:
            changed |= _content(message, f"messages[{position}]")
        if "images" in changed:
            images = _list(changed, "images", f"messages[{position}]")
            changed["images"] = [_base64(image, f"messages[{position}]") for image in images]
        for name in ("reasoning_content", "reasoning"):
            if isinstance(message.get(name), str):
                changed["thinking"] = changed.get("thinking") or changed.pop(name)
        if message.get("tool_calls"):
            calls = _list(message, "tool_calls", f"messages[{position}]")
            calls = [_tool_call(call, f"messages[{position}]") for call in calls]
            tool_names |= {str(call.get("id")): call["function"]["name"] for call in calls}
            changed["tool_calls"] = calls
        if message.get("role") == "tool" and not message.get("tool_name"):
            tool = message.get("name") or tool_names.get(str(message.get("tool_call_id")))
            changed |= {"tool_name": tool} if tool else {}
        converted.append(changed)
    return converted


def _content(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`content` as text, and `images` if it has some."""
    content = message["content"]
    if content is None:
        return {"content": ""}
    if not isinstance(content, list | tuple):
        return {"content": content}
    texts: list[str] = []
    images = _list(message, "images", where)
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type") == "image_url":
            image = part.get("image_url")
            images.append(image.get("url") if isinstance(image, Mapping) else image)
        elif isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ConfigError(
                f"{where} has a part of type {kind!r}, which Ollama does not take; give text or image_url"
            )
    # As llama-server joins them for templates that take text only.
    return {"content": "\n".join(texts)} | ({"images": images} if images else {})


def _list(message: Mapping[str, Any], name: str, where: str) -> list[Any]:
    values = message.get(name) or ()
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where} has {name} that are not a list")
    return [*values]


def _base64(image: Any, where: str) -> str:
    """The base64 text of an image, without the head of a data URL."""
    if isinstance(image, str) and image.startswith("data:"):
        head, comma, image = image.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ConfigError(f"{where} has an image as a data URL without base64; encode it")
    if not isinstance(image, str):
        raise ConfigError(f"{where} has an image of type {type(image).__name__}; Ollama takes base64 text")
    if image.startswith(("http:", "https:", "file:")):
        raise ConfigError(f"{where} has an image by its address; Ollama takes images as base64 text only")
    return image


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f'{where} has a tool call that is not {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: the arguments of the tool call {function['name']} are not JSON") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConfigError(f"{where}: the arguments of the tool call {function['name']} are not a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments or {})}}
