"""The difference between two states of plain data, as a JSON merge patch (RFC 7396).

A state is dicts down to plain values. In a patch, a key with None is gone, a dict is a patch of what was there,
and anything else (lists too) replaces it. So a state cannot hold None: what is not known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def patch_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `after` of `before`; empty when they are equal."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        known = before.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            inner = patch_between(known, value)
            if inner:
                patch[key] = inner
        elif key not in before or known != value:
            patch[key] = value
    return patch


def patched(state: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The state with a patch applied; the one given stays as it is."""
    after = {key: value for key, value in state.items() if patch.get(key, value) is not None}
    for key, value in patch.items():
        if isinstance(value, Mapping):
            known = state.get(key)
            after[key] = patched(known if isinstance(known, Mapping) else {}, value)
        elif value is not None:
            after[key] = value
    return after
