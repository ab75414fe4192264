"""Batches on real engines: every row asked once, errors beside their rows, nothing lost by a stop or crash."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from pydantic import BaseModel, Field

from sollol_nb import frame_accessor
from sollol_nb.batch import batch
from sollol_nb.batch.store import BatchStore
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import (
    BatchInterrupted,
    ConfigError,
    ModelFileError,
    ModelNotFoundError,
    RequestRejectedError,
    WorkersUnavailableError,
)
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.events import Event
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import (
    HANG_GUARD_S,
    busy_slots,
    eventually,
    eventually_async,
    run,
    says,
    script,
    suspended,
    write_endless,
)
from tests.support.held_answers import PATIENT
from tests.support.kernels import kernel
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.engine

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "progress": False}
TEMPLATE = "What is {{ word }}?"
WORDS = pd.DataFrame({"word": ["a worker", "a coordinator", "a layer"], "n": [1, 2, 3]}, index=[7, 5, 5])


@pytest.fixture(scope="module")
def router(engine: Engine) -> Iterator[HybridRouter]:
    """A separate router: the events of a batch would push out those that other tests look for."""
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, rpc_port=51152, context_tokens=2304
    ) as mine:
        yield mine


@pytest.fixture(autouse=True)
def own_store(router: HybridRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with an empty store."""
    monkeypatch.setattr(router._async, "batch_store", BatchStore(tmp_path / "batches.sqlite"))


@pytest.fixture
def asked(router: HybridRouter) -> Iterator[list[Event]]:
    """The events of requests that begin."""
    events: list[Event] = []
    forget = router.events.subscribe(lambda event: event.kind == "request.started" and events.append(event))
    yield events
    forget()


# --- the frame --------------------------------------------------------------------------------


def test_rows_with_nothing_to_ask_are_skipped(router: HybridRouter, asked: list[Event]) -> None:
    words = pd.DataFrame({"word": ["a worker", None, "", float("nan"), "a layer"]})

    result = router.map(words, TEMPLATE, model="demo:sharded", **GREEDY)

    assert list(result.status) == ["ok", "skipped", "skipped", "skipped", "ok"]
    assert list(result.answer.isna()) == [False, True, True, True, False]
    assert len(asked) == 2
    assert result.attrs["sollol"]["skipped"] == 3
    only = router.map([None, " "], "{{ item }}", model="a model that nobody has")
    assert list(only.status) == ["skipped", "skipped"]


def test_answers_are_columns_beside_the_rows_in_their_order(router: HybridRouter) -> None:
    result = router.map(WORDS, TEMPLATE, model="demo:sharded", **GREEDY)

    assert list(result.columns) == [
        *("word", "n", "answer", "status", "error", "backend", "finish_reason"),
        *("ttft_ms", "total_ms", "tokens_per_s", "completion_tokens"),
    ]
    pd.testing.assert_frame_equal(result[["word", "n"]], WORDS)
    for word, answer in zip(WORDS.word, result.answer, strict=True):
        asked_alone = router.route_request("demo:sharded", f"What is {word}?", temperature=0, max_tokens=6)
        assert answer == asked_alone.text != ""
    assert set(result.status) == {"ok"}
    assert set(result.error) == {""}
    assert set(result.backend) == {"llama.cpp-distributed"}
    assert set(result.finish_reason) == {"length"}
    assert (result.completion_tokens == 6).all()
    assert ((result.ttft_ms > 0) & (result.ttft_ms <= result.total_ms) & (result.tokens_per_s > 0)).all()
    assert result.attrs["sollol"] == {"model": "demo:sharded", "ok": 3, "cached": 0, "error": 0, "cancelled": 0}


@pytest.mark.parametrize(
    ("rows", "template", "column"),
    [
        (["a worker", "a layer"], "What is {{ item }}?", "item"),
        ((word for word in ("a worker", "a layer")), "What is {{ value }}?", "item"),
        ([{"w": "a worker"}, {"w": "a layer"}], "What is {{ w }}?", "w"),
        (pd.Series(["a worker", "a layer"], name="thing"), "What is {{ item }}?", "thing"),
        (["a worker", "a layer"], lambda item: f"What is {item}?", "item"),
        (["a worker", "a layer"], lambda item: [{"role": "user", "content": f"What is {item}?"}], "item"),
    ],
)
def test_rows_and_templates_have_many_forms(router: HybridRouter, rows: Any, template: Any, column: str) -> None:
    result = router.map(rows, template, model="demo", **GREEDY)
    assert list(result[column]) == ["a worker", "a layer"]
    expected = [
        router.route_request("demo", f"What is {word}?", temperature=0, max_tokens=6).text
        for word in ("a worker", "a layer")
    ]
    assert list(result.answer) == expected


