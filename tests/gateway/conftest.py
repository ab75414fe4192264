"""One gateway for the tests that only send requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.gateway import GatewayProcess, running_gateway
from tests.support.scripted_model import CHATML, write_scripted
from tests.support.tool_model import write_tool_model


@pytest.fixture(scope="package")
def gateway(engine: Engine, own_state: object) -> Iterator[GatewayProcess]:
    """A gateway that shards `demo:sharded` over its own workers; it has no Ollama. Tests may halt its engines."""
    with running_gateway(variables={"SOLLOL_AUTO_SETUP": "1"}, is_patient=True) as running:
        yield running


@pytest.fixture(scope="package")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model that can call tools."""
    return str(write_tool_model(tmp_path_factory.mktemp("models") / "tools.gguf"))


@pytest.fixture(scope="package")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model that always thinks "Workers compute." and says "A worker computes."."""
    path = tmp_path_factory.mktemp("models") / "thinking.gguf"
    script = ["<think>\n", "Workers", " compute.", "</think>\n\n", "A worker", " computes."]
    return str(
        write_scripted(path, script, template=CHATML + "{# <think> #}", specials=("<|im_start|>", "<|im_end|>"))
    )
