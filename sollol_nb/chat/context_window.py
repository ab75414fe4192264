"""Which messages of a conversation fit the context of the server that answers. Pure: the caller counts tokens.

Whole turns are dropped, the oldest first. A turn is a user's message with everything up to the next one (the
answer, tool calls and their results). System messages and the last turn always stay. Nothing is dropped
silently: `FittedMessages.description` says what was dropped, and messages that cannot fit are a
ContextOverflowError.

Tokens are reserved for the answer: `max_tokens` if it is given, but at most half of the context; otherwise a
quarter. The last turn alone may use them up; the answer then has what is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sollol_nb.errors import ConfigError, ContextOverflowError
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.short_names import short_name

ERROR, DROP_OLDEST = OVERFLOW_CHOICES = ("error", "drop_oldest")
"""What to do with messages that do not fit: raise an error, or drop the oldest turns."""

Message: TypeAlias = Mapping[str, Any]
CountTokens: TypeAlias = Callable[[Sequence[Message]], Awaitable[int]]
"""Counts the tokens of the prompt made of these messages, including those of the chat template."""


@dataclass(frozen=True, slots=True)
class FittedMessages:
    """The messages to send.

    Attributes:
        messages: those that fit, in order.
        dropped_count: how many turns were dropped.
        description: what was dropped; "" if nothing was.
    """

    messages: tuple[Message, ...]
    dropped_count: int = 0
    description: str = ""


def check_overflow(choice: str) -> str:
    """The choice. Raises ConfigError if it is not one of `OVERFLOW_CHOICES`."""
    if choice not in OVERFLOW_CHOICES:
        raise ConfigError(f"overflow={shown(choice)} must be {' or '.join(OVERFLOW_CHOICES)}")
    return choice


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """The index at which each turn begins. Messages before the first user message are a separate turn."""
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    first = next((at for at, message in enumerate(messages) if message["role"] != "system"), None)
    return starts if first is None or first in starts else [first, *starts]


def without_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages without their `count` oldest turns; system messages stay."""
    starts = [*turn_starts(messages), len(messages)]
    return [message for at, message in enumerate(messages) if at >= starts[count] or message["role"] == "system"]


def tokens_for_answer(context_tokens: int, max_tokens: int | None) -> int:
    """Tokens reserved for the answer, as described above."""
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
) -> FittedMessages:
    """Drop as few of the oldest turns as necessary, found by bisection.

    Args:
        context_tokens: the server's limit for one request, answer included.
        at_least: drop at least this many turns.
        is_estimate: `count_tokens` estimates, so the server decides whether the last turn alone fits.

    Raises:
        ContextOverflowError: the last turn alone does not fit.
    """
    reserved = tokens_for_answer(context_tokens, max_tokens)
    most = max(0, len(turn_starts(messages)) - 1)
    count, high = min(at_least, most), most
    whole = await count_tokens(messages)
    kept, tokens = list(messages), whole
    if count or whole + reserved > context_tokens:
        while count < high:
            middle = (count + high) // 2
            fits = await count_tokens(without_oldest(messages, middle)) + reserved <= context_tokens
            count, high = (count, middle) if fits else (middle + 1, high)
        kept = without_oldest(messages, count)
        tokens = await count_tokens(kept)
    if tokens >= context_tokens and not is_estimate:
        raise overflow_error(model, tokens, context_tokens)
    if not count:
        return FittedMessages(tuple(kept))
    turns = "the oldest turn" if count == 1 else f"the {count} oldest turns"
    about = "about " if is_estimate else ""
    description = (
        f"dropped {turns} ({about}{whole - tokens:,} of {whole:,} tokens) to fit {context_tokens:,} tokens of "
        f"context with room for the answer"
    )
    return FittedMessages(tuple(kept), count, description)


def overflow_error(
    model: str,
    prompt_tokens: int | None,
    context_tokens: int | None,
    *,
    remedy: str = "a larger context_tokens= to the router",
) -> ContextOverflowError:
    """The error for messages that do not fit.

    Args:
        remedy: how to get a larger context; the message says to give it.
    """
    size = "more tokens than" if prompt_tokens is None else f"{prompt_tokens:,} tokens, too many for"
    context = "its context" if context_tokens is None else f"its context of {context_tokens:,}"
    return ContextOverflowError(
        f"{short_name(model)}: the messages have {size} {context}, which must hold the answer too; "
        f"give {remedy}, or shorten them",
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )
