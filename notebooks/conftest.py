"""For nbval: the notebooks run in a world of their own, with a real Ollama that has the demo model.

nbval's items are no functions and take no fixtures, so the world is made by hooks of the session; kernels
inherit its environment variables. Without an Ollama the notebooks that need one are left out, and the end of
the run says so; where `CI` is set that is a failure.
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

from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.ollama_server import NO_OLLAMA, OllamaServer, find_ollama

NEED_OLLAMA = ("02_hybrid_routing.ipynb",)

_world: dict[str, Any] = {}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the world: a state folder, no other Ollama than ours, and that one with the demo model."""
    folder = Path(tempfile.mkdtemp(prefix="sollol-notebooks-"))
    _world["folder"] = folder
    os.environ.pop("RPC_BACKENDS", None)
    os.environ["SOLLOL_STATE_DIR"] = str(folder / "state")
    os.environ["OLLAMA_HOST"] = "127.0.0.1:9"  # nothing answers there
    program = find_ollama()
    if program is None:
        if os.environ.get("CI"):
            pytest.exit(NO_OLLAMA, returncode=1)
        return
    server = _world["ollama"] = OllamaServer(program, folder / "ollama")
    server.start().create("demo")
    os.environ["OLLAMA_HOST"] = f"127.0.0.1:{server.port}"
    os.environ["OLLAMA_MODELS"] = str(server.models_folder)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the world; the notebooks' engines would live on for their keep_alive."""
    run_blocking(stop_engines(also_used=True))
    if "ollama" in _world:
        _world["ollama"].kill()
    shutil.rmtree(_world["folder"], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot run here."""
    return True if collection_path.name in NEED_OLLAMA and "ollama" not in _world else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what was left out."""
    if "ollama" not in _world:
        terminalreporter.write_line(f"{len(NEED_OLLAMA)} NOTEBOOK LEFT OUT: {NO_OLLAMA}", yellow=True, bold=True)
