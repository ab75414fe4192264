"""The caches of weights, in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.llama_cpp.weights import cache


@pytest.fixture
def caches(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the caches, which is empty; workers that start now use it."""
    monkeypatch.setattr(cache, "root", lambda: tmp_path / "tensors")
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "50")
    return tmp_path / "tensors"
