"""Fixtures of tests with workers that have several names."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sollol_nb.llama_cpp.workers import identities, probe


@pytest.fixture
def first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of some names of one free worker is asked until it answers, up to 60 times. With a longer
    limit, each other name would take that long."""

    async def answering_together(endpoints: Iterable[str]) -> list[str]:
        names = [*endpoints]
        for _ in range(60):
            answering = await probe.answering_together(names)
            if answering[:1] == names[:1]:
                break
        return answering

    monkeypatch.setattr(identities, "answering_together", answering_together)
