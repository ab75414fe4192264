"""Rendered prompts are kept for the same messages, and for no others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from sollol_nb.errors import ConnectFailedError
from sollol_nb.llama_cpp.answers.prompts import MOST_CHARACTERS, MOST_PROMPTS, RenderedPrompts


class Engine:
    """Renders the body of a request as its text."""

    def __init__(self) -> None:
        self.asked = 0

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        self.asked += 1
        if body.get("fails") == self.asked:
            raise ConnectFailedError("it ended")
        return {"prompt": str(body)} if path == "/apply-template" else {"tokens": [self.asked]}


def rendered(prompts: RenderedPrompts, **body: Any) -> Any:
    return asyncio.run(prompts.post("/apply-template", body))


def test_the_same_messages_are_rendered_once() -> None:
    engine = Engine()
    prompts = RenderedPrompts(engine.post, "{{ messages }}")
    assert rendered(prompts, messages="a") == rendered(prompts, messages="a") == {"prompt": "{'messages': 'a'}"}
    assert engine.asked == 1
    assert rendered(prompts, messages="a", tools=[]) != rendered(prompts, messages="b")
    assert engine.asked == 3


@pytest.mark.parametrize("template", ["{{ strftime_now('%d') }}", "{{ date_string }}", "{{ datetime }}"])
def test_a_prompt_with_the_date_is_rendered_anew(template: str) -> None:
    engine = Engine()
    prompts = RenderedPrompts(engine.post, template)
    rendered(prompts, messages="a")
    rendered(prompts, messages="a")
    assert engine.asked == 2


def test_few_prompts_of_moderate_length_are_kept() -> None:
    engine = Engine()
    prompts = RenderedPrompts(engine.post, "")
    for number in range(MOST_PROMPTS + 1):
        rendered(prompts, messages=number)
    rendered(prompts, messages=MOST_PROMPTS)
    assert engine.asked == MOST_PROMPTS + 1
    rendered(prompts, messages=0)
    assert engine.asked == MOST_PROMPTS + 2
    for _ in range(2):
        rendered(prompts, messages="x" * MOST_CHARACTERS)
    assert engine.asked == MOST_PROMPTS + 4


def test_errors_and_other_requests_are_not_kept() -> None:
    engine = Engine()
    prompts = RenderedPrompts(engine.post, "")
    with pytest.raises(ConnectFailedError):
        rendered(prompts, fails=1)
    assert rendered(prompts, fails=1) == {"prompt": "{'fails': 1}"}
    assert [asyncio.run(prompts.post("/tokenize", {"content": "a"})) for _ in range(2)] == [
        {"tokens": [3]},
        {"tokens": [4]},
    ]
