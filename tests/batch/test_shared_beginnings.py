"""Rows with a long instruction in common, on a real engine: it is processed once, and copied between slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.batch import order
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.saved_contexts import save_all

pytestmark = pytest.mark.engine

SYSTEM = "Say for each review whether it is good or bad. " + "".join(
    f"Rule {number}: what it says about day {number} counts {number} times. " for number in range(1, 21)
)
ROWS = [f"Review {number}: it was fine." for number in (3, 1, 5, 2, 6, 4)]
ROW_TOKENS = 40


@pytest.fixture
def router(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HybridRouter:
    """A router that saves and restores contexts in a separate folder, however quick the prompt is."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "1")
    monkeypatch.setattr(order, "LONG_CHARACTERS", 1000)  # a shorter instruction is processed sooner
    assert len(SYSTEM) > 1000
    save_all(monkeypatch)
    return HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=1, rpc_port=51252, speculation="off"
    )


def test_a_common_instruction_is_processed_once_and_not_once_for_each_slot(
    router: HybridRouter, smollm2: Path
) -> None:
    with router:
        result = router.map(
            ROWS,
            "{{ item }}",
            model=smollm2,
            system=SYSTEM,
            backend="sharded",
            temperature=0,
            max_tokens=3,
            progress=False,
        )

        assert list(result["item"]) == ROWS
        assert set(result.status) == {"ok"}
        log = router.latency.frame(last=len(ROWS))
        assert (log.prompt_tokens > 5 * ROW_TOKENS).all()
        processed = sorted(log.prompt_tokens - log.cached_tokens)
        assert processed[-1] == log.prompt_tokens.max(), "of the first row all"
        assert processed[-2] <= ROW_TOKENS, "of the others only what is their own"
        restored = log.restored_tokens[log.restored_tokens > 0]
        assert 1 <= len(restored) <= 3, "once for each of the other slots"
