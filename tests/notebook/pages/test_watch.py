"""Which answers a page has missed, and when the file is changed; with real pages in `lab/test_closed_pages.py`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sollol_nb.errors import HttpStatusError, TransportError, TransportTimeoutError
from sollol_nb.notebook.pages import watch
from sollol_nb.notebook.pages.jupyter_server import Page
from sollol_nb.notebook.pages.saved_outputs import SavedDisplay
from sollol_nb.notebook.pages.watch import PageWatch, ShownAnswer
from tests.support.saved_notebooks import CODE, notebook, shown


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the module, set by the test."""
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    return clock


class Server:
    """A Jupyter server with one notebook."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.connections = 1
        self.text = json.dumps(document, indent=4)
        self.writes = 0
        self.has_collaboration = False
        self.path = "a.ipynb"

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.text)
        return document

    async def page(self) -> Page:
        return Page(self.path, self.connections)

    async def holds_notebooks(self) -> bool:
        return self.has_collaboration

    async def read(self, path: str) -> dict[str, Any]:
        return self.document

    async def read_text(self, path: str) -> str:
        return self.text

    async def write(self, path: str, document: dict[str, Any]) -> None:
        await self.write_text(path, json.dumps(document, indent=1))

    async def write_text(self, path: str, text: str) -> None:
        self.text, self.writes = text, self.writes + 1

    def edit(self, source: str) -> None:
        """Somebody else edits the first cell."""
        document = self.document
        document["cells"][0]["source"] = source
        self.text = json.dumps(document, indent=2)


class Case:
    """One answer, shown in a notebook of a server, and what looks after it."""

    def __init__(self, now: list[float], *, is_saved: bool = True) -> None:
        self.now = now
        self.answer = ShownAnswer("demo", "page 1")
        self.display = SavedDisplay("c1", CODE, "run 1", {"text/plain": "so far", "text/markdown": "so far"})
        self.answer.displays.append(self.display)
        self.server: Any = Server(notebook(*([shown(self.display)] if is_saved else [])))
        self.original = self.server.text
        self.watch = PageWatch(lambda: None)
        self.watch.add(self.answer)
        self.watch.note("page 1")

    def look(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.now[0] += 1
            asyncio.run(self.watch._look(self.server))

    def close(self) -> None:
        """Close the page, and wait until that is believed."""
        self.server.connections = 0
        self.look(int(watch.CLOSED_S) + 2)

    def open(self, session: str, *, after_s: float = 10) -> None:
        """A page connects."""
        self.now[0] += after_s
        self.server.connections = 1
        self.watch.note(session)
        self.look()

    def end(self) -> None:
        self.display.bundle = {"text/plain": "the end"}
        self.answer.end()

    @property
    def saved(self) -> list[str]:
        outputs = self.server.document["cells"][1]["outputs"]
        return [output["data"]["text/plain"] for output in outputs]


def test_while_a_page_is_connected_the_file_is_its_own(now: list[float]) -> None:
    case = Case(now)
    case.look(20)
    case.end()
    case.look(20)
    assert (case.server.writes, case.saved) == (0, ["asking"])
    assert case.watch.hint("page 2") == "", "its page has shown it"


@pytest.mark.parametrize("is_saved", [True, False])
def test_an_answer_that_ends_while_no_page_is_connected_is_put_into_the_file(
    now: list[float], is_saved: bool
) -> None:
    case = Case(now, is_saved=is_saved)
    case.close()
    assert case.saved == [
        "so far\n\ndemo was still answering when this page was closed; %sollol_last shows the answer."
    ]
    assert case.server.writes == 1, "once"
    case.end()
    case.look(5)
    assert case.saved == ["the end"]
    case.open("page 2")
    assert (case.server.writes, case.saved) == (2, ["the end"])
    assert case.watch.hint("page 2") == "", "the notebook has it"


def test_an_answer_that_ends_between_two_looks_is_put_into_the_file(now: list[float]) -> None:
    case = Case(now)
    case.look()
    case.server.connections = 0
    case.end()
    case.close()
    assert case.saved == ["the end"]


def test_a_page_that_is_loaded_again_soon_finds_its_file_unchanged_and_a_hint(now: list[float]) -> None:
    case = Case(now)
    case.server.connections = 0
    case.look(4)
    case.server.connections = 1
    case.look()
    case.end()
    case.watch.note("page 2")  # was queued while the kernel was busy
    case.look(10)
    assert case.server.writes == 0
    assert case.watch.hint("page 2") == (
        "The page was opened again while demo answered; this shows the answer:\n%sollol_last"
    )
    assert case.watch.hint("page 2") == "", "once"
    case.watch.note("page 2")
    assert case.watch.hint("page 2") == "", "though it ran its cell soon after the end"
    case.close()
    assert case.saved == ["the end"], "when that page is closed, too"


def test_without_a_server_a_page_that_was_loaded_again_gets_a_hint(now: list[float]) -> None:
    case = Case(now)
    case.watch.note("page 2")
    assert case.watch.hint("page 2").startswith("The page was opened again while demo is answering;")


def test_several_missed_answers_are_one_line(now: list[float]) -> None:
    case = Case(now)
    case.watch.add(ShownAnswer("demo", "page 1"))
    case.watch.note("page 2")
    assert case.watch.hint("page 2") == (
        "The page was opened again while 2 answers were written; %sollol_answers lists them."
    )


def test_a_client_that_is_heard_long_after_the_end_has_missed_nothing(now: list[float]) -> None:
    case = Case(now)
    case.end()
    now[0] += 60
    case.watch.note("page 2")
    assert case.watch.hint("page 2") == ""


@pytest.mark.parametrize("is_heard", [True, False])
def test_for_a_page_that_comes_back_as_it_was_the_file_is_restored(now: list[float], is_heard: bool) -> None:
    case = Case(now)
    case.close()
    case.end()
    case.look(8)
    assert (case.server.writes, case.saved) == (2, ["the end"])
    case.server.connections = 1
    now[0] += 1
    if is_heard:
        case.watch.note("page 1")
    case.look(1 if is_heard else 6)
    assert case.server.text == case.original, "every byte"
    assert case.watch.hint("page 1") == ""


def test_a_file_that_was_changed_since_is_not_restored(now: list[float]) -> None:
    case = Case(now)
    case.end()
    case.close()
    case.server.edit("by somebody else")
    case.open("page 1")
    assert case.server.writes == 1


def test_what_somebody_else_has_changed_before_the_end_was_put_in_stays_when_the_file_is_restored(
    now: list[float],
) -> None:
    case = Case(now)
    case.close()
    case.server.edit("by somebody else")
    edited = case.server.text
    case.end()
    case.look(2)
    assert case.saved == ["the end"]
    case.open("page 1")
    assert case.server.text == edited


def test_a_page_that_may_have_read_the_file_before_it_was_changed_gets_a_hint(now: list[float]) -> None:
    case = Case(now)
    case.end()
    case.server.connections = 0
    while not case.server.writes:
        case.look()
    case.open("page 2", after_s=0.1)  # its connection is seen right after the change
    assert case.watch.hint("page 2") != ""
    assert case.watch.hint("page 2") == "", "once"


def test_where_the_server_holds_the_notebooks_no_file_is_changed(now: list[float]) -> None:
    case = Case(now)
    case.server.has_collaboration = True
    case.end()
    case.close()
    assert case.server.writes == 0
    case.open("page 2")
    assert case.watch.hint("page 2") != ""


@pytest.mark.parametrize("path", ["a.ipynb", "a.md"])
def test_no_text_file_of_jupytext_is_changed(now: list[float], path: str) -> None:
    case = Case(now)
    document = case.server.document
    if path.endswith(".ipynb"):
        document["metadata"]["jupytext"] = {"formats": "ipynb,py:percent"}
    case.server.text, case.server.path = json.dumps(document), path
    case.end()
    case.close()
    assert case.server.writes == 0
    case.open("page 2")
    assert case.watch.hint("page 2") != ""


def test_what_fails_once_is_tried_again(now: list[float]) -> None:
    case = Case(now)
    write_text = case.server.write_text

    async def fail_once(path: str, text: str) -> None:
        case.server.write_text = write_text
        raise TransportTimeoutError("no answer within the time limit")

    def look_and_fail(seconds: int) -> None:
        case.server.write_text = fail_once
        with pytest.raises(TransportTimeoutError):
            case.look(seconds)

    case.server.connections = 0
    look_and_fail(int(watch.CLOSED_S) + 2)
    case.look()
    assert case.saved[0].startswith("so far\n\ndemo was still answering")
    case.server.connections = 1
    now[0] += 1
    case.watch.note("page 1")
    look_and_fail(1)
    case.look()
    assert case.server.text == case.original, "the page that is back finds it as it was"


def test_a_file_that_changes_while_it_is_read_is_not_written(now: list[float]) -> None:
    case = Case(now)

    async def read(path: str) -> dict[str, Any]:
        document: dict[str, Any] = case.server.document
        if case.server.document["cells"][0]["source"] == "1":
            case.server.edit("by somebody else")
        return document

    case.server.read = read
    case.end()
    case.close()
    assert case.saved == ["the end"], "at the next look"
    assert case.server.document["cells"][0]["source"] == "by somebody else"


def test_a_page_that_connects_at_the_last_moment_keeps_its_file(now: list[float]) -> None:
    case = Case(now)

    async def read(path: str) -> dict[str, Any]:
        case.server.connections = 1
        document: dict[str, Any] = case.server.document
        return document

    case.server.read = read
    case.end()
    case.close()
    assert case.server.writes == 0


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (HttpStatusError("403 Forbidden", status=403, reason="Forbidden"), 1),
        (TransportError("its certificate is not trusted"), watch.MOST_FAILURES),
        (ValueError("Out of range float values are not JSON compliant"), watch.MOST_FAILURES),
        (RecursionError("maximum recursion depth exceeded"), watch.MOST_FAILURES),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_is_soon_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int
) -> None:
    asked = []

    class Refusing:
        async def page(self) -> Page:
            asked.append("page")
            raise error

        async def close(self) -> None:
            asked.append("close")

    monkeypatch.setattr(watch, "POLL_S", 0.0)
    watching = PageWatch(lambda: Refusing())  # type: ignore[arg-type, return-value]
    watching._answers = [ShownAnswer("demo", "page 1")]
    asyncio.run(watching._watch())
    assert asked == [*["page"] * tries, "close"]


def test_a_hint_alone_needs_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Unused:
        async def close(self) -> None:
            closed.append(True)

    watching = PageWatch(lambda: Unused())  # type: ignore[arg-type, return-value]
    answer = ShownAnswer("demo", "page 1")
    watching._answers = [answer]
    watching.note("page 2")
    answer.end()
    monkeypatch.setattr(watch, "SETTLE_S", -1.0)
    asyncio.run(watching._watch())
    assert closed
    assert watching.hint("page 2") != ""


def test_an_answer_that_begins_while_a_watch_ends_has_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    class Refusing:
        async def page(self) -> Page:
            nonlocal asked
            asked += 1
            raise HttpStatusError("http://127.0.0.1:8888/api/sessions: 403 Forbidden", status=403, reason="")

        async def close(self) -> None:
            if asked == 1:
                watching._start()
            await asyncio.sleep(0)

    async def begin() -> None:
        watching._start()
        while (others := asyncio.all_tasks() - {asyncio.current_task()}) != set():
            await asyncio.wait(others)

    monkeypatch.setattr(watch, "POLL_S", 0.0)
    watching = PageWatch(lambda: Refusing())  # type: ignore[arg-type, return-value]
    watching._answers = [ShownAnswer("demo", "page 1")]
    asyncio.run(begin())
    assert asked == 2
