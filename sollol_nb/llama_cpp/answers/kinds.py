"""Which kind of answer suits a question."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.chat import ChatAnswer
from sollol_nb.llama_cpp.answers.prompts import ForeseenPrompts
from sollol_nb.llama_cpp.answers.protocol import OPENING_TAG, continues_message, has_media
from sollol_nb.llama_cpp.answers.raw import RawAnswer

# Other than <think>: markup of thoughts or answers that only llama-server's own parsers know.
_OTHER_MARKUP = re.compile(
    r"""[<\[◁](?!/?think>)[^\s'"<>\[\]◁▷]{0,20}(think|thought|channel|reasoning)[^\s'"<>\[\]◁▷]{0,20}[>\]▷]"""
    r"|<response></response>|\[BEGIN FINAL RESPONSE\]|<\|inner_prefix\|>|<\|open\|>|>>>all|<atem:",
    re.IGNORECASE,
)

# What may be one special token of the model: <|channel|>, <tool_call>, [TOOL_CALLS].
_MARKUP = re.compile(r"<[^\s'\"<>]{1,40}>|\[/?[A-Z][A-Z_]{1,30}\]")
_MAX_MARKUP = 200


def answer_for(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    chat_template: str,
    prompts: ForeseenPrompts | None = None,
) -> Answer:
    """A new answer of the kind that suits the question.

    Args:
        messages, options: Ollama-shaped, as `chat.messages` and `chat.option_checks` return them.
        chat_template: of the model, as `/props` gives it.
        prompts: the engine's prompts so far.
    """
    if needs_chat_parser(messages, options, chat_template):
        return ChatAnswer(
            model,
            messages,
            options,
            splits_thinking=OPENING_TAG in chat_template,
            markup=sorted(set(_MARKUP.findall(chat_template)))[:_MAX_MARKUP],
        )
    return RawAnswer(model, messages, options, splits_thinking=OPENING_TAG in chat_template, prompts=prompts)


def needs_chat_parser(
    messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], chat_template: str
) -> bool:
    """Whether only llama-server's chat endpoint can answer: tools, images, or markup other than `<think>`."""
    if options.get("tools") or any(map(has_media, messages)):
        return True
    if options.get("format") and continues_message(messages):
        return False  # its grammar would begin with the given text; the value is all that follows, as in Ollama
    return bool(
        _OTHER_MARKUP.search(chat_template)
        # The grammar must allow thoughts before the value.
        or (options.get("format") and OPENING_TAG in chat_template)
    )
