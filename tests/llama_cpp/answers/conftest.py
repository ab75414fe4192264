"""What the tests of answers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.llama_server import Run, llama_server


@pytest.fixture(scope="package")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a test with a llama-server that has its usual settings."""
    with llama_server(engine, tmp_path_factory.mktemp("plain")) as run:
        yield run
