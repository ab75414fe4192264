"""Tokens counted and texts embedded, by real engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.errors import ConfigError, ContextOverflowError, ModelNotFoundError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.ollama_server import OllamaServer
from tests.support.tool_model import write_tool_model

MESSAGES = [
    {"role": "user", "content": "What is a worker?"},
    {"role": "assistant", "content": "A process."},
    {"role": "user", "content": "Äöü, " * 20},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    with HybridRouter(auto_discover_rpc=False, rpc_port=51152) as router:
        yield router


def ollama_router(*servers: OllamaServer) -> HybridRouter:
    return HybridRouter(OllamaPool([server.base_url for server in servers]), auto_discover_rpc=False)


@pytest.mark.engine
def test_the_count_is_that_of_an_answer(local: HybridRouter, tmp_path: Path) -> None:
    model = write_tool_model(tmp_path / "tools.gguf")
    plain = local.count_tokens(model, MESSAGES, backend="local")
    with_tools = local.count_tokens(model, MESSAGES, tools=TOOLS, system="Be brief.", backend="local")
    answer = local.route_request(model, MESSAGES, backend="local", max_tokens=1)
    longer = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    answer_with_tools = local.route_request(model, longer, tools=TOOLS, backend="local", max_tokens=1)
    assert (plain, with_tools) == (answer["prompt_eval_count"], answer_with_tools["prompt_eval_count"])
    psutil.Process(local.coordinators[-1].pid).kill()
    assert local.count_tokens(model, MESSAGES, backend="local") == plain
    assert local.count_tokens(model, "word " * 5000, backend="local") > 5000  # more than the context


@pytest.mark.engine
def test_what_cannot_be_counted_is_refused(local: HybridRouter) -> None:
    with pytest.raises(ConfigError, match="demo does not support tools"):
        local.count_tokens("demo", MESSAGES, tools=TOOLS, backend="local")
    with pytest.raises(ConfigError, match="demo does not read images"):
        local.count_tokens("demo", [{**MESSAGES[0], "images": ["aGk="]}], backend="local")
    with pytest.raises(ConfigError, match="messages must be a list"):
        local.count_tokens("demo", [], backend="local")


@pytest.mark.ollama
def test_the_count_of_ollama_includes_what_it_has_cached(ollama: OllamaServer) -> None:
    with ollama_router(ollama) as router:
        counts = [router.count_tokens("llama3.2", MESSAGES) for _ in range(2)]
        answer = router.route_request("llama3.2", MESSAGES, max_tokens=1)
        shorter = router.count_tokens("llama3.2", MESSAGES[:1])
        with_system = router.count_tokens("llama3.2", MESSAGES[:1], system="Be brief.")
    assert counts == [answer["prompt_eval_count"]] * 2
    assert shorter < with_system < counts[0]


@pytest.mark.ollama
def test_embeddings_are_those_of_ollama(ollama: OllamaServer) -> None:
    texts = ["What is sharding?", "A worker."]
    expected = ollama.ask("/api/embed", {"model": "llama3.2", "input": texts})
    with ollama_router(ollama) as router:
        answer = router.embed("llama3.2", texts, keep_alive="5m", truncate=True, options={"num_ctx": 2048})
        single = router.embed("llama3.2", texts[0], dimensions=8)
        large = router.embed("llama3.1:70b", texts[0])  # which would be sharded if it answered
    assert answer["embeddings"] == expected["embeddings"]
    assert answer["prompt_eval_count"] == expected["prompt_eval_count"]
    assert answer["_routing"]["node"] == ollama.base_url
    assert [len(vector) for vector in single["embeddings"]] == [8]
    assert large["embeddings"][0] == expected["embeddings"][0]


@pytest.mark.ollama
def test_a_text_too_long_to_embed_is_refused_if_it_must_not_be_cut(ollama: OllamaServer) -> None:
    message = "a text has more tokens than the context of llama3.2; shorten it, or give truncate=True"
    with ollama_router(ollama) as router, pytest.raises(ContextOverflowError, match=message):
        router.embed("llama3.2", "word " * 5000, truncate=False)


@pytest.mark.ollama
def test_embeddings_survive_a_node(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    with ollama_router(*ollama_pair) as router:
        before = router.embed("llama3.2", "What is sharding?")
        next(server for server in ollama_pair if server.base_url == before["_routing"]["node"]).kill()
        after = router.embed("llama3.2", "What is sharding?")
    assert after["embeddings"] == before["embeddings"]
    assert after["_routing"]["node"] != before["_routing"]["node"]


@pytest.mark.parametrize(
    ("model", "inputs", "more", "error", "message"),
    [
        (
            "demo",
            "a",
            {},
            ConfigError,
            "demo is routed to llama.cpp, which has no embeddings here; use an embedding",
        ),
        ("/none.gguf", "a", {}, Exception, "none.gguf"),
        ("nobody-has-it", "a", {}, ModelNotFoundError, "nobody-has-it"),
        ("demo", 5, {}, ConfigError, "inputs must be a text, or a list of texts"),
        ("demo", ["a", 5], {}, ConfigError, "inputs must be a text, or a list of texts"),
        ("demo", ["\udc80"], {}, ConfigError, r"inputs\[0\] contains"),
        ("demo", "a", {"dimensions": 0}, ConfigError, "dimensions=0 must be a whole number of 1 or more"),
        ("demo", "a", {"truncate": 1}, ConfigError, "truncate=1 must be True or False"),
        ("demo", "a", {"keep_alive": "soon"}, ConfigError, "soon"),
        ("demo", "a", {"options": {"num_ctxx": 5}}, ConfigError, "did you mean num_ctx"),
        ("demo", "a", {"priority": 11}, ConfigError, "priority"),
        ("demo", "a", {"timeout": 0}, ConfigError, "timeout"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_one_line(
    model: str, inputs: Any, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with HybridRouter(llama_cpp="/nowhere") as router, pytest.raises(error, match=message) as caught:
        router.embed(model, inputs, **more)
    assert "\n" not in str(caught.value)
