"""Requests to verify caches on the other side of a link, where they are not answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from sollol_nb.llama_cpp.links import verifying
from sollol_nb.llama_cpp.links.program import Report
from sollol_nb.llama_cpp.links.verifying import AgentVerifying, answer_requests
from tests.support.engines import eventually_async, run

ENDPOINTS = ["127.0.0.1:20001", "127.0.0.1:20002"]


@dataclass
class Agent:
    """What it was told, and the side here."""

    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.here = AgentVerifying(self.told.append, lambda: ENDPOINTS)


class Told(Report):
    """The registry entry of a link."""

    def __init__(self, **about: Any) -> None:
        self.entry = about

    async def tell(self, **about: Any) -> None:
        self.entry |= about

    async def about(self) -> dict[str, Any]:
        return self.entry


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    monkeypatch.setattr(verifying, "REQUEST_POLL_S", 0.01)
    monkeypatch.setattr(verifying.cache, "known_sizes", lambda: frozenset({5}))


def test_an_agent_learns_the_sizes_first_and_has_verified_when_it_says_so() -> None:
    async def ask() -> bool:
        asking = asyncio.create_task(agent.here.verify([ENDPOINTS[1]], [7]))
        await eventually_async(lambda: len(agent.told) == 2, "it was asked")
        assert agent.here.heard("verified 99")
        assert not agent.here.heard("worker 0 20000")
        assert not asking.done()
        agent.here.heard("verified 1")
        return await asking

    agent = Agent()
    assert run(ask())
    assert agent.told == ["sizes 5 7\n", "verify 1 1\n"]


def test_an_agent_that_does_not_answer_has_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "VERIFY_LIMIT_S", 0.2)
    agent = Agent()
    assert not run(agent.here.verify(ENDPOINTS, [7]))
    assert not run(agent.here.verify(ENDPOINTS, [7]))
    assert agent.told[1::2] == ["verify 1 0 1\n", "verify 2 0 1\n"]


@pytest.mark.parametrize(("is_verified", "key"), [(True, "verified"), (False, "refused")])
def test_each_request_is_carried_out_once(is_verified: bool, key: str) -> None:
    async def answered() -> int:
        calls = 0

        async def verify(endpoints: Any, sizes: Any) -> bool:
            nonlocal calls
            calls += 1
            assert (endpoints, sizes) == (ENDPOINTS, [7])
            return is_verified

        answering = asyncio.create_task(answer_requests(report, verify))
        await eventually_async(lambda: report.entry.get(key) == "a", "it is answered")
        await asyncio.sleep(0.1)
        report.entry["verify"] = {**asked, "number": "b"}
        await eventually_async(lambda: report.entry.get(key) == "b", "the next one, too")
        answering.cancel()
        return calls

    asked = {"number": "a", "endpoints": ENDPOINTS, "sizes": [7]}
    report = Told(verify=asked)
    assert run(answered()) == 2
