"""The requests of a raw answer: the first, after a cut, and when the tokens of its text cannot be known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sollol_nb.errors import AnswerDivergedError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from sollol_nb.llama_cpp.answers.tokens import grammar_prompt, spelled, tokens_within

PROMPT = "Q:"
PROMPT_IDS = [1, *PROMPT.encode()]  # a token begins each prompt
SCHEMA = {"type": "string"}


class Tokenizer:
    """The engine's small requests, over bytes: the id of a token is its byte, that of a longer piece is given.

    Args:
        pieces: text of tokens longer than a byte; those in <> are special.
        leading_space: a space is put before whatever is tokenised, as some vocabularies do.
        prompt: what the template renders.
    """

    def __init__(
        self, pieces: Mapping[str, int] | None = None, *, leading_space: bool = False, prompt: str = PROMPT
    ) -> None:
        self._pieces = {text.encode(): number for text, number in (pieces or {}).items()}
        self._leading_space = leading_space
        self._prompt = prompt

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        if path == "/apply-template":
            return {"prompt": self._prompt}
        if path == "/detokenize":
            spelling = {number: text for text, number in self._pieces.items()}
            pieces = [spelling.get(token, bytes([token % 256])) for token in body["tokens"]]
            return {"content": b"".join(pieces).decode(errors="replace")}
        assert path == "/tokenize"
        tokens = self._tokens(body["content"].encode(), bool(body.get("parse_special", True)))
        if not body.get("with_pieces"):
            return {"tokens": [1] * bool(body.get("add_special")) + [number for number, _ in tokens]}
        return {"tokens": [{"id": number, "piece": _as_sent(piece)} for number, piece in tokens]}

    def _tokens(self, text: bytes, parse_special: bool) -> list[tuple[int, bytes]]:
        text = b" " + text if self._leading_space else text
        tokens = []
        while text:
            known = [
                piece for piece in self._pieces if text.startswith(piece) and (parse_special or piece[:1] != b"<")
            ]
            piece = max(known, key=len, default=text[:1])
            tokens.append((self._pieces.get(piece, piece[0]), piece))
            text = text[len(piece) :]
        return tokens


def _as_sent(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def new_answer(**options: Any) -> RawAnswer:
    return RawAnswer("demo", [{"role": "user", "content": "Q"}], options)


def ask(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The body of its next request."""
    request = asyncio.run(answer.request(tokenizer.post))
    assert request is None or request[0] == "/completion"
    return request and request[1]


def receive(answer: Answer, *events: tuple[str, Sequence[int], int]) -> str:
    """Pass events (text, ids, tokens so far) to the answer; returns the text that it shows."""
    shown = ""
    for text, ids, predicted in events:
        event = {"content": text, "tokens": list(ids), "tokens_predicted": predicted, "tokens_evaluated": 2}
        chunk = answer.translate({**event, "stop": False})
        shown += chunk["message"]["content"] if chunk is not None else ""
    return shown


def end(answer: Answer, predicted: int, stop_type: str = "eos") -> None:
    answer.translate({"stop": True, "stop_type": stop_type, "tokens_predicted": predicted, "tokens_evaluated": 2})


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"n_predict": 5}),
        ({"options": {"num_predict": 100, "top_k": 3}, "max_tokens": 5}, {"n_predict": 5, "top_k": 3}),
        ({"num_predict": -1}, {"n_predict": -1}),
        ({"stop": "a", "temperature": 0}, {"stop": ["a"], "temperature": 0}),
        ({"format": "json"}, {"json_schema": {"type": "object"}}),
        ({"format": SCHEMA}, {"json_schema": SCHEMA}),
        ({"keep_alive": "5m", "think": True}, {}),
        ({"repeat_penalty": 1.1, "min_p": 0.1}, {"repeat_penalty": 1.1, "min_p": 0.1}),
    ],
)
def test_first_request_is_the_rendered_prompt_with_the_options(
    options: dict[str, Any], body: dict[str, Any]
) -> None:
    request = ask(new_answer(seed=7, **options), Tokenizer())

    assert request is not None
    fields = request.pop("response_fields")
    assert {"stop", "stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated", "timings"} == set(fields)
    flags = ("stream", "return_tokens", "return_progress", "timings_per_token")
    assert request == {"prompt": PROMPT, "seed": 7, **dict.fromkeys(flags, True), **body}


