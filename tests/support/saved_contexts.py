"""Contexts that are saved and restored, however quick the prompt and the disk are."""

from __future__ import annotations

import pytest

from sollol_nb.llama_cpp.contexts import actions, keeper


def save_all(patch: pytest.MonkeyPatch) -> None:
    """Save every context from now on, and restore whatever fits."""
    patch.setattr(keeper, "LEAST_GAIN_MS", 0.0)
    patch.setattr(actions.Costs, "save_ms", lambda *_: 0.0)
    patch.setattr(actions.Costs, "restore_ms", lambda *_: 0.0)
