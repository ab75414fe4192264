"""Log probabilities through the router, from real engines of both backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import OllamaResponseError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import QUESTION
from tests.support.fake_node import fake_node
from tests.support.ollama_server import OllamaServer

WANTED: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "temperature": 0, "max_tokens": 12}


def check(chunks: list[Any]) -> None:
    answer = Completion.from_chunks(chunks)
    entries = answer["logprobs"]
    assert "".join(entry["token"] for entry in entries) == answer.text
    assert len(entries) == answer["eval_count"]
    for entry in entries:
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # it is the likeliest at temperature 0
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    with HybridRouter(auto_discover_rpc=False, rpc_port=51152) as router:
        yield router


@pytest.mark.engine
def test_they_come_from_llama_cpp(local: HybridRouter) -> None:
    check(list(local.stream("demo", QUESTION, backend="local", **WANTED)))
    assert "logprobs" not in local.route_request("demo", QUESTION, backend="local", max_tokens=2)
    few = local.route_request("demo", QUESTION, backend="local", logprobs=True, max_tokens=2)
    assert [set(entry) for entry in few["logprobs"]] == [{"token", "logprob", "bytes"}] * 2


@pytest.mark.ollama
def test_they_come_from_ollama(ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as router:
        check(list(router.stream("llama3.2", QUESTION, **WANTED)))


def test_an_ollama_that_gives_none_is_named() -> None:
    with fake_node({}) as (url, _), HybridRouter(OllamaPool([url]), auto_discover_rpc=False) as router:
        with pytest.raises(
            OllamaResponseError, match=f"Ollama at {url} gave no logprobs; update it to 0.12.11"
        ) as no:
            router.route_request("llama3.2", "Hi", **WANTED)
        assert "\n" not in str(no.value)
        assert router.route_request("llama3.2", "Hi").text == "hello"
