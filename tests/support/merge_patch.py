"""JSON merge patches (RFC 7396) as a front end applies them, and random states to try them on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any


def patched(state: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The state with a patch applied; the given state is not changed."""
    after = {key: value for key, value in state.items() if patch.get(key, value) is not None}
    for key, value in patch.items():
        if isinstance(value, Mapping):
            old = state.get(key)
            after[key] = patched(old if isinstance(old, Mapping) else {}, value)
        elif value is not None:
            after[key] = value
    return after


def random_state(chance: random.Random, depth: int) -> dict[str, Any]:
    """A state of up to five keys, nested up to `depth` times."""
    values: list[Any] = [0, 1, "x", "", [1], [], 2.5]
    return {
        key: random_state(chance, depth - 1) if depth and chance.random() < 0.5 else chance.choice(values)
        for key in chance.sample("abcdef", chance.randint(0, 5))
    }
