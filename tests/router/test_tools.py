"""Functions that models call, on real engines: sharded, on Ollama and over a gateway, also when machines die."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import CALLING, STEP
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ask_in_chat
from sollol_nb.errors import ConfigError
from sollol_nb.hybrid_router import HybridRouter as AsyncRouter
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.routing import DISTRIBUTED, OLLAMA
from sollol_nb.runtime.io_loop import iterate_blocking
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.calling_model import write_calling
from tests.support.engines import kill_at_once, read_and_do
from tests.support.gateway import NOTHING_LISTENS, engine_at, own_gateway
from tests.support.mid_answer import wired_workers
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.engine

QUESTION = "How much?"
ANSWERS: Any = [[("double", {"x": 3})], [("double", {"x": 6}), ("fail", {})], "It is twelve"]
TEXT = "(2.0) It (2.1) is (2.2) twelve "
RESULTS = ["6", "12", ""]
OLLAMA_TEMPLATE = """{{ if .Tools }}<|im_start|>system
{{ range .Tools }}{{ . }}
{{ end }}<|im_end|>
{{ end }}{{ $role := "" }}{{ range .Messages }}{{ $role = .Role }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ if eq $role "tool" }}<|after1|>{{ else }}<|after0|>{{ end }}"""


def double(x: int) -> int:
    """Double."""
    return 2 * x


def fail() -> None:
    """Fail."""
    raise ValueError("no way")


ASKED: Any = {"tools": [double, fail], "temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_calling(tmp_path_factory.mktemp("models") / "calling.gguf", ANSWERS, words=6))


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    with HybridRouter(auto_discover_rpc=False, rpc_port=51252) as router:
        yield router


def check(answer: Completion, text: str = TEXT) -> None:
    assert [step["result"] for step in answer.steps] == RESULTS
    assert [step["error"] for step in answer.steps] == ["", "", "ValueError: no way"]
    assert [step["round"] for step in answer.steps] == [1, 2, 2]
    assert answer.text == text
    assert answer.finish_reason == "stop"


def test_each_step_is_a_request_with_its_row_and_its_journal_entry(local: HybridRouter, calling: str) -> None:
    before = len(local.latency.frame())
    answer = local.route_request(calling, QUESTION, backend="local", conversation="tour", **ASKED)
    check(answer)
    assert answer.steps[0]["text"].startswith("(think 0.0) ")
    rows = local.latency.frame().iloc[before:]
    assert list(rows["done_reason"]) == ["tool_calls", "tool_calls", "stop"]
    assert list(rows["status"]) == ["ok"] * 3
    journaling.flush()
    entries = [each for each in journaling.journal().newest() if each.conversation == "tour"][:3]
    assert [each.question for each in reversed(entries)] == [
        "How much?",
        "[after double] How much?",
        "[after double, fail] How much?",
    ]
    assert answer.routing["answer_id"] == entries[0].id


def test_a_conversation_keeps_what_was_called(local: HybridRouter, calling: str) -> None:
    chat = Chat("tour")
    stream = ask_in_chat(local.stream_async, chat, calling, QUESTION, backend="local", **ASKED)
    check(Completion.from_chunks(iterate_blocking(stream)))
    roles = ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    assert [message["role"] for message in chat.messages] == roles
    assert (chat.turn_count, chat.messages[2]["content"]) == (1, "6")
    assert Chat.from_dict(chat.as_dict()).messages == chat.messages
    more = ask_in_chat(local.stream_async, chat, calling, "And now?", backend="local", max_tokens=5)
    list(iterate_blocking(more))
    assert chat.turn_count == 2


def test_functions_run_in_the_loop_of_an_async_caller(engine: Engine, calling: str) -> None:
    seen: list[Any] = []

    async def ask() -> Completion:
        here = asyncio.get_running_loop()

        async def double(x: int) -> int:
            """Double."""
            seen.append(asyncio.get_running_loop() is here)
            return 2 * x

        router = AsyncRouter(auto_discover_rpc=False, rpc_port=51262)
        try:
            return await router.route_request(
                calling, QUESTION, backend="local", **{**ASKED, "tools": [double, fail]}
            )
        finally:
            await router.close()

    check(asyncio.run(ask()))
    assert seen == [True, True]


def test_a_model_that_takes_no_tools_is_refused_before_it_loads(local: HybridRouter) -> None:
    with pytest.raises(ConfigError, match="does not support tools"):
        local.route_request("demo", QUESTION, **ASKED)


def test_an_interrupt_in_a_function_leaves_no_request(local: HybridRouter, calling: str) -> None:
    def double(x: int) -> int:
        """Double."""
        raise KeyboardInterrupt  # as the stop button does it

    before = len(local.latency.frame())
    with pytest.raises(KeyboardInterrupt):
        local.route_request(calling, QUESTION, backend="local", **{**ASKED, "tools": [double, fail]})
    assert list(local.latency.frame().iloc[before:]["done_reason"]) == ["tool_calls"]


def test_workers_may_die_between_steps_and_within_one(engine: Engine, calling: str) -> None:
    called: list[int] = []
    with wired_workers(engine, 3) as workers, HybridRouter(rpc_backends=[*workers]) as router:
        asked = {**ASKED, "backend": "sharded"}
        stream = router.stream_async(calling, QUESTION, **asked)
        undisturbed = read_and_do(stream, 0, lambda _: None)
        check(Completion.from_chunks(undisturbed))
        first_step = next(at for at, chunk in enumerate(undisturbed) if STEP in chunk)
        within = first_step + 3  # while the model writes its second answer
        assert not any(
            mark in chunk for chunk in undisturbed[first_step + 1 : within + 1] for mark in (CALLING, STEP)
        )

        def lose(count: int) -> None:
            assert router.coordinator is not None
            (worker, *_) = [each for each in router.coordinator.rpc_backends if workers[each].is_running()]
            kill_at_once([workers[worker]])
            lost.append(count)

        lost: list[int] = []

        def double(x: int) -> int:
            """Double."""
            called.append(x)
            if not lost:
                lose(1)
            return 2 * x

        stream = router.stream_async(calling, QUESTION, **{**asked, "tools": [double, fail]})
        answer = Completion.from_chunks(read_and_do(stream, within, lambda _: lose(2)))
        check(answer)
        assert called == [3, 6]  # each once
        assert lost == [1, 2]
        assert answer.routing["backend"] == DISTRIBUTED
        assert len(answer.routing["failovers"]) >= 2
        assert len({worker for each in answer.routing["failovers"] for worker in each["lost_workers"]}) == 2


def test_an_engine_may_die_between_steps(local: HybridRouter, calling: str) -> None:
    def double(x: int) -> int:
        """Double."""
        engine = psutil.Process(local.own_coordinators[-1].pid)
        engine.kill()
        return 2 * x

    check(local.route_request(calling, QUESTION, backend="local", **{**ASKED, "tools": [double, fail]}))


def test_over_a_gateway_functions_run_here(engine: Engine, calling: str, tmp_path: Path) -> None:
    ran_in: list[int] = []
    with (
        own_gateway(tmp_path, OLLAMA_HOST=NOTHING_LISTENS) as gateway,
        HybridRouter(gateway=gateway.url) as remote,
    ):

        def double(x: int) -> int:
            """Double."""
            ran_in.append(os.getpid())
            return 2 * x

        answer = remote.route_request(calling, QUESTION, backend="local", **{**ASKED, "tools": [double, fail]})
        check(answer)
        assert ran_in == [os.getpid()] * 2
        url = answer.routing["coordinator_url"]

        def fails_over(x: int) -> int:
            """Double."""
            with pytest.MonkeyPatch.context() as its:
                its.setenv("SOLLOL_STATE_DIR", str(tmp_path))
                engine_at(url).kill()
            return 2 * x

        fails_over.__name__ = "double"
        check(remote.route_request(calling, QUESTION, backend="local", **{**ASKED, "tools": [fails_over, fail]}))


@pytest.mark.ollama
def test_ollama_calls_functions_too(ollama: OllamaServer, tmp_path: Path) -> None:
    answers: Any = [[("double", {"x": 3})], "It is six"]
    ollama.create("calling", write_calling(tmp_path / "calling.gguf", answers, words=3), OLLAMA_TEMPLATE)
    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as router:
        answer = router.route_request("calling", QUESTION, **{**ASKED, "tools": [double]})
    assert answer.routing["backend"] == OLLAMA
    (step,) = answer.steps
    assert (step["call"], step["result"]) == ("double", "6")
    assert answer.text.split() == ["(1.0)", "It", "(1.1)", "is", "(1.2)", "six"]
