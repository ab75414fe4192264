"""The pool against a newer Ollama, which runs models in a llama-server and refuses in its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ContextOverflowError, OllamaResponseError
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import eventually, on_io_loop, run, write_endless
from tests.support.gguf_files import write_llama
from tests.support.ollama_server import AnswerWire, OllamaServer

pytestmark = [pytest.mark.ollama, pytest.mark.engine]

QUESTION = [{"role": "user", "content": "What is sollol_nb?"}]
STORY = [{"role": "user", "content": "Tell me a long story."}]
LONG = "word " * 3000
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def newer(newer_ollama_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    server = OllamaServer(newer_ollama_program, tmp_path_factory.mktemp("newer"))
    try:
        server.start().create("llama3.2")
        folder = tmp_path_factory.mktemp("narrow")
        server.create("endless", write_endless(folder))
        server.create("narrow", write_llama(folder / "narrow.gguf", blocks=2, vocabulary=300, context=512))
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def pool(newer: OllamaServer) -> Iterator[OllamaPool]:
    with OllamaPool(newer.base_url) as shared:
        yield shared


def test_it_is_a_newer_ollama_and_answers_as_without_the_pool(newer: OllamaServer, pool: OllamaPool) -> None:
    assert tuple(map(int, newer.ask("/api/version")["version"].split("."))) >= (0, 32)
    body = {"model": "llama3.2", "messages": QUESTION, "options": {**GREEDY, "num_predict": 20}, "stream": False}
    own = newer.ask("/api/chat", body)
    answer = pool.chat("llama3.2", QUESTION, max_tokens=20, **GREEDY)
    assert answer["message"] == own["message"]
    assert (answer["eval_count"], answer["done_reason"]) == (own["eval_count"], own["done_reason"])
    assert pool.generate("llama3.2", "What is sollol_nb?", max_tokens=20, **GREEDY)["response"]


@pytest.mark.parametrize("ask", ["chat", "stream", "generate", "router"])
def test_a_prompt_that_does_not_fit_is_an_error_with_both_numbers(
    newer: OllamaServer, pool: OllamaPool, ask: str
) -> None:
    messages = [{"role": "user", "content": LONG}]
    with HybridRouter(OllamaPool(newer.base_url), auto_discover_rpc=False) as router:
        requests: dict[str, Callable[[], object]] = {
            "chat": lambda: pool.chat("llama3.2", messages),
            "stream": lambda: list(pool.stream_chat("llama3.2", messages)),
            "generate": lambda: pool.generate("llama3.2", LONG),
            "router": lambda: router.route_request("llama3.2", messages),
        }
        with pytest.raises(ContextOverflowError, match=r"3,0\d\d tokens, too many for.* 2,048,.*num_ctx") as error:
            requests[ask]()
    assert error.value.context_tokens == 2048
    assert error.value.prompt_tokens is not None
    assert error.value.prompt_tokens > 3000
    assert pool.nodes[0].state == "ready"


def test_it_counts_what_it_has_cached_and_spells_its_log_probabilities(newer: OllamaServer) -> None:
    with HybridRouter(OllamaPool(newer.base_url), auto_discover_rpc=False) as router:
        counts = [router.count_tokens("llama3.2", QUESTION) for _ in range(2)]
        answer = router.route_request("llama3.2", QUESTION, logprobs=True, top_logprobs=2, max_tokens=10, **GREEDY)
    assert counts == [answer["prompt_eval_count"]] * 2
    assert "".join(entry["token"] for entry in answer["logprobs"]) == answer.text
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer["logprobs"])


def test_a_prompt_that_it_may_not_cut_is_recognised_in_its_own_words_too(pool: OllamaPool) -> None:
    with pytest.raises(ContextOverflowError, match="more tokens than its context of 512"):
        pool.generate("narrow", LONG, truncate=True, shift=False, max_tokens=2, raw=True)


def test_the_oldest_turns_are_dropped_on_request(pool: OllamaPool) -> None:
    turn = [{"role": "user", "content": "w" * 100}, {"role": "assistant", "content": "w" * 100}]
    messages = [*turn * 8, {"role": "user", "content": "Hi"}]
    answer = pool.chat("narrow", messages, overflow="drop_oldest", max_tokens=2)
    assert answer["prompt_eval_count"] < 512
    assert "to fit 512 tokens of context" in answer["_dropped"]


def test_an_answer_that_fills_the_context_ends_with_a_mark(pool: OllamaPool) -> None:
    answer = pool.chat("llama3.2", STORY, num_ctx=256, **GREEDY)
    assert answer["done_reason"] == "length"
    assert answer["_context_full"] == 256


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_an_answer_that_it_ends_because_the_model_repeats_itself_is_whole(
    newer: OllamaServer, pool: OllamaPool, path: str
) -> None:
    """Ollama ends such an answer without a last chunk. The connection is not lost: nothing is asked again."""
    if path == "/api/chat":
        answer = pool.chat("endless", QUESTION, num_ctx=1024, **GREEDY)
        text = answer["message"]["content"]
    else:
        answer = pool.generate("endless", "What is sollol_nb?", num_ctx=1024, **GREEDY)
        text = answer["response"]
    assert (answer["done"], answer["done_reason"], answer["_routing"]["failovers"]) == (True, "stop", [])
    assert answer["_note"] == "Ollama ended the answer: the model repeated itself"
    assert len(set(text.split()[-25:])) == 1
    assert pool.nodes[0].state == "ready"
    with HybridRouter(OllamaPool(newer.base_url), auto_discover_rpc=False) as router:
        whole = router.route_request("endless", QUESTION, options={"num_ctx": 1024, **GREEDY})
        assert "the model repeated itself" in repr(whole._repr_mimebundle_())


def test_other_refusals_are_its_words_without_json_around_them(pool: OllamaPool) -> None:
    with pytest.raises(OllamaResponseError, match=r"^Ollama at http://127\.0\.0\.1:\d+: [^{]*$"):
        pool.embed("llama3.2", ["a", "b"])


def test_an_answer_continues_at_an_older_node_when_the_newer_dies(
    newer_ollama_program: Path, ollama: OllamaServer, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"max_tokens": 400, **GREEDY}
    newer = OllamaServer(newer_ollama_program, tmp_path)
    with ExitStack() as stack:
        stack.callback(newer.kill)
        wire = stack.enter_context(on_io_loop(AnswerWire(newer)))
        newer.start().create("llama3.2")
        with OllamaPool(newer.base_url) as alone:
            whole = alone.chat("llama3.2", STORY, **asked)["message"]["content"]
        # Else either node may answer first.
        ollama.ask("/api/generate", {"stream": False, "model": "llama3.2", "keep_alive": 0})
        eventually(
            lambda: all(loaded["name"] != "llama3.2:latest" for loaded in ollama.ask("/api/ps")["models"]),
            "the older node has unloaded the model",
        )
        with OllamaPool([wire.base_url, ollama.base_url]) as both:
            assert {node.state for node in both.refresh()} == {"ready"}
            wire.halt_after(1)
            with closing(both.stream_chat("llama3.2", STORY, **asked)) as chunks:
                received = [next(chunks)]
                run(wire.kill())
                assert received[0]["_routing"]["node"] == wire.base_url  # it has the model loaded
                received += chunks
    (failover,) = received[-1]["_routing"]["failovers"]
    assert failover["continued"]
    assert received[-1]["_routing"]["node"] == ollama.base_url
    text = "".join(chunk["message"]["content"] for chunk in received)
    cut = "".join(chunk["message"]["content"] for chunk in received[: failover["tokens_before"]])
    assert whole.startswith(cut)
    assert len(text) > len(cut)
