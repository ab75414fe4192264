"""The one router of a kernel, whoever asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from sollol_nb import notebook
from sollol_nb.sync_wrapper import HybridRouter


@pytest.fixture(autouse=True)
def no_router_yet() -> Iterator[None]:
    assert notebook._router is None
    yield
    if notebook._router is not None:
        notebook._router.close()
        notebook._router = None


def test_threads_that_ask_at_once_share_one_router(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HybridRouter] = []
    two_at_once = threading.Barrier(2)

    def make(**settings: Any) -> HybridRouter:
        with suppress(threading.BrokenBarrierError):
            two_at_once.wait(0.2)
        made.append(HybridRouter(auto_discover_rpc=False, **settings))
        return made[-1]

    monkeypatch.setattr(notebook, "HybridRouter", make)
    with ThreadPoolExecutor(4) as threads:
        given = list(threads.map(lambda _: notebook.router(), range(4)))
    assert len(made) == 1
    assert given == made * 4
