"""Between Ollama's chat shape and llama-server's: requests one way, streamed pieces the other. It sends nothing.

Requests and answers have Ollama's shape everywhere in this package (`options`, `num_predict`, `images`, `format`,
`message`, `eval_count`); llama-server speaks OpenAI's at `/v1/chat/completions` and its own at `/completion`.
`llama_answer` decides which of the two an answer uses. Sources: Ollama's `docs/api.md`, llama.cpp's
`tools/server/README.md`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from sollol_nb.chat.context_window import check_overflow
from sollol_nb.errors import ConfigError

_NUMBER = (int, float)
_TEXT_OR_LIST = (str, list, tuple)

# option -> (llama-server's name, accepted types)
SAMPLING_OPTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    "max_tokens": ("max_tokens", (int,)),
    "num_predict": ("max_tokens", (int,)),
    "temperature": ("temperature", _NUMBER),
    "top_p": ("top_p", _NUMBER),
    "top_k": ("top_k", (int,)),
    "min_p": ("min_p", _NUMBER),
    "typical_p": ("typical_p", _NUMBER),
    "seed": ("seed", (int,)),
    "stop": ("stop", _TEXT_OR_LIST),
    "repeat_penalty": ("repeat_penalty", _NUMBER),
    "repeat_last_n": ("repeat_last_n", (int,)),
    "presence_penalty": ("presence_penalty", _NUMBER),
    "frequency_penalty": ("frequency_penalty", _NUMBER),
}
CHAT_OPTIONS: dict[str, tuple[type, ...]] = {
    "options": (dict,),
    "format": (str, dict),
    "tools": (list, tuple),
    "keep_alive": (str, int, float),
    "think": (bool, str),
    "overflow": (str,),
}
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
            raise ConfigError(f"messages[{position}] has role {message['role']!r}; roles are {', '.join(ROLES)}")
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
    known: dict[str, tuple[type, ...]] = {
        **{name: types for name, (_, types) in SAMPLING_OPTIONS.items()},
        **CHAT_OPTIONS,
    }
    checked = {name: value for name, value in options.items() if value is not None}
    for name, value in checked.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            if name == "stream":
                raise ConfigError("route_request gives whole answers; iterate router.stream(...) for chunks")
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {name!r}; {hint}")
        types = known[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(one.__name__ for one in types)
            raise ConfigError(f"option {name}={value!r} must be {wanted}")
    if "overflow" in checked:
        check_overflow(checked["overflow"])
    return checked


def request_body(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body for `/v1/chat/completions`, streaming, from an Ollama-shaped request (already checked)."""
    body: dict[str, Any] = {
        "messages": [_openai_message(message) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_settings(options),
    }
    schema = answer_schema(options)
    if schema is not None and options["format"] == "json":
        body["response_format"] = {"type": "json_object"}
    elif schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if options.get("tools"):
        body["tools"] = list(options["tools"])
    if "think" in options:
        body["chat_template_kwargs"] = {"enable_thinking": bool(options["think"])}
    return body


def sampling_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options by llama-server's names; those in `options["options"]` give way to the outer ones."""
    settings: dict[str, Any] = {}
    for given in (options.get("options") or {}, options):
        for name, (theirs, _) in SAMPLING_OPTIONS.items():
            if given.get(name) is not None:
                settings[theirs] = given[name]
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    return settings


def answer_schema(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that `format` asks for, None without one.

    Raises:
        ConfigError: `format` is neither "json" nor a schema.
    """
    wanted = options.get("format")
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if wanted and wanted != "json":
        raise ConfigError(f'format={wanted!r} must be "json" or a JSON schema as a dict')
    return {"type": "object"} if wanted else None


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    ours = dict(message)
    images = ours.pop("images", None)
    if images:
        ours["content"] = [
            {"type": "text", "text": ours.get("content") or ""},
            *({"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images),
        ]
    if ours.get("tool_calls"):  # Ollama's arguments are an object, OpenAI's a JSON text
        ours["tool_calls"] = [
            {
                "id": call.get("id", f"call_{position}"),
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": _as_json_text(call["function"].get("arguments", {})),
                },
            }
            for position, call in enumerate(ours["tool_calls"])
        ]
    return ours


def _data_url(image: str) -> str:
    return image if image.startswith(("data:", "http:", "https:")) else f"data:image/png;base64,{image}"


def _as_json_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def parse_event(line: str) -> dict[str, Any] | None:
    """One line of llama-server's event stream as its JSON; None for lines that carry nothing."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event = json.loads(line[6:])
    return event if isinstance(event, dict) else None


def progress_of(event: Mapping[str, Any]) -> tuple[int, int] | None:
    """(prompt tokens processed, all of them) if the event tells how far the prompt is; else None.

    llama-server sends such events when asked to by `return_progress`: one when a slot takes the request, then one
    after each batch of the prompt.
    """
    progress = event.get("prompt_progress")
    return (int(progress["processed"]), int(progress["total"])) if progress else None


def chat_chunk(model: str, content: str, thinking: str = "", *, done: bool = False) -> dict[str, Any]:
    """One chunk of a streamed answer in Ollama's shape."""
    message = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    return {
        "model": model,
        "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "message": message,
        "done": done,
    }


class ChunkTranslator:
    """Turns the events of `/v1/chat/completions` into Ollama chunks, one answer per translator."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._finish_reason = "stop"
        self._usage: dict[str, Any] = {}
        self._timings: dict[str, Any] = {}
        self._tool_calls: dict[int, dict[str, str]] = {}

    def translate(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """The Ollama chunk of an event, or None when it brings no text."""
        self._usage = event.get("usage") or self._usage
        self._timings = event.get("timings") or self._timings
        for choice in event.get("choices", ()):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                entry = self._tool_calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
                function = call.get("function") or {}
                entry["name"] += function.get("name") or ""
                entry["arguments"] += function.get("arguments") or ""
            content, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
            if content or thinking:
                return chat_chunk(self._model, content, thinking)
        return None

    def final(self) -> dict[str, Any]:
        """The last chunk: `done`, the reason, token counts, durations in nanoseconds, tool calls if any."""
        chunk = chat_chunk(self._model, "", done=True)
        if self._tool_calls:
            chunk["message"]["tool_calls"] = [
                {"function": {"name": call["name"], "arguments": _parsed_arguments(call["arguments"])}}
                for call in self._tool_calls.values()
            ]
        chunk["done_reason"] = self._finish_reason
        prompt_tokens = self._usage.get("prompt_tokens", self._timings.get("prompt_n"))
        completion_tokens = self._usage.get("completion_tokens", self._timings.get("predicted_n"))
        chunk["prompt_eval_count"] = prompt_tokens
        chunk["eval_count"] = completion_tokens
        chunk["prompt_eval_duration"] = int(self._timings.get("prompt_ms", 0) * 1e6)
        chunk["eval_duration"] = int(self._timings.get("predicted_ms", 0) * 1e6)
        return chunk


def _parsed_arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


OPENING_TAG, CLOSING_TAG = "<think>", "</think>"


class _Phase(Enum):
    BEGUN = auto()
    """Nothing but whitespace, or a part of the opening tag, has come."""
    OPENED = auto()
    """The opening tag has just come."""
    THINKING = auto()
    CLOSED = auto()
    """The closing tag has just come."""
    ANSWERING = auto()


class ThinkSplitter:
    """Parts text of the form `<think>thoughts</think>answer` as it streams in.

    Only what an answer begins with is thinking; tags later in it are its text. Whitespace after either tag is
    dropped. What may turn out to be a tag is held back until it is decided.

    Args:
        inside: the prompt has ended with the opening tag already.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._phase = _Phase.OPENED if inside else _Phase.BEGUN
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """The next text; gives what is thinking of what is decided now, and what is answer."""
        self._held += text
        thinking = ""
        if self._phase is _Phase.BEGUN:
            begin = self._held.lstrip()
            if begin.startswith(OPENING_TAG):
                self._phase, self._held = _Phase.OPENED, begin.removeprefix(OPENING_TAG)
            elif not OPENING_TAG.startswith(begin):
                self._phase = _Phase.ANSWERING
        if self._phase is _Phase.OPENED:
            self._held = self._held.lstrip()
            self._phase = _Phase.THINKING if self._held else self._phase
        if self._phase is _Phase.THINKING:
            thinking, closing, rest = self._held.partition(CLOSING_TAG)
            if closing:
                self._phase, self._held = _Phase.CLOSED, rest
            else:
                held = _length_of_part(self._held, CLOSING_TAG)
                thinking, self._held = thinking[: len(thinking) - held], thinking[len(thinking) - held :]
        if self._phase is _Phase.CLOSED:
            self._held = self._held.lstrip()
            self._phase = _Phase.ANSWERING if self._held else self._phase
        if self._phase is not _Phase.ANSWERING:
            return thinking, ""
        answer, self._held = self._held, ""
        return thinking, answer

    def flush(self) -> tuple[str, str]:
        """What was held back when the text has ended."""
        held, self._held = self._held, ""
        return (held, "") if self._phase is _Phase.THINKING else ("", held)


def _length_of_part(text: str, tag: str) -> int:
    """How many characters at the end of the text the tag may begin with."""
    return next(length for length in range(min(len(text), len(tag) - 1), -1, -1) if text.endswith(tag[:length]))
