"""A cluster to break, and a state folder without processes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.coordinators import readiness
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from tests.chaos.machines import Cluster
from tests.chaos.trials import STALL_S, Chaos
from tests.support.engines import eventually, with_variable


@pytest.fixture(scope="package")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder for these tests alone: its registry has only what they start."""
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLLOL_STATE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="package")
def cluster(engine: Engine, state: Path) -> Iterator[Cluster]:
    """Three machines and a spare one."""
    with Cluster(engine) as machines:
        yield machines


@pytest.fixture(scope="package")
def chaos(cluster: Cluster) -> Iterator[Chaos]:
    """The cluster with the undisturbed answers of its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readiness, "LOAD_STALL_S", STALL_S)
        yield Chaos(cluster)


@pytest.fixture(autouse=True)
def nothing_is_left(state: Path) -> Iterator[None]:
    """After each test no process of ours runs, and the registry is empty."""
    yield
    eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(state)), "no process is left")
    assert not [path.name for path in (state / "registry").glob("*") if path.suffix != ".lock"]
    assert not registry.entries()
