"""Machines that join by the real `sollol-nb worker --join`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually
from tests.support.machines import Machine


def here(machine: Machine) -> str:
    """The address of this machine that another one can dial."""
    return f"{machine.address.rpartition('.')[0]}.1" if machine.namespace else "127.0.0.1"


def join(machine: Machine, engine: Engine, link: str, *options: str, **more: Any) -> subprocess.Popen[Any]:
    """Start a worker there, which takes the link from its standard input. All its files are there."""
    variables = {
        "SOLLOL_STATE_DIR": str(machine.home / "state"),
        "SOLLOL_CACHE_DIR": str(machine.home / ".cache" / "sollol_nb"),
        "SOLLOL_LLAMA_CPP": str(engine.server.parent),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = (sys.executable, "-m", "sollol_nb", "worker", "--join", "-", "--threads", "1", *options)
    process = machine.start(
        *command, env=variables, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=machine.home, **more
    )
    assert process.stdin is not None
    process.stdin.write(f"{link}\n")
    process.stdin.close()
    return process


def invite(router: HybridRouter, machine: Machine) -> str:
    """A link for this machine; where there are no namespaces, machines have no names by themselves."""
    return router.invite(name=machine.name, host=here(machine)).link


def connected(router: HybridRouter, *names: str) -> bool:
    """Wait until these have joined, and no others."""
    return eventually(
        lambda: sorted(item.name for item in router.invitations().joined if item.is_connected) == sorted(names),
        f"{names} have joined",
    )
