"""The pool against real Ollama servers."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import (
    ConfigError,
    ContextOverflowError,
    ModelNotFoundError,
    OllamaResponseError,
    OllamaUnavailableError,
    RequestTimeoutError,
)
from sollol_nb.ollama.choice import Residency
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.events import Event, EventBus
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import write_endless
from tests.support.gguf_files import write_llama
from tests.support.ollama_server import CHATML, AnswerWire, OllamaServer

pytestmark = pytest.mark.ollama

Harm = Callable[[AnswerWire], Awaitable[None]]

QUESTION = "What is sollol_nb?"
MESSAGES = [{"role": "user", "content": QUESTION}]
STORY = "Tell me a long story."  # the demo model's longest answer
STORY_MESSAGES = [{"role": "user", "content": STORY}]
STORY_TOKENS = 400
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1}
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "the time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
# Ollama recognises a tool call in the model's text by the form that the template uses.
TOOL_TEMPLATE = (
    CHATML
    + """{{ range .Tools }}{{ . }}{{ end }}{{ range .Messages }}{{ range .ToolCalls -}}
{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}{{ end }}{{ end }}"""
)
TOOL_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["clock"]},
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "enum": ["UTC"]}},
            "required": ["zone"],
        },
    },
    "required": ["name", "parameters"],
}


def run(work: Coroutine[Any, Any, Any], limit_s: float = 120) -> Any:
    return asyncio.run(asyncio.wait_for(work, limit_s))


def with_pool(*servers: OllamaServer, **settings: Any) -> Callable[[Callable[[OllamaPool], Awaitable[Any]]], Any]:
    """Run a coroutine function with a pool over these servers."""

    def runner(work: Callable[[OllamaPool], Awaitable[Any]]) -> Any:
        async def go() -> Any:
            async with OllamaPool([server.base_url for server in servers], **settings) as pool:
                return await work(pool)

        return run(go())

    return runner


def with_wires(*servers: OllamaServer, **settings: Any) -> Callable[[Callable[..., Awaitable[Any]]], Any]:
    """Run a coroutine function with a pool that reaches these servers through wires, and with the wires."""

    def runner(work: Callable[..., Awaitable[Any]]) -> Any:
        async def go() -> Any:
            async with AsyncExitStack() as stack:
                wires = [await stack.enter_async_context(AnswerWire(server)) for server in servers]
                pool = OllamaPool([wire.base_url for wire in wires], **settings)
                return await work(await stack.enter_async_context(pool), *wires)

        return run(go())

    return runner


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; the test's time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - the condition is no event
        await asyncio.sleep(0.01)


async def unload_all(server: OllamaServer) -> None:
    for loaded in server.ask("/api/ps")["models"]:
        direct(server, "/api/generate", model=loaded["name"], keep_alive=0)
    await until(lambda: not server.ask("/api/ps")["models"])


def direct(server: OllamaServer, path: str, **body: Any) -> Any:
    """Ollama's own answer, without the package under test."""
    return server.ask(path, {"stream": False, **body})


# --- requests as Ollama answers them --------------------------------------------------------------------------


def test_a_chat_is_ollamas_own_answer_and_says_where_it_ran(ollama: OllamaServer) -> None:
    expected = direct(ollama, "/api/chat", model="llama3.2", messages=MESSAGES, options=GREEDY)
    answer = with_pool(ollama)(lambda pool: pool.chat("llama3.2", MESSAGES, **GREEDY))
    assert answer["message"] == expected["message"]
    assert answer["message"]["content"]
    for name in ("model", "done", "done_reason", "eval_count"):
        assert answer[name] == expected[name]
    assert answer.keys() - expected.keys() == {"_routing"}
    routing = answer["_routing"]
    assert (routing["backend"], routing["node"], routing["failovers"]) == ("ollama-pool", ollama.base_url, [])
    assert 0 <= routing["queue_ms"] <= routing["ttft_ms"] <= routing["total_ms"]


def test_a_stream_has_ollamas_chunks_and_the_first_and_last_say_where_it_runs(ollama: OllamaServer) -> None:
    async def collect(pool: OllamaPool) -> list[dict[str, Any]]:
        return [chunk async for chunk in pool.stream_chat("llama3.2", MESSAGES, **GREEDY)]

    chunks = with_pool(ollama)(collect)
    expected = direct(ollama, "/api/chat", model="llama3.2", messages=MESSAGES, options=GREEDY)
    assert "".join(chunk["message"]["content"] for chunk in chunks) == expected["message"]["content"]
    assert len(chunks) > 5
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [at for at, chunk in enumerate(chunks) if "_routing" in chunk] == [0, len(chunks) - 1]
    assert chunks[0]["_routing"]["node"] == chunks[-1]["_routing"]["node"] == ollama.base_url


