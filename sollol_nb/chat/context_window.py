"""What of a conversation fits the context of the place that answers it. Pure decisions; counting is handed in.

A conversation is cut only between turns, from its oldest one. A turn is a user's message with all that follows it
up to the next one (the answer, tool calls and their results). System messages and the last turn always stay.
Nothing is left out in silence: `Fitted.words` says what was dropped, and what cannot fit at all is a
ContextOverflowError.

The answer needs room too: `max_tokens` where it is given, but no more than half of the context; else a quarter of
it. The last turn alone may use that room up; the answer then has what is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sollol_nb.errors import ConfigError, ContextOverflowError

ERROR, DROP_OLDEST = OVERFLOW_CHOICES = ("error", "drop_oldest")
"""What a request may ask for where its messages do not fit: an error, or to drop its oldest turns."""

Message: TypeAlias = Mapping[str, Any]
CountTokens: TypeAlias = Callable[[Sequence[Message]], Awaitable[int]]
"""Tokens of the prompt that these messages make, the template's own included."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The messages that go out.

    Attributes:
        messages: what fits, in order.
        dropped_count: turns left out, the oldest ones.
        words: what was left out; "" if nothing was.
    """

    messages: tuple[Message, ...]
    dropped_count: int = 0
    words: str = ""


def check_overflow(choice: str) -> str:
    """The choice, or ConfigError if it is none."""
    if choice not in OVERFLOW_CHOICES:
        raise ConfigError(f"overflow={choice!r} must be {' or '.join(OVERFLOW_CHOICES)}")
    return choice


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where each turn begins. What is said before the first user message is a turn of its own."""
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    first = next((at for at, message in enumerate(messages) if message["role"] != "system"), None)
    return starts if first is None or first in starts else [first, *starts]


def without_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages without their `count` oldest turns, of which system messages stay."""
    starts = [*turn_starts(messages), len(messages)]
    return [one for at, one in enumerate(messages) if at >= starts[count] or one["role"] == "system"]


def answer_room_tokens(context_tokens: int, max_tokens: int | None) -> int:
    """Tokens kept free for the answer (see the module)."""
    if max_tokens is not None and max_tokens > 0:
        return min(max_tokens, context_tokens // 2)
    return context_tokens // 4


async def fit(
    messages: Sequence[Message],
    count_tokens: CountTokens,
    *,
    model: str,
    context_tokens: int,
    max_tokens: int | None = None,
    at_least: int = 0,
    is_estimate: bool = False,
) -> Fitted:
    """Drop as few of the oldest turns as it takes, found by bisection.

    Args:
        context_tokens: what the place holds for one request, answer included.
        at_least: drop so many turns in any case.
        is_estimate: `count_tokens` guesses, so the place has the last word on whether the last turn fits.

    Raises:
        ContextOverflowError: the last turn alone does not fit.
    """
    room = answer_room_tokens(context_tokens, max_tokens)
    most = max(0, len(turn_starts(messages)) - 1)
    count, high = min(at_least, most), most
    whole = await count_tokens(messages)
    kept, tokens = list(messages), whole
    if count or whole + room > context_tokens:
        while count < high:
            middle = (count + high) // 2
            fits = await count_tokens(without_oldest(messages, middle)) + room <= context_tokens
            count, high = (count, middle) if fits else (middle + 1, high)
        kept = without_oldest(messages, count)
        tokens = await count_tokens(kept)
    if tokens >= context_tokens and not is_estimate:
        raise overflow_error(model, tokens, context_tokens)
    if not count:
        return Fitted(tuple(kept))
    turns = "the oldest turn" if count == 1 else f"the {count} oldest turns"
    about = "about " if is_estimate else ""
    words = (
        f"dropped {turns} ({about}{whole - tokens:,} of {whole:,} tokens) to fit {context_tokens:,} tokens of "
        f"context with room for the answer"
    )
    return Fitted(tuple(kept), count, words)


def overflow_error(
    model: str,
    prompt_tokens: int | None,
    context_tokens: int | None,
    *,
    remedy: str = "a larger context_tokens= to the router",
) -> ContextOverflowError:
    """The error of messages that do not fit, in words."""
    has = "more tokens than" if prompt_tokens is None else f"{prompt_tokens:,} tokens, too many for"
    context = "its context" if context_tokens is None else f"its context of {context_tokens:,}"
    return ContextOverflowError(
        f"{model}: the messages have {has} {context}, which must hold the answer too; "
        f"give {remedy}, or shorten them",
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )
