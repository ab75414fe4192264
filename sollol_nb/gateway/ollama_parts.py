"""Shared by the paths of Ollama's API: fields of bodies, and errors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sollol_nb.chat.option_checks import CHAT_OPTIONS, OLLAMA_OPTIONS, SAMPLING_OPTIONS, Values
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.openai_parts import (
    A_LIST,
    AN_OBJECT,
    METADATA,
    PRIORITY,
    TEXT,
    TEXT_OR_LIST,
    TEXT_OR_OBJECT,
    YES_OR_NO,
    Fields,
    only,
)
from sollol_nb.runtime.amounts import is_whole_number, shown

MOST_TOP_LOGPROBS = 20
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        sorted({*SAMPLING_OPTIONS, *OLLAMA_OPTIONS} - {"max_tokens"}), "give it in options, as Ollama takes it"
    ),
    "max_tokens": "Ollama's API calls it num_predict, in options",
    "_debug_render_only": "the gateway does not show prompts",
    "context": "it is deprecated; send the conversation to /api/chat",
    "template": "the model's own is used",
    **dict.fromkeys(("width", "height", "steps"), "the gateway makes no images"),
}
_ANSWER_FIELDS: Mapping[str, Values] = {
    "model": TEXT,
    "stream": YES_OR_NO,
    "format": TEXT_OR_OBJECT,
    "keep_alive": CHAT_OPTIONS["keep_alive"],
    "options": AN_OBJECT,
    "think": CHAT_OPTIONS["think"],
    "truncate": YES_OR_NO,
    "shift": only(False, "an answer ends where the context is full; nothing is dropped from it"),
    "logprobs": YES_OR_NO,
    "top_logprobs": Values(
        f"a whole number from 0 to {MOST_TOP_LOGPROBS}",
        lambda value: is_whole_number(value) and 0 <= value <= MOST_TOP_LOGPROBS,
    ),
    "priority": PRIORITY,
}


def _fields(known: Mapping[str, Values], *ignored: str) -> Fields:
    return Fields(known, _REFUSED, METADATA | set(ignored))


FIELDS: Mapping[str, Fields] = {
    "chat": _fields({**_ANSWER_FIELDS, "messages": A_LIST, "tools": A_LIST}),
    "generate": _fields(
        {
            **_ANSWER_FIELDS,
            "prompt": TEXT,
            "suffix": TEXT,
            "system": TEXT,
            "raw": YES_OR_NO,
            "images": A_LIST,
        }
    ),
    "embed": _fields(
        {
            "model": TEXT,
            "input": TEXT_OR_LIST,
            "truncate": YES_OR_NO,
            "dimensions": Values(
                "a whole number of 0 or more", lambda value: is_whole_number(value) and value >= 0
            ),
            "keep_alive": CHAT_OPTIONS["keep_alive"],
            "options": AN_OBJECT,
            "priority": PRIORITY,
        }
    ),
    "embeddings": _fields(
        {
            "model": TEXT,
            "prompt": TEXT,
            "keep_alive": CHAT_OPTIONS["keep_alive"],
            "options": AN_OBJECT,
            "priority": PRIORITY,
        }
    ),
    "show": Fields(
        {"model": TEXT, "name": TEXT, "verbose": YES_OR_NO},
        dict.fromkeys(("system", "template", "options"), "the model is shown as it is"),
    ),
    # Ollama itself ignores the name and the password.
    "pull": Fields(
        {"model": TEXT, "name": TEXT, "stream": YES_OR_NO, "insecure": YES_OR_NO},
        ignored=METADATA | {"username", "password"},
    ),
}
"""By the last part of the path."""


def checked_fields(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that have a value. What cannot be followed may be empty: Ollama's own program sends all
    fields that a request can have.

    Args:
        path: its last part.

    Raises:
        ApiError: a field is not known, or refused, or has a value that it does not take; it is named.
    """
    fields = FIELDS[path]
    return fields.checked({name: value for name, value in body.items() if value or name not in fields.refused})


def error_shape(error: ApiError) -> Any:
    """An error as Ollama's API writes it."""
    return {"error": error.message}


def model_error(error: ApiError, model: str) -> ApiError:
    """The error; if the model does not exist, it begins as Ollama's error, which tools recognize."""
    if error.kind != "not_found":
        return error
    return ApiError(error.status, error.kind, f"model {shown(model)} not found: {error.message}")
