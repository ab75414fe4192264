"""The official clients stream through the death of machines, and receive the undisturbed answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import psutil
import pytest

from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.runtime.io_loop import run_blocking
from tests.chaos.machines import Cluster
from tests.support.engines import HANG_GUARD_S, eventually, with_variable
from tests.support.gateway import GatewayProcess, end_engines, running_gateway

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]

QUESTION = [{"role": "user", "content": "Tell me everything about sharding."}]
STORY = [{"role": "user", "content": "Write a long story about a lighthouse keeper."}]
TOKENS = 300
TOKENS_OF_REAL_MODEL = 60
STRIKE_AFTER = 12
"""Results of a worker: one for each token, as nothing is drafted, and some for the prompt. The answers have many
more tokens."""

Texts = Iterator[str]
AsyncTexts = AsyncIterator[str]


class Clients:
    """How each official client streams the text of an answer."""

    def __init__(self, url: str, tokens: int) -> None:
        self.url = url
        self.tokens = tokens
        self._openai: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
        self._anthropic: dict[str, Any] = {"base_url": url, "api_key": "none", "max_retries": 0}

    def openai_chat(self, model: str, messages: list[Any]) -> Texts:
        stream: Any = openai.OpenAI(**self._openai).chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=self.tokens, stream=True
        )
        for chunk in stream:
            yield chunk.choices[0].delta.content or "" if chunk.choices else ""

    def openai_responses(self, model: str, messages: list[Any]) -> Texts:
        client = openai.OpenAI(**self._openai)
        for event in client.responses.create(
            model=model, input=messages, temperature=0, max_output_tokens=self.tokens, stream=True
        ):
            yield event.delta if event.type == "response.output_text.delta" else ""

    def anthropic_messages(self, model: str, messages: list[Any]) -> Texts:
        client = anthropic.Anthropic(**self._anthropic)
        with client.messages.stream(
            model=model, messages=messages, max_tokens=self.tokens, extra_body={"temperature": 0}
        ) as stream:
            yield from stream.text_stream

    def ollama_chat(self, model: str, messages: list[Any]) -> Texts:
        options = {"temperature": 0, "num_predict": self.tokens}
        for chunk in ollama.Client(self.url).chat(model, messages, stream=True, options=options):
            yield chunk.message.content or ""

    async def async_openai_chat(self, model: str, messages: list[Any]) -> AsyncTexts:
        stream: Any = await openai.AsyncOpenAI(**self._openai).chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=self.tokens, stream=True
        )
        async for chunk in stream:
            yield chunk.choices[0].delta.content or "" if chunk.choices else ""

    async def async_openai_responses(self, model: str, messages: list[Any]) -> AsyncTexts:
        client = openai.AsyncOpenAI(**self._openai)
        stream = await client.responses.create(
            model=model, input=messages, temperature=0, max_output_tokens=self.tokens, stream=True
        )
        async for event in stream:
            yield event.delta if event.type == "response.output_text.delta" else ""

    async def async_anthropic_messages(self, model: str, messages: list[Any]) -> AsyncTexts:
        client = anthropic.AsyncAnthropic(**self._anthropic)
        async with client.messages.stream(
            model=model, messages=messages, max_tokens=self.tokens, extra_body={"temperature": 0}
        ) as stream:
            async for text in stream.text_stream:
                yield text

    async def async_ollama_chat(self, model: str, messages: list[Any]) -> AsyncTexts:
        options = {"temperature": 0, "num_predict": self.tokens}
        client = ollama.AsyncClient(self.url)
        async for chunk in await client.chat(model, messages, stream=True, options=options):
            yield chunk.message.content or ""


BLOCKING = ("openai_chat", "openai_responses", "anthropic_messages", "ollama_chat")
ALL = (*BLOCKING, *(f"async_{name}" for name in BLOCKING))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder in which only this module's gateways keep their engines."""
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLLOL_STATE_DIR", str(folder))
        yield folder
        end_engines(folder)
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", str(folder)), "no process is left")


@pytest.fixture(scope="module")
def cluster(engine: Engine, state: Path) -> Iterator[Cluster]:
    """Three machines and a spare one."""
    with Cluster(engine) as machines:
        yield machines


@pytest.fixture(scope="module")
def over_machines(cluster: Cluster) -> Iterator[GatewayProcess]:
    """A gateway over these machines."""
    with gateway_over(cluster) as running:
        yield running


@pytest.fixture(autouse=True)
def all_machines_are_well(cluster: Cluster) -> None:
    cluster.make_well()


@contextmanager
def gateway_over(cluster: Cluster, **variables: str) -> Iterator[GatewayProcess]:
    endpoints = ",".join(machine.wired_endpoint for machine in cluster.machines)
    # The model stays loaded however slow a test is, and a result of a worker is one token.
    settings = {"RPC_BACKENDS": endpoints, "SOLLOL_SPECULATION": "off", "SOLLOL_KEEP_ALIVE": "600s"}
    with running_gateway(variables=settings | variables, is_patient=True) as running:
        yield running


class Answering:
    """A loaded model in the middle of its next answer: however quick the engine is, it does not come to an end."""

    def __init__(self, gateway: GatewayProcess, cluster: Cluster, model: str) -> None:
        ollama.Client(gateway.url).generate(model)  # loads it
        self.cluster = cluster
        self.worker = cluster.machine(sorted(registry.holders())[0])
        self.worker.swallow_after(STRIKE_AFTER)

    def wait_begun(self) -> None:
        """Wait until the engine is in the middle of the answer, and its worker holds it there."""
        eventually(lambda: self.worker.is_swallowing, "the answer is being generated")


