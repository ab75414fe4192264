"""A translation that is proven: on sample conversations it gives the same prompts as the Go template.

Go's side is `render.py`, which shares only the parser with the translation; Jinja's side is the library `jinja2`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sollol_nb.go_template.jinja import to_jinja
from sollol_nb.go_template.render import field_names, render, thinking_tags, with_response
from sollol_nb.go_template.syntax import UnknownSyntaxError, parse

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_ROLES = ("system", "user", "assistant", "tool")
_TEXTS = ("You are Mario.", "It's-a {{ me }}, %}!\n\n- \u00fc \\n 'q' \"Q\" <|x|>", " ", "two\nlines\n", "{}")
MAX_MESSAGES = 4


def proven_jinja(source: str) -> str:
    """The template in Jinja.

    Raises:
        UnknownSyntaxError: it cannot be translated, or the translation gives other prompts.
    """
    answer = _proven_jinja(source)
    if isinstance(answer, UnknownSyntaxError):
        raise answer
    return answer


def reads_tools(source: str) -> bool:
    """Whether a template that can be parsed uses tools."""
    return "Tools" in field_names(parse(source))


@functools.lru_cache(maxsize=32)
def _proven_jinja(source: str) -> str | UnknownSyntaxError:
    from jinja2 import TemplateError  # here, so that `%load_ext` is quick

    try:
        nodes = with_response(parse(source))
        translated = to_jinja(source)
        thinks = all(thinking_tags(nodes))
        template = _environment().from_string(translated)
        for messages in _conversations():
            for think in (True, False) if thinks else (False,):
                expected = render(nodes, messages, thinks=thinks, think=think)
                given = template.render(
                    messages=[_openai_message(message) for message in messages],
                    enable_thinking=think,
                    add_generation_prompt=True,
                )
                if given != expected:
                    raise UnknownSyntaxError("its translation gives other prompts")
    except UnknownSyntaxError as error:
        return error
    except (TemplateError, SyntaxError, RecursionError, TypeError, ValueError, LookupError) as error:
        return UnknownSyntaxError(f"its translation fails: {error}")
    return translated


@functools.cache
def _conversations() -> Sequence[Sequence[Mapping[str, str]]]:
    """All orders of roles up to `MAX_MESSAGES` that end with a question or a result, and one long conversation.

    The last message is never the assistant's: llama-server itself lets the model continue such a message.
    """
    orders = [
        order
        for count in range(1, MAX_MESSAGES + 1)
        for order in itertools.product(_ROLES, repeat=count)
        if order[-1] in ("user", "tool") and "user" in order
    ]
    orders.append(("system", *("user", "assistant") * 6, "user"))
    return [[_message(role, position) for position, role in enumerate(order)] for order in orders]


def _message(role: str, position: int) -> dict[str, str]:
    message = {"role": role, "content": _TEXTS[position % len(_TEXTS)]}
    if role == "assistant" and position % 2:
        message["thinking"] = "Let me think."
    return message


def _openai_message(message: Mapping[str, str]) -> dict[str, Any]:
    given = dict(message)
    thinking = given.pop("thinking", "")
    return {**given, "reasoning_content": thinking} if thinking else given


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as llama.cpp and the transformers library use it for chat templates."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = time.strftime
    return environment