def test_a_generation_is_ollamas_own(ollama: OllamaServer) -> None:
    expected = direct(ollama, "/api/generate", model="llama3.2", prompt=QUESTION, options=GREEDY)
    answer = with_pool(ollama)(lambda pool: pool.generate("llama3.2", QUESTION, **GREEDY))
    assert answer["response"] == expected["response"]
    assert answer["context"] == expected["context"]


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({"max_tokens": 3}, lambda answer: (answer["eval_count"], answer["done_reason"]) == (3, "length")),
        ({"options": {"num_predict": 2}}, lambda answer: answer["eval_count"] == 2),
        ({"stop": "Small", **GREEDY}, lambda answer: "Small" not in answer["message"]["content"]),
        ({"logprobs": True, "max_tokens": 3}, lambda answer: len(answer["logprobs"]) == 3),
        (
            {"format": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}, **GREEDY},
            lambda answer: json.loads(answer["message"]["content"])["n"] in (1, 2),
        ),
    ],
    ids=["max_tokens", "options", "stop", "logprobs", "format"],
)
def test_options_reach_the_model(
    ollama: OllamaServer, options: dict[str, Any], holds: Callable[[dict[str, Any]], bool]
) -> None:
    answer = with_pool(ollama)(lambda pool: pool.chat("llama3.2", MESSAGES, **options))
    assert holds(answer), answer


def test_tool_calls_come_back(ollama: OllamaServer) -> None:
    ollama.create("tools", template=TOOL_TEMPLATE)
    answer = with_pool(ollama)(
        lambda pool: pool.chat("tools", MESSAGES, tools=[TOOL], format=TOOL_CALL_SCHEMA, **GREEDY)
    )
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    assert call["function"]["arguments"] == {"zone": "UTC"}


@pytest.mark.parametrize(
    ("more", "body"),
    [
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"format": "nonsense"}, {"format": "nonsense"}),
        ({"temperature": "hot"}, {"options": {"temperature": "hot"}}),
        ({"think": True}, {"think": True}),
    ],
    ids=["tools", "format", "temperature", "think"],
)
def test_a_refusal_has_the_message_of_ollama(
    ollama: OllamaServer, more: dict[str, Any], body: dict[str, Any]
) -> None:
    async def ask(pool: OllamaPool) -> str:
        with pytest.raises(OllamaResponseError) as refused:
            await pool.chat("llama3.2", MESSAGES, **more)
        assert pool.nodes[0].state == "ready"  # the request was at fault, not the node
        return str(refused.value)

    with pytest.raises(OSError, match="HTTP Error") as own:
        direct(ollama, "/api/chat", model="llama3.2", messages=MESSAGES, **body)
    own_message = json.load(own.value)["error"]  # type: ignore[arg-type]
    assert with_pool(ollama)(ask) == f"Ollama at {ollama.base_url}: {own_message}"


def test_images_reach_the_model(ollama: OllamaServer) -> None:
    # The demo model sees nothing, but Ollama puts a mark for each image into the prompt.
    seen = [{**MESSAGES[0], "images": ["aGVsbG8="]}]
    expected = direct(ollama, "/api/chat", model="llama3.2", messages=seen, options={"num_predict": 1})
    with_image = with_pool(ollama)(lambda pool: pool.chat("llama3.2", seen, max_tokens=1))
    without = with_pool(ollama)(lambda pool: pool.chat("llama3.2", MESSAGES, max_tokens=1))
    assert with_image["prompt_eval_count"] == expected["prompt_eval_count"] > without["prompt_eval_count"]


# --- a context that is too small ----------------------------------------------------------------

DEMO_CONTEXT_TOKENS = 2048
LONG_MESSAGES = [{"role": "user", "content": "word " * 300}]


@pytest.fixture(scope="module")
def small_models(
    start_ollamas: Callable[..., OllamaServer], tmp_path_factory: pytest.TempPathFactory
) -> OllamaServer:
    """A server with a model that never stops by itself, and one that was trained for 256 tokens."""
    server, folder = start_ollamas(), tmp_path_factory.mktemp("small_models")
    server.create("endless", write_endless(folder))
    server.create("narrow", write_llama(folder / "narrow.gguf", blocks=2, vocabulary=300, context=256))
    return server


