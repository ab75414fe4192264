"""The demo text: questions and answers read from `text/`, and random training conversations made of them.

A text file is a list of blocks, separated by lines of `---`: several `Q:` lines that are trained on, perhaps an
`H:` line that is held out for verification, and one `A:` answer that runs to the end of the block. Questions
outside the demo's subject all get one answer; they are made from patterns and word lists, so there are very many.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizer import IM_END, IM_START, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT_FOLDER = Path(__file__).parent / "text"
LONG_BLOCKS = "long.txt"
OUT_OF_SCOPE_SHARE = 0.35
# The first tokens of an answer decide which answer it is, so they have a higher weight in the loss, and half of
# the single-turn conversations stop after them, which leaves room for many more questions in a batch.
CHOICE_TOKENS = 6
CHOICE_WEIGHT = 4.0

_OPENINGS = (
    (
        r"What (?:is|are) (.+)\?",
        ("What's {}?", "Explain {}.", "Define {}.", "Can you explain {}?", "Tell me what {} is."),
    ),
    (r"What does (.+) mean\?", ("What is meant by {}?", "Explain {}.", "What is the meaning of {}?")),
    (
        r"How do I (.+)\?",
        ("How can I {}?", "How to {}?", "Tell me how to {}.", "How would I {}?", "How do you {}?"),
    ),
    (r"Show me (.+)\.", ("Give me {}.", "Can you show me {}?", "I would like to see {}.")),
    (r"Tell me (.+)\.", ("Can you tell me {}?", "I want to hear {}.")),
    (r"Describe (.+)\.", ("Can you describe {}?", "Give me a description of {}.")),
)
_FRAMES = (
    "Please {lower}",
    "{question} Please.",
    "{question} Thanks!",
    "Hey, {lower}",
    "Hello! {question}",
    "Can you tell me: {lower}",
    "I have a question: {lower}",
    "Question: {question}",
    "So, {lower}",
    "{question} Answer briefly.",
    "{question} Keep it short.",
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answer, the questions that lead to it, and questions kept out of training."""

    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    is_long: bool = False


