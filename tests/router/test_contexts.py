"""Conversations that go on after their coordinator has ended, on a real model: what is processed again, and that
the text is the same."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.llama_cpp.contexts import actions
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.events import EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import engine_on, eventually, kill_at_once
from tests.support.mid_answer import read_and_kill

pytestmark = pytest.mark.engine

AGAIN_TOKENS = 32
"""At most so many tokens of a prompt are processed a second time."""
PREFILL_MS = 5.0
"""Of a token: what is saved and restored depends on this, and not on how quick the machine is at that moment."""
WORDS = ("the", "worker", "sends", "a", "layer", "to", "slot", "token", "model", "cache", "time", "plan")

MORE = "And what else is there to say about it? Please use a few more words than you did before, if you can."


def long_text(seed: int, words: int = 320) -> str:
    numbers = random.Random(seed)
    return " ".join(numbers.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def contexts(engine: Engine, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for contexts of this module alone. A prompt counts as slow here, and the disk as quick."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLLOL_LLAMA_CPP", str(engine.server.parent))
        patch.setenv("SOLLOL_CACHE_DIR", str(cache))
        patch.setenv("SOLLOL_CONTEXT_CACHE_GB", "1")
        patch.setenv("SOLLOL_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setattr(actions.Costs, "add_prefill", lambda costs, *_: setattr(costs, "prefill_ms", PREFILL_MS))
        patch.setattr(actions.Costs, "save_ms", lambda *_: 0.0)
        patch.setattr(actions.Costs, "restore_ms", lambda *_: 0.0)
        yield cache / "contexts"


def router_over(workers: int, **settings: Any) -> HybridRouter:
    return HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=workers, speculation="off", **settings
    )


@pytest.fixture(scope="module")
def router(contexts: Path) -> Iterator[HybridRouter]:
    with router_over(3) as router:
        yield router


class Talk:
    """A conversation, one turn after the other."""

    def __init__(self, model: Path, text: str) -> None:
        self.model = str(model)
        self.messages = [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": f"{text} What is this about?"},
        ]

    def ask(self, router: HybridRouter, **options: Any) -> Completion:
        return router.route_request(
            self.model, self.messages, backend="sharded", temperature=0, max_tokens=12, **options
        )

    def go_on(self, answer: Completion, question: str) -> None:
        self.messages += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": question},
        ]


@pytest.fixture(scope="module")
def first(router: HybridRouter, smollm2: Path, contexts: Path) -> tuple[Talk, Completion]:
    """A conversation of two turns, and the answer to the second one, in the same slot; both turns are saved."""
    talk = Talk(smollm2, long_text(1))
    before = talk.ask(router)
    talk.go_on(before, MORE)
    until_saved(router, 1)
    answer = talk.ask(router)
    assert answer.routing["cached_tokens"] >= before["prompt_eval_count"] + before["eval_count"] - 2
    assert answer.routing["restored_tokens"] == 0
    until_saved(router, 2)
    return talk, answer


def saved_times(router: HybridRouter) -> int:
    return sum(event.kind == EventKind.CONTEXT_SAVED for event in router.events.recent())


def until_saved(router: HybridRouter, times: int) -> None:
    eventually(lambda: saved_times(router) >= times, "the context is saved")


def again(answer: Completion) -> int:
    """How many tokens of its prompt were processed."""
    return int(answer["prompt_eval_count"] - answer.routing["cached_tokens"])


def test_a_chat_returns_to_its_slot_and_what_was_processed_is_logged(
    router: HybridRouter, first: tuple[Talk, Completion], contexts: Path
) -> None:
    answer = first[1]
    row = router.latency.frame().iloc[-1]

    assert (row["cached_tokens"], row["restored_tokens"]) == (answer.routing["cached_tokens"], 0)
    assert answer.routing["context_note"] == ""
    assert {stat.S_IMODE(path.stat().st_mode) for path in contexts.iterdir()} == {0o600}
    assert stat.S_IMODE(contexts.stat().st_mode) == 0o700


def test_after_a_stop_only_what_is_new_is_processed_and_the_text_is_the_same(
    router: HybridRouter, first: tuple[Talk, Completion]
) -> None:
    talk, undisturbed = first
    short = {"role": "user", "content": "Hello."}
    router.stop_coordinator()
    hello = router.route_request(talk.model, [talk.messages[0], short], backend="sharded", max_tokens=4)
    answer = talk.ask(router)

    assert (hello.routing["restored_tokens"], hello.routing["context_note"]) == (0, "")
    assert again(answer) <= AGAIN_TOKENS
    assert answer.routing["restored_tokens"] == answer.routing["cached_tokens"]
    assert answer.text == undisturbed.text


def test_a_short_question_does_not_take_the_slot_of_a_long_chat(
    router: HybridRouter, first: tuple[Talk, Completion]
) -> None:
    talk, _ = first
    talk.ask(router)
    for number in range(6):
        question = [talk.messages[0], {"role": "user", "content": f"What is {number}?"}]
        router.route_request(talk.model, question, backend="sharded", max_tokens=2)
    answer = talk.ask(router)

    assert again(answer) <= AGAIN_TOKENS
    assert answer.routing["restored_tokens"] == 0, "it is still there"


def test_an_answer_goes_on_over_other_workers_after_one_died(
    router: HybridRouter, first: tuple[Talk, Completion]
) -> None:
    talk, _ = first
    coordinator = router.coordinator
    assert coordinator is not None
    worker = engine_on(int(coordinator.rpc_backends[-1].rpartition(":")[2]))
    stream = router.stream_async(talk.model, talk.messages, backend="sharded", temperature=0, max_tokens=12)
    engine = psutil.Process(coordinator.pid)  # which ends when it notices that its worker has
    last = read_and_kill(stream, 2, lambda: kill_at_once([worker, engine]))[-1]
    routing = last["_routing"]
    (failover,) = routing["failovers"]
    known = last["prompt_eval_count"] + failover["tokens_before"]

    assert failover["continued"]
    assert known - routing["cached_tokens"] <= AGAIN_TOKENS
    assert routing["restored_tokens"] == routing["cached_tokens"]


def test_what_an_engine_without_keep_alive_has_saved_is_restored_by_another_kernel_over_two_workers(
    router: HybridRouter, smollm2: Path, contexts: Path
) -> None:
    talk = Talk(smollm2, long_text(2))
    router.stop_coordinator()
    talk.go_on(talk.ask(router), MORE)
    undisturbed = talk.ask(router, keep_alive=0)
    eventually(lambda: not router.coordinators, "the coordinator ends with its request")
    router.stop_workers()
    with router_over(2) as other:
        answer = talk.ask(other)

    assert len(answer.routing["layout"].split("/")) == 2
    assert again(answer) <= AGAIN_TOKENS
    assert answer.routing["restored_tokens"] > 0
    assert answer.text == undisturbed.text


def test_a_damaged_context_of_many_tokens_in_few_characters_is_not_used_and_the_answer_says_so(
    router: HybridRouter, smollm2: Path, contexts: Path
) -> None:
    talk = Talk(smollm2, "a " * 320)
    undisturbed = talk.ask(router)
    router.stop_coordinator()
    (saved,) = (found for found in ContextStore().list() if found.has_turns([talk.messages[1]["content"]]))
    path = contexts / saved.file_name
    os.truncate(path, path.stat().st_size // 2)
    answer = talk.ask(router)

    assert answer.text == undisturbed.text
    assert "damaged" in answer.routing["context_note"]
    assert answer.routing["context_note"] in answer.footer()
    assert (answer.routing["cached_tokens"], answer.routing["restored_tokens"]) == (0, 0)
    assert not path.exists()