Strike = Callable[[Answering], None]


def kill_a_worker(answering: Answering) -> None:
    """Kill one of the workers that hold layers now."""
    answering.worker.kill()


def kill_all_workers(answering: Answering) -> None:
    for machine in answering.cluster.machines:
        machine.kill()


def kill_the_coordinator(answering: Answering) -> None:
    for entry in registry.entries(registry.COORDINATOR):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(entry.pid).kill()
    answering.worker.pass_again()


def texts_of(gateway: GatewayProcess, client: str, model: str, messages: list[Any]) -> Texts | AsyncTexts:
    tokens = TOKENS_OF_REAL_MODEL if model == "smollm2" else TOKENS
    texts: Texts | AsyncTexts = getattr(Clients(gateway.url, tokens), client)(model, messages)
    return texts


def undisturbed_text(gateway: GatewayProcess, model: str, messages: list[Any]) -> str:
    texts = texts_of(gateway, "openai_chat", model, messages)
    assert isinstance(texts, Iterator)
    return "".join(texts)


def struck(
    gateway: GatewayProcess, cluster: Cluster, client: str, model: str, messages: list[Any], strike: Strike
) -> str:
    """The text that a client receives, while something strikes in the middle of the answer."""
    answering = Answering(gateway, cluster, model)
    texts = texts_of(gateway, client, model, messages)
    received: list[str] = []

    def receive(text: str) -> None:
        if text:
            received.append(text)
            if len(received) == 1:
                answering.wait_begun()
                strike(answering)

    async def receive_all(texts: AsyncTexts) -> None:
        async with asyncio.timeout(HANG_GUARD_S):
            async for text in texts:
                receive(text)

    if isinstance(texts, AsyncIterator):
        asyncio.run(receive_all(texts))
    else:
        for text in texts:
            receive(text)
    return "".join(received)


def survived(
    gateway: GatewayProcess, cluster: Cluster, client: str, model: str, messages: list[Any], strike: Strike
) -> str:
    """The text that a client receives through a failover."""
    before = failovers()
    text = struck(gateway, cluster, client, model, messages, strike)
    eventually(lambda: failovers() > before, "the gateway has recorded a failover")
    return text


def failovers() -> int:
    """How many failovers the latency log of the gateways has."""
    return int(LatencyLog().frame()["failovers"].sum())


@pytest.fixture(scope="module")
def undisturbed(over_machines: GatewayProcess) -> str:
    return undisturbed_text(over_machines, "demo:sharded", QUESTION)


@pytest.mark.parametrize("client", ALL)
def test_a_client_streams_through_the_death_of_a_worker(
    over_machines: GatewayProcess, cluster: Cluster, client: str, undisturbed: str
) -> None:
    assert survived(over_machines, cluster, client, "demo:sharded", QUESTION, kill_a_worker) == undisturbed


@pytest.mark.parametrize("client", BLOCKING)
def test_a_client_streams_through_the_death_of_the_coordinator(
    over_machines: GatewayProcess, cluster: Cluster, client: str, undisturbed: str
) -> None:
    assert survived(over_machines, cluster, client, "demo:sharded", QUESTION, kill_the_coordinator) == undisturbed


def test_when_no_worker_is_left_the_client_gets_an_error_and_later_requests_work(
    over_machines: GatewayProcess, cluster: Cluster, undisturbed: str
) -> None:
    with pytest.raises(openai.APIError, match="worker"):
        struck(over_machines, cluster, "openai_chat", "demo:sharded", QUESTION, kill_all_workers)
    cluster.make_well()
    assert undisturbed_text(over_machines, "demo:sharded", QUESTION) == undisturbed


def test_the_header_of_a_whole_answer_says_how_many_failovers_it_had(
    over_machines: GatewayProcess, cluster: Cluster, undisturbed: str
) -> None:
    body = {"model": "demo:sharded", "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS}
    answering = Answering(over_machines, cluster, "demo:sharded")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(timeout=HANG_GUARD_S) as client:
            asking = asyncio.create_task(client.post(f"{over_machines.url}/v1/chat/completions", json=body))
            await asyncio.to_thread(answering.wait_begun)
            await asyncio.to_thread(kill_a_worker, answering)
            return await asking

    response = asyncio.run(ask())
    assert response.json()["choices"][0]["message"]["content"] == undisturbed
    assert response.headers["X-Sollol-Route"].startswith("llama.cpp-distributed http")
    assert int(response.headers["X-Sollol-Failovers"]) >= 1


@pytest.fixture(scope="module")
def exact(cluster: Cluster, smollm2: Path) -> Iterator[tuple[GatewayProcess, str]]:
    """A gateway that shards a real model, deterministic and with exact recovery, and its undisturbed story."""
    model = {"SOLLOL_MODELS": f"smollm2={smollm2}", "SOLLOL_DETERMINISTIC": "1", "SOLLOL_THRESHOLD_PARAMS": "0.01"}
    run_blocking(stop_engines(also_used=True))  # the demo model's coordinator holds workers
    with gateway_over(cluster, **model) as running:
        yield running, undisturbed_text(running, "smollm2", STORY)


@pytest.mark.parametrize("client", BLOCKING)
def test_with_exact_recovery_the_answer_of_a_real_model_is_the_undisturbed_one(
    exact: tuple[GatewayProcess, str], cluster: Cluster, client: str
) -> None:
    gateway, undisturbed = exact
    assert survived(gateway, cluster, client, "smollm2", STORY, kill_a_worker) == undisturbed
