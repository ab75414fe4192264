"""Answers in the background: waiting, giving up, cancelling, failing."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, RequestCancelledError
from sollol_nb.notebook.answers.background import BackgroundAnswer, MakeDisplay, cancel_all, show_in_cell
from sollol_nb.notebook.answers.request import CellRequest
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import io_loop
from sollol_nb.text.expansion import expand
from tests.support.engines import HANG_GUARD_S, eventually


class Stream:
    """A stream that ends when `end` is called."""

    def __init__(self, text: str = "so ", *, fails: Exception | None = None) -> None:
        self._text = text
        self._may_end = asyncio.Event()
        self._fails = fails

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        if self._text:
            yield {"message": {"content": self._text}, "done": False}
        await self._may_end.wait()
        if self._fails is not None:
            raise self._fails
        yield {"message": {"content": "far"}, "done": True, "done_reason": "stop"}

    def end(self) -> None:
        io_loop().call_soon_threadsafe(self._may_end.set)


def background(
    stream: Stream, make_display: MakeDisplay | None = None, keep: Callable[[Completion], object] | None = None
) -> BackgroundAnswer:
    request = CellRequest(model="demo", prompt="Hi", system=None, options={})
    return BackgroundAnswer(request, stream.chunks(), EventBus(), make_display, keep=keep)


def test_a_waiter_that_gave_up_is_not_called_back(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream()
    handle = background(stream)

    async def wait_a_moment() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)

    asyncio.run(wait_a_moment())
    asyncio.run(wait_a_moment())
    with caplog.at_level(logging.DEBUG):
        stream.end()
        assert handle.result(HANG_GUARD_S)["message"]["content"] == "so far"
        assert asyncio.run(_awaited(handle)) is handle.result()
    assert [record.getMessage() for record in caplog.records if "callback" in record.getMessage()] == []


async def _awaited(handle: BackgroundAnswer) -> object:
    return await handle


def test_cancelling_all_answers_ends_their_threads() -> None:
    shown: list[dict[str, Any]] = []

    def make_display(bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        shown.append(bundle)
        return shown.append

    handle = background(Stream(), make_display)
    handle._ipython_display_()
    cancel_all(wait_s=HANG_GUARD_S)
    assert handle.done
    assert "stopped" in shown[-1]["text/plain"]
    assert [thread for thread in threading.enumerate() if thread.name == "sollol_nb display"] == []


def test_a_prompt_that_inserts_an_answer_waits_for_all_of_it() -> None:
    stream = Stream()
    handle = background(stream)
    inserted: list[str] = []
    waiter = threading.Thread(target=lambda: inserted.append(expand("{{ handle }}!", {"handle": handle})))
    waiter.start()
    stream.end()
    waiter.join(HANG_GUARD_S)
    assert inserted == ["so far!"]

    failed = background(Stream())
    failed.cancel()
    with pytest.raises(ConfigError, match=r"{{ failed }}: RequestCancelledError: demo: stopped"):
        expand("{{ failed }}", {"failed": failed})


def test_several_loops_may_await_the_same_answer() -> None:
    stream = Stream()
    handle = background(stream)
    values: list[object] = []
    waiters = [threading.Thread(target=lambda: values.append(asyncio.run(_awaited(handle)))) for _ in range(3)]
    for thread in waiters:
        thread.start()
    stream.end()
    for thread in waiters:
        thread.join(HANG_GUARD_S)
    assert values == [handle.result()] * 3


def test_an_awaited_answer_is_done() -> None:
    async def cell() -> None:
        for _ in range(200):  # the awaiting thread often runs before the I/O thread has finished its callbacks
            stream = Stream()
            handle = background(stream)
            stream.end()
            completion = await handle
            assert (handle.done, handle.state, handle.completion) == (True, "done", completion)

    asyncio.run(cell())


def test_awaiting_a_cancelled_answer_raises() -> None:
    handle = background(Stream())
    assert handle.cancel()
    with pytest.raises(RequestCancelledError):
        asyncio.run(_awaited(handle))
    with pytest.raises(RequestCancelledError):
        handle.result(HANG_GUARD_S)


def test_an_answer_cancelled_before_its_first_token_says_so() -> None:
    handle = background(Stream(""))
    assert handle.cancel()
    with pytest.raises(RequestCancelledError, match=r"^demo: stopped before any text arrived$"):
        handle.result(HANG_GUARD_S)
    assert handle.completion is None


def test_the_running_cell_shows_answers_in_the_background_until_their_end() -> None:
    updates: list[str] = []

    def make_display(bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        updates.append(bundle["text/plain"])
        return lambda new: updates.append(new["text/plain"])

    stream = Stream()
    handle = background(stream, make_display)
    handle._ipython_display_()
    eventually(lambda: handle.text == "so ", "the first token")
    show_in_cell()
    assert updates[-1] == "so "
    stream.end()
    handle.join(HANG_GUARD_S)
    updates.clear()
    show_in_cell()
    show_in_cell()
    assert [text[:6] for text in updates] == ["so far"], "once more in the cell that runs then"


def test_an_answer_is_kept_at_its_end_whole_or_partial() -> None:
    kept: list[Completion] = []
    whole, stopped = Stream(), Stream()
    done, cut = background(whole, keep=kept.append), background(stopped, keep=kept.append)
    whole.end()
    done.result(HANG_GUARD_S)
    eventually(lambda: cut.text == "so ", "the first token")
    cut.cancel()
    cut.join(HANG_GUARD_S)
    assert [(completion.text, completion.finish_reason) for completion in kept] == [
        ("so far", "stop"),
        ("so ", "cancelled"),
    ]


def test_an_unexpected_error_keeps_the_partial_answer() -> None:
    stream = Stream(fails=ZeroDivisionError("of a bug"))
    handle = background(stream)
    stream.end()
    with pytest.raises(ZeroDivisionError):
        handle.result(HANG_GUARD_S)
    assert handle.completion is not None
    assert (handle.completion.text, handle.completion.finish_reason) == ("so ", "error")