def test_continued_from_the_tokens_of_what_went_out() -> None:
    answer = new_answer(seed=7, max_tokens=10, temperature=0.5)
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1), ("b", [98], 2), ("", [99], 3))  # c may begin a stop string: held back

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, 97, 98]
    assert (request["n_predict"], request["seed"], request["temperature"]) == (8, 9, 0.5)
    assert receive(answer, ("c", [99], 1), ("d", [100], 2)) == "cd"

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, *b"abcd"]
    end(answer, 1)
    assert (answer.text, answer.final()["eval_count"], answer.final()["prompt_eval_count"]) == ("abcd", 5, 2)


def test_seed_never_becomes_the_one_that_means_any() -> None:
    answer = new_answer(seed=2**32 - 3)
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1), ("b", [98], 2))

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["seed"] == (2**32 - 1) % 2**31


def test_nothing_that_went_out_before_the_first_token_is_continued() -> None:
    answer = new_answer(seed=7, max_tokens=3)
    first = ask(answer, Tokenizer())
    answer.translate({"prompt_progress": {"total": 9, "processed": 4}, "tokens": [0], "tokens_predicted": 0})
    assert answer.waiting_prompt_tokens == 5
    receive(answer, ("", [99], 1))

    assert answer.waiting_prompt_tokens == 0
    assert ask(answer, Tokenizer()) == first


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8}])
def test_ids_that_the_stream_left_out_are_found_by_their_text(options: dict[str, Any]) -> None:
    answer = new_answer(**options)
    ask(answer, Tokenizer())
    e_acute = "\u00e9".encode()
    receive(answer, ("x", [120], 1), ("\u00e9", [e_acute[1]], 3), ("y", [121], 4))

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, 120, *e_acute, 121]


def test_engine_that_gives_no_ids_can_be_continued_too() -> None:
    answer = new_answer(temperature=0)
    ask(answer, Tokenizer())
    receive(answer, ("x", [], 1), ("yz", [], 3))

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, *b"xyz"]


UNLIKELY = (("x", [120], 1), ("\u00e9", [77], 3), ("y", [121], 4), ("z", [122], 5))  # no tokenizer gives these ids


def test_text_of_unknown_tokens_is_generated_again_and_not_shown_again() -> None:
    answer = new_answer(temperature=0, max_tokens=9)
    ask(answer, Tokenizer())
    assert receive(answer, *UNLIKELY) == "x\u00e9yz"

    request = ask(answer, Tokenizer())

    assert request is not None
    assert (request["prompt"], request["n_predict"]) == ([*PROMPT_IDS, 120], 8)
    assert receive(answer, ("\u00e9", [77], 2)) == ""
    assert answer.token_count == 5
    assert receive(answer, ("yz!", [5], 3)) == "!"
    end(answer, 4)
    assert (answer.text, answer.final()["eval_count"]) == ("x\u00e9yz!", 5)


@pytest.mark.parametrize("how", ["other text", "an end"])
def test_text_that_is_not_generated_again_is_spelled(how: str) -> None:
    answer = new_answer(temperature=0)
    ask(answer, Tokenizer())
    receive(answer, *UNLIKELY)
    ask(answer, Tokenizer())
    if how == "other text":
        assert receive(answer, ("\u00e9", [77], 2), ("no", [5], 3), ("thing", [6], 4)) == ""
    else:
        receive(answer, ("\u00e9", [77], 2))
        end(answer, 3)
    assert answer.is_abandoned
    assert not answer.is_complete

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, *"x\u00e9yz".encode()]
    assert not answer.is_abandoned
    assert receive(answer, ("!", [33], 1)) == "!"


def test_cut_while_text_is_generated_again_continues_from_there() -> None:
    answer = new_answer(temperature=0)
    ask(answer, Tokenizer())
    receive(answer, *UNLIKELY)
    ask(answer, Tokenizer())
    receive(answer, ("\u00e9y", [8, 9], 2))

    request = ask(answer, Tokenizer({"\u00e9": 8, "y": 9}))

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, 120, 8, 9]
    assert receive(answer, ("z", [122], 1), ("!", [33], 2)) == "!"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])  # the engine's default temperature is not 0