@pytest.mark.parametrize("model", ["llama3.2", "llama3.1:70b"])  # loaded once, and listed under one name
@pytest.mark.parametrize("path", ["chat", "generate"])
def test_a_prompt_that_does_not_fit_is_an_error_and_nothing_is_dropped(
    ollama: OllamaServer, path: str, model: str
) -> None:
    prompt = "word " * 3000

    async def ask(pool: OllamaPool) -> ContextOverflowError:
        asked: Awaitable[Any] = (
            pool.chat(model, [{"role": "user", "content": prompt}])
            if path == "chat"
            else pool.generate(model, prompt)
        )
        with pytest.raises(ContextOverflowError, match=r"^llama3.*context of 2,048,.*num_ctx") as overflow:
            await asked
        assert pool.nodes[0].state == "ready"
        return overflow.value

    overflow = with_pool(ollama)(ask)
    assert (overflow.prompt_tokens, overflow.context_tokens) == (None, DEMO_CONTEXT_TOKENS)


def test_a_prompt_that_ollama_truncates_is_reported(ollama: OllamaServer) -> None:
    asked: dict[str, Any] = {"num_ctx": 64, "max_tokens": 1, "truncate": True}
    answer = with_pool(ollama)(lambda pool: pool.chat("llama3.2", LONG_MESSAGES, **asked))
    assert answer["prompt_eval_count"] <= 64
    assert "did not report what it dropped" in answer["_dropped"]


@pytest.mark.parametrize(
    ("more", "is_full"),
    [({}, True), ({"keep_alive": 0}, True), ({"max_tokens": 2}, False), ({"shift": True}, False)],
)
def test_an_answer_that_fills_the_context_ends_with_a_mark(
    small_models: OllamaServer, more: dict[str, Any], is_full: bool
) -> None:
    limit: dict[str, Any] = {"max_tokens": 100} if "shift" in more else {}
    hi = [{"role": "user", "content": "Hi"}]
    answer = with_pool(small_models)(lambda pool: pool.chat("endless", hi, num_ctx=64, **GREEDY, **limit, **more))
    assert answer["done_reason"] == "length"
    assert answer.get("_context_full") == (64 if is_full else None)
    used_tokens = answer["prompt_eval_count"] + answer["eval_count"]
    assert (64 <= used_tokens <= 65) if is_full else (used_tokens < 64 or "shift" in more)


@pytest.mark.parametrize(("num_ctx", "context_tokens"), [(128, 128), (1_000_000, 256)])
def test_the_oldest_turns_are_dropped_on_request(
    small_models: OllamaServer, num_ctx: int, context_tokens: int
) -> None:
    turn = [{"role": "user", "content": "w" * 100}, {"role": "assistant", "content": "w" * 100}]

    async def ask(pool: OllamaPool) -> dict[str, Any]:
        answer: dict[str, Any] = await pool.chat(
            "narrow",
            [*turn * 8, {"role": "user", "content": "Hi"}],
            overflow="drop_oldest",
            num_ctx=num_ctx,
            max_tokens=2,
        )
        return answer

    answer = with_pool(small_models)(ask)
    assert answer["prompt_eval_count"] < context_tokens
    assert f"to fit {context_tokens:,} tokens of context" in answer["_dropped"]


def test_an_unknown_overflow_is_refused(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        with pytest.raises(ConfigError, match="overflow='drop' must be error or drop_oldest"):
            await pool.chat("llama3.2", MESSAGES, overflow="drop")

    with_pool(ollama)(ask)


def test_a_request_that_is_not_json_is_refused(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        with pytest.raises(ConfigError, match="base64"):
            await pool.chat("llama3.2", [{"role": "user", "content": "What?", "images": [b"raw"]}])
        with pytest.raises(ConfigError, match="stream_chat"):
            await pool.chat("llama3.2", MESSAGES, stream=True)

    with_pool(ollama)(ask)


def test_embeddings_of_a_batch_are_those_of_its_texts_in_order(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        texts = ["a worker", "a coordinator", "a worker"]
        batch = await pool.embed("llama3.2", texts)
        assert len(batch["embeddings"]) == 3
        for text, vector in zip(texts, batch["embeddings"], strict=True):
            alone = await pool.embed("llama3.2", text)
            assert alone["embeddings"] == [pytest.approx(vector, abs=1e-3)]
        assert batch["embeddings"][0] != batch["embeddings"][1]
        assert batch["_routing"]["node"] == ollama.base_url

    with_pool(ollama)(ask)


def test_keep_alive_reaches_ollama(ollama: OllamaServer, tmp_path: Path) -> None:
    ollama.create("short-lived", write_llama(tmp_path / "small.gguf"))

    async def ask(pool: OllamaPool) -> None:
        await pool.chat("short-lived", MESSAGES, max_tokens=1, keep_alive="5m")
        assert "short-lived:latest" in pool.nodes[0].loaded_models
        loaded = {entry["name"]: entry["node"] for entry in (await pool.ps())["models"]}
        assert loaded["short-lived:latest"] == ollama.base_url
        await pool.refresh()  # so that none begins in the background, and ends after the answer
        await pool.chat("short-lived", MESSAGES, max_tokens=1, keep_alive=0)
        assert "short-lived:latest" not in pool.nodes[0].loaded_models
        await until(lambda: all(each["name"] != "short-lived:latest" for each in ollama.ask("/api/ps")["models"]))

    with_pool(ollama)(ask)


def test_a_model_loaded_under_one_name_is_loaded_under_all_its_names(ollama: OllamaServer) -> None:
    async def ask() -> None:
        await unload_all(ollama)
        async with OllamaPool([ollama.base_url]) as pool:
            await pool.chat("llama3.2", MESSAGES, max_tokens=1)
        async with OllamaPool([ollama.base_url]) as pool:  # knows only what Ollama says
            assert (pool.nodes[0].loaded_bytes or 0) > 0
            assert (pool.nodes[0].round_trip_ms or 0) > 0
            (shown,) = pool.nodes[0].loaded_models
            keys = ("llama3.2:latest", "llama3.1:70b", "someone/special:7b")
            assert shown in keys
            for key in keys:
                assert pool._serving.nodes[ollama.base_url].residency(key) is Residency.LOADED

    run(ask())


# --- models ---------------------------------------------------------------------------------------


def test_models_are_known_by_all_spellings_of_their_names(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        for name in ("llama3.2", "llama3.2:latest", "library/Llama3.2", "registry.ollama.ai/library/llama3.2"):
            assert await pool.has_model(name), name
        for name in ("llama3.1:70b", "someone/special:7b", "hf.co/someone/some-model-GGUF:Q4_K_M"):
            assert (await pool.chat(name, MESSAGES, max_tokens=1))["done"], name
        for name in ("llama3.1", "special:7b", "llama3.2:70b"):
            assert not await pool.has_model(name), name

    with_pool(ollama)(ask)


def test_list_and_show_are_ollamas_own(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        entries = {entry["name"]: entry for entry in (await pool.list())["models"]}
        own = {entry["name"]: entry for entry in ollama.ask("/api/tags")["models"]}
        assert entries == {name: {**entry, "nodes": [ollama.base_url]} for name, entry in own.items()}
        shown = await pool.show("llama3.2")
        own = ollama.ask("/api/show", {"model": "llama3.2"})
        unordered = ("modelfile", "parameters")  # Ollama lists parameters in another order each time
        assert shown.keys() == own.keys()
        assert all(shown[name] == own[name] for name in own if name not in unordered)
        assert shown["details"]["family"] == "llama"
        with pytest.raises(ModelNotFoundError, match="ollama pull"):
            await pool.show("no-such-model")

    with_pool(ollama)(ask)


@pytest.mark.parametrize("name", ["no-such-model", "llama3.2:70b", "../../etc/passwd", ""])
def test_a_model_that_no_node_has_is_not_found(ollama: OllamaServer, name: str) -> None:
    async def ask(pool: OllamaPool) -> None:
        with pytest.raises(ModelNotFoundError, match=r"ollama pull|is not the name"):
            await pool.chat(name, MESSAGES)

    with_pool(ollama)(ask)


def test_a_model_created_meanwhile_is_found(ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollol_nb.ollama.serving.INVENTORY_RECENT_S", 0.0)

    async def ask(pool: OllamaPool) -> None:
        assert not await pool.has_model("created-meanwhile")
        ollama.create("created-meanwhile")
        assert (await pool.chat("created-meanwhile", MESSAGES, max_tokens=1))["done"]

    with_pool(ollama)(ask)


def test_a_pull_shows_progress_and_the_model_can_be_used(
    registry: str, ollama_pair: tuple[OllamaServer, OllamaServer], capsys: pytest.CaptureFixture[str]
) -> None:
    async def pull(pool: OllamaPool) -> None:
        first, second = (node.url for node in pool.nodes)
        steps = [step async for step in pool.pull(f"{registry}:latest", node=second, insecure=True)]
        assert steps[-1]["status"] == "success"
        assert any(step.get("total", 0) == step.get("completed", -1) > 1_000_000 for step in steps)
        name = registry.removeprefix("http://")
        assert (await pool.chat(name, MESSAGES, max_tokens=1))["_routing"]["node"] == second
        await pool.pull_with_bar(f"{registry}:latest", node=first, insecure=True)
        assert "success" in capsys.readouterr().err
        with pytest.raises(OllamaResponseError, match="pull"):
            await pool.pull_with_bar(f"{registry}:no-such-tag", insecure=True)
        with pytest.raises(ConfigError, match="not a node of this pool"):
            await pool.pull_with_bar(name, node="elsewhere")

    with_pool(*ollama_pair)(pull)


# --- nodes that come and go -----------------------------------------------------------------------


def test_without_ollama_the_pool_says_what_to_run_and_uses_it_once_it_runs(
    ollama_pair: tuple[OllamaServer, OllamaServer],
) -> None:
    server, _ = ollama_pair
    server.kill()

    async def ask(pool: OllamaPool) -> None:
        assert [node.state for node in pool.nodes] == ["absent"]
        with pytest.raises(OllamaUnavailableError, match=f"running at {server.base_url}. .*`ollama serve`"):
            await pool.chat("llama3.2", MESSAGES)
        with pytest.raises(OllamaUnavailableError, match="`ollama serve`"):
            await pool.list()
        assert not await pool.has_model("llama3.2")
        server.start()
        await until(lambda: pool.nodes[0].state == "ready")  # by itself
        assert (await pool.chat("llama3.2", MESSAGES, max_tokens=1))["done"]

    with_pool(server)(ask)


def test_a_pool_is_created_without_requests_and_can_be_awaited(
    ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.port}, http://127.0.0.1:9")
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", "3")
    pool = OllamaPool.auto_configure()
    assert [(node.url, node.state, node.slots) for node in pool.nodes] == [
        (ollama.base_url, "unknown", 3),
        ("http://127.0.0.1:9", "unknown", 3),
    ]

    async def refreshed_states() -> list[str]:
        assert await pool is pool
        states = [node.state for node in pool.nodes]
        await pool.close()
        await pool.close()
        return states

    assert run(refreshed_states()) == ["ready", "absent"]
    assert [node.url for node in OllamaPool.auto_configure(nodes=["gpu:1"]).nodes] == ["http://gpu:1"]
    monkeypatch.delenv("OLLAMA_HOST")
    assert [node.url for node in OllamaPool.auto_configure().nodes] == ["http://127.0.0.1:11434"]


def test_automatic_parallelism_counts_as_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", "0")
    assert [node.slots for node in OllamaPool("http://127.0.0.1:9").nodes] == [1]


def test_another_server_than_ollama_is_not_used(ollama: OllamaServer, registry: str) -> None:
    async def ask() -> None:
        stranger = "/".join(registry.split("/")[:3])
        async with OllamaPool([stranger, ollama.base_url]) as pool:
            assert [node.state for node in pool.nodes] == ["cooling", "ready"]
            answer = await pool.chat("llama3.2", MESSAGES, max_tokens=1)
            assert answer["_routing"]["node"] == ollama.base_url

    run(ask())


def test_a_restarted_server_is_used_again_immediately(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    server, _ = ollama_pair

    async def ask(pool: OllamaPool) -> None:
        await pool.chat("llama3.2", MESSAGES, max_tokens=1)
        server.kill()
        server.start()
        assert (await pool.chat("llama3.2", MESSAGES, max_tokens=1))["done"]

    with_pool(server)(ask)


async def chat_text(pool: OllamaPool) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    async for chunk in pool.stream_chat("llama3.2", STORY_MESSAGES, max_tokens=STORY_TOKENS, **GREEDY):
        yield chunk["message"]["content"], chunk


async def generate_text(pool: OllamaPool) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async for chunk in pool.stream_generate("llama3.2", STORY, max_tokens=STORY_TOKENS, **GREEDY):
        yield chunk["response"], chunk


async def raw_text(pool: OllamaPool) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    prompt = f"<|im_start|>user\n{STORY}<|im_end|>\n<|im_start|>assistant\n"
    async for chunk in pool.stream_generate("llama3.2", prompt, raw=True, max_tokens=STORY_TOKENS, **GREEDY):
        yield chunk["response"], chunk


async def goes_silent(wire: AnswerWire) -> None:
    wire.server.suspend()


async def harm_busy(pool: OllamaPool, wires: Sequence[AnswerWire], harm: Harm) -> AnswerWire:
    """Harm the node that is at work, and let the answers of the others pass; returns the wire of the first."""
    (busy,) = [node.url for node in pool.nodes if node.running]
    for wire in wires:
        if wire.base_url != busy:
            wire.halt_after(math.inf)
    harmed = next(wire for wire in wires if wire.base_url == busy)
    await harm(harmed)
    return harmed


@pytest.mark.parametrize("harm", [AnswerWire.kill, goes_silent], ids=["dies", "goes silent"])
@pytest.mark.parametrize("stream", [chat_text, generate_text, raw_text])
def test_an_answer_continues_on_another_node_when_its_node(
    ollama_pair: tuple[OllamaServer, OllamaServer],
    stream: Callable[[OllamaPool], AsyncIterator[tuple[str, dict[str, Any]]]],
    harm: Harm,
) -> None:
    async def ask(pool: OllamaPool, *wires: AnswerWire) -> None:
        whole = "".join([text async for text, _ in stream(pool)])
        for wire in wires:
            wire.halt_after(2)
        text, pieces, harmed = "", 0, None
        async for piece, chunk in stream(pool):
            text, pieces, last = text + piece, pieces + 1, chunk
            if pieces == 2:
                harmed = await harm_busy(pool, wires, harm)
        assert harmed is not None
        assert text == whole
        assert last["_routing"]["node"] in {wire.base_url for wire in wires} - {harmed.base_url}
        (failover,) = last["_routing"]["failovers"]
        assert harmed.base_url in failover["what"]
        assert failover["continued"] is True
        assert 2 <= failover["tokens_before"] < STORY_TOKENS
        assert failover["cost_ms"] > 0
        assert failover["when"] > 1.7e9
        left = next(node for node in pool.nodes if node.url == harmed.base_url)
        assert left.state in ("absent", "cooling")
        assert left.last_error

    with_wires(*ollama_pair, probe_after_s=1.0)(ask)


@pytest.mark.parametrize(
    ("patience", "words_before"),
    [
        ({"silence_timeout_s": 2}, 2),
        ({"first_token_timeout_s": 4}, 0),
    ],
    ids=["between two chunks", "before the first chunk"],
)
def test_a_model_that_hangs_in_a_live_server_fails_after_its_deadline(
    ollama_pair: tuple[OllamaServer, OllamaServer], patience: dict[str, float], words_before: int
) -> None:
    hung, well = ollama_pair
    direct(hung, "/api/generate", model="llama3.2")  # loads it

    async def load_well(pool: OllamaPool, wire: AnswerWire) -> None:
        """Load it there once the other was chosen, which has it loaded: so it is not waited for any longer."""
        await until(lambda: any(node.running for node in pool.nodes if node.url == wire.base_url))
        await asyncio.to_thread(direct, well, "/api/generate", model="llama3.2")

    async def ask(pool: OllamaPool, to_hung: AnswerWire, to_well: AnswerWire) -> None:
        if words_before == 0:
            hung.suspend_runners()
        else:
            to_hung.halt_after(words_before)
        loading = asyncio.create_task(load_well(pool, to_hung))
        async for _, chunk in chat_text(pool):
            last = chunk
        await loading
        routing = last["_routing"]
        assert routing["node"] == to_well.base_url
        assert f"{to_hung.base_url} sent nothing for" in routing["failovers"][0]["what"]
        assert routing["failovers"][0]["continued"] is (words_before > 0)

    with_wires(hung, well, **patience)(ask)


def test_a_node_that_was_silent_is_used_again_when_it_answers(
    ollama_pair: tuple[OllamaServer, OllamaServer],
) -> None:
    server, _ = ollama_pair

    async def ask(pool: OllamaPool) -> None:
        server.suspend()
        with pytest.raises(OllamaUnavailableError, match="accepted the request, then stopped responding"):
            await pool.chat("llama3.2", MESSAGES)
        assert pool.nodes[0].state == "cooling"
        assert pool.nodes[0].retry_in_s is not None
        server.resume()
        await until(lambda: pool.nodes[0].state == "ready")
        assert (await pool.chat("llama3.2", MESSAGES, max_tokens=1))["done"]

    with_pool(server, probe_after_s=0.3)(ask)


def test_an_answer_in_a_format_starts_again_on_another_node_and_is_complete(
    ollama_pair: tuple[OllamaServer, OllamaServer],
) -> None:
    names = [f"number_{letter}" for letter in "abcdefghijklmnopqrst"]
    properties = {name: {"type": "integer", "minimum": 10, "maximum": 99} for name in names}
    schema = {"type": "object", "properties": properties, "required": names}

    async def ask(pool: OllamaPool, *wires: AnswerWire) -> None:
        for wire in wires:
            wire.halt_after(2)
        text, pieces, restarted = "", 0, 0
        async for chunk in pool.stream_chat("llama3.2", MESSAGES, format=schema, **GREEDY):
            if chunk.get("_restarted"):
                text, restarted = "", restarted + 1
            text, pieces = text + chunk["message"]["content"], pieces + 1
            if pieces == 2:
                await harm_busy(pool, wires, AnswerWire.kill)
        assert restarted == 1
        assert list(json.loads(text)) == names
        assert chunk["_routing"]["failovers"][0]["continued"] is False

    with_wires(*ollama_pair)(ask)


def test_a_node_that_died_before_the_first_word_costs_only_time(
    ollama_pair: tuple[OllamaServer, OllamaServer],
) -> None:
    async def ask(pool: OllamaPool) -> None:
        dead, alive = ollama_pair
        dead.kill()
        assert [node.state for node in pool.nodes] == ["ready", "ready"]  # not noticed yet
        answers = await asyncio.gather(*(pool.chat("llama3.2", MESSAGES, max_tokens=2) for _ in range(4)))
        assert {answer["_routing"]["node"] for answer in answers} == {alive.base_url}
        failovers = [failover for answer in answers for failover in answer["_routing"]["failovers"]]
        assert failovers
        assert not any(failover["continued"] for failover in failovers)
        vectors = await pool.embed("llama3.2", ["one", "two"])
        assert len(vectors["embeddings"]) == 2

    with_pool(*ollama_pair)(ask)


def test_the_error_says_that_the_only_node_died(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    async def ask(pool: OllamaPool, wire: AnswerWire) -> None:
        wire.halt_after(1)
        stream = chat_text(pool)
        await anext(stream)
        await wire.kill()
        with pytest.raises(OllamaUnavailableError, match=f"{wire.base_url}.*no other Ollama node has llama3.2"):
            [text async for text in stream]

    with_wires(ollama_pair[0])(ask)


def test_nodes_that_start_and_stop_are_published(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    published: list[Event] = []
    bus = EventBus()
    bus.subscribe(published.append)
    server, _ = ollama_pair

    async def ask(pool: OllamaPool) -> None:
        server.kill()
        with pytest.raises(OllamaUnavailableError):
            await pool.chat("llama3.2", MESSAGES)

    with_pool(server, events=bus)(ask)
    assert [(event.kind, event.subject) for event in published] == [
        ("node.ready", server.base_url),
        ("node.absent", server.base_url),
    ]


# --- many requests at the same time ------------------------------------------------------------------


def test_two_hundred_requests_over_two_nodes_lose_nothing(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    questions = ["What is a worker?", "What is a coordinator?", "How do I start?", QUESTION]
    expected = {}
    for question in questions:
        messages = [{"role": "user", "content": question}]
        options = {**GREEDY, "num_predict": 3}
        own = direct(ollama_pair[0], "/api/chat", model="llama3.2", messages=messages, options=options)
        expected[question] = own["message"]["content"]
    direct(ollama_pair[1], "/api/generate", model="llama3.2")  # both have it loaded: no other difference decides

    async def ask(pool: OllamaPool) -> None:
        async def ask_one(number: int) -> dict[str, Any]:
            question = questions[number % 4]
            messages = [{"role": "user", "content": question}]
            answer = await pool.chat("llama3.2", messages, max_tokens=3, priority=1 + number % 10, **GREEDY)
            assert answer["message"]["content"] == expected[question]
            return answer

        answers = await asyncio.gather(*(ask_one(number) for number in range(200)))
        served = Counter(answer["_routing"]["node"] for answer in answers)
        assert served.keys() == {server.base_url for server in ollama_pair}
        assert min(served.values()) >= 20
        assert not any(answer["_routing"]["failovers"] for answer in answers)
        assert [(node.running, node.waiting) for node in pool.nodes] == [(0, 0), (0, 0)]

    with_pool(*ollama_pair)(ask)


def test_when_a_node_dies_under_load_nothing_is_lost(ollama_pair: tuple[OllamaServer, OllamaServer]) -> None:
    async def ask(pool: OllamaPool) -> None:
        finished = 0

        async def ask_one() -> dict[str, Any]:
            nonlocal finished
            answer = await pool.chat("llama3.2", MESSAGES, max_tokens=4, **GREEDY)
            finished += 1
            if finished == 10:
                ollama_pair[0].kill()
            return answer

        answers = await asyncio.gather(*(ask_one() for _ in range(60)))
        assert len({answer["message"]["content"] for answer in answers}) == 1

    with_pool(*ollama_pair)(ask)


def test_waiting_requests_are_served_by_priority(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        served: list[int] = []

        async def ask_one(priority: int) -> None:
            async for chunk in pool.stream_chat("llama3.2", MESSAGES, max_tokens=2, priority=priority):
                if chunk["done"]:
                    served.append(priority)

        priorities = [5, 1, 9, 3, 10, 7, 2, 8, 4, 6]
        async with aclosing(pool.stream_chat("llama3.2", STORY_MESSAGES)) as long_answer:
            await anext(long_answer)
            waiting = [asyncio.create_task(ask_one(priority)) for priority in priorities]
            await until(lambda: pool.nodes[0].waiting == len(priorities))
            assert pool.nodes[0].expected_wait_ms > 0
        await asyncio.gather(*waiting)
        assert served == sorted(priorities, reverse=True)

    with_pool(ollama)(ask)


def test_a_timeout_ends_the_request_on_the_node_and_frees_its_slot(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        await pool.chat("llama3.2", MESSAGES, max_tokens=1)
        ollama.suspend_runners()  # however quick it is, the answer does not end in time
        try:
            with pytest.raises(RequestTimeoutError, match=r"llama3\.2:latest did not finish within 0\.05 s"):
                await pool.chat("llama3.2", MESSAGES, timeout=0.05, ignored=None, max_tokens=2000, stop=[])
        finally:
            ollama.resume()
        assert pool.nodes[0].running == 0
        assert pool.nodes[0].state == "ready"
        assert (await pool.chat("llama3.2", MESSAGES, max_tokens=1, timeout=60))["done"]
        for bad in (0, -1, float("nan")):
            with pytest.raises(ConfigError, match="positive"):
                await pool.chat("llama3.2", MESSAGES, timeout=bad)

    with_pool(ollama)(ask)


def test_the_timeout_holds_while_the_model_loads(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        await unload_all(ollama)
        await pool.refresh()
        with pytest.raises(RequestTimeoutError):
            await pool.chat("llama3.2", STORY_MESSAGES, timeout=0.02)
        assert pool.nodes[0].running == 0

    with_pool(ollama)(ask)


def test_a_timeout_ends_the_wait_for_a_slot_too_and_a_closed_stream_frees_its_own(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        async with aclosing(pool.stream_chat("llama3.2", STORY_MESSAGES)) as stream:
            await anext(stream)
            with pytest.raises(RequestTimeoutError):
                await pool.chat("llama3.2", MESSAGES, timeout=0.05)
            assert (pool.nodes[0].running, pool.nodes[0].waiting) == (1, 0)
        assert pool.nodes[0].running == 0

    with_pool(ollama)(ask)


@pytest.mark.parametrize("from_io_loop", [False, True])
def test_a_stream_left_before_its_first_chunk_frees_its_slot(ollama: OllamaServer, from_io_loop: bool) -> None:
    async def ask(pool: OllamaPool) -> None:
        await pool.stream_chat("llama3.2", MESSAGES).aclose()  # unread
        await unload_all(ollama)  # so the first chunk takes a while
        async with aclosing(pool.stream_chat("llama3.2", MESSAGES)) as stream:
            first_chunk = asyncio.ensure_future(anext(stream))
            await until(lambda: pool.nodes[0].running == 1)
            first_chunk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first_chunk
            assert pool.nodes[0].running == 0
        assert (await pool.chat("llama3.2", MESSAGES, max_tokens=1))["done"]

    if from_io_loop:
        with_pool(ollama)(lambda pool: asyncio.to_thread(run_blocking, ask(pool)))
    else:
        with_pool(ollama)(ask)


def test_the_time_of_a_stream_begins_when_it_is_read(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        stream = pool.stream_chat("llama3.2", MESSAGES, max_tokens=1)
        await asyncio.sleep(0.2)
        began_s = time.monotonic()
        last = [chunk async for chunk in stream][-1]
        assert last["_routing"]["total_ms"] <= (time.monotonic() - began_s) * 1000

    with_pool(ollama)(ask)


def test_a_priority_outside_the_levels_is_refused(ollama: OllamaServer) -> None:
    async def ask(pool: OllamaPool) -> None:
        with pytest.raises(ConfigError, match=r"1 \(BATCH\) to 10 \(CRITICAL\)"):
            await pool.chat("llama3.2", MESSAGES, priority=42)

    with_pool(ollama)(ask)
