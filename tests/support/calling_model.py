"""A model that calls functions as a script says, for tests: each answer depends on how many results it was given.

It is a `scripted_model` whose chat template ends with a special token for the number of results, and each of these
tokens begins its own answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.scripted_model import write_scripted
from tests.support.tool_model import TEMPLATE

_ROUND = "<|after{count}|>"
_COUNTING = (
    "{% set ns = namespace(n=0) %}{% for message in messages %}{% if message.role == 'tool' %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
)
CALLING_TEMPLATE = TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", _COUNTING + "<|im_start|>assistant\n<|after{{ ns.n }}|>{% endif %}"
)

Call = tuple[str, Mapping[str, Any]]


def write_calling(
    path: Path, answers: Sequence[Sequence[Call] | str], *, words: int = 40, blocks: int = 4
) -> Path:
    """Write a model that gives these answers: calls, or a text; returns its path.

    Args:
        answers: in the order in which they are asked for, the text last. No two calls are equal.
        words: how many tokens an answer with calls has before them, so that it takes a while.
    """
    after: dict[str, Sequence[str]] = {}
    results = 0
    for number, answer in enumerate(answers):
        mark = _ROUND.format(count=results)
        if isinstance(answer, str):
            after[mark] = [f"({number}.{at}) {word} " for at, word in enumerate(answer.split())]
            break
        # The newline before the first call is not of its token: Ollama loses a call that comes together with text.
        pieces = [f"(think {number}.{at}) " for at in range(words)] + [f"(call {number})\n"]
        for name, arguments in answer:
            body = json.dumps({"name": name, "arguments": dict(arguments)})
            pieces.append(f"<tool_call>\n{body}\n</tool_call>\n")
        after[mark] = pieces
        results += len(answer)
    specials = ("<|im_start|>", "<|im_end|>", *after)
    return write_scripted(
        path, ["nothing to say"], template=CALLING_TEMPLATE, specials=specials, after=after, blocks=blocks
    )
