"""Processes are distinguished from later ones with the same pid."""

from __future__ import annotations

import os

import psutil
import pytest

from sollol_nb.runtime.process_identity import is_same_process, own_start


def test_this_process_is_itself_also_after_its_clock_was_adjusted(monkeypatch: pytest.MonkeyPatch) -> None:
    started = own_start()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: started + 60.0)  # a laptop slept, say
    assert is_same_process(os.getpid(), started)
    assert is_same_process(os.getpid(), None)
    assert not is_same_process(os.getpid(), started - 60.0), "an earlier process had this pid"
