"""Calls of functions, as messages for the model and as lines and folds for people. What models write is not
trusted."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest

from sollol_nb.chat.chunk import Step
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.tool_steps import (
    call_text,
    error_text,
    folded_steps,
    line_of,
    lines_of,
    messages_of,
    result_text,
)


def step(call: str = "f", arguments: Any = None, result: str = "1", **more: Any) -> Step:
    whole: Any = {
        "round": 1,
        "id": "call_1",
        "call": call,
        "arguments": {} if arguments is None else arguments,
        "result": result,
        "error": "",
        "seconds": 0.25,
        "note": "",
        "text": "",
        "thinking": "",
    }
    return whole | more


def test_a_step_is_one_line() -> None:
    assert line_of(step("convert", {"amount": 3.5, "to": "EUR"}, "3.22")) == 'convert(amount=3.5, to="EUR") = 3.22'
    assert line_of(step(result="", error="ValueError: no")) == "f() failed: ValueError: no"
    assert line_of(step(result="one\ntwo")) == "f() = one …"
    assert line_of(step(arguments='{"cut": ')) == 'f({"cut": ) = 1'
    assert lines_of([step(note="it was cut")]) == "[f() = 1 (it was cut)]\n"
    assert len(line_of(step("f" * 500, {"x": "y" * 5000}, "z" * 5000))) < 300
    assert call_text("f", {"x": "y" * 5000}, 100).endswith("more characters)")


HOSTILE = (
    "<img src=x onerror=alert(1)>\n</small></summary></details>\n\n# head [l](javascript:alert(1)) $x$ \x1b[31m"
)


def test_nothing_that_a_model_or_a_result_says_leaves_its_fold() -> None:
    hostile = step(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, text=HOSTILE)
    for each in (hostile, hostile | {"error": HOSTILE}, hostile | {"arguments": HOSTILE}):
        markdown = folded_steps([each])  # type: ignore[list-item]
        outside = re.sub(r"(?ms)^(`{3,})[^\n]*\n.*?^\1$", "", markdown)
        assert "<img" not in outside
        assert "\x1b" not in markdown
        summary = re.search("<summary><small>(.*?)</small></summary>", outside)
        assert summary is not None
        assert not re.search("[<\n$]", summary[1])
        assert html.unescape(summary[1]).startswith("<img src=x")
        assert outside.count("</details>") == outside.count("<details>") == 1
        assert "](javascript:" not in outside


@pytest.mark.parametrize("end", ["![x](http://localhost/x.png)", "[x](http://localhost)", "<b>", "*x*", "`x`"])
def test_a_result_cannot_write_its_note(end: str) -> None:
    for result in (f"page\n[cut: {end}]", f"page\n[cut: 1 of 2 rows shown {end}]"):
        assert result_text(result) == (result, "")


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_an_error_without_a_readable_text_has_its_name() -> None:
    assert error_text(UnreadableError()) == "UnreadableError: (its text cannot be read)"


def test_a_result_with_fences_stays_in_its_own() -> None:
    assert "`````\n````\n# head\n````\n`````" in folded_steps([step(result="````\n# head\n````")])


def test_many_steps_are_one_more_fold() -> None:
    assert folded_steps([step()] * 6).count("<details>") == 6
    many = folded_steps([step(), *[step("g", error="no")] * 6])
    assert many.count("<details>") == many.count("</details>") == 8
    assert many.startswith("<details><summary><small>7 calls: f, g · 6 failed · 1.8 s</small></summary>")


def test_the_messages_are_what_backends_take() -> None:
    steps = [
        step(id="a", text="Well.", thinking="Hm."),
        step("g", "cut", "", id="b", error="no JSON"),
        step(round=2, id="c"),
    ]
    messages = messages_of(steps)
    assert check_messages([{"role": "user", "content": "?"}, *messages])[1:] == messages
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "assistant", "tool"]
    assert (messages[0]["content"], messages[0]["thinking"]) == ("Well.", "Hm.")
    assert [call["function"]["name"] for call in messages[0]["tool_calls"]] == ["f", "g"]
    assert messages[0]["tool_calls"][1]["function"]["arguments"] == {}
    assert messages[2]["content"] == "Error: no JSON"
    assert "thinking" not in messages[3]


@pytest.mark.parametrize("value", [None, 3, "text", {"a": [1]}, [1, 2]])
def test_results_are_readable(value: object) -> None:
    text, note = result_text(value)
    assert (len(text) < 20, note) == (True, "")


def test_a_result_that_says_nothing_of_being_cut_is_whole() -> None:
    assert result_text("x" * 7000) == ("x" * 7000, "")
    text, note = result_text("x" * 8001)
    cut = re.search(r"\n\[cut: (7,\d{3}|8,000) of 8,001 characters shown\]$", text)
    assert cut is not None
    assert note == f"the model got a part of the result: {cut[1]} of 8,001 characters shown"


def test_an_answer_shows_its_steps_first() -> None:
    answer = Completion(
        model="m", message={"role": "assistant", "content": "It is 1."}, done_reason="stop", _steps=[step()]
    )
    bundle = answer._repr_mimebundle_()
    assert bundle["text/plain"].startswith("[f() = 1]\nIt is 1.\n\n[m")
    assert bundle["text/markdown"].index("f() = 1 · 250 ms") < bundle["text/markdown"].index("It is 1.")
    chat = Chat("tour")
    chat.add({"role": "user", "content": "?"}, answer)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.turn_count == 1


def test_while_an_answer_streams_little_of_each_call_is_sent() -> None:
    long = step(arguments={"text": "a" * 9_000}, result="b" * 8_000)
    assert len(folded_steps([long], limit_chars=500)) < 2_000 < 17_000 < len(folded_steps([long]))


def test_an_answer_that_is_shown_as_a_page_shows_its_calls_above() -> None:
    message = {"role": "assistant", "content": "<b>x</b>"}
    completion = Completion({"message": message, "_steps": [step(result="<script>")]})
    completion.shown_as = "html"
    above, _, frame = completion._repr_mimebundle_()["text/html"].partition("<iframe")
    assert "f() = &lt;script&gt;" in above
    assert frame
