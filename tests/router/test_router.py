"""The router apart from its requests: its settings, and a sibling with other settings."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.models.files import DEMO_MODEL_PATH


def test_a_sibling_has_the_settings_of_now_but_for_the_changes() -> None:
    router = HybridRouter(
        rpc_backends=["10.0.0.1:50052"],
        coordinator_timeout=60,
        distributed_threshold_params=10,
        model_filter=["codellama:13b"],
        gguf_path=DEMO_MODEL_PATH,
        context_tokens=1024,
        timeout=7,
        keep_alive={"demo": "forever", "*": 5},
    )
    asyncio.run(router.configure(layer_strategy="even"))

    sibling = router.sibling(slots=3, auto_discover_rpc=False)

    assert sibling.settings == replace(router.settings, slots=3, auto_discover_rpc=False)
    assert (sibling.settings.layer_strategy, sibling.settings.keep_alive("demo")) == ("even", None)
    assert (sibling.worker_endpoints, sibling.timeout_s) == (["10.0.0.1:50052"], 7)
    assert sibling.should_use_distributed("codellama:13b")
    assert not sibling.should_use_distributed("llama3.1:70b")
    assert sibling.latency is router.latency
    assert sibling.events is not router.events
