"""Every answer of a router is journaled while it streams, and goes on from its last token, on real engines."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.journal import CANCELLED, DONE, FILE_NAME, JournaledAnswer
from sollol_nb.chat.journaling import JournalWriter
from sollol_nb.errors import ConfigError, SollolError
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings import config
from sollol_nb.sync_wrapper import HybridRouter

pytestmark = pytest.mark.engine

QUESTION = "What is a worker?"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "backend": "local"}


def row(answer_id: str) -> JournaledAnswer:
    found = journaling.journal().get(answer_id)
    assert found is not None
    return found


def newest_id() -> str:
    answers = journaling.journal().newest()
    return answers[0].id if answers else ""


def read_some(router: HybridRouter, chunks: int, **options: Any) -> str:
    """The id of an answer whose reader leaves it after so many chunks."""
    return left_early(router.stream_async("demo", QUESTION, **{**GREEDY, **options}), chunks)


def left_early(stream: AsyncGenerator[Chunk, None], chunks: int) -> str:
    """The id of an answer whose reader leaves it after so many chunks: on the I/O loop it is not read ahead."""

    async def read() -> str:
        async with aclosing(stream):
            number = 0
            async for chunk in stream:
                if number == 0:
                    answer_id = str(chunk["_routing"]["answer_id"])
                if number == chunks:
                    return answer_id
                number += 1
        raise AssertionError("the answer is too short")

    return run_blocking(read())


def test_a_complete_answer_is_in_the_journal(router: HybridRouter) -> None:
    answer = router.route_request("demo", QUESTION, conversation="tour", **GREEDY)
    journaled = row(answer.routing["answer_id"])
    assert (journaled.status, journaled.text, journaled.question) == (DONE, answer.text, QUESTION)
    assert (journaled.model, journaled.conversation, journaled.request) == ("demo", "tour", None)
    assert journaled.state is not None
    assert journaled.state["eval_count"] == answer["eval_count"]


@pytest.mark.parametrize(("options", "variables"), [({"journal": False}, {}), ({}, {"SOLLOL_JOURNAL": "0"})])
def test_journaling_can_be_switched_off(
    router: HybridRouter, options: dict[str, Any], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = newest_id()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = router.route_request("demo", QUESTION, **GREEDY, **options)
    assert (answer.routing["answer_id"], newest_id()) == ("", before)


def test_rows_of_a_batch_are_not_journaled(router: HybridRouter) -> None:
    before = newest_id()
    router.map(["worker"], "What is a {{ item }}?", model="demo", fresh=True, **GREEDY)
    assert newest_id() == before


def test_a_refused_request_leaves_nothing(router: HybridRouter) -> None:
    before = newest_id()
    with pytest.raises(SollolError):
        router.route_request("demo", QUESTION, max_tokens=5, options={"num_ctx": 10**6}, backend="local")
    assert newest_id() == before


@pytest.mark.parametrize("options", [{}, {"recovery": "exact"}, {"logprobs": True}])
def test_an_answer_goes_on_where_it_was(router: HybridRouter, options: dict[str, Any]) -> None:
    undisturbed = router.route_request("demo", QUESTION, journal=False, **GREEDY, **options)
    answer_id = read_some(router, 5, **options)
    before = row(answer_id)
    assert before.status == CANCELLED
    assert before.text
    assert undisturbed.text.startswith(before.text)
    whole = router.resume(answer_id)
    assert whole.text == undisturbed.text
    assert len(whole.get("logprobs") or ()) == len(undisturbed.get("logprobs") or ())
    assert (whole.routing["answer_id"], row(answer_id).status, row(answer_id).text) == (
        answer_id,
        DONE,
        whole.text,
    )
    with pytest.raises(ConfigError, match="complete"):
        router.resume(answer_id)


def test_the_rest_of_an_answer_from_its_state_is_no_answer_of_its_own(router: HybridRouter) -> None:
    answer_id = read_some(router, 10)
    state = row(answer_id).state
    assert state is not None
    *_, last = router.resumed(state)
    assert last["_routing"]["answer_id"] == ""
    assert newest_id() == answer_id


def test_a_continued_text_goes_on_too(router: HybridRouter) -> None:
    prompt = "A worker is"
    undisturbed = router.generate("demo", prompt, temperature=0, max_tokens=20, backend="local")
    answer_id = left_early(
        router._async.stream_generate("demo", prompt, temperature=0, max_tokens=20, backend="local"), 0
    )
    assert row(answer_id).question == prompt
    assert router.resume(answer_id).text == undisturbed.text


def test_a_script_that_is_killed_leaves_an_answer_that_goes_on(router: HybridRouter, tmp_path: Path) -> None:
    script = f"""
import asyncio, os
from sollol_nb.sync_wrapper import HybridRouter
from sollol_nb.chat import journaling
from sollol_nb.runtime.io_loop import run_blocking
async def read(router):  # on the I/O loop, where the answer is not read ahead
    number = 0
    async for chunk in router.stream_async("demo", {QUESTION!r}, **{GREEDY!r}):
        if number == 0:
            print(chunk["_routing"]["answer_id"], flush=True)
        if number == 8:
            await asyncio.to_thread(journaling.journal)
            os.kill(os.getpid(), 9)
        number += 1
run_blocking(read(HybridRouter()))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "SOLLOL_KEEP_ALIVE": "5s"},
        timeout=120,
        check=False,
    )
    assert ended.returncode == -9, ended.stderr
    answer_id = ended.stdout.strip()
    before = row(answer_id)
    assert before.status == "interrupted"
    assert before.text
    undisturbed = router.route_request("demo", QUESTION, journal=False, **GREEDY)
    assert undisturbed.text.startswith(before.text)
    assert router.resume(answer_id).text == undisturbed.text


def test_a_journal_that_cannot_be_written_costs_no_answer(
    router: HybridRouter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journaling._writer, "_has_failed", False)
    monkeypatch.setattr(journaling._journal, "_path", tmp_path / FILE_NAME)
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    for _ in range(2):
        assert router.route_request("demo", QUESTION, **GREEDY).text
        journaling.journal()
    said = [record.getMessage() for record in caplog.records if "journaled" in record.getMessage()]
    assert len(said) == 1
    monkeypatch.undo()
    assert router.route_request("demo", QUESTION, **GREEDY).routing["answer_id"] == newest_id()


def test_the_state_is_taken_twice_a_second_and_not_per_token(
    router: HybridRouter, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JournalWriter(journaling._journal)
    monkeypatch.setattr(journaling, "_writer", writer)
    chunks, began = 0, time.monotonic()
    for chunk in router.stream(endless, "Go.", max_tokens=300, temperature=0, backend="local"):
        chunks += bool(chunk["message"].get("content"))
    assert chunks > 100
    seconds = time.monotonic() - began
    assert writer._begun <= 2 + seconds / journaling.INTERVAL_S
    writer.wait_written()


def test_only_the_state_folder_has_it(router: HybridRouter) -> None:
    path = config.state_file(FILE_NAME)
    assert journaling.journal().path == path
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone()[0] > 0
