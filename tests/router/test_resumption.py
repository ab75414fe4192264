"""Answers of the journal that go on: once, from where they were, and never with less text than before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from sollol_nb.chat import journaling
from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.journal import CANCELLED, DONE, INTERRUPTED, Journal, JournaledAnswer, Progress, new_id
from sollol_nb.chat.journal_state import plain_json, request_json, split_state
from sollol_nb.chat.request import ChatRequest
from sollol_nb.chat.tool_choice import apply_tool_choice
from sollol_nb.errors import AnswerDivergedError, ConfigError, WorkersUnavailableError
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from sollol_nb.router.resumption import ASKED_AGAIN_NOTE, claimed, continued
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import HANG_GUARD_S, eventually

QUESTION = {"role": "user", "content": "Why?"}


class Engines:
    """Gives an answer, or fails with an error after it; keeps the requests."""

    def __init__(self, *texts: str, fails: Exception | None = None) -> None:
        self.texts, self.fails = texts, fails
        self.requests: list[ChatRequest] = []

    async def chunks(
        self, model: str, check: Callable[[], ChatRequest], **_: object
    ) -> AsyncGenerator[Chunk, None]:
        self.requests.append(check())
        for text in self.texts:
            yield {"model": model, "message": {"content": text}}
        if self.fails is not None:
            raise self.fails
        yield {"model": model, "message": {}, "done": True, "done_reason": "stop", "eval_count": 2}


def interrupted(text: str, **others: Any) -> str:
    """The id of an interrupted answer of Ollama."""
    body = {"messages": [QUESTION], "prompt": None, "options": others.pop("options", {}), "backend": None}
    first = {"owner": "a", "conversation": "", "model": "demo", "question": "Why?", "started_at": 1e9}
    progress = Progress(
        id=new_id(),
        run=new_id(),
        status=others.pop("status", INTERRUPTED),
        error="lost",
        text=text,
        thinking=others.pop("thinking", ""),
        first=first,
        request=others.pop("request", request_json(body, {})),
        state=others.pop("state", plain_json({"kind": "text", "texts": 3})),
    )
    journaling.journal().write([progress])
    return progress.id


def resumed(answer_id: str, engines: Engines, *, may_repeat: bool = False) -> Completion:
    async def read() -> list[Chunk]:
        chunks = continued(engines, answer_id, router=engines, may_repeat=may_repeat, priority=5, timeout_s=60)
        return [chunk async for chunk in chunks]

    return Completion.from_chunks(run_blocking(read()))


def row(answer_id: str) -> JournaledAnswer:
    found = journaling.journal().get(answer_id)
    assert found is not None
    return found


def test_an_answer_without_known_tokens_continues_from_its_text() -> None:
    answer_id, engines = interrupted("Since it ", options={"max_tokens": 10}), Engines("is", " so.")
    whole = resumed(answer_id, engines)
    assert (whole.text, whole["eval_count"]) == ("Since it is so.", 5)
    assert engines.requests[0].messages == [QUESTION, {"role": "assistant", "content": "Since it "}]
    assert engines.requests[0].options["max_tokens"] == 7
    assert (row(answer_id).status, row(answer_id).text) == (DONE, "Since it is so.")


def test_an_answer_that_had_not_begun_is_asked() -> None:
    engines = Engines("Because.")
    assert resumed(interrupted(""), engines).text == "Because."
    assert engines.requests[0].messages == [QUESTION]


def test_a_required_call_is_asked_again_as_it_was() -> None:
    tools = [{"type": "function", "function": {"name": "stop"}}]
    options: dict[str, Any] = {"tools": tools, "tool_choice": "required"}
    state = RawAnswer("demo", [QUESTION], apply_tool_choice(options), prompt="Why?").state()
    fixed, moving = split_state({**state, "written": '{"name": '})
    body = {"messages": [QUESTION], "prompt": None, "options": options, "backend": None}
    engines = Engines("")
    resumed(interrupted("", request=request_json(body, fixed), state=plain_json(moving)), engines)
    assert engines.requests[0].messages == [QUESTION]
    assert engines.requests[0].options == options


def test_what_cannot_be_continued_is_asked_again_and_says_so() -> None:
    answer_id = interrupted('{"a": ', options={"format": "json"})
    whole = resumed(answer_id, Engines('{"b": 1}'))
    assert (whole.text, whole["_note"]) == ('{"b": 1}', ASKED_AGAIN_NOTE)
    assert row(answer_id).text == '{"b": 1}'


def test_an_engine_that_writes_something_else_is_asked_again() -> None:
    answer_id = interrupted("Since it ", options={"recovery": "exact"})
    whole = resumed(answer_id, Engines("Otherwise."), may_repeat=True)
    assert (whole.text, whole["_note"]) == ("Otherwise.", ASKED_AGAIN_NOTE)


def test_an_exact_answer_is_repeated_and_shown_once() -> None:
    answer_id, engines = interrupted("Since it ", options={"recovery": "exact"}), Engines("Since it", " is so.")
    whole = resumed(answer_id, engines, may_repeat=True)
    assert (whole.text, whole.get("_note")) == ("Since it is so.", None)
    assert engines.requests[0].messages == [QUESTION]
    assert row(answer_id).text == "Since it is so."


@pytest.mark.parametrize("options", [{}, {"format": "json"}])
def test_an_answer_that_is_lost_again_keeps_all_that_was_shown(options: dict[str, Any]) -> None:
    answer_id = interrupted("a long text that was shown", options=options)
    for text in ("", " x"):
        with pytest.raises(WorkersUnavailableError):
            resumed(answer_id, Engines(text, fails=WorkersUnavailableError("no workers")))
        assert row(answer_id).status == INTERRUPTED
        assert row(answer_id).text.startswith("a long text that was shown")
    assert row(answer_id).error == "no workers"
    ended = Engines(" and ended")
    assert resumed(answer_id, ended).text.endswith(" and ended")


def test_a_reader_who_leaves_can_continue_it_later() -> None:
    answer_id = interrupted("one ")

    async def read_some() -> None:
        chunks = continued(
            Engines("two ", "three"), answer_id, router=None, may_repeat=False, priority=5, timeout_s=60
        )
        async for chunk in chunks:
            if chunk["message"].get("content") == "two ":
                break
        await chunks.aclose()

    run_blocking(read_some())
    assert (row(answer_id).status, row(answer_id).text) == (CANCELLED, "one two ")
    assert resumed(answer_id, Engines("three")).text == "one two three"


def test_two_kernels_do_not_continue_the_same_answer() -> None:
    answer_id = interrupted("one ")

    async def both() -> list[object]:
        async def read() -> int:
            chunks = continued(Engines("two"), answer_id, router=None, may_repeat=False, priority=5, timeout_s=60)
            return len([chunk async for chunk in chunks])

        return await asyncio.gather(read(), read(), return_exceptions=True)

    ended = run_blocking(both())
    assert [isinstance(each, ConfigError) for each in ended].count(True) == 1
    assert row(answer_id).text == "one two"


def test_who_is_interrupted_while_an_answer_is_claimed_leaves_it_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_id, claim = interrupted("one "), Journal.claim
    asked, may_go_on, is_claimed = threading.Event(), threading.Event(), threading.Event()

    def slowly(journal: Journal, answer_id: str) -> tuple[JournaledAnswer, str] | None:
        asked.set()
        may_go_on.wait(HANG_GUARD_S)
        taken = claim(journal, answer_id)
        is_claimed.set()
        return taken

    async def leave() -> None:
        claiming = asyncio.create_task(claimed(answer_id))
        await asyncio.to_thread(asked.wait, HANG_GUARD_S)
        claiming.cancel()
        await asyncio.wait({claiming})
        may_go_on.set()

    monkeypatch.setattr(Journal, "claim", slowly)
    run_blocking(leave())
    assert is_claimed.wait(HANG_GUARD_S)
    monkeypatch.undo()
    eventually(lambda: row(answer_id).status == INTERRUPTED, "it is given back")
    assert resumed(answer_id, Engines("two")).text == "one two"


@pytest.mark.parametrize(
    ("answer_id", "message"),
    [
        (lambda: "0" * 16, "no answer"),
        (lambda: interrupted("all", status=DONE), "complete"),
        (lambda: interrupted("some", request=None), "only the text"),
        (lambda: interrupted("some", request='{"messages": 3, "options": {}}'), "only the text"),
    ],
)
def test_what_has_nothing_to_continue_is_refused_and_stays(answer_id: Callable[[], str], message: str) -> None:
    known = answer_id()
    before = journaling.journal().get(known)
    with pytest.raises(ConfigError, match=message):
        resumed(known, Engines("x"))
    after = journaling.journal().get(known)
    assert (
        after is None
        or before is None
        or (after.status, after.text, after.error)
        == (
            before.status,
            before.text,
            before.error,
        )
    )


def test_an_engine_that_diverges_in_the_end_keeps_the_text() -> None:
    answer_id = interrupted("one ")
    with pytest.raises(AnswerDivergedError):
        resumed(answer_id, Engines("", fails=AnswerDivergedError("otherwise")))
    assert (row(answer_id).status, row(answer_id).text) == (INTERRUPTED, "one ")
