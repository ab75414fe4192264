"""One gateway for the tests that only send requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.gateway import GatewayProcess, running_gateway


@pytest.fixture(scope="package")
def gateway(engine: Engine, own_state: object) -> Iterator[GatewayProcess]:
    """A gateway that shards `demo:sharded` over workers of its own; it has no Ollama."""
    with running_gateway(variables={"SOLLOL_AUTO_SETUP": "1"}) as running:
        yield running
