"""Tokens and the text they spell, from the engine's tokenizer. None is returned where that is not exact."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from sollol_nb.llama_cpp.answers.protocol import prompt_request

Post: TypeAlias = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Posts a JSON body to a path of the engine and returns the decoded answer."""


async def prompt_tokens(post: Post, request: Mapping[str, Any]) -> int:
    """Tokens of the prompt of a request for `/v1/chat/completions`. Those of images are not counted."""
    rendered = await post("/apply-template", prompt_request(request))
    content = {"content": rendered["prompt"], "add_special": True, "parse_special": True}
    return len((await post("/tokenize", content))["tokens"])


async def spelled(post: Post, text: str) -> list[int]:
    """Token ids for a text in the middle of another: those that spell it exactly, or else the nearest."""
    ids = await tokens_within(post, text)
    return ids if ids is not None else list((await post("/tokenize", {"content": text}))["tokens"])


async def tokens_within(post: Post, text: str) -> list[int] | None:
    """Token ids that spell exactly the text, or None if there are none.

    Some vocabularies put a space before the first word of a text. So the text is also tried after a line break,
    without the tokens of that.
    """
    for before in ("", "\n"):
        content = {"content": before + text, "parse_special": False, "with_pieces": True}
        tokens = (await post("/tokenize", content))["tokens"]
        pieces = [_bytes_of(token["piece"]) for token in tokens]
        for begin in range(len(pieces)):
            if b"".join(pieces[begin:]) == text.encode():
                return [token["id"] for token in tokens[begin:]]
    return None


async def grammar_prompt(post: Post, text: str) -> str | None:
    """What to pass as `generation_prompt`, so that a grammar continues after this text; None if that cannot be.

    llama-server tokenises it, special tokens included, drops a first token that begins with a space the text does
    not have, and lets the grammar read the rest. An end token in it would abort the whole engine (seen in
    `llama_grammar_accept_impl`), so the result is None for a text that spells a special token. Where the
    vocabulary would put a space into the first token, a letter before the text is dropped instead.
    """
    for before in ("", "x"):
        content = {"content": before + text, "with_pieces": True}
        tokens = (await post("/tokenize", {**content, "parse_special": True}))["tokens"]
        if tokens != (await post("/tokenize", {**content, "parse_special": False}))["tokens"]:
            return None
        pieces = [_bytes_of(token["piece"]) for token in tokens]
        if pieces and pieces[0][:1].isspace() and not (before + text)[0].isspace():
            del pieces[0]
        if b"".join(pieces) == text.encode():
            return before + text
    return None


def _bytes_of(piece: str | list[int]) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)
