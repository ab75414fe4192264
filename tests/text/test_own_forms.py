"""Objects say by their methods what a model reads of them; what goes wrong there stops nobody."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from dataclasses import dataclass
from typing import Any

import pandas as pd
import PIL.Image
import pytest

from sollol_nb.text import own_forms
from sollol_nb.text.readable import form_of, readable


def png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def saying(**methods: Any) -> Any:
    """An object with methods that return, raise, or await these."""

    def method(said: Any) -> Any:
        def call(self: object, **hints: Any) -> Any:
            if isinstance(said, Exception):
                raise said
            return said(**hints) if callable(said) else said

        return call

    def text(self: object) -> str:
        return "its str"

    named = {f"_{name}_": method(said) for name, said in methods.items()}
    return type("Chart", (), {**named, "__str__": text})()


@dataclass
class Book:
    title: str

    def _repr_llm_(self) -> str:
        return f"A book: {self.title}"


class Sales(pd.DataFrame):
    def _repr_llm_(self) -> str:
        return f"Sales of {len(self)} days"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Book("Emma"), "A book: Emma"),
        ([Book("Emma"), 1], '["A book: Emma", 1]'),
        ({"of": Book("Emma")}, '{"of": "A book: Emma"}'),
        (Sales({"a": [1, 2]}), "Sales of 2 days"),
        (saying(repr_llm="said", prompt_text="ours"), "said"),
        (saying(repr_llm=None, prompt_text="ours"), "ours"),
        (saying(ai_repr={"text/plain": "plain"}, repr_llm="said"), "plain"),
        (saying(ai_repr=None, repr_llm="said"), "said"),
        (saying(ai_repr={"text/plain": "plain", "text/markdown": "**marked**"}), "**marked**"),
        (saying(ai_repr={"text/html": "<b>x</b>", "application/json": {"a": 1}}), '{"a": 1}'),
        (saying(ai_repr={"text/x-tree": "a/b", "application/x-own": 1}), "a/b"),
        (saying(ai_repr="only a text"), "only a text"),
        (saying(ai_repr=lambda **hints: {"text/plain": str(hints)}), "{'multimodal': True}"),
        (saying(repr_llm=None), "its str"),
    ],
)
def test_an_object_says_what_it_looks_like(value: object, text: str) -> None:
    form = form_of(value)
    assert (form.text, form.problem, readable(value)) == (text, "", text)


def test_an_object_may_know_no_hints() -> None:
    class Plain:
        def _ai_repr_(self) -> dict[str, str]:
            return {"text/plain": "without hints"}

    assert readable(Plain()) == "without hints"


def test_image_and_text_of_an_object_belong_together() -> None:
    form = form_of(
        saying(ai_repr={"text/plain": "a chart of rain", "image/png": base64.b64encode(png()).decode()})
    )

    assert form.image is not None
    assert form.image.data == png()
    assert (form.text, form.beside) == ("a chart of rain", "a chart of rain")
    assert form_of(saying(ai_repr={"image/png": png()})).text == "PNG image, 3 x 2 pixels"


async def drawn_later(**hints: Any) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"text/plain": f"drawn later, {hints}"}


def test_an_awaitable_is_awaited_also_while_a_loop_runs_as_in_a_cell() -> None:
    async def cell() -> str:
        return readable(saying(ai_repr=drawn_later))

    assert asyncio.run(cell()) == readable(saying(ai_repr=drawn_later)) == "drawn later, {'multimodal': True}"


async def never(**hints: Any) -> None:
    await asyncio.Event().wait()


async def wrong(**hints: Any) -> None:
    raise ZeroDivisionError("of a chart")


@pytest.mark.parametrize(
    ("value", "text", "problem"),
    [
        (
            saying(repr_llm=ValueError("two\nlines")),
            "its str",
            "Chart._repr_llm_() failed (ValueError: two lines)",
        ),
        (saying(repr_llm=5), "its str", "Chart._repr_llm_() returned int, not a text"),
        (saying(ai_repr=[1]), "its str", "Chart._ai_repr_() returned list, not a dict by MIME type"),
        (saying(ai_repr={}), "its str", "Chart._ai_repr_() returned no text, PNG or JPEG (but nothing)"),
        (saying(ai_repr={"image/png": "?"}), "its str", "returned no text, PNG or JPEG (but image/png)"),
        (saying(ai_repr=wrong), "its str", "Chart._ai_repr_() failed (ZeroDivisionError: of a chart)"),
        (saying(ai_repr=KeyError("k"), repr_llm="said"), "said", "Chart._ai_repr_() failed (KeyError: 'k')"),
        (saying(ai_repr=1, prompt_text="ours"), "ours", "Chart._ai_repr_() returned int"),
    ],
)
def test_a_method_that_fails_is_passed_over_with_a_note(value: object, text: str, problem: str) -> None:
    form = form_of(value)
    assert form.text == text
    assert problem in form.problem
    assert "\n" not in form.problem


def test_what_is_never_done_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_forms, "AWAIT_LIMIT_S", 0.05)
    before = set(threading.enumerate())
    form = form_of(saying(ai_repr=never))

    assert (form.text, form.problem) == (
        "its str",
        "Chart._ai_repr_() failed (TimeoutError: no result within 0.05 s)",
    )
    assert set(threading.enumerate()) <= before


def test_what_an_object_says_is_limited() -> None:
    form = form_of(saying(repr_llm="x" * 50_000))
    assert form.text.endswith("\n[cut: 7,940 of 50,000 characters shown]")
    assert form.cut_chars == 50_000
    assert len(readable(saying(repr_llm="x" * 50_000), limit_chars=100_000)) == 50_000


def test_a_page_is_asked_for_as_ipython_does() -> None:
    class Plot:
        def _repr_mimebundle_(self, include: Any, exclude: Any) -> dict[str, str]:
            return {"text/plain": "a plot"}

    assert readable(Plot()) == "a plot"


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"repr_mimebundle": {"text/markdown": "# Shown", "text/html": "<h1>"}}, "# Shown"),
        ({"repr_mimebundle": ({"text/plain": "shown"}, {})}, "shown"),
        ({"repr_markdown": "*m*", "repr_html": "<i>"}, "*m*"),
        ({"repr_html": "<i>h</i>"}, "<i>h</i>"),
        ({"repr_html": ValueError()}, None),
        ({"repr_html": None}, None),
    ],
    ids=str,
)
def test_where_str_says_nothing_the_page_does(methods: dict[str, Any], text: str | None) -> None:
    value = type("Chart", (), dict(vars(type(saying(**methods))), __str__=object.__str__))()
    shown = readable(value)
    assert shown == text if text is not None else shown.startswith("<tests.text.test_own_forms.Chart object at")