@pytest.mark.parametrize("tokens", [2, 3])
def test_sampled_text_of_unknown_tokens_is_spelled_at_once(options: dict[str, Any], tokens: int) -> None:
    answer = new_answer(**options)
    ask(answer, Tokenizer())
    last = "\u00e9".encode()[1] if tokens == 3 else 77
    receive(answer, ("x", [120], 1), ("\u00e9", [last], 1 + tokens), ("yz", [5], 2 + tokens))

    request = ask(answer, Tokenizer())

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, *"x\u00e9yz".encode()]
    assert receive(answer, ("!", [33], 1)) == "!"


def test_tokens_that_say_more_than_was_shown_are_not_continued() -> None:
    answer = new_answer(temperature=0, stop=["STOP"])
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1), ("b", [500], 2))  # token 500 is "bSTOP"

    request = ask(answer, Tokenizer({"bSTOP": 500}))

    assert request is not None
    assert request["prompt"] == [*PROMPT_IDS, 97]
    assert receive(answer, ("b", [500], 1)) == ""
    end(answer, 1, "word")
    assert (answer.text, answer.final()["done_reason"], answer.final()["eval_count"]) == ("ab", "stop", 2)


def test_grammar_continues_after_the_text_that_was_sent() -> None:
    answer = new_answer(temperature=0, format=SCHEMA)
    first = ask(answer, Tokenizer())
    assert first is not None
    assert "generation_prompt" not in first
    receive(answer, ('"', [34], 1), ("a", [97], 2))

    request = ask(answer, Tokenizer())

    assert request is not None
    assert (request["generation_prompt"], request["json_schema"]) == ('"a', SCHEMA)
    assert request["prompt"] == [*PROMPT_IDS, 34, 97]


def test_where_the_grammar_cannot_continue_all_is_repeated_or_given_up() -> None:
    answer = new_answer(temperature=0.8, seed=7, format=SCHEMA)
    tokenizer = Tokenizer({"<end>": 300})
    first = ask(answer, tokenizer)
    receive(answer, ('"', [34], 1), ("<end>", list(b"<end>"), 6))

    assert ask(answer, tokenizer) == first
    assert receive(answer, ('"', [34], 1)) == ""
    with pytest.raises(AnswerDivergedError, match="cannot be continued; ask again"):
        receive(answer, ("b", [98], 2))


def test_times_of_all_engines_are_added_once() -> None:
    answer = new_answer(temperature=0)
    for _ in range(2):
        ask(answer, Tokenizer())
        timings = {"prompt_ms": 2.0, "predicted_ms": 3.0}
        answer.translate({"content": "a", "tokens": [97], "tokens_predicted": 1, "timings": timings})
    ask(answer, Tokenizer())
    end(answer, 1)

    assert (answer.final()["prompt_eval_duration"], answer.final()["eval_duration"]) == (4_000_000, 6_000_000)


@pytest.mark.parametrize(
    ("prompt", "pieces", "thinking", "text"),
    [
        ("Q:", ("<think>a", "b</thi"), "ab</thi", ""),
        ("Q:<think>\n", ("a", "b</think>", "c"), "ab", "c"),
        ("Q:<think></think>", ("a", "b"), "", "ab"),
    ],
)
def test_thoughts_are_parted_to_the_end(prompt: str, pieces: tuple[str, ...], thinking: str, text: str) -> None:
    answer = RawAnswer("demo", [{"role": "user", "content": "Q"}], {}, splits_thinking=True)
    request = ask(answer, Tokenizer(prompt=prompt))
    assert request is not None
    assert request["preserved_tokens"] == ["<think>", "</think>"]  # sent also where they are special

    shown = receive(answer, *((piece, [97], number) for number, piece in enumerate(pieces, 1)))
    end(answer, 9)
    final = answer.final()

    assert shown + final["message"]["content"] == answer.text == text
    assert answer.thinking == thinking


def test_state_keeps_what_is_unknown() -> None:
    answer = new_answer(temperature=0, max_tokens=9, seed=4)
    ask(answer, Tokenizer())
    receive(answer, *UNLIKELY)

    again = Answer.from_state(json.loads(json.dumps(answer.state())))

    assert (again.text, again.token_count, again.seed) == (answer.text, answer.token_count, 4)
    assert ask(again, Tokenizer()) == ask(answer, Tokenizer())


