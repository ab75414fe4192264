"""Answers with drafts on real engines: the same text, counted drafts, and none where an answer must be exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.sync_wrapper import HybridRouter
from tests.chaos.machines import Cluster
from tests.support.engines import argument_after, engine_on, read_and_do
from tests.support.gguf_files import write_llama

pytestmark = pytest.mark.engine

MODEL = "demo:sharded"
QUESTION = "What is model sharding?"


@pytest.fixture(scope="module")
def drafting(engine: Engine) -> Iterator[HybridRouter]:
    """A router over three workers that only it uses, with n-gram drafts."""
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, context_tokens=1536, speculation="ngram"
    ) as router:
        yield router


@pytest.fixture(scope="module")
def chat(drafting: HybridRouter) -> list[dict[str, str]]:
    """A chat whose last question was answered in it, so that the answer is copied."""
    question = {"role": "user", "content": QUESTION}
    first = drafting.route_request(MODEL, [question], temperature=0)
    return [question, {"role": "assistant", "content": first.text}, question]


def asked(router: HybridRouter, chat: list[dict[str, str]], **options: Any) -> Completion:
    return router.route_request(MODEL, chat, temperature=0, **options)


def test_the_text_is_that_without_drafts_which_are_counted_in_routing_log_and_footer(
    drafting: HybridRouter, chat: list[dict[str, str]]
) -> None:
    with_drafts = asked(drafting, chat)
    row = drafting.latency.frame().iloc[-1]
    status = str(drafting.status())
    without = asked(drafting, chat, speculation="off")

    drafted, accepted = with_drafts.routing["drafted_tokens"], with_drafts.routing["accepted_tokens"]
    assert with_drafts.text == without.text == chat[1]["content"]
    assert accepted >= 10
    assert (row["drafted_tokens"], row["accepted_tokens"]) == (drafted, accepted)
    assert f"drafts: {accepted} of {drafted} accepted" in with_drafts.footer()
    assert "n-gram drafts of up to" in status
    assert without.routing["drafted_tokens"] is None
    assert "drafts" not in without.footer()
    coordinator = drafting.coordinator
    assert coordinator is not None
    assert not coordinator.settings.speculation.is_on, "it was restarted without"
    assert argument_after(engine_on(coordinator.port), "--spec-type") is None


@pytest.mark.parametrize("options", [{"recovery": "exact"}, {"deterministic": True}, {"logprobs": True}], ids=str)
def test_exact_answers_and_those_with_logprobs_run_without_drafts(
    drafting: HybridRouter, chat: list[dict[str, str]], options: dict[str, Any]
) -> None:
    drafting.unload(MODEL)
    assert asked(drafting, chat).routing["drafted_tokens"] is not None

    answer = asked(drafting, chat, **options)

    assert answer.routing["drafted_tokens"] is None
    assert answer.text == chat[1]["content"]
    if options.get("logprobs"):
        assert "".join(entry["token"] for entry in answer["logprobs"]) == answer.text


def test_stop_strings_and_schemas_hold_within_drafts(drafting: HybridRouter, chat: list[dict[str, str]]) -> None:
    drafting.unload(MODEL)
    text = chat[1]["content"]
    stop = text.split()[12]

    stopped = asked(drafting, chat, stop=[stop])
    cut = asked(drafting, chat, max_tokens=11)
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}}, "required": ["a"]}
    structured = asked(drafting, chat, format=schema, max_tokens=80)

    assert stopped.text == text[: text.index(stop)]
    assert stopped.routing["accepted_tokens"] > 0
    assert cut["eval_count"] == 11
    assert text.startswith(cut.text)
    assert set(json.loads(structured.text)) == {"a"}


def test_an_answer_with_drafts_continues_after_the_loss_of_a_worker(
    engine: Engine, chat: list[dict[str, str]]
) -> None:
    settings: dict[str, Any] = {"auto_discover_rpc": False, "context_tokens": 1536, "speculation": "ngram"}
    with Cluster(engine) as cluster:
        workers = [machine.wired_endpoint for machine in cluster.machines]
        with HybridRouter(rpc_backends=workers, **settings) as router:
            asked(router, chat)
            coordinator = router.coordinator
            assert coordinator is not None
            worker = cluster.machine(coordinator.rpc_backends[1])
            worker.swallow_after(4)  # however quick the engine is, the answer does not end before
            chunks = read_and_do(router.stream_async(MODEL, chat, temperature=0), 0, lambda _: worker.kill())
    last = chunks[-1]

    assert "".join(chunk["message"].get("content", "") for chunk in chunks) == chat[1]["content"]
    assert last["_routing"]["failovers"]
    assert last["_routing"]["drafted_tokens"] >= last["_routing"]["accepted_tokens"]


def test_a_model_drafts_for_one_with_its_vocabulary_and_another_is_refused(
    engine: Engine, chat: list[dict[str, str]], drafting: HybridRouter, tmp_path: Path
) -> None:
    drafting.unload(MODEL)
    other = write_llama(tmp_path / "other.gguf")
    shared = {"rpc_backends": drafting.worker_endpoints, "auto_discover_rpc": False, "context_tokens": 1280}
    with HybridRouter(**shared, speculation="draft", draft=str(DEMO_MODEL_PATH)) as router:
        answer = asked(router, chat)
        coordinator = router.coordinator
        assert coordinator is not None
        assert argument_after(engine_on(coordinator.port), "--spec-draft-model") == str(DEMO_MODEL_PATH)
    with HybridRouter(**shared, draft=str(other)) as router:
        with pytest.raises(
            ConfigError, match=r"draft=.*other.gguf cannot draft for .*: its tokenizer is of another"
        ):
            asked(router, chat)
        assert router.coordinator is None
    with (
        HybridRouter(**shared, draft="no-such-model") as router,
        pytest.raises(ConfigError, match="draft=no-such-model: this machine has no file of it"),
    ):
        asked(router, chat)

    assert answer.text == chat[1]["content"]
    assert answer.routing["accepted_tokens"] >= 20, "a model agrees with itself"


def test_a_wrong_word_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="speculation='fast' must be one of auto, off, ngram, draft"):
        HybridRouter(speculation="fast")
