"""Requests with a schema, on real engines: the answer is of it, or the error says why and has the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pandas as pd
import psutil
import pytest
from pydantic import BaseModel

from sollol_nb.chat.completion import Completion, checked_against_schema
from sollol_nb.errors import AnswerInterruptedError, StructureError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.routing import DISTRIBUTED, OLLAMA
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import QUESTION, engine_on, kill_at_once
from tests.support.mid_answer import read_and_kill
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.engine


class Side(Enum):
    LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class Turn:
    side: Side
    sure: bool


class TurnModel(BaseModel):
    side: Side
    sure: bool


TURN = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}, "sure": {"type": "boolean"}},
    "required": ["side", "sure"],
    "additionalProperties": False,
}
EXAMPLE = pd.DataFrame({"side": pd.Categorical(["left"], categories=["left", "right"]), "sure": [True]})


def is_turn(value: Any) -> bool:
    return isinstance(value.side, Side) and isinstance(value.sure, bool)


SCHEMAS = pytest.mark.parametrize(
    ("schema", "fits"),
    [
        (TurnModel, lambda value: isinstance(value, TurnModel) and is_turn(value)),
        (Turn, lambda value: isinstance(value, Turn) and is_turn(value)),
        (TURN, lambda value: value.keys() == {"side", "sure"} and value["side"] in ("left", "right")),
        (Side, lambda value: isinstance(value, Side)),
        (EXAMPLE, lambda value: value.dtypes.to_dict() == EXAMPLE.dtypes.to_dict() and len(value) > 0),
    ],
    ids=["pydantic", "dataclass", "dict", "enum", "frame"],
)


@SCHEMAS
@pytest.mark.parametrize("model", ["demo", "demo:sharded"])
def test_an_answer_matches_its_schema(
    router: HybridRouter, model: str, schema: Any, fits: Callable[[Any], bool]
) -> None:
    answer = router.route_request(model, QUESTION, schema=schema, temperature=0, max_tokens=300)
    assert answer.schema is schema
    assert fits(answer.value)


@SCHEMAS
@pytest.mark.ollama
def test_an_answer_of_ollama_matches_its_schema(
    ollama: OllamaServer, schema: Any, fits: Callable[[Any], bool]
) -> None:
    with HybridRouter(OllamaPool([f"127.0.0.1:{ollama.port}"]), auto_discover_rpc=False) as mine:
        answer = mine.route_request("llama3.2", QUESTION, schema=schema, temperature=0, max_tokens=300)
    assert answer.routing["backend"] == OLLAMA
    assert fits(answer.value)


def test_a_streamed_answer_matches_the_schema_too(router: HybridRouter) -> None:
    chunks = router.stream("demo", QUESTION, schema=TURN, temperature=0, max_tokens=300)
    assert json.loads("".join(chunk["message"]["content"] for chunk in chunks)).keys() == {"side", "sure"}


def test_an_answer_cut_before_it_matches_says_so_and_is_kept(router: HybridRouter) -> None:
    with pytest.raises(StructureError) as caught:
        router.route_request("demo", QUESTION, schema=TURN, temperature=0, max_tokens=2)
    error = caught.value
    assert "the answer was stopped after 2 tokens" in str(error)
    assert "give a larger max_tokens" in str(error)
    assert "\n" not in str(error)
    assert (error.completion.finish_reason, error.completion["eval_count"]) == ("length", 2)
    assert error.text == error.completion.text
    row = router.latency.frame(model="demo", last=1).iloc[0]
    assert (row.status, row.completion_tokens) == ("ok", 2), "the engine did what it was asked"


@dataclass
class Picky:
    side: Side

    def __post_init__(self) -> None:
        raise ValueError("never good enough")


def test_an_answer_that_a_class_refuses_says_why_and_is_kept(router: HybridRouter) -> None:
    with pytest.raises(StructureError, match="never good enough") as caught:
        router.route_request("demo", QUESTION, schema=Picky, temperature=0, max_tokens=300)
    assert json.loads(caught.value.completion.text).keys() == {"side"}
    assert caught.value.completion.routing["backend"] == "llama.cpp-local"


def test_a_tool_call_is_not_checked_against_the_schema() -> None:
    call = {"function": {"name": "look", "arguments": {}}}
    completion = Completion(message={"role": "assistant", "content": "", "tool_calls": [call]}, done=True)
    assert checked_against_schema(completion, TURN) is completion


def test_an_interrupted_answer_is_resumed_on_its_backend_and_checked(engine: Engine, alone: None) -> None:
    flips = {"type": "array", "items": {"type": "boolean"}, "minItems": 60, "maxItems": 60}
    asked: dict[str, Any] = {"backend": "sharded", "schema": flips, "temperature": 0, "max_tokens": 1500}
    with HybridRouter(auto_discover_rpc=False, num_rpc_backends=2, context_tokens=1856, rpc_port=52152) as mine:
        workers = mine.start_workers(2)
        whole = mine.route_request("demo", QUESTION, **asked)
        assert len(whole.value) == 60
        assert mine.coordinator is not None
        engines = [engine_on(int(endpoint.rpartition(":")[2])) for endpoint in workers]
        engines.append(psutil.Process(mine.coordinator.pid))  # which ends when it notices that its workers have
        stream = mine.stream_async("demo", QUESTION, **asked)
        with pytest.raises(AnswerInterruptedError) as caught:
            read_and_kill(stream, 0, lambda: kill_at_once(engines))
        for endpoint in workers:
            mine.remove_worker(endpoint)
        mine.start_workers(2)
        resumed = mine.resume(caught.value)
    assert resumed.routing["backend"] == DISTRIBUTED
    assert (resumed.schema, resumed.text) == (flips, whole.text)
