"""Log probabilities of tokens, from llama-server's shape to that of Ollama's `/api/chat` (`chat.chunk`). Pure.

llama-server gives them with each token that it sends. A token that ends within a character is not sent, so the
token that completes the character stands for both. The text of a token that is held back (it may begin a stop
string) comes with the next one; a held token that is never sent was the end, or part of the stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sollol_nb.chat.chunk import TokenLogprob


def wanted_alternatives(options: Mapping[str, Any]) -> int | None:
    """How many of the likeliest tokens to ask llama-server for; None without log probabilities. At least one: with
    none it gives nothing at all."""
    return max(1, options.get("top_logprobs", 0)) if options.get("logprobs") else None


class LogprobReader:
    """Reads the log probabilities of one stream.

    Args:
        options: of the request.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._most = options.get("top_logprobs", 0)
        self._held: list[Mapping[str, Any]] = []

    def read(self, probabilities: Iterable[Mapping[str, Any]], text: str) -> list[TokenLogprob]:
        """Those of the tokens that an event brings, and of the tokens before them that were held back.

        Args:
            probabilities: of the event, as llama-server gives them.
            text: of the event. The tokens of the result spell it.
        """
        self._held += probabilities
        if not text or not self._held:
            return []
        tokens, self._held = self._held, []
        pieces = [_own_piece(token) for token in tokens[:-1]]
        if None in pieces or not text.startswith("".join(piece or "" for piece in pieces)):
            pieces = [""] * len(pieces)
        pieces.append(text[sum(len(piece or "") for piece in pieces) :])
        return [self._entry(token, piece or "") for token, piece in zip(tokens, pieces, strict=True)]

    def read_parsed(self, probabilities: Iterable[Mapping[str, Any]]) -> list[TokenLogprob]:
        """Those that an event of the chat parser brings. Its tokens may be markup, which is in no text."""
        return [self._entry(token, str(token.get("token", ""))) for token in probabilities]

    def _entry(self, token: Mapping[str, Any], piece: str) -> TokenLogprob:
        entry: TokenLogprob = {"token": piece, "logprob": float(token["logprob"]), "bytes": list(piece.encode())}
        if self._most:
            entry["top_logprobs"] = [
                {
                    "token": alternative["token"],
                    "logprob": float(alternative["logprob"]),
                    "bytes": alternative["bytes"],
                }
                for alternative in token.get("top_logprobs", ())[: self._most]
            ]
        return entry


def spelling(entries: Sequence[TokenLogprob], text: str) -> list[TokenLogprob]:
    """The entries at the end that spell this text, the first of them shortened if it begins before."""
    kept: list[TokenLogprob] = []
    for entry in reversed(entries):
        if not text:
            break
        piece = entry["token"][-len(text) :]
        kept.insert(0, entry if piece == entry["token"] else {**entry, "token": piece, "bytes": [*piece.encode()]})
        text = text[: len(text) - len(piece)]
    return kept


def _own_piece(token: Mapping[str, Any]) -> str | None:
    """The text of a token whose text was held back, if it is among the likeliest ones."""
    alternatives = token.get("top_logprobs", ())
    return next((alternative["token"] for alternative in alternatives if alternative["id"] == token["id"]), None)
