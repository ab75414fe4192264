"""Answers whose model gets another layout while they are generated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, aclosing
from typing import Any

import psutil

from sollol_nb.runtime.events import EventKind
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import suspended


def read_and_move(
    router: HybridRouter, model: str, question: str, at: int, layout: Mapping[str, int]
) -> list[dict[str, Any]]:
    """All chunks of a greedy answer. After the one with this number, its model gets this layout.

    The engine waits until it is about to end: however quick it is, it has not given the rest before.
    """

    async def read() -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        async with aclosing(router.stream_async(model, question, temperature=0)) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == at + 1:
                    await move()
        return chunks

    async def move() -> None:
        assert router.coordinator is not None
        with ExitStack() as held:
            held.enter_context(suspended(psutil.Process(router.coordinator.pid)))
            forget = router.events.subscribe(
                lambda event: held.close() if event.kind == EventKind.COORDINATOR_PLANNED else None
            )
            held.callback(forget)
            await router._async.apply_plan(model, layout)

    return run_blocking(read())
