"""Tokens and the text they spell, asked of the engine's tokenizer. What cannot be had exactly is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

Post: TypeAlias = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Posts a JSON body to a path of the engine and gives the decoded answer."""


async def prompt_tokens(post: Post, request: Mapping[str, Any]) -> int:
    """Tokens of the prompt that a request for `/v1/chat/completions` makes. What an image takes is not counted."""
    shaping = ("messages", "tools", "chat_template_kwargs", "response_format")
    rendered = await post("/apply-template", {name: request[name] for name in shaping if name in request})
    content = {"content": rendered["prompt"], "add_special": True, "parse_special": True}
    return len((await post("/tokenize", content))["tokens"])


async def spelled(post: Post, text: str) -> list[int]:
    """Tokens that spell a text in the middle of another."""
    ids = await tokens_within(post, text)
    return ids if ids is not None else list((await post("/tokenize", {"content": text}))["tokens"])


async def tokens_within(post: Post, text: str) -> list[int] | None:
    """The same, or None if there are no tokens that spell exactly the text.

    Some vocabularies put a space before the first word of whatever they tokenise. So the text is also tried after
    a line break, and the tokens before it are left out.
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
    """What to pass as `generation_prompt` so that a grammar goes on after this text; None if nothing is fit.

    llama-server tokenises it, special tokens included, drops a first token that begins with a space the text does
    not have, and lets the grammar read the rest. An end token in it would abort the whole engine (seen in
    `llama_grammar_accept_impl`), so a text that spells a special token is refused; and where the vocabulary would
    put a space into the first token, a letter is put before the text to be dropped instead.
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
