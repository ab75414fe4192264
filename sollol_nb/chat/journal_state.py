"""What the journal keeps to continue an answer, as JSON in two parts: the first is written once, the second often.

The first has the request (messages, options, ...) and of the answer's state (`Answer.state`) what stays the same
while it streams; the second has the rest of the state: the text so far and its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LIMIT_BYTES = 4 * 1024 * 1024
"""Of each part; a longer one is not kept."""

FIXED = ("messages", "options", "prompt", "chat_template", "markup")
"""What of a state stays the same once it is known."""
NESTED = ("fitted", "unparsed")
"""States within the state."""
_SHARED = ("messages", "options")
"""What a request has, too. The state's are those that the engine got: with a Modelfile's, say."""
END = "end"
"""The kind of what the last chunk brought."""
_STATE = "state"


def read_parts(first: str | None, second: str | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The request and the state of an answer from their two parts; None for what is missing or damaged. Of a
    complete answer there is only the second: what its last chunk brought."""
    request, moving = _object(first), _object(second)
    if request is None:
        return None, moving if moving is not None and moving.get("kind") == END else None
    fixed = request.pop(_STATE, None)
    if not isinstance(fixed, dict):
        return request, None
    shared = {name: fixed[name] for name in _SHARED if name in fixed}
    return {**shared, **request}, None if moving is None else merged_state(fixed, moving)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a state stays the same while the answer streams, and the rest."""
    fixed = {name: state[name] for name in FIXED if name in state}
    moving = {name: value for name, value in state.items() if name not in FIXED}
    for name in NESTED:
        if isinstance(state.get(name), Mapping):
            fixed[name], moving[name] = split_state(state[name])
    return fixed, moving


def merged_state(fixed: Mapping[str, Any], moving: Mapping[str, Any]) -> dict[str, Any]:
    """The state whose parts `split_state` gave."""
    nested = {
        name: merged_state(fixed.get(name) or {}, moving[name])
        for name in NESTED
        if isinstance(moving.get(name), Mapping)
    }
    return {**fixed, **moving, **nested}


def request_json(request: Mapping[str, Any], fixed: Mapping[str, Any] | None) -> str | None:
    """A request and the fixed part of its answer's state, as `Progress` takes them; None if they are too long, or
    are not plain data.

    What is the same in both is written once.
    """
    if fixed is not None:
        shared = {name for name in _SHARED if name in fixed and fixed[name] == request.get(name)}
        request = {name: value for name, value in request.items() if name not in shared}
    return plain_json({**request, **({} if fixed is None else {_STATE: fixed})})


def plain_json(data: Mapping[str, Any]) -> str | None:
    """Data as JSON; None if it is longer than `LIMIT_BYTES`, or is not plain data."""
    try:
        text = json.dumps(data, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return None
    return text if len(text) <= LIMIT_BYTES else None


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
