"""Official clients on a gateway with an Ollama node: embeddings, names of models, chats."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.gateway import GatewayProcess, running_gateway
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.ollama

TEXTS = ["A worker computes some layers.", "The sea is blue.", "Zwölf Boxkämpfer"]


@pytest.fixture(scope="module")
def with_node(ollama: OllamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with an Ollama node, and engines that no other test uses."""
    variables = {"OLLAMA_HOST": ollama.base_url, "SOLLOL_STATE_DIR": str(tmp_path_factory.mktemp("state"))}
    with running_gateway(variables=variables) as running:
        yield running


@pytest.fixture(scope="module")
def client(with_node: GatewayProcess) -> OpenAI:
    return OpenAI(base_url=f"{with_node.url}/v1", api_key="none", max_retries=0)


def are_close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-6), some, others))


def test_embeddings_are_those_of_ollama_in_both_encodings(client: OpenAI, ollama: OllamaServer) -> None:
    expected = ollama.ask("/api/embed", {"model": "llama3.2", "input": TEXTS})
    in_base64 = client.embeddings.create(model="llama3.2", input=TEXTS)  # which this client asks for by default
    raw = client.embeddings.with_raw_response.create(model="llama3.2", input=TEXTS, encoding_format="float")
    as_numbers = raw.parse()
    assert raw.headers["X-Sollol-Route"] == f"ollama-pool {ollama.base_url}"
    for answer in (in_base64, as_numbers):
        assert [item.index for item in answer.data] == [0, 1, 2]
        for item, vector in zip(answer.data, expected["embeddings"], strict=True):
            assert are_close(item.embedding, vector)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == expected["prompt_eval_count"]
    (short,) = client.embeddings.create(model="llama3.2", input=TEXTS[0], dimensions=8).data
    assert len(short.embedding) == 8


def test_an_async_client_embeds_several_texts_at_the_same_time(with_node: GatewayProcess) -> None:
    async def vectors() -> list[list[float]]:
        async with AsyncOpenAI(base_url=f"{with_node.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="llama3.2", input=TEXTS[0]) for _ in range(4))
            )
            return [answer.data[0].embedding for answer in answers]

    first, *others = asyncio.run(vectors())
    assert all(are_close(vector, first) for vector in others)


def test_what_cannot_be_embedded_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="demo is routed to llama"):
        client.embeddings.create(model="demo", input="Hello!")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.embeddings.create(model="llama3.2", input="worker " * 20_000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="nobody/has:this", input="Hello!")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="does not apply to embeddings"):
        client.embeddings.create(model="llama3.2", input="Hello!", extra_headers={"X-Sollol-Recovery": "exact"})


@pytest.mark.parametrize("name", ["llama3.2", "hf.co/someone/some-model-GGUF:Q4_K_M", "someone/special:7b"])
def test_models_of_nodes_are_listed_and_can_be_named(client: OpenAI, name: str) -> None:
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name


def test_a_chat_with_a_model_in_ollama_has_the_same_form(client: OpenAI, ollama: OllamaServer) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="llama3.2", messages=[{"role": "user", "content": "What is a worker?"}], temperature=0, max_tokens=5
    )
    assert raw.headers["X-Sollol-Route"] == f"ollama-pool {ollama.base_url}"
    answer = raw.parse()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    texts = client.completions.create(model="llama3.2", prompt="A worker", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts)


def test_the_other_apis_answer_with_a_model_in_ollama_too(client: OpenAI, with_node: GatewayProcess) -> None:
    question = "What is a worker?"
    *_, last = client.responses.create(model="llama3.2", input=question, max_output_tokens=5, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 5

    messages = anthropic.Anthropic(base_url=with_node.url, api_key="none", max_retries=0).messages
    asked: dict[str, Any] = {"model": "llama3.2", "messages": [{"role": "user", "content": question}]}
    answer = messages.create(**asked, max_tokens=5)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 5)
    assert messages.count_tokens(**asked).input_tokens == answer.usage.input_tokens