@dataclass(frozen=True, slots=True)
class OutOfScope:
    """The patterns of questions outside the demo's subject, and the one answer to all of them."""

    patterns: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    held_out: tuple[str, ...]
    answer: str

    def question(self, rng: np.random.Generator) -> str:
        """A random question, never one of the held-out ones."""
        while True:
            question = re.sub(r"{(\w+)}", lambda m: _pick(rng, self.words[m[1]]), _pick(rng, self.patterns))
            if question not in self.held_out:
                return question


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything in `text/`."""

    exchanges: tuple[Exchange, ...]
    out_of_scope: OutOfScope
    system_prompts: tuple[str, ...]

    def texts(self, seed: int) -> list[str]:
        """The text that the tokenizer learns from: all of it, and a sample of out-of-scope questions."""
        rng = np.random.default_rng(seed)
        questions = [question for exchange in self.exchanges for question in exchange.questions]
        answers = [exchange.answer for exchange in self.exchanges]
        foreign = [self.out_of_scope.question(rng) for _ in range(1000)]
        frames = [*_FRAMES, *(form for _, forms in _OPENINGS for form in forms)]
        marks = ["user\n", "assistant\n", "system\n"] * 10
        return [
            *questions,
            *answers * 3,
            *foreign,
            *frames,
            *self.system_prompts,
            *marks,
            self.out_of_scope.answer,
        ]


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _read_exchange(block: str, is_long: bool) -> Exchange:
    head, _, answer = block.partition("\nA: ")
    lines = head.strip().splitlines()
    questions = tuple(line[3:] for line in lines if line.startswith("Q: "))
    held_out = tuple(line[3:] for line in lines if line.startswith("H: "))
    if not questions or not answer or len(questions) + len(held_out) != len(lines):
        raise ValueError(f"not a block of Q:, H: and A: lines: {block!r}")
    return Exchange(questions, held_out, answer.strip(), is_long)


def _read_sections(path: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\[([\w-]+)\]", line):
            current = sections.setdefault(match[1], [])
        elif line and not line.startswith("#"):
            current.append(line)
    return sections


def read_corpus(folder: Path = TEXT_FOLDER) -> Corpus:
    """Read and check the text.

    Raises:
        ValueError: a block is malformed, or one question has two answers or is both trained on and held out.
    """
    special = {"system.txt", "out_of_scope.txt", "out_of_scope_words.txt"}
    exchanges = tuple(
        _read_exchange(block, path.name == LONG_BLOCKS)
        for path in sorted(folder.glob("*.txt"))
        if path.name not in special
        for block in path.read_text(encoding="utf-8").split("\n---\n")
    )
    seen: set[str] = set()
    for exchange in exchanges:
        for question in exchange.questions + exchange.held_out:
            if question.casefold() in seen:
                raise ValueError(f"this question occurs twice in the text: {question!r}")
            seen.add(question.casefold())
    sections = _read_sections(folder / "out_of_scope.txt")
    words = _read_sections(folder / "out_of_scope_words.txt")
    out_of_scope = OutOfScope(
        patterns=tuple(sections["questions"]),
        words={name: tuple(" ".join(lines).split(", ")) for name, lines in words.items()},
        held_out=tuple(sections["held-out"]),
        answer=" ".join(sections["answer"]),
    )
    system_prompts = tuple((folder / "system.txt").read_text(encoding="utf-8").splitlines())
    return Corpus(exchanges, out_of_scope, system_prompts)


class Sampler:
    """Draws random training conversations, as token ids and the loss weight of each."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)
        self._written = {q.casefold() for e in corpus.exchanges for q in e.questions + e.held_out}
        self._short = tuple(e for e in corpus.exchanges if not e.is_long)
        self._long = tuple(e for e in corpus.exchanges if e.is_long)
        weights = np.sqrt([len(exchange.questions) for exchange in self._short])
        self._shares = weights / weights.sum()

    def _chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def reworded(self, question: str) -> str:
        """The question as another person might type it; never another question of the text."""
        rng, original = self._rng, question
        if self._chance(0.35):
            for pattern, forms in _OPENINGS:
                if match := re.fullmatch(pattern, question):
                    question = _pick(rng, forms).format(match[1])
                    break
        if self._chance(0.2):
            lower = question[0].lower() + question[1:]
            question = _pick(rng, _FRAMES).format(question=question, lower=lower)
        if self._chance(0.15):
            question = question.lower()
        if self._chance(0.25):
            question = question.rstrip("?.!") or question
        elif self._chance(0.1):
            question += _pick(rng, ("?", "!", " ?", "...", " :)"))
        if question.casefold() in self._written:
            question = original
        if len(question) > 12 and self._chance(0.06):
            at = int(rng.integers(1, len(question) - 1))
            question = question[:at] + question[at + 1 :]
        if self._chance(0.15):
            question += "\n"
        elif self._chance(0.03):
            question = " " + question
        return question

    def _exchange(self, want_long: bool) -> tuple[str, str]:
        rng = self._rng
        if want_long:
            exchange = self._long[int(rng.integers(len(self._long)))]
        elif self._chance(OUT_OF_SCOPE_SHARE):
            foreign = self._corpus.out_of_scope
            count = int(rng.integers(2, 9)) if self._chance(0.06) else 1
            return " ".join(self.reworded(foreign.question(rng)) for _ in range(count)), foreign.answer
        else:
            exchange = self._short[int(rng.choice(len(self._short), p=self._shares))]
        return self.reworded(_pick(rng, exchange.questions)), exchange.answer

    def conversation(self, turns: int, long_turn: int | None = None) -> tuple[list[int], list[float]]:
        """`turns` exchanges in ChatML, perhaps after a system message: ids and their weights in the loss."""
        rng, encode = self._rng, self._tokenizer.encode
        start, end = self._tokenizer.special(IM_START), self._tokenizer.special(IM_END)
        ids: list[int] = []
        weights: list[float] = []

        def add(part: list[int], weight: float = 0.0) -> None:
            ids.extend(part)
            weights.extend([weight] * len(part))

        def add_answer(answer: str, stop_early: bool) -> None:
            part = [*encode(answer), end]
            add(part[:CHOICE_TOKENS], CHOICE_WEIGHT)
            if not stop_early:
                add(part[CHOICE_TOKENS:], 1.0)

        stop_early = turns == 1 and long_turn is None and self._chance(0.5)
        if turns == 1 and self._chance(0.04):  # A bare prompt, without any template.
            question, answer = self._exchange(long_turn == 0)
            add(encode(question.rstrip("\n") + "\n"))
            add_answer(answer, stop_early)
            return ids, weights
        if self._chance(0.25):
            add([start, *encode("system\n" + _pick(rng, self._corpus.system_prompts)), end, *encode("\n")])
        for turn in range(turns):
            question, answer = self._exchange(turn == long_turn)
            add([start, *encode("user\n" + question), end, *encode("\n"), start, *encode("assistant\n")])
            if turn + 1 < turns and self._chance(0.05):  # An earlier answer that was interrupted.
                add([*encode(answer[: int(rng.integers(1, len(answer)))]), end])
            else:
                add_answer(answer, stop_early)
            add(encode("\n"))
        return ids, weights

    def batch(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, conversation numbers and loss weights, each (rows, length + 1); rows hold whole conversations."""
        ids = np.zeros((rows, length + 1), np.int32)
        conversations = np.zeros((rows, length + 1), np.int32)
        counted = np.zeros((rows, length + 1), np.float32)
        for row in range(rows):
            filled, misfits = 0, 0
            for number, (part, weights) in enumerate(self._conversations(length), start=1):
                stop = filled + len(part)
                if stop > length + 1:
                    misfits += 1
                    if misfits == 4:
                        break
                    continue
                ids[row, filled:stop], counted[row, filled:stop] = part, weights
                conversations[row, filled:stop] = number
                filled = stop
        return ids, conversations, counted

    def _conversations(self, length: int) -> Iterator[tuple[list[int], list[float]]]:
        many = (8, 12) if length >= 1024 else (1, 5)
        if length >= 512:  # Room for a long answer, first or after other turns.
            turns = int(self._rng.integers(*many)) if length >= 1024 else 1
            yield self.conversation(turns, long_turn=int(self._rng.integers(turns)))
        while True:
            turns = 1 if self._chance(0.6) else int(self._rng.integers(2, many[1]))
            yield self.conversation(turns)


def exam(
    corpus: Corpus, tokenizer: Tokenizer, wanted: Callable[[Exchange], tuple[str, ...]]
) -> list[tuple[list[int], int]]:
    """Every wanted question with its answer as one single-turn conversation: ids, and where the answer begins."""
    start, end = tokenizer.special(IM_START), tokenizer.special(IM_END)
    encode = tokenizer.encode
    sheets = []
    for exchange in corpus.exchanges:
        for question in wanted(exchange):
            prompt = [start, *encode("user\n" + question), end, *encode("\n"), start, *encode("assistant\n")]
            sheets.append(([*prompt, *encode(exchange.answer), end], len(prompt)))
    return sheets