def test_no_rows_make_no_requests(router: HybridRouter, asked: list[Event]) -> None:
    result = router.map(WORDS.iloc[:0], TEMPLATE, model="no such model", **GREEDY)
    assert (len(result), len(asked)) == (0, 0)
    assert {"word", "answer", "status"} <= set(result.columns)


def test_a_prefix_makes_room_for_a_second_batch_and_nothing_is_overwritten(
    router: HybridRouter, asked: list[Event]
) -> None:
    first = router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    asked.clear()
    with pytest.raises(ConfigError, match=r"the rows have answer, status, error, .* give the new columns"):
        router.map(first, "Again: {{ answer }}", model="demo", **GREEDY)
    assert asked == []
    second = router.map(first, "Again: {{ answer }}", model="demo", prefix="second_", **GREEDY)
    assert list(second.columns[: len(first.columns)]) == list(first.columns)
    assert set(second.second_status) == {"ok"}


def test_a_system_message_is_before_each_row(router: HybridRouter) -> None:
    result = router.map(["Hello!"], "{{ item }}", model="demo", system="Be brief.", **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    assert result.answer[0] == router.route_request("demo", messages, temperature=0, max_tokens=6).text


def test_the_async_router_maps_too(router: HybridRouter) -> None:
    async def ask() -> pd.DataFrame:
        return await router._async.map(WORDS, TEMPLATE, model="demo", **GREEDY)

    result = asyncio.run(ask())
    assert list(result.status) == ["ok"] * 3
    pd.testing.assert_series_equal(result.answer, router.map(WORDS, TEMPLATE, model="demo", **GREEDY).answer)


def test_a_bar_shows_the_progress(router: HybridRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.map(WORDS, TEMPLATE, model="demo", **{**GREEDY, "progress": True})
    shown = capsys.readouterr().err
    assert "demo: 100%" in shown
    assert "3/3" in shown
    router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    assert capsys.readouterr().err == ""


# --- a schema ---------------------------------------------------------------------------------


class Side(Enum):
    LEFT, RIGHT = "left", "right"


@dataclass
class Turn:
    side: Side
    n: int
    note: bool | None = None


class TurnModel(BaseModel):
    side: Side = Field(alias="Side")
    sure: bool


def test_the_fields_of_an_object_become_columns(router: HybridRouter) -> None:
    result = router.map(WORDS, TEMPLATE, model="demo", schema=Turn, **{**GREEDY, "max_tokens": 300})
    assert list(result.status) == ["ok"] * 3, list(result.error)
    assert list(result.columns[:7]) == ["word", "n", "answer", "side", "answer_n", "note", "value"]
    assert list(result.n) == [1, 2, 3], "the input's own"
    assert result.answer_n.dtype == "int64"
    for _, row in result.iterrows():
        assert isinstance(row.value, Turn)
        assert (row.side, row.answer_n) == (row.value.side, row.value.n)
        assert json.loads(row.answer)["side"] == row.side.value


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (TurnModel, ["side", "sure"]),
        ({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}, ["a"]),
        (Side, []),
        (list[bool], []),
        (pd.DataFrame({"sure": [True]}), []),
    ],
    ids=["pydantic", "dict", "enum", "list", "frame"],
)
def test_any_schema_gives_a_value(router: HybridRouter, schema: Any, fields: list[str]) -> None:
    settings = {**GREEDY, "max_tokens": 300}
    result = router.map(["a"], "{{ item }}", model="demo", schema=schema, **settings)
    assert list(result.columns[:-8]) == ["item", "answer", *fields, "value"]
    again = router.map(["a"], "{{ item }}", model="demo", schema=schema, **settings)
    assert again.status[0] == ("cached" if result.status[0] == "ok" else "error")
    if result.status[0] == "ok":
        assert type(again.value[0]) is type(result.value[0])
        assert str(again.value[0]) == str(result.value[0])


