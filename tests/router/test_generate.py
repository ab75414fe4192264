"""Texts that a model continues without a chat template, from real engines of both backends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from typing import Any

import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, ContextOverflowError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.routing import LOCAL, OLLAMA
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import on_io_loop
from tests.support.mid_answer import read_and_kill
from tests.support.ollama_server import CHATML, AnswerWire, OllamaServer

PROMPT = "<|im_start|>user\nTell me everything about sharding.<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [{"role": "user", "content": "Tell me everything about sharding."}]
GREEDY: dict[str, Any] = {"temperature": 0}
GAP_TEMPLATE = "{{ if .Suffix }}<|im_start|>{{ .Prompt }}|{{ .Suffix }}{{ else }}" + CHATML + "{{ end }}"


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    with HybridRouter(auto_discover_rpc=False, rpc_port=51152) as router:
        yield router


def ollama_router(server: OllamaServer) -> HybridRouter:
    return HybridRouter(OllamaPool([server.base_url]), auto_discover_rpc=False)


@pytest.mark.engine
@pytest.mark.parametrize("recovery", ["fast", "exact"])
def test_a_continuation_survives_its_coordinator(local: HybridRouter, recovery: Any) -> None:
    whole = local.route_request("demo", MESSAGES, backend="local", max_tokens=300, **GREEDY)
    before = len(local.latency.frame())
    stream = local._async.stream_generate(
        "demo", PROMPT, backend="local", max_tokens=300, recovery=recovery, logprobs=True, **GREEDY
    )
    # Not before that: with log probabilities the model may be started again, without drafts.
    chunks = read_and_kill(stream, 0, lambda: psutil.Process(local.coordinators[-1].pid).kill())
    answer = Completion.from_chunks(chunks)
    assert answer.text == whole.text
    assert answer["prompt_eval_count"] == whole["prompt_eval_count"]
    assert "".join(entry["token"] for entry in answer["logprobs"]) == answer.text
    assert [failover["recovery"] for failover in answer.routing["failovers"]] == [recovery]
    assert answer.routing["backend"] == LOCAL
    rows = local.latency.frame()
    assert (len(rows), rows.iloc[-1].status) == (before + 1, "ok")


@pytest.mark.engine
def test_options_hold_for_a_continuation_too(local: HybridRouter) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = local.generate("demo", PROMPT, backend="local", format=schema, max_tokens=60, **GREEDY)
    assert answer.value.keys() == {"ok"}
    assert "d" not in local.generate("demo", PROMPT, backend="local", stop="d", max_tokens=60, **GREEDY).text
    with pytest.raises(ContextOverflowError):
        local.generate("demo", "word " * 5000, backend="local")


@pytest.mark.engine
def test_a_token_can_be_made_impossible(local: HybridRouter) -> None:
    async def token_id(text: str) -> str:
        coordinator = local.coordinators[-1]
        (token,) = (await coordinator._client.post("/tokenize", {"content": text}))["tokens"]
        return str(token)

    usual = local.generate("demo", PROMPT, backend="local", max_tokens=3, logprobs=True, **GREEDY)
    number = run_blocking(token_id(usual["logprobs"][0]["token"]))
    for chunks in (
        local.stream_generate("demo", PROMPT, backend="local", max_tokens=3, logit_bias={number: -100}, **GREEDY),
        local.stream("demo", MESSAGES, backend="local", max_tokens=3, logit_bias={number: -100}, **GREEDY),
    ):
        assert not Completion.from_chunks(chunks).text.startswith(usual["logprobs"][0]["token"])


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("", {}, "prompt='' must be text, and not empty"),
        (["a"], {}, "must be text"),
        ("a", {"suffix": 5}, "suffix=5 must be text"),
        ("a", {"suffix": "b"}, "llama.cpp does not take suffix here; leave it out, or ask a model in Ollama"),
        ("[img-0]", {"images": ["aGk="]}, "llama.cpp does not take images with a raw prompt"),
        ("a", {"images": ["aGk="]}, r"a raw prompt says with \[img-0\] where its image number 0 is"),
        ("a", {"images": "aGk="}, "images must be a list"),
        ("a", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "a raw prompt does not take tools"),
        ("a", {"think": True}, "a raw prompt does not take think"),
        ("a", {"logit_bias": {"x": 1}}, "must be a dict of token ids"),
        ("a", {"logit_bias": {"1": 101}}, "must be a dict of token ids"),
    ],
)
def test_what_a_raw_prompt_cannot_have_is_refused_before_anything_loads(
    prompt: Any, more: dict[str, Any], message: str
) -> None:
    with HybridRouter(llama_cpp="/nowhere") as router, pytest.raises(ConfigError, match=message) as caught:
        router.generate("demo", prompt, backend="local", **more)
    assert "\n" not in str(caught.value)


@pytest.mark.ollama
def test_a_continuation_at_ollama_has_the_shape_of_a_chat(ollama: OllamaServer) -> None:
    with ollama_router(ollama) as router:
        chunks = list(router.stream_generate("llama3.2", PROMPT, max_tokens=20, logprobs=True, **GREEDY))
        chat = router.route_request("llama3.2", MESSAGES, max_tokens=20, **GREEDY)
        answer = Completion.from_chunks(chunks)
        assert (answer.text, answer.routing["backend"]) == (chat.text, OLLAMA)
        assert answer["prompt_eval_count"] == chat["prompt_eval_count"]
        assert all(chunk["message"]["role"] == "assistant" and "response" not in chunk for chunk in chunks)
        assert "".join(entry["token"] for entry in answer["logprobs"]) == answer.text
        with pytest.raises(ConfigError, match="Ollama does not take logit_bias; leave it out"):
            router.generate("llama3.2", PROMPT, logit_bias={"1": 1})


@pytest.mark.ollama
def test_a_gap_is_filled_by_a_model_whose_template_knows_gaps(ollama: OllamaServer) -> None:
    ollama.create("gaps", template=GAP_TEMPLATE)
    body = {"model": "gaps", "prompt": "What", "suffix": "sharding?", "stream": False}
    expected = ollama.ask("/api/generate", {**body, "options": {"temperature": 0, "num_predict": 10}})
    with ollama_router(ollama) as router:
        answer = router.generate("gaps", "What", suffix="sharding?", max_tokens=10, **GREEDY)
    assert answer.text == expected["response"]
    assert answer["prompt_eval_count"] == expected["prompt_eval_count"]


@pytest.mark.ollama
def test_a_continuation_continues_at_another_node(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    wires = [AnswerWire(server) for server in ollama_pair]

    async def ask_and_kill(router: HybridRouter) -> list[Any]:
        chunks: list[Any] = []
        stream = router._async.stream_generate("llama3.2", PROMPT, max_tokens=300, **GREEDY)
        async with aclosing(stream):
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 1:
                    (struck,) = (wire for wire in wires if wire.base_url == chunk["_routing"]["node_url"])
                    (other,) = (wire for wire in wires if wire is not struck)
                    other.halt_after(math.inf)
                    await struck.kill()
        return chunks

    with ExitStack() as stack:
        for wire in wires:
            stack.enter_context(on_io_loop(wire))
        with HybridRouter(OllamaPool([wire.base_url for wire in wires]), auto_discover_rpc=False) as router:
            whole = router.generate("llama3.2", PROMPT, max_tokens=300, **GREEDY)
            for wire in wires:
                wire.halt_after(5)  # more than are read before the server is killed
            chunks = run_blocking(ask_and_kill(router))
            answer = Completion.from_chunks(chunks)
    assert answer.text == whole.text
    assert answer.routing["node_url"] != chunks[0]["_routing"]["node_url"]
    assert [failover["continued"] for failover in answer.routing["failovers"]] == [True]
