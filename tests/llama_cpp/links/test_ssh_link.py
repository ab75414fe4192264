"""A link to a machine that says nothing, or too much, seen through a local shell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.links import ssh
from sollol_nb.llama_cpp.links.link import LinkedWorker
from sollol_nb.llama_cpp.links.program import Report
from tests.support.engines import HANG_GUARD_S, posix_only, run
from tests.support.shell_machine import ShellMachine, engine_in

pytestmark = posix_only


class Seen(Report):
    """What the registry entry would say."""

    def __init__(self) -> None:
        self.states: list[str] = []

    async def set(self, state: str, detail: str, workers: Mapping[str, LinkedWorker], **more: Any) -> None:
        self.states.append(state)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShellMachine:
    machine = ShellMachine(tmp_path / "gpu1")
    engine_in(machine.engines / f"llama.cpp-{build.VERSION}-cpu")
    monkeypatch.setattr(ssh._Link, "_new_shell", lambda link: machine.shell())
    monkeypatch.setattr(ssh, "FIRST_LIMIT_S", 0.5)
    return machine


async def ended(machine: ShellMachine, folder: Path) -> str:
    """Why the link to a machine ends."""
    here = engine_in(folder)
    spec = {
        "target": "ssh://gpu1",
        "server": str(here.server),
        "worker": str(here.worker),
        "version": here.version,
        "source": here.source,
        "protocol": here.protocol,
    }
    with pytest.raises(LinkError) as raised:
        async with asyncio.timeout(HANG_GUARD_S):
            await ssh._Link(spec, Seen()).run()
    return str(raised.value)


@pytest.mark.parametrize("script_begins", [False, True])
def test_a_machine_that_does_not_report_its_workers_is_not_waited_for_forever(
    machine: ShellMachine, tmp_path: Path, script_begins: bool
) -> None:
    if script_begins:
        machine.add_program("env", "exec cat >/dev/null")  # only the script that runs the workers needs it
    else:
        machine.before = "case $last in *USR1*) exec cat >/dev/null ;; esac"
    assert run(ended(machine, tmp_path / "here")) == (
        "gpu1: its workers did not start within 0.5 s; is it overloaded?"
    )