def test_an_answer_that_does_not_match_is_an_error_with_its_text_and_is_not_kept(
    router: HybridRouter, asked: list[Event]
) -> None:
    for _ in range(2):
        result = router.map(WORDS, TEMPLATE, model="demo", schema=Turn, **GREEDY)
        assert list(result.status) == ["error"] * 3
        assert all("give a larger max_tokens" in error for error in result.error)
        assert all(answer.startswith("{") for answer in result.answer)
        assert list(result.value) == [None] * 3
        assert (result.completion_tokens == 6).all()
    assert len(asked) == 6


# --- once -------------------------------------------------------------------------------------


def test_rows_that_ask_the_same_are_asked_once(router: HybridRouter, asked: list[Event]) -> None:
    result = router.map(["a", "b", "a", "a"], "{{ item }}", model="demo", **GREEDY)
    assert len(asked) == 2
    assert list(result.status) == ["ok"] * 4
    assert result.answer[0] == result.answer[2] == result.answer[3]


def test_answered_rows_are_not_asked_again(router: HybridRouter, asked: list[Event]) -> None:
    sampled = {**GREEDY, "temperature": 1.5}
    first = router.map(WORDS.word[:2], TEMPLATE.replace("word", "item"), model="demo", **sampled)
    assert len(asked) == 2
    again = router.map(WORDS, TEMPLATE, model="demo", **sampled)
    assert len(asked) == 3
    assert list(again.status) == ["cached", "cached", "ok"]
    assert list(again.answer[:2]) == list(first.answer)
    assert list(again.ttft_ms[:2]) == list(first.ttft_ms), "from when it was asked"
    assert again.attrs["sollol"]["cached"] == 2


@pytest.mark.parametrize("change", [{"fresh": True}, {"max_tokens": 7}, {"system": "Be brief."}, {"schema": str}])
def test_fresh_answers_and_other_questions_are_asked(
    router: HybridRouter, asked: list[Event], change: dict[str, Any]
) -> None:
    router.map(["a"], "{{ item }}", model="demo", **GREEDY)
    router.map(["a"], "{{ item }}", model="demo", **{**GREEDY, **change})
    assert len(asked) == 2


def test_a_file_that_has_changed_is_another_model(
    router: HybridRouter, asked: list[Event], tmp_path: Path
) -> None:
    path = write_endless(tmp_path)
    for _ in range(2):
        router.map(["a"], "{{ item }}", model=str(path), **GREEDY)
    assert len(asked) == 1
    os.utime(path, ns=(1, 1))
    result = router.map(["a"], "{{ item }}", model=str(path), **GREEDY)
    assert (len(asked), result.status[0]) == (2, "ok")
    router.stop_coordinator(str(path))


def test_forgotten_answers_are_asked_again(router: HybridRouter, asked: list[Event]) -> None:
    router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    assert router.batch_store.clear("demo") == 3
    router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    assert len(asked) == 6


def test_a_store_that_cannot_be_used_costs_no_answer(
    router: HybridRouter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router._async, "batch_store", BatchStore(tmp_path / "no" / "such" / "folder"))
    assert list(router.map(WORDS, TEMPLATE, model="demo", **GREEDY).status) == ["ok"] * 3
    assert caplog.text.count("an answer was not kept") == 1, "and so says one line, not one for each row"


