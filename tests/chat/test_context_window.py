"""Which turns of a conversation are dropped so that the rest fits, and how that is described."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest

from sollol_nb.chat.context_window import (
    FittedMessages,
    Message,
    fit,
    overflow_error,
    tokens_for_answer,
    turn_starts,
    without_oldest,
)
from sollol_nb.errors import ContextOverflowError, RequestRejectedError
from sollol_nb.llama_cpp.answers.protocol import refusal


def conversation(roles: str) -> list[dict[str, str]]:
    """Messages of one letter each: s(ystem), u(ser), a(ssistant), t(ool); each content is its index."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": str(at)} for at, letter in enumerate(roles)]


def indexes(messages: Sequence[Message]) -> list[int]:
    return [int(message["content"]) for message in messages]


class TenEach:
    """Ten tokens a message; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, messages: Sequence[Message]) -> int:
        self.calls += 1
        return 10 * len(messages)


def fitted(roles: str, context_tokens: int, **more: Any) -> FittedMessages:
    return asyncio.run(fit(conversation(roles), TenEach(), model="m", context_tokens=context_tokens, **more))


@pytest.mark.parametrize(
    ("roles", "starts"),
    [
        ("u", [0]),
        ("suauau", [1, 3, 5]),
        ("uatau", [0, 4]),
        ("saua", [1, 2]),
        ("ss", []),
        ("uu", [0, 1]),
    ],
)
def test_a_turn_goes_from_a_users_message_to_the_next(roles: str, starts: list[int]) -> None:
    assert turn_starts(conversation(roles)) == starts


@pytest.mark.parametrize(
    ("roles", "count", "kept"),
    [
        ("uauau", 1, [2, 3, 4]),
        ("suauau", 2, [0, 5]),
        ("usau", 1, [1, 3]),
        ("uatatau", 1, [6]),
        ("saua", 1, [0, 2, 3]),
    ],
)
def test_whole_turns_go_and_system_messages_stay(roles: str, count: int, kept: list[int]) -> None:
    assert indexes(without_oldest(conversation(roles), count)) == kept


@pytest.mark.parametrize(
    ("context_tokens", "max_tokens", "reserved"),
    [
        (8192, None, 2048),
        (8192, 100, 100),
        (8192, 100_000, 4096),
        (8192, -1, 2048),
        (8192, 0, 2048),
    ],
)
def test_tokens_are_reserved_for_the_answer(context_tokens: int, max_tokens: int | None, reserved: int) -> None:
    assert tokens_for_answer(context_tokens, max_tokens) == reserved


@pytest.mark.parametrize(
    ("roles", "context_tokens", "more", "kept"),
    [
        ("suauau", 80, {}, [0, 1, 2, 3, 4, 5]),
        ("suauau", 78, {}, [0, 3, 4, 5]),
        ("suauau", 78, {"max_tokens": 18}, [0, 1, 2, 3, 4, 5]),
        ("suauau", 48, {}, [0, 5]),
        ("suauau", 21, {}, [0, 5]),
        ("u", 11, {}, [0]),
        ("suauau", 1000, {"at_least": 1}, [0, 3, 4, 5]),
        ("suauau", 79, {"at_least": 2}, [0, 5]),
        ("suauau", 79, {"at_least": 9}, [0, 5]),
        ("suauau", 5, {"is_estimate": True}, [0, 5]),
    ],
)
def test_as_few_of_the_oldest_turns_go_as_it_takes(
    roles: str, context_tokens: int, more: dict[str, Any], kept: list[int]
) -> None:
    what = fitted(roles, context_tokens, **more)
    assert indexes(what.messages) == kept
    assert what.dropped_count == len(turn_starts(conversation(roles))) - len(turn_starts(what.messages))
    assert bool(what.description) == bool(what.dropped_count)


@pytest.mark.parametrize(
    ("context_tokens", "more", "message"),
    [
        (78, {}, "dropped the oldest turn (20 of 60 tokens) to fit 78 tokens of context"),
        (48, {}, "dropped the 2 oldest turns (40 of 60 tokens) to fit 48 tokens of context"),
        (
            48,
            {"is_estimate": True},
            "dropped the 2 oldest turns (about 40 of 60 tokens) to fit 48 tokens of context",
        ),
    ],
)
def test_the_description_names_what_was_dropped(context_tokens: int, more: dict[str, Any], message: str) -> None:
    assert fitted("suauau", context_tokens, **more).description == f"{message} with room for the answer"


def test_a_last_turn_that_does_not_fit_alone_is_an_error_with_its_numbers() -> None:
    with pytest.raises(
        ContextOverflowError, match=r"^m: the messages have 20 tokens, too many for .* of 20,"
    ) as error:
        fitted("suauau", 20)
    assert (error.value.prompt_tokens, error.value.context_tokens) == (20, 20)


def test_a_long_chat_is_counted_a_few_times_only() -> None:
    count = TenEach()
    asyncio.run(fit(conversation("ua" * 500 + "u"), count, model="m", context_tokens=300))
    assert count.calls <= 12


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((9020, 8192), "m: the messages have 9,020 tokens, too many for its context of 8,192, which"),
        ((None, 8192), "m: the messages have more tokens than its context of 8,192, which"),
        ((None, None), "m: the messages have more tokens than its context, which"),
    ],
)
def test_an_overflow_names_what_it_knows(numbers: tuple[int | None, int | None], message: str) -> None:
    assert str(overflow_error("m", *numbers)).startswith(message)


@pytest.mark.parametrize(
    ("reason", "kind", "message"),
    [
        (
            "request (2804 tokens) exceeds the available context size (256 tokens), try increasing it",
            ContextOverflowError,
            "2,804 tokens, too many for its context of 256",
        ),
        (
            "Context size has been exceeded.",
            ContextOverflowError,
            "filled the 512 tokens of context that they share",
        ),
        ("Failed to parse messages", RequestRejectedError, "m refused the request: Failed to parse messages"),
    ],
)
def test_a_refusal_of_llama_server_says_what_to_do(
    reason: str, kind: type[RequestRejectedError], message: str
) -> None:
    error = refusal("m", reason, 512)
    assert type(error) is kind
    assert re.search(re.escape(message), str(error))
