"""The completion: chunks joined, and shown."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest
from IPython.lib.pretty import pretty

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import answer_key


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "message": {"role": "assistant", "content": text}, "done": False, **more}


LAST = {
    "model": "demo",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "done_reason": "stop",
    "eval_count": 2,
    "_routing": {
        "backend": "llama.cpp-distributed",
        "layout": "5/4/4",
        "load_ms": 1234.0,
        "ttft_ms": 80.4,
        "tokens_per_s": 41.6,
        "note": "a note",
    },
}


def test_chunks_are_joined_and_the_last_brings_the_rest() -> None:
    answer = Completion.from_chunks([piece("Hel"), piece("lo"), LAST])

    assert answer.text == "Hello"
    assert answer["message"] == {"role": "assistant", "content": "Hello"}
    assert answer["done"] is True
    assert answer.finish_reason == "stop"
    assert answer.routing == LAST["_routing"]
    assert answer == {**LAST, "message": {"role": "assistant", "content": "Hello"}}


def test_thinking_and_tool_calls_are_joined_too() -> None:
    call, other = {"function": {"name": "a"}}, {"function": {"name": "b"}}
    answer = Completion.from_chunks(
        [
            {"message": {"content": "", "thinking": "Hm"}},
            {"message": {"content": "", "thinking": "m.", "tool_calls": [call]}},
            {"message": {"content": "Yes", "tool_calls": [other]}, "done": True},
        ]
    )

    assert answer["message"] == {
        "role": "assistant",
        "content": "Yes",
        "thinking": "Hmm.",
        "tool_calls": [call, other],
    }


def test_restarted_answer_begins_again() -> None:
    answer = Completion.from_chunks(
        [
            {"message": {"content": "old", "thinking": "old", "tool_calls": [{"function": {"name": "old"}}]}},
            piece("new", _restarted=True),
            piece(" text"),
            LAST,
        ]
    )

    assert answer["message"] == {"role": "assistant", "content": "new text"}


@pytest.mark.parametrize("chunks", [[], [{}], [{"message": None}]])
def test_answer_without_text_is_empty(chunks: list[dict[str, Any]]) -> None:
    answer = Completion.from_chunks(chunks)

    assert answer.text == answer.finish_reason == ""
    assert answer.routing == {}
    assert answer.footer() == ""


@pytest.mark.parametrize(
    ("changes", "footer"),
    [
        (
            {},
            "demo \u00b7 llama.cpp-distributed \u00b7 layers 5/4/4 \u00b7 loaded in 1.2 s \u00b7 first token 80 ms"
            " \u00b7 42 tokens/s \u00b7 2 tokens \u00b7 a note",
        ),
        (
            {"_routing": {"backend": "llama.cpp-local", "load_ms": 312.0, "loaded_by": "process 7 (a kernel)"}},
            "demo \u00b7 llama.cpp-local \u00b7 already loaded \u00b7 2 tokens",
        ),
        ({"_routing": {"backend": "ollama-pool", "ttft_ms": 0.0, "load_ms": None}, "eval_count": 0},
         "demo \u00b7 ollama-pool \u00b7 first token 0.0 ms \u00b7 0 tokens"),
        ({"_routing": {"drafted_tokens": 20, "accepted_tokens": 15}},
         "demo \u00b7 drafts: 15 of 20 accepted \u00b7 2 tokens"),
        ({"_routing": {"drafted_tokens": 20, "accepted_tokens": 0}}, "demo \u00b7 2 tokens"),
        ({"_routing": {}, "eval_count": 1}, "demo \u00b7 1 token"),
        ({"_routing": {}, "done_reason": "length"}, "demo \u00b7 2 tokens \u00b7 stopped at max_tokens"),
        ({"_routing": {}, "done_reason": "cancelled", "eval_count": None}, "demo \u00b7 stopped"),
    ],
)  # fmt: skip
def test_footer_is_one_line_of_what_is_known(changes: dict[str, Any], footer: str) -> None:
    assert Completion({**LAST, **changes}).footer() == footer


def test_notebook_shows_the_text_and_an_escaped_footer() -> None:
    answer = Completion.from_chunks([piece("**Hi**"), {**LAST, "model": "<script>x", "_routing": {}}])

    shown = answer._repr_mimebundle_()

    assert shown["text/plain"] == "**Hi**\n\n[<script>x \u00b7 2 tokens]"
    mark = f'class="sollol-answer sollol-answer-{answer_key("**Hi**")}"'
    assert shown["text/markdown"] == f"**Hi**\n\n<small {mark}>&lt;script&gt;x \u00b7 2 tokens</small>"
    assert str(answer) == shown["text/plain"]
    assert repr(answer) == "<Completion of <script>x: '**Hi**'>"


def test_plain_notebook_shows_the_answer_and_not_a_dict() -> None:
    answer = Completion.from_chunks([piece("Hi"), {**LAST, "_routing": {}}])

    assert pretty(answer) == "Hi\n\n[demo \u00b7 2 tokens]"  # type: ignore[no-untyped-call]


# --- pickled ----------------------------------------------------------------------------------


@dataclass
class Person:
    name: str


def structured(schema: object, text: str = '{"name": "Ada"}') -> Completion:
    answer = Completion(message={"content": text})
    answer.schema = schema
    return answer


def defined_again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, as a cell that runs once more defines it."""
    again = make_dataclass("Person", [("name", str)])
    again.__module__ = __name__
    monkeypatch.setattr(sys.modules[__name__], "Person", again)
    return again


@pytest.mark.parametrize("when", ["before it is written", "before it is read"])
def test_a_pickled_answer_survives_that_its_class_is_defined_again(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = structured(Person)
    if when == "before it is written":
        again = defined_again(monkeypatch)
        data = pickle.dumps(answer)
    else:
        data = pickle.dumps(answer)
        again = defined_again(monkeypatch)
    read = pickle.loads(data)
    assert read == answer
    assert read.value == again(name="Ada")


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [(Person, '{"name": "Ada"}', {"name": "Ada"}), (list[Person], '[{"name": "Ada"}]', [{"name": "Ada"}])],
    ids=str,
)
def test_a_pickled_answer_can_be_read_where_its_class_is_not_defined(
    schema: object, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(structured(schema, text))
    monkeypatch.delattr(sys.modules[__name__], "Person")
    assert pickle.loads(data).value == value


def test_an_answer_of_a_class_inside_of_a_function_can_be_pickled() -> None:
    @dataclass
    class Local:
        name: str

    assert pickle.loads(pickle.dumps(structured(Local))).value == {"name": "Ada"}


def test_a_copy_keeps_the_class_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Person
    answer = structured(first)
    defined_again(monkeypatch)
    for copied in (copy.copy(answer), copy.deepcopy(answer)):
        assert copied.schema is first
        assert copied.value == first(name="Ada")


def test_an_answer_without_schema_is_pickled_as_it_is() -> None:
    answer = Completion(message={"content": "x"})
    answer.shown_as = "json"
    read = pickle.loads(pickle.dumps(answer))
    assert (read, read.schema, read.shown_as) == (answer, None, "json")
