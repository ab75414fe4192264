"""A streaming answer: read by several threads, started over, shown without terminal control sequences."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from IPython.core.formatters import DisplayFormatter

from sollol_nb.chat.completion import Completion
from sollol_nb.notebook.answers.views import (
    STARTS_OVER,
    LiveAnswer,
    PlainView,
    TerminalView,
    View,
    error_bundle,
)


def chunk(text: str, **more: object) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": text}, **more}


def test_reading_threads_lose_no_chunks() -> None:
    answer, parts = LiveAnswer("demo"), 20_000
    ended, interval_s = threading.Event(), sys.getswitchinterval()

    def read() -> None:
        while not ended.is_set():
            assert set(answer.text) <= {"x"}

    sys.setswitchinterval(1e-6)  # threads switch as often as possible
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for _ in range(parts):
        answer.add(chunk("x"))
    ended.set()
    for thread in readers:
        thread.join()
    sys.setswitchinterval(interval_s)
    assert len(answer.text) == parts == len(answer.completion().text)


@pytest.mark.parametrize("make_view", [TerminalView, PlainView])
def test_an_answer_that_starts_over_is_printed_from_its_beginning(
    make_view: type[TerminalView | PlainView], capsys: pytest.CaptureFixture[str]
) -> None:
    view: View = make_view()
    answer = LiveAnswer("demo")
    answer.add(chunk("Hello wor"))
    view.show(answer)
    answer.add(chunk("Good morning, ", _restarted=True))  # longer than the void text
    view.show(answer)
    answer.add(chunk("all", done=True))
    view.finish(answer.completion())
    shown = capsys.readouterr()
    assert "Hello worGood morning, all\n" in shown.out
    assert shown.err.split("\n") == ["", STARTS_OVER, ""]


@pytest.mark.parametrize("make_view", [TerminalView, PlainView])
def test_a_model_cannot_control_the_terminal(
    make_view: type[TerminalView | PlainView], capsys: pytest.CaptureFixture[str]
) -> None:
    view: View = make_view()
    answer = LiveAnswer("demo")
    answer.add(chunk("a\x1b]52;c;cm0gLXJm\x07b\x9b2J\tc\n", done=True))
    view.show(answer)
    view.finish(answer.completion())
    assert capsys.readouterr().out.startswith("ab\tc\n")


@pytest.mark.parametrize("make_view", [TerminalView, PlainView])
def test_colours_are_not_printed_wherever_they_are_cut(
    make_view: type[TerminalView | PlainView], capsys: pytest.CaptureFixture[str]
) -> None:
    view: View = make_view()
    answer = LiveAnswer("demo")
    for part in "a \x1b[1;31mred\x1b[0m word":
        answer.add(chunk(part))
        view.show(answer)
    view.finish(answer.completion())
    assert capsys.readouterr().out.startswith("a red word\n")


def test_an_error_after_an_answer_is_one_line_with_code() -> None:
    shown = error_bundle("ModelNotFoundError: <m> is missing. Run `ollama pull <m>`")
    assert shown["text/plain"] == "ModelNotFoundError: <m> is missing. Run `ollama pull <m>`"
    assert "<m>" not in shown["text/markdown"] + shown["text/html"]
    assert shown["text/markdown"].startswith("**ModelNotFoundError**: &lt;m> is missing. Run <code>")
    assert shown["text/html"].endswith("Run <code>ollama pull &lt;m&gt;</code></p>")


def test_the_repr_of_a_completion_has_no_control_sequences() -> None:
    formatter: Any = DisplayFormatter()
    formats, _ = formatter.format(Completion(model="demo", message={"content": "\x1b[2J"}))
    assert "\x1b" not in formats["text/plain"]
