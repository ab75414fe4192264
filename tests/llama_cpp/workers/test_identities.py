"""Which endpoints are one worker, where names resolve slowly and other kernels use the workers meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

import pytest

from sollol_nb.llama_cpp.workers import identities
from sollol_nb.llama_cpp.workers.identities import Identities
from tests.support.engines import run

FIRST, SECOND = "10.0.0.1:50052", "10.0.0.2:50052"


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([[FIRST], [SECOND]], [SECOND]),
        ([[SECOND], [SECOND]], []),  # another kernel has taken the first one
        ([[FIRST], [SECOND, FIRST]], []),  # another kernel asked the second one
    ],
)
def test_a_worker_that_another_kernel_uses_at_this_moment_is_not_taken_for_a_second_name(
    monkeypatch: pytest.MonkeyPatch, pairs: list[list[str]], found: list[str]
) -> None:
    answers = iter([[FIRST], [SECOND], *pairs])  # both at once, the silent one alone, then the two both ways

    async def answering_together(endpoints: Iterable[str]) -> list[str]:
        return next(answers)

    monkeypatch.setattr(identities, "answering_together", answering_together)
    known = Identities()
    assert run(known.find_second_names([FIRST, SECOND])) == found
    assert list(known.second_names([FIRST, SECOND])) == found


def test_a_name_that_resolves_slowly_is_looked_up_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups, is_resolved = [], threading.Event()

    def worker_at(host: str, port: int) -> tuple[str, int]:
        lookups.append(host)
        is_resolved.wait(30)
        return "10.0.0.1", port

    monkeypatch.setattr(identities, "worker_at", worker_at)
    monkeypatch.setattr(identities, "DEFAULT_TIMEOUT_S", 0.01)

    async def check() -> None:
        known = Identities()
        for _ in range(20):
            await known.resolve(["box:50052"], again=True)
        assert known.of("box:50052") == "box:50052"
        is_resolved.set()
        monkeypatch.setattr(identities, "DEFAULT_TIMEOUT_S", 30)
        await known.resolve(["box:50052"])
        assert known.of("box:50052") == ("10.0.0.1", 50052)

    run(asyncio.wait_for(check(), 20))
    assert lookups == ["box"]
