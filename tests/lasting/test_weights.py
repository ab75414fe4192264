"""Weights travel once: a reload sends nothing that workers have cached, a death only the dead worker's layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.lasting import weights
from tests.support.gguf_files import write_heavy

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("alone")]


def test_a_reload_sends_nothing_that_is_cached_and_a_death_only_the_dead_workers_layers(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "50")
    model = write_heavy(tmp_path / "heavy.gguf", blocks=8, feed_forward=41_000)
    total = weights.weight_bytes(model)
    played = weights.play(engine, model, tmp_path, lost=0)
    assert played.first > 0.99 * total
    assert played.reload <= weights.RELOAD_GOAL * total
    assert played.failover <= weights.FAILOVER_GOAL * total
    assert played.again <= weights.RELOAD_GOAL * total