def test_a_damaged_store_costs_no_answer(
    router: HybridRouter, caplog: pytest.LogCaptureFixture, asked: list[Event]
) -> None:
    router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    for path in router.batch_store.path.parent.glob("batches.sqlite*"):
        path.write_bytes(b"no database at all " * 1000)
    assert list(router.map(WORDS, TEMPLATE, model="demo", **GREEDY).status) == ["ok"] * 3
    assert len(asked) == 6
    assert caplog.text.count("an answer was not kept") == 1
    assert "delete it" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_a_stopped_batch_says_where_its_answers_could_not_be_kept(
    router: HybridRouter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patient: None
) -> None:
    monkeypatch.setattr(router._async, "batch_store", BatchStore(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(BatchInterrupted) as caught, stop_after(router, 2):
        router.map(range(30), "Tell {{ item }}", model="demo", **{**GREEDY, "max_tokens": 40, "concurrency": 1})
    assert "rows are done, but could not be kept; take them from .partial" in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_an_answer_that_cannot_be_kept_during_a_stop_is_one_warning(
    router: HybridRouter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    patient: None,
) -> None:
    running: list[str] = []
    stopped = threading.Event()

    class Failing(BatchStore):
        def put(self, answers: Mapping[str, Completion]) -> None:
            if not stopped.is_set():  # the stop comes while the first answer is being kept, and the next is given
                with suspended(engine_of(router)):
                    eventually(lambda: running, "the next row is asked")
                    os.kill(os.getpid(), signal.SIGINT)
                    assert stopped.wait(HANG_GUARD_S)
            raise OSError("no space left")

    def note(event: Event) -> None:
        if event.kind == "request.started":
            running.append(event.subject)
        elif event.kind == "request.finished":
            running.clear()
            if event.data["status"] == "cancelled":
                stopped.set()

    monkeypatch.setattr(router._async, "batch_store", Failing(tmp_path / "batches.sqlite"))
    forget = router.events.subscribe(note)
    with pytest.raises(BatchInterrupted):
        router.map(range(9), "Tell {{ item }}", model="demo", concurrency=1, **GREEDY)
    forget()
    gc.collect()  # asyncio reports errors that nobody has read
    assert [record.getMessage()[:26] for record in caplog.records] == ["an answer was not kept in "]


# --- at once ----------------------------------------------------------------------------------


def most_at_once(router: HybridRouter, expected: int, **settings: Any) -> int:
    """How many requests run at the same time. From the first one on, the engine waits until there are as many as
    expected: however quick it is, none ends before."""
    running, most = 0, 0
    router.route_request("demo", "Hello!", max_tokens=1)
    engine = engine_of(router)

    def count(event: Event) -> None:
        nonlocal running, most
        running += {"request.started": 1, "request.finished": -1}.get(event.kind, 0)
        if running == 1 and most == 0:
            waiting.enter_context(suspended(engine))
        if running == expected > most:
            waiting.close()
        most = max(most, running)

    with ExitStack() as waiting:
        forget = router.events.subscribe(count)
        try:
            router.map(range(12), "{{ item }}", model="demo", **{**GREEDY, "max_tokens": 20}, **settings)
        finally:
            forget()
    return most


def test_all_slots_are_used_or_as_many_as_requested(router: HybridRouter, patient: None) -> None:
    assert most_at_once(router, 4) == 4, "the coordinator's slots"
    assert most_at_once(router, 2, fresh=True, concurrency=2) == 2
    assert most_at_once(router, 12, fresh=True, concurrency=100) == 12


def test_rows_wait_behind_all_other_requests(router: HybridRouter) -> None:
    router.map(WORDS, TEMPLATE, model="demo", **GREEDY)
    assert set(router.latency.frame(model="demo", last=3).priority) == {1}
    router.map(WORDS, TEMPLATE, model="demo", fresh=True, priority=7, **GREEDY)
    assert set(router.latency.frame(model="demo", last=3).priority) == {7}


@pytest.mark.ollama
def test_rows_are_spread_over_the_ollama_nodes_that_have_the_model(
    ollama_pair: tuple[OllamaServer, OllamaServer], tmp_path: Path
) -> None:
    pool = OllamaPool([f"127.0.0.1:{server.port}" for server in ollama_pair], num_parallel=2)
    settings = {**GREEDY, "max_tokens": 4}
    with HybridRouter(pool, auto_discover_rpc=False) as mine:
        mine._async.batch_store = BatchStore(tmp_path / "b.sqlite")
        found = mine.slots_for("llama3.2")
        assert found.slots == 4
        assert len(found.identity["digests"][0]) > 20
        result = mine.map(range(12), "Count to {{ item }}", model="llama3.2", **settings)
        assert list(result.status) == ["ok"] * 12, list(result.error)
        assert set(result.backend) == {"ollama-pool"}
        assert mine.latency.frame(model="llama3.2", last=12).place.nunique() == 2
        again = mine.map(range(12), "Count to {{ item }}", model="llama3.2:latest", **settings)
        assert list(again.status) == ["ok"] * 12, "another name is another question"
        again = mine.map(range(12), "Count to {{ item }}", model="llama3.2", **settings)
        assert list(again.status) == ["cached"] * 12


# --- what goes wrong --------------------------------------------------------------------------


def test_a_rows_error_stays_beside_it_and_stops_no_other_row(router: HybridRouter, asked: list[Event]) -> None:
    rows = ["a", "much too long " * 30_000, "b"]
    result = router.map(rows, "{{ item }}", model="demo", **GREEDY)
    assert list(result.status) == ["ok", "error", "ok"]
    assert result.error[1]
    assert "\n" not in result.error[1]
    assert pd.isna(result.answer[1])
    assert pd.isna(result.completion_tokens[1])
    assert result.attrs["sollol"] == {"model": "demo", "ok": 2, "cached": 0, "error": 1, "cancelled": 0}
    asked.clear()
    assert list(router.map(rows, "{{ item }}", model="demo", **GREEDY).status) == ["cached", "error", "cached"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("rows", "template", "settings", "kind", "message"),
    [
        (["a"], "{{ item }}", {"model": "nosuch"}, ModelNotFoundError, "nosuch is not available"),
        (["a"], "{{ item }}", {"model": None}, ConfigError, "no model given"),
        (
            ["a"],
            "{{ item }}",
            {"temprature": 1},
            ConfigError,
            "unknown option 'temprature'; did you mean",
        ),
        (["a"], "{{ item }}", {"schema": 7}, ConfigError, "a schema is a pydantic model class"),
        (["a"], "{{ item }}", {"concurrency": 0}, ConfigError, "concurrency=0 must be a whole number"),
        (["a"], "{{ item }}", {"concurrency": True}, ConfigError, "concurrency=True must be"),
        (["a"], "{{ item }}", {"priority": 11}, ConfigError, "priority=11 must be"),
        (["a"], "{{ item }}", {"timeout": -1}, ConfigError, "timeout=-1 must be"),
        (["a"], "{{ item }}", {"backend": "clowd"}, ConfigError, "backend='clowd' is unknown"),
        (["a"], "{{ item }}", {"backend": "ollama"}, ModelNotFoundError, "no Ollama node is running"),
        (
            ["a", "b"],
            "{{ itm }}",
            {},
            ConfigError,
            "row 0: {{ itm }}: there is no variable itm (did you mean",
        ),
        ([{"a": 1}, {"b": 1}], "{{ a }}", {}, ConfigError, "row 1: {{ a }}: there is no variable a"),
        ("text", "{{ item }}", {}, ConfigError, "rows must be a DataFrame"),
    ],
)
def test_an_error_of_every_row_is_raised_before_the_first_request(
    router: HybridRouter,
    asked: list[Event],
    rows: Any,
    template: str,
    settings: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind) as caught:
        router.map(rows, template, **{"model": "demo", **GREEDY, **settings})
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert asked == []


def test_without_workers_no_second_row_is_tried(engine: Engine, tmp_path: Path, alone: None) -> None:
    with HybridRouter(auto_discover_rpc=False) as mine:
        mine._async.batch_store = BatchStore(tmp_path / "b.sqlite")
        begun: list[Event] = []
        mine.events.subscribe(begun.append)
        with pytest.raises(WorkersUnavailableError, match="none is known"):
            mine.map(range(50), "{{ item }}", model="demo:sharded", concurrency=1, **GREEDY)
        assert [event.kind for event in begun].count("request.started") == 1


def test_an_error_that_begins_to_hit_every_row_is_raised_and_answers_are_kept(
    router: HybridRouter, asked: list[Event], tmp_path: Path
) -> None:
    path = write_endless(tmp_path)
    moved = path.with_suffix(".away")

    def move(event: Event) -> None:
        if event.kind == "request.finished" and path.exists():
            path.rename(moved)

    forget = router.events.subscribe(move)
    with pytest.raises(ModelFileError, match="does not exist") as caught:
        router.map(range(5), "{{ item }}", model=str(path), concurrency=1, **GREEDY)
    forget()
    assert caught.value.__notes__ == ["1 of 5 rows are done and kept; the same call continues once this is fixed"]
    moved.rename(path)
    asked.clear()
    result = router.map(range(5), "{{ item }}", model=str(path), concurrency=1, **GREEDY)
    assert list(result.status) == ["cached", "ok", "ok", "ok", "ok"]
    router.stop_coordinator(str(path))


def test_a_refusal_of_every_row_is_raised_after_a_few_rows(router: HybridRouter, asked: list[Event]) -> None:
    refused = {"type": "string", "minLength": 50_000}  # more than a grammar may repeat
    few = router.map(range(2), "{{ item }}", model="demo", schema=refused, **GREEDY)
    assert list(few.status) == ["error"] * 2
    asked.clear()
    with pytest.raises(RequestRejectedError, match="failed to parse grammar"):
        router.map(range(50), "{{ item }}", model="demo", schema=refused, **GREEDY)
    assert len(asked) < 15


def test_rows_that_are_too_long_with_the_same_message_stop_no_other_row(router: HybridRouter) -> None:
    rows = [*("word " * 4_000 + letter for letter in "abcdefgh"), "Hello!"]
    result = router.map(rows, "{{ item }}", model="demo", concurrency=1, **GREEDY)
    assert list(result.status) == ["error"] * 8 + ["ok"]
    assert result.error[:8].nunique() == 1, "so that this tests the same message"


# --- stopped ----------------------------------------------------------------------------------


def all_idle(router: HybridRouter) -> bool:
    """Whether no slot of any coordinator works."""
    return not any(run(busy_slots(coordinator)) for coordinator in router.coordinators)


def engine_of(router: HybridRouter) -> psutil.Process:
    """The engine of the coordinator that was used last."""
    return psutil.Process(router.own_coordinators[-1].pid)


@contextmanager
def after_answers(router: HybridRouter, answers: int, do: Callable[[], object]) -> Iterator[None]:
    """Do something when so many requests have ended well. The engine waits from then until the end of the block:
    however quick it is, not all rows are done."""
    ended = 0

    def count(event: Event) -> None:
        nonlocal ended
        if event.kind == "request.finished" and event.data["status"] == "ok":
            ended += 1
            if ended == answers:
                waiting.enter_context(suspended(engine_of(router)))
                do()

    with ExitStack() as waiting:
        unsubscribe = router.events.subscribe(count)
        try:
            yield
        finally:
            unsubscribe()


def stop_after(router: HybridRouter, answers: int) -> AbstractContextManager[None]:
    """Interrupt this process, as Ctrl-C does, when so many requests have ended well."""
    return after_answers(router, answers, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_an_interrupted_batch_continues_where_it_was(
    router: HybridRouter, asked: list[Event], patient: None
) -> None:
    settings = {**GREEDY, "max_tokens": 40, "concurrency": 2}
    with pytest.raises(BatchInterrupted) as caught, stop_after(router, 8):
        router.map(range(40), "Tell me of {{ item }}", model="demo:sharded", **settings)

    partial = caught.value.partial
    done = int((partial.status == "ok").sum())
    assert 8 <= done < 40
    assert set(partial.status) == {"ok", "cancelled"}
    assert partial.answer[partial.status == "ok"].notna().all()
    assert f"stopped: {done} of 40 rows are done and kept; run the same call again to continue" in str(
        caught.value
    )
    assert isinstance(caught.value, KeyboardInterrupt)
    eventually(lambda: all_idle(router), "the slots are idle")
    assert len(router.batch_store) >= done

    kept = len(router.batch_store)
    asked.clear()
    whole = router.map(range(40), "Tell me of {{ item }}", model="demo:sharded", **settings)
    assert len(asked) == 40 - kept
    assert list(whole.status).count("cached") == kept
    finished = partial.status == "ok"
    assert list(whole.answer[finished]) == list(partial.answer[finished])
    assert set(whole.status) == {"ok", "cached"}


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_a_batch_can_be_stopped_while_kept_answers_are_read(
    router: HybridRouter, asked: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    router.map(range(6), "Say {{ item }}", model="demo", **GREEDY)
    asked.clear()
    reads: list[list[str]] = []
    stopped = threading.Event()
    read = router.batch_store.get

    def stopped_at_the_second(keys: Iterable[str]) -> dict[str, Completion]:
        reads.append(list(keys))
        if len(reads) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(HANG_GUARD_S)
        return read(reads[-1])

    monkeypatch.setattr(router.batch_store, "get", stopped_at_the_second)
    monkeypatch.setattr(batch, "READ_AT_ONCE", 2)
    with pytest.raises(BatchInterrupted, match="stopped: 2 of 6 rows are done") as caught:
        router.map(range(6), "Say {{ item }}", model="demo", **GREEDY)
    stopped.set()
    assert list(caught.value.partial.status) == ["cached"] * 2 + ["cancelled"] * 4
    assert asked == []
    assert list(router.map(range(6), "Say {{ item }}", model="demo", **GREEDY).status) == ["cached"] * 6
    assert [len(keys) for keys in reads] == [2] * 5


def test_cancelling_the_async_batch_ends_its_requests_and_keeps_its_answers(
    router: HybridRouter, asked: list[Event], patient: None
) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(
            router._async.map(range(16), "Say {{ item }}", model="demo", **{**GREEDY, "max_tokens": 40})
        )
        await eventually_async(lambda: len(router.batch_store) >= 3, "three are kept")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with after_answers(router, 3, lambda: None):
        asyncio.run(cancelled())
    eventually(lambda: all_idle(router), "the slots are idle")
    kept = len(router.batch_store)
    assert 3 <= kept < 16
    asked.clear()
    router.map(range(16), "Say {{ item }}", model="demo", **{**GREEDY, "max_tokens": 40})
    assert len(asked) == 16 - kept


KILLED = """
import sys
from sollol_nb.batch.store import BatchStore
from sollol_nb.sync_wrapper import HybridRouter

router = HybridRouter(auto_discover_rpc=False)
router._async.batch_store = BatchStore(sys.argv[1])
ended = []
def count(event):
    if event.kind == "request.finished" and event.data["status"] == "ok":
        ended.append(event)
        if len(ended) == 6:
            print("six", flush=True)
            sys.stdin.read()  # holds the I/O loop until the process is killed
router.events.subscribe(count)
router.map(range(30), "Name {{ item }}", model="demo", temperature=0, max_tokens=30, concurrency=1, progress=False)
"""


def test_the_batch_of_a_killed_kernel_is_continued_by_the_next(router: HybridRouter, asked: list[Event]) -> None:
    with script(KILLED, str(router.batch_store.path)) as process:
        assert says(process, "six") == ""
        process.kill()
        process.wait(HANG_GUARD_S)
    kept = len(router.batch_store)
    assert 0 < kept <= 5, "its kernel was killed as the sixth came and the fifth was being kept"
    result = router.map(
        range(30), "Name {{ item }}", model="demo", temperature=0, max_tokens=30, concurrency=1, progress=False
    )
    assert list(result.status) == ["cached"] * kept + ["ok"] * (30 - kept)
    assert len(asked) == 30 - kept


STOPPED_CELL = """
import os, signal
import psutil
from sollol_nb.sync_wrapper import HybridRouter
router = HybridRouter(auto_discover_rpc=False)
ended = 0
def count(event):
    global ended, engine
    if event.kind == "request.finished" and event.data["status"] == "ok":
        ended += 1
        if ended == 5:
            engine = psutil.Process(router.own_coordinators[-1].pid)
            engine.suspend()  # however quick it is, not all rows are done
            os.kill(os.getpid(), signal.SIGINT)  # what the stop button sends
router.events.subscribe(count)
"""
BATCH_CELL = "result = router.map(range(30), 'Stop {{ item }}', model='demo', temperature=0, max_tokens=30)"


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C alone there")
def test_the_stop_button_ends_a_batch_and_running_the_cell_again_continues_it(tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path)) as notebook:
        notebook.run(PATIENT)
        notebook.run(STOPPED_CELL)
        stopped = notebook.run(BATCH_CELL)
        assert stopped.status == "error"
        assert "of 30 rows are done and kept; run the same call again to continue" in stopped.error[-1]
        done = int(notebook.value("(__import__('sys').last_value.partial.status == 'ok').sum().item()"))
        assert 5 <= done < 30
        assert notebook.run("engine.resume()").status == "ok"
        assert notebook.run(BATCH_CELL).status == "ok"
        kept = int(notebook.value("(result.status == 'cached').sum().item()"))
        assert kept >= done
        assert notebook.value("set(result.status) == {'cached', 'ok'}") == "True"
        notebook.run("router.close()")


# --- the accessor -----------------------------------------------------------------------------


def test_frames_have_the_accessor_while_it_is_registered(router: HybridRouter) -> None:
    assert not hasattr(WORDS, "sollol")
    frame_accessor.register()
    try:
        with pytest.raises(ConfigError, match=r"no router is registered for df\.sollol; pass one"):
            WORDS.sollol.map(TEMPLATE, model="demo")
        named = WORDS.sollol.map(TEMPLATE, router=router, model="demo", **GREEDY)
        frame_accessor.register(lambda: router)
        registered = WORDS.sollol.map(TEMPLATE, model="demo", **GREEDY)
    finally:
        frame_accessor.unregister()
        frame_accessor.unregister()
    assert not hasattr(WORDS, "sollol")
    assert list(named.status) == ["ok"] * 3
    assert list(registered.status) == ["cached"] * 3
