"""Fixtures of all tests: real engines, started once, and a separate state folder."""

from __future__ import annotations

import gc
import math
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat import journaling
from sollol_nb.cluster import state
from sollol_nb.llama_cpp.coordinators import pace
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.llama_cpp.workers import workers
from sollol_nb.llama_cpp.workers.probe import Probe, probe_all
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support import own_folders
from tests.support.engines import write_endless
from tests.support.gguf_files import write_heavy
from tests.support.smollm2 import smollm2_path

pytest_plugins = ["tests.support.ollama_server"]

collect_ignore = ["notebook/test_terminal.py", "ollama/test_newer_ollama.py"] if sys.platform == "win32" else []
ENGINE_NAMES = ("llama-server", "ggml-rpc-server", "rpc-server", "ollama")

# Tests send signals to themselves and to processes that they start, which inherit what is ignored here: a shell
# without job control starts background jobs with SIGINT ignored, `nohup` starts its command with SIGHUP ignored.
DEFAULT_HANDLERS = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
for name, default in DEFAULT_HANDLERS.items():
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


def pytest_report_header() -> list[str]:
    """Say which files are skipped."""
    return [f"left out: {name} (it needs POSIX)" for name in collect_ignore]


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that belongs to the user is read or written: folders, workers and Ollama nodes are separate."""
    folder = tmp_path_factory.mktemp("own")
    before = own_folders.use(
        # What one test saves must not shorten the prompts and loads of another.
        own_folders.own_settings(folder) | {"SOLLOL_CONTEXT_CACHE_GB": "0", "SOLLOL_TENSOR_CACHE_GB": "0"}
    )
    yield folder / "state"
    run_blocking(stop_engines(also_used=True))
    journaling.flush()  # what is written after this would go to the user's journal
    own_folders.use(before)


@pytest.fixture(scope="module", autouse=True)
def nothing_measured(own_state: Path) -> None:
    """What earlier tests have measured of workers and drafts would decide plans of this module."""
    for name in ("calibrations.json", "drafts.json", "cached_layers.json"):
        (own_state / name).unlink(missing_ok=True)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder in which no other test's coordinators and workers are found, which would be shared."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silence of an engine is taken for the end of it here: one may be halted for long."""
    monkeypatch.setattr(pace, "MARGIN", math.inf)


@pytest.fixture
def patient_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers a probe late is free here all the same; one that has ended refuses it immediately."""

    async def wait_longer(endpoints: Iterable[str], **settings: Any) -> list[Probe]:
        return await probe_all(endpoints, **{**settings, "timeout_s": 30.0})

    monkeypatch.setattr(workers, "probe_all", wait_longer)


@pytest.fixture
def four_times_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches and probes of the live cluster in the same proportion as for users, in a quarter of the time."""
    monkeypatch.setattr(state, "PATCHES_PER_S", 4 * state.PATCHES_PER_S)
    monkeypatch.setattr(state, "PROBES_PER_S", 4 * state.PROBES_PER_S)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The real llama.cpp binaries. `make test` installs them; their absence is a failure, never a skip."""
    return find_engine()


@pytest.fixture(scope="session")
def router(engine: Engine) -> Iterator[HybridRouter]:
    """A blocking router over three real local workers, shared by tests that only send requests."""
    # Not on the usual port, which other tests expect to be free.
    with HybridRouter(auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, rpc_port=51052) as shared:
        yield shared


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of a real instruct model, fetched once."""
    return smollm2_path()


@pytest.fixture(scope="session")
def heavy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 126 MB in 4 blocks, whose tensors workers can cache: nearly all are over 10 MiB."""
    return write_heavy(tmp_path_factory.mktemp("heavy") / "heavy.gguf", blocks=4, feed_forward=41_000)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model that never stops generating: one per test module, so that none shares a coordinator."""
    return str(write_endless(tmp_path_factory.mktemp("models")))


def engine_processes() -> list[psutil.Process]:
    """Engine processes that descend from this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            if child.name().removesuffix(".exe") in ENGINE_NAMES:
                found.append(child)
    return found


def pytest_collection_finish() -> None:
    """Leave what exists now out of garbage collections, and have fewer: they searched the imported libraries again
    and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
