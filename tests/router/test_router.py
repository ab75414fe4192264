"""The router apart from its requests: its settings, a sibling with other settings, and how long it lives."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
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


def test_a_router_lives_until_its_streams_and_calls_have_ended() -> None:
    """Else `await HybridRouter().cluster()` would close the connections that it uses."""

    async def check() -> None:
        router = HybridRouter(rpc_backends=[], auto_discover_rpc=False)
        known = weakref.ref(router)
        call, stream = router.status(), router.stream("demo", "Hello!")
        del router
        gc.collect()
        assert known() is not None
        await call
        del call
        gc.collect()
        assert known() is not None
        await stream.aclose()
        del stream
        gc.collect()
        assert known() is None

    asyncio.run(check())


def test_methods_about_the_cluster_are_coroutine_functions() -> None:
    for name in ("cluster", "status", "start_workers", "apply_plan", "configure"):
        assert inspect.iscoroutinefunction(getattr(HybridRouter, name)), name
