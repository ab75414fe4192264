"""The messages of a body of Anthropic's API, in Ollama's shape, and the tools that the model may use. Pure.

Messages have blocks: text, images, thinking, uses of tools and their results. Consecutive turns of
the same role are one turn. Tools with `defer_loading` are left out until a message names them.

Chat templates take a system message only at the beginning. Later ones are text of the user's turn, in the tags in
which Claude Code writes such text where it may not send it as a system message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.openai_parts import checked_base64, function_tool
from sollol_nb.runtime.amounts import shown

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_CLIENT_MARK = "x-anthropic-"
"""The beginning of a block of the system prompt that Claude Code sends to Anthropic's servers. It changes with
every request, so no prompt would share its beginning with the previous prompt in the engine's cache."""
_TOOL_CHANGES = ("tool_addition", "tool_removal")

Block = tuple[str, dict[str, Any]]
"""Where it is, such as `messages[0].content[1]`, and a block with a `type`."""


class Conversation:
    """The conversation so far.

    Args:
        fields: of a body, checked.

    Attributes:
        messages: in Ollama's shape; the system prompt is the first.

    Raises:
        ApiError: a message, a block or a tool cannot be used; it is named.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._offered: dict[str, dict[str, Any]] = {}
        self._deferred: dict[str, dict[str, Any]] = {}
        self._called: dict[str, str] = {}  # names of tools, by the ids of their calls
        for position, tool in enumerate(fields.get("tools", ())):
            self._declare(tool, f"tools[{position}]")
        system = self._system(blocks_of(fields.get("system", ""), "system"))
        for role, blocks in _turns(fields["messages"]):
            if role == "system":
                system += self._system(blocks)
            elif role == "assistant":
                self.messages.append(self._assistant(blocks))
            else:
                self.messages += self._user(blocks)
        if system:
            self.messages.insert(0, {"role": "system", "content": "\n".join(system)})

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that the model may use now, as the router takes them."""
        return list(self._offered.values())

    # --- turns ------------------------------------------------------------------------------------

    def _system(self, blocks: Sequence[Block]) -> list[str]:
        texts = []
        for place, block in blocks:
            if block["type"] in _TOOL_CHANGES:
                self._change_tools(place, block)
            elif block["type"] == "text":
                texts.append(_text(place, block))
            else:
                raise _unknown(place, block, "a system prompt takes text")
        return [text for text in texts if text and not text.startswith(_CLIENT_MARK)]

    def _assistant(self, blocks: Sequence[Block]) -> dict[str, Any]:
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
                    arguments = block.get("input")
                    if not isinstance(arguments, dict):
                        raise invalid(f"{place}.input={shown(arguments)} must be an object", f"{place}.input")
                    calls.append({"id": call_id, "function": {"name": name, "arguments": arguments}})
                    self._called[call_id] = name
                case _:
                    raise _unknown(place, block, "an assistant's turn takes text, thinking and tool_use")
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
        if any(thoughts):
            message["thinking"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return message

    def _user(self, blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """The messages of a user's turn: a tool's results come first, and their images with the user's."""
        results, texts, images = [], [], []
        for place, block in blocks:
            match block["type"]:
                case "text":
                    texts.append(_text(place, block))
                case "image":
                    images.append(_image(place, block))
                case "tool_result":
                    result, pictures = self._tool_result(place, block)
                    results.append(result)
                    images += pictures
                case "tool_addition" | "tool_removal":
                    self._change_tools(place, block)
                case _:
                    raise _unknown(place, block, "a user's turn takes text, image and tool_result")
        if results and not texts and not images:
            return results
        message: dict[str, Any] = {"role": "user", "content": "\n".join(texts)}
        return [*results, message | ({"images": images} if images else {})]

    def _tool_result(self, place: str, block: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        call_id = _text(place, block, "tool_use_id")
        if call_id not in self._called:
            where = f"{place}.tool_use_id"
            raise invalid(f"{where}={shown(call_id)} is not the id of a tool_use before it", where)
        texts, images = [], []
        for inner_place, inner in blocks_of(block.get("content") or "", f"{place}.content"):
            match inner["type"]:
                case "text":
                    texts.append(_text(inner_place, inner))
                case "image":
                    images.append(_image(inner_place, inner))
                case "tool_reference":
                    name = _text(inner_place, inner, "tool_name")
                    self._offer(name, inner_place)
                    texts.append(f"The tool {name} can be used now.")
                case _:
                    raise _unknown(inner_place, inner, "a tool_result takes text, image and tool_reference")
        is_error = block.get("is_error")
        if not isinstance(is_error, bool | None):
            raise invalid(f"{place}.is_error={shown(is_error)} must be true or false", f"{place}.is_error")
        text = "\n".join(texts)
        return {
            "role": "tool",
            "content": f"Error: {text}" if is_error else text,  # chat templates have no other place for it
            "tool_name": self._called[call_id],
            "tool_call_id": call_id,
        }, images

    # --- tools ------------------------------------------------------------------------------------

    def _declare(self, given: Any, where: str) -> str:
        """Take a tool's definition; returns its name."""
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in (None, "custom"):
            raise invalid(
                f"{where} has type {shown(kind)}, which only Anthropic's own models and servers have; describe a "
                "tool with name, description and input_schema",
                where,
            )
        if not isinstance(given, dict) or not isinstance(given.get("input_schema"), dict):
            raise invalid(
                f'{where} must be a tool such as {{"name": "f", "input_schema": {{"type": "object"}}}}', where
            )
        tool = function_tool({**given, "parameters": given["input_schema"]}, where)
        name: str = tool["function"]["name"]
        if name in self._offered or name in self._deferred:
            raise invalid(f"{where}.name={shown(name)} is also the name of another tool", f"{where}.name")
        (self._deferred if given.get("defer_loading") is True else self._offered)[name] = tool
        return name

    def _offer(self, name: str, place: str) -> None:
        if name in self._offered:
            return
        if name not in self._deferred:
            raise invalid(f"{place} names the tool {shown(name)}, which is not among the tools", place)
        self._offered[name] = self._deferred.pop(name)

    def _change_tools(self, place: str, block: Mapping[str, Any]) -> None:
        """Offer a tool from now on, or no longer."""
        place, changed = f"{place}.tool", block.get("tool")
        kind = changed.get("type") if isinstance(changed, dict) else None
        if isinstance(changed, dict) and kind == "tool_definition" and block["type"] == "tool_addition":
            self._offer(self._declare(changed.get("definition"), f"{place}.definition"), place)
        elif not isinstance(changed, dict) or kind != "tool_reference":
            raise invalid(f"{place} has type {shown(kind)}, which is not supported; give a tool_reference", place)
        elif block["type"] == "tool_addition":
            self._offer(_text(place, changed, "name"), place)
        elif (tool := self._offered.pop(name := _text(place, changed, "name"), None)) is not None:
            self._deferred[name] = tool


def _turns(messages: Sequence[Any]) -> Iterator[tuple[str, list[Block]]]:
    """The turns, each with all its blocks. The role `system` is only at the beginning."""
    last_user = max((at for at, message in enumerate(messages) if _role(message) == "user"), default=-1)
    role, turn = "", list[Block]()
    for position, message in enumerate(messages):
        where, new_role = f"messages[{position}]", _role(message)
        if not isinstance(message, dict):
            raise invalid(f'{where} must be an object with "role" and "content", not {shown(message)}', where)
        if new_role not in ("user", "assistant", "system"):
            raise invalid(
                f"{where}.role={shown(new_role)} must be user or assistant; the system prompt is the field system",
                f"{where}.role",
            )
        if new_role == "system" and "content" not in message and "output_config" in message:
            continue  # it changes the effort
        blocks = blocks_of(message.get("content"), f"{where}.content")
        if new_role == "system":
            if _ends_with_turn(message, where) and position < last_user:
                continue
            if role not in ("", "system"):
                new_role, blocks = "user", [_reminder(place, block) for place, block in blocks]
        if new_role == role:
            turn += blocks
            continue
        if role:
            yield role, turn
        role, turn = new_role, blocks
    yield role, turn


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _ends_with_turn(message: Mapping[str, Any], where: str) -> bool:
    clear_at = message.get("clear_at")
    if clear_at not in (None, "never", "next_user_message"):
        raise invalid(
            f"{where}.clear_at={shown(clear_at)} must be never or next_user_message", f"{where}.clear_at"
        )
    return bool(clear_at == "next_user_message")


def _reminder(place: str, block: dict[str, Any]) -> Block:
    if block["type"] != "text":
        return place, block
    return place, {"type": "text", "text": f"<system-reminder>\n{_text(place, block)}\n</system-reminder>"}


# --- blocks ---------------------------------------------------------------------------------------


def blocks_of(content: Any, where: str) -> list[Block]:
    """The blocks of a content; a text is one block."""
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
