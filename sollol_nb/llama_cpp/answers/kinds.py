"""Answers that survive their engine: streamed from one llama-server, continued on another when that one dies.

An `Answer` holds all that another engine needs to go on. It sends nothing itself: it says what to ask for
(`request`) and reads what comes back (`translate`). There are two kinds:

* `RawAnswer` streams token ids from `/completion`. Another engine gets the prompt's ids followed by those
  generated so far, and goes on as if nothing had happened: at temperature 0 token for token.
* `ChatAnswer` streams from `/v1/chat/completions`, whose parser knows tool calls, images and the reasoning markup
  of every template, but which takes no ids. Another engine is asked the whole question again, and what it repeats
  is not shown a second time. If it writes something else, the answer cannot go on.

Text that went out is never taken back, sent twice or lost. A raw answer goes on from the last token whose text
went out, so text that the engine held back (it may begin a stop string) is generated again. The stream leaves out
the ids of tokens that end within a character; they are found again by tokenising that character's text. Where that
cannot be trusted, and where an answer may have ended with the last event seen, the tokens of that text are
generated again and not shown again (temperature 0), or taken from the tokenised text (sampling).

Seeds: an answer without a seed draws one when it is made. The first engine uses the seed as it is; one that
continues after n tokens uses (seed + n) modulo 2**31. So sampling goes on with the same settings and a new random
sequence that is the same whenever it is cut at the same place. Temperature 0 needs no seed.

Of llama.cpp: `tools/server/server-context.cpp` (process_token, send_partial_response), `common/sampling.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.chat import ChatAnswer
from sollol_nb.llama_cpp.answers.protocol import OPENING_TAG
from sollol_nb.llama_cpp.answers.raw import RawAnswer

__all__ = ["Answer", "ChatAnswer", "RawAnswer", "answer_for", "needs_chat_parser"]

# Beyond <think>: markup of thoughts or answers that only llama-server's own parsers know.
_OTHER_MARKUP = re.compile(
    r"""[<\[◁](?!/?think>)[^\s'"<>\[\]◁▷]{0,20}(think|thought|channel|reasoning)[^\s'"<>\[\]◁▷]{0,20}[>\]▷]"""
    r"|<response></response>|\[BEGIN FINAL RESPONSE\]|<\|inner_prefix\|>|<\|open\|>|>>>all|<atem:",
    re.IGNORECASE,
)


def answer_for(
    model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, chat_template: str
) -> Answer:
    """A new answer of the kind that suits the question.

    Args:
        messages, options: Ollama-shaped, as `messages.check_messages` and `check_options` give them.
        chat_template: of the model; `/props` names it so.
    """
    if needs_chat_parser(messages, options, chat_template):
        return ChatAnswer(model, messages, options)
    return RawAnswer(model, messages, options, splits_thinking=OPENING_TAG in chat_template)


def needs_chat_parser(
    messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], chat_template: str
) -> bool:
    """Whether only llama-server's chat endpoint can do it: tools, images, or markup other than `<think>`."""
    return bool(
        options.get("tools")
        or any(map(_has_media, messages))
        or _OTHER_MARKUP.search(chat_template)
        or (options.get("format") and OPENING_TAG in chat_template)  # the grammar has to leave room for thoughts
    )


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return bool(message.get("images")) or any(part.get("type") != "text" for part in parts)
