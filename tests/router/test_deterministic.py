"""A deterministic answer on a real model: the same, whatever other slots of the engine hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import run

pytestmark = pytest.mark.engine

QUESTION = "Tell me a short story about a fox and a river."


@pytest.mark.parametrize("contexts_gb", ["0", "1"])
def test_it_is_the_same_after_other_answers(
    engine: Engine, smollm2: Path, contexts_gb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", contexts_gb)
    with HybridRouter(auto_discover_rpc=False, slots=4, context_tokens=4096 + int(contexts_gb)) as router:

        def ask(question: str, *, deterministic: bool) -> str:
            answer = router.route_request(
                str(smollm2), question, temperature=0, max_tokens=200, deterministic=deterministic
            )
            return answer.text

        whole = ask(QUESTION, deterministic=True)
        ask("Which rivers do you know?", deterministic=False)
        ask("Where do foxes live?", deterministic=False)
        assert ask(QUESTION, deterministic=True) == whole
        slots = run(router.coordinators[0]._client.get("/slots"))
        # The engine says nothing of a slot that it never used.
        assert sum(slot.get("n_prompt_tokens", 0) > 0 for slot in slots) == 1, "the others were emptied"
