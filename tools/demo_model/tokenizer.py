"""A byte-level BPE tokenizer that agrees with llama.cpp's `llama-bpe` pre-tokenizer.

Every byte is a token, so any UTF-8 input tokenizes. The merges are learned from the demo text. As with every
`llama-bpe` vocabulary, a piece that is a token as a whole is taken whole, before any merge is tried.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

# llama.cpp's expression for `llama-bpe`, with \p{L} and \p{N} spelled for `re`: [^\W\d_] and \d.
_PIECES = re.compile(
    r"'(?i:s|t|re|ve|m|ll|d)"
    r"|(?:(?![\r\n])[\W_])?[^\W\d_]+"
    r"|\d{1,3}"
    r"| ?(?:(?!\s)[\W_])+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def _byte_letters() -> list[str]:
    """The printable letter GPT-2 vocabularies write for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


_BYTE_LETTERS = _byte_letters()


def _letters(text: str) -> str:
    return "".join(_BYTE_LETTERS[byte] for byte in text.encode())


def _merge_pair(symbols: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == left and symbols[i + 1] == right:
            merged.append(left + right)
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent merges of `texts`, most frequent first; ties break by spelling."""
    words = Counter(_letters(piece) for text in texts for piece in _PIECES.findall(text))
    spelled = {word: tuple(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in spelled.items():
            if best[0] in symbols:
                spelled[word] = _merge_pair(symbols, *best)
    return merges


@dataclass
class Tokenizer:
    """Text to token ids. Ids: the 256 bytes, one per merge, then the three special tokens."""

    merges: list[tuple[str, str]]
    tokens: list[str] = field(init=False)
    _ids: dict[str, int] = field(init=False, repr=False)
    _ranks: dict[tuple[str, str], int] = field(init=False, repr=False)
    _cache: dict[str, list[int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(dict.fromkeys([*_BYTE_LETTERS, *(a + b for a, b in self.merges), *SPECIAL_TOKENS]))
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}

    def special(self, token: str) -> int:
        """The id of one of `SPECIAL_TOKENS`."""
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens are never read out of it."""
        return [token_id for piece in _PIECES.findall(text) for token_id in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self._cache:
            word = _letters(piece)
            symbols: tuple[str, ...] = (word,) if word in self._ids else tuple(word)
            while len(symbols) > 1:
                pairs = set(itertools.pairwise(symbols))
                best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if best not in self._ranks:
                    break
                symbols = _merge_pair(symbols, *best)
            self._cache[piece] = [self._ids[symbol] for symbol in symbols]
        return self._cache[piece]
