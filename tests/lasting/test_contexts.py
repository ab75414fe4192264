"""A short conversation is interrupted once in each of the six ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lasting import contexts
from tests.lasting._kernel import SAVES_ALL
from tests.support import own_folders


@pytest.mark.engine
def test_a_conversation_goes_on_after_each_way_of_interruption(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SAVES_ALL, "1")  # it is so short that a quick machine would not save it
    before = own_folders.use(own_folders.own_settings(tmp_path))
    lines: list[str] = []
    try:
        again, _, is_same = contexts.run(len(contexts.WAYS), 1, lines.append, sentences=30)
    finally:
        own_folders.use(before)
    # Loading takes longer than so short a prompt, so the time to the first token says nothing here.
    assert again.is_met, [again, *lines]
    assert is_same.is_met, [is_same, *lines]