# --- exact recovery ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"recovery": "exact"}, {"deterministic": True}], ids=str)
def test_an_exact_answer_is_generated_again_and_what_was_shown_is_not_shown_again(options: dict[str, Any]) -> None:
    answer = new_answer(temperature=0.8, seed=7, max_tokens=9, **options)
    first = ask(answer, Tokenizer())
    assert first is not None
    assert first["cache_prompt"] is False
    receive(answer, ("a", [97], 1), ("b", [98], 2))

    again = ask(answer, Tokenizer())

    assert again == first, "the whole answer, with the same seed and limit"
    assert receive(answer, ("a", [97], 1)) == ""
    assert receive(answer, ("b", [98], 2), ("c", [99], 3)) == "c"
    assert answer.recovery == "exact"
    assert (answer.text, answer.token_count) == ("abc", 3)


def test_an_exact_answer_that_is_lost_again_while_it_is_repeated_keeps_what_was_shown() -> None:
    answer = new_answer(temperature=0, recovery="exact")
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1), ("b", [98], 2))
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1))

    for lost_again in (answer, Answer.from_state(json.loads(json.dumps(answer.state())))):
        ask(lost_again, Tokenizer())
        assert receive(lost_again, ("a", [97], 1), ("b", [98], 2), ("c", [99], 3)) == "c"
        assert lost_again.text == "abc"


@pytest.mark.parametrize("ends", [False, True])
def test_an_exact_answer_that_another_engine_does_not_repeat_continues_from_its_tokens(ends: bool) -> None:
    answer = new_answer(temperature=0, recovery="exact", max_tokens=9)
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1), ("b", [98], 2))
    ask(answer, Tokenizer())
    receive(answer, ("a", [97], 1))
    if ends:
        end(answer, 1)
    else:
        assert receive(answer, ("x", [120], 2)) == ""
    assert answer.is_abandoned

    request = ask(answer, Tokenizer())

    assert request is not None
    assert (request["prompt"], request["n_predict"]) == ([*PROMPT_IDS, 97, 98], 7)
    assert receive(answer, ("c", [99], 1)) == "c"
    assert (answer.text, answer.recovery) == ("abc", "fast")


def test_a_fast_answer_says_so_only_once_it_was_continued() -> None:
    answer = new_answer(temperature=0)
    first = ask(answer, Tokenizer())
    assert first is not None
    assert "cache_prompt" not in first
    receive(answer, ("a", [97], 1))
    assert answer.recovery == ""
    ask(answer, Tokenizer())
    assert answer.recovery == "fast"


# --- text and tokens --------------------------------------------------------------------------

ROCKET = "\U0001f680"


@pytest.mark.parametrize("leading_space", [False, True])
@pytest.mark.parametrize("text", ["a", " a", "\n", "\n\na", "{", ROCKET, "a " + ROCKET, "<end>"])
def test_tokens_spell_exactly_the_text(text: str, leading_space: bool) -> None:
    tokenizer = Tokenizer({" a": 301, " {": 302, "\n\n": 303, "<end>": 300}, leading_space=leading_space)

    ids = asyncio.run(spelled(tokenizer.post, text))

    assert 300 not in ids
    assert asyncio.run(tokenizer.post("/detokenize", {"tokens": ids}))["content"] == text


def test_text_that_cannot_be_spelled_exactly_is_spelled_nearly() -> None:
    tokenizer = Tokenizer({" a": 301, "\na": 302}, leading_space=True)

    assert asyncio.run(tokens_within(tokenizer.post, "a")) is None
    assert asyncio.run(spelled(tokenizer.post, "a")) == [301]


@pytest.mark.parametrize(
    ("text", "leading_space", "prompt"),
    [
        ('{"a', False, '{"a'),
        ('{"a', True, 'x{"a'),  # else the engine would drop " {" with the space
        (" a", False, " a"),
        (" a", True, "x a"),
        ("a" + ROCKET, True, "xa" + ROCKET),
        ("[a", True, "[a"),  # here the space is a separate token
        ("<end>", False, None),
        ("a<end>b", True, None),
        ("a<end", False, "a<end"),
    ],
)
def test_grammar_is_given_nothing_but_the_text(text: str, leading_space: bool, prompt: str | None) -> None:
    tokenizer = Tokenizer({" {": 302, "<end>": 300, " a": 301, " x": 304}, leading_space=leading_space)

    assert asyncio.run(grammar_prompt(tokenizer.post, text)) == prompt


def test_no_grammar_prompt_where_the_letter_before_it_does_not_stand_alone() -> None:
    tokenizer = Tokenizer({" {": 302, " x{": 303}, leading_space=True)

    assert asyncio.run(grammar_prompt(tokenizer.post, "{")) is None
