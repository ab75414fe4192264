"""For nbval: the notebooks run with a separate state folder, without the user's settings file, and with a real
Ollama server that has the demo model.

nbval's items are not functions and take no fixtures, so hooks of the session set this up; kernels inherit the
environment variables. Without an Ollama the notebooks that need one are skipped, and the summary says so; with
`CI` set that is a failure.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from notebooks.ssh_hosts import find_sshd
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.ollama_server import NO_OLLAMA, OllamaServer, find_ollama

NEED_OLLAMA = ("02_hybrid_routing.ipynb",)
NEED_SSHD = ("08_many_machines.ipynb",)
NO_SSHD = "it needs sshd; run: sudo apt-get install openssh-server"

_session: dict[str, Any] = {}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Create a state folder, and start an Ollama server with the demo model; no other is used."""
    folder = Path(tempfile.mkdtemp(prefix="sollol-notebooks-"))
    _session["folder"] = folder
    os.environ.pop("RPC_BACKENDS", None)
    os.environ["SOLLOL_STATE_DIR"] = str(folder / "state")
    os.environ["SOLLOL_CONFIG"] = "0"  # not the user's settings file, which a notebook would also write
    os.environ["OLLAMA_HOST"] = "127.0.0.1:9"  # nothing answers there
    if find_sshd() is None and os.environ.get("CI"):
        pytest.exit(NO_SSHD, returncode=1)
    program = find_ollama()
    if program is None:
        if os.environ.get("CI"):
            pytest.exit(NO_OLLAMA, returncode=1)
        return
    server = _session["ollama"] = OllamaServer(program, folder / "ollama")
    server.start().create("demo")
    os.environ["OLLAMA_HOST"] = f"127.0.0.1:{server.port}"
    os.environ["OLLAMA_MODELS"] = str(server.models_folder)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop everything; the notebooks' engines would otherwise run until their keep_alive is over."""
    run_blocking(stop_engines(also_used=True))
    if "ollama" in _session:
        _session["ollama"].kill()
    shutil.rmtree(_session["folder"], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Skip notebooks that cannot run here."""
    if collection_path.name in NEED_SSHD and find_sshd() is None:
        return True
    return True if collection_path.name in NEED_OLLAMA and "ollama" not in _session else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report skipped notebooks."""
    if find_sshd() is None:
        terminalreporter.write_line(f"{len(NEED_SSHD)} NOTEBOOK SKIPPED: {NO_SSHD}", yellow=True, bold=True)
    if "ollama" not in _session:
        terminalreporter.write_line(f"{len(NEED_OLLAMA)} NOTEBOOK SKIPPED: {NO_OLLAMA}", yellow=True, bold=True)
