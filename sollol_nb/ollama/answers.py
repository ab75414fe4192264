"""What Ollama nodes send, checked before anything else reads it. Pure.

The server at a node's address may be broken, old, hostile, or no Ollama. A wrong type where the answer's text is
read is an error; a wrong figure is left out, as if the node had not sent it; of a list of models a malformed entry
is left out. Names that begin with `_` are this package's own marks, which no node may set.

Source of the shapes: Ollama's `api/types.go`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollol_nb.chat.chunk import TokenLogprob
from sollol_nb.models.names import key_of

MOST_MODELS = 10_000  # of a list; a node has some dozens
_LARGEST = 2**63  # of a Go integer

_TEXTS = ("model", "created_at", "done_reason", "status", "digest")
_FIGURES = frozenset(
    """
    total_duration load_duration prompt_eval_count prompt_eval_duration eval_count eval_duration total completed
    """.split()  # noqa: SIM905
)
_ENTRY_TEXTS = ("model", "digest", "expires_at", "modified_at", "remote_model", "remote_host")
_ENTRY_FIGURES = ("size", "size_vram", "context_length")
_REPORTED = "_debug_info"  # of `_debug_render_only`


def checked_chunk(chunk: Any) -> dict[str, Any]:
    """A chunk of an answer with the right types.

    Raises:
        ValueError: it is not a chunk; the message says what is wrong with it.
    """
    if not isinstance(chunk, dict):
        raise ValueError(f"a JSON object was expected, not {_kind(chunk)}")
    checked: dict[str, Any] = {}
    for name, value in chunk.items():
        if name == "message":
            checked[name] = _message(value)
        elif name in ("response", "thinking"):
            checked[name] = _text(name, value)
        elif name == "done":
            if not isinstance(value, bool):
                raise ValueError(f"done is {_kind(value)}, not true or false")
            checked[name] = value
        elif name == "embeddings":
            checked[name] = _embeddings(value)
        elif name == "logprobs":
            if isinstance(value, list):
                checked[name] = _logprobs(value)
        elif not _is_wrong(name, value):
            checked[name] = value
    return checked


def listed_models(answer: Any) -> list[dict[str, Any]]:
    """The well-formed entries of an answer of `/api/tags` or `/api/ps`; each has `name`, the name of a model.

    Raises:
        ValueError: it is not such an answer.
    """
    models = answer.get("models", ()) if isinstance(answer, Mapping) else ()
    if models is None:  # of old versions without models
        return []
    if not isinstance(models, list):
        raise ValueError("it has no list of models")
    entries = []
    for entry in models[:MOST_MODELS]:
        name = (entry.get("name") or entry.get("model")) if isinstance(entry, Mapping) else None
        if key_of(name) is not None:
            entries.append(
                {"name": name} | {field: v for field, v in entry.items() if not _is_wrong_entry(field, v)}
            )
    return entries


def _message(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"message is {_kind(value)}, not an object")
    message: dict[str, Any] = {}
    for name, part in value.items():
        if name in ("content", "thinking"):
            message[name] = _text(f"message.{name}", part)
        elif name == "tool_calls":
            message[name] = _tool_calls(part)
        elif name != "role" or isinstance(part, str):
            message[name] = part
    return message


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not text")
    return value


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    if calls is None:
        return []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments", {}), dict)
        ):
            raise ValueError("message.tool_calls has a call without a function's name and arguments")
    return list(calls)


def _embeddings(value: Any) -> list[list[float]]:
    is_right = isinstance(value, list) and all(
        isinstance(vector, list) and all(type(figure) in (int, float) for figure in vector) for vector in value
    )
    if not is_right:
        raise ValueError("embeddings is not a list of vectors")
    return list(value)


def _logprobs(entries: Any, *, are_alternatives: bool = False) -> list[TokenLogprob]:
    """The well-formed entries, with what this package knows of them."""
    checked: list[TokenLogprob] = []
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("token"), str):
            continue
        if type(entry.get("logprob")) not in (int, float):
            continue
        known: TokenLogprob = {"token": entry["token"], "logprob": entry["logprob"]}
        values = entry.get("bytes")
        if isinstance(values, list) and all(type(value) is int and 0 <= value < 256 for value in values):
            known["bytes"] = values
        if isinstance(entry.get("top_logprobs"), list) and not are_alternatives:
            known["top_logprobs"] = _logprobs(entry["top_logprobs"], are_alternatives=True)
        checked.append(known)
    return checked


def _is_wrong(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return not isinstance(value, str)
    if name in _FIGURES:
        return not _is_figure(value)
    return name.startswith("_") and name != _REPORTED


def _is_wrong_entry(name: str, value: Any) -> bool:
    if name in _ENTRY_TEXTS:
        return not isinstance(value, str)
    if name in _ENTRY_FIGURES:
        return not _is_figure(value)
    return name == "name" or (name == "details" and not isinstance(value, Mapping))


def _is_figure(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _kind(value: Any) -> str:
    kinds = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")
