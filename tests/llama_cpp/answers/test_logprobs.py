"""Log probabilities: they spell the answer, also where text was held back and where the answer was cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.llama_cpp.answers.logprobs import LogprobReader, spelling
from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.llama_server import (
    ACCENTS,
    GREEDY,
    LONG,
    PLAIN,
    SCHEMA,
    THINKING,
    Run,
    Server,
    cut_after,
    llama_server,
    new_answer,
    uncut,
)

WANTED = {**GREEDY, "logprobs": True, "top_logprobs": 2}
PARSED = PLAIN + "{# [THINK] #}"


def token(number: int, text: str, *likely: tuple[int, str]) -> dict[str, Any]:
    alternatives = [{"id": likely_id, "token": piece, "bytes": [], "logprob": -1.0} for likely_id, piece in likely]
    return {"id": number, "token": text, "bytes": [], "logprob": -0.5, "top_logprobs": alternatives}


def pieces(entries: Any) -> list[str]:
    return [entry["token"] for entry in entries]


def test_the_text_of_a_held_token_comes_with_the_next_one() -> None:
    reader = LogprobReader({"logprobs": True})
    assert pieces(reader.read([token(1, "Hi")], "Hi")) == ["Hi"]
    assert reader.read([token(2, "", (2, " th"))], "") == []
    assert pieces(reader.read([token(3, " there")], " there")) == [" th", "ere"]


def test_a_held_token_that_is_not_among_the_likeliest_has_no_text() -> None:
    reader = LogprobReader({"logprobs": True})
    assert reader.read([token(2, "", (9, " no"))], "") == []
    assert pieces(reader.read([token(3, " there")], " there")) == ["", " there"]
    assert reader.read([token(4, "")], "") == []  # the end


def test_alternatives_come_only_if_they_were_requested() -> None:
    (plain,) = LogprobReader({"logprobs": True}).read([token(1, "a", (1, "a"), (2, "b"))], "a")
    assert plain == {"token": "a", "logprob": -0.5, "bytes": [97]}
    reader = LogprobReader({"logprobs": True, "top_logprobs": 1})
    (with_one,) = reader.read([token(1, "a", (1, "a"), (2, "b"))], "a")
    assert with_one["top_logprobs"] == [{"token": "a", "logprob": -1.0, "bytes": []}]


def test_only_what_is_new_of_repeated_text_is_spelled() -> None:
    entries = LogprobReader({}).read([token(1, "", (1, "ab")), token(2, "abcd")], "abcd")
    assert pieces(spelling(entries, "abcd")) == ["ab", "cd"]
    assert pieces(spelling(entries, "d")) == ["d"]
    assert spelling(entries, "") == []


@pytest.mark.engine
@pytest.mark.parametrize(
    ("question", "options", "template"),
    [
        (LONG, {}, PLAIN),
        (ACCENTS, {}, PLAIN),
        (LONG, {"stop": ["workers hold"], "recovery": "exact"}, PLAIN),
        (LONG, {"format": SCHEMA, "max_tokens": 40}, PLAIN),
        (LONG, {}, THINKING),
        (LONG, {}, PARSED),
    ],
    ids=["long", "accents", "stop and exact", "schema", "thinking", "parsed"],
)
def test_they_spell_the_answer_wherever_it_was_cut(
    run: Run, question: str, options: dict[str, Any], template: str
) -> None:
    options = {**WANTED, **options}

    async def test(server: Server) -> None:
        whole = new_answer(question, options, template)
        events, expected = await uncut(server, whole)
        assert "".join(pieces(whole.logprobs)) == expected["content"] != ""
        assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in whole.logprobs)
        for cut in {1, 2, len(events) // 2, len(events) - 1}:
            answer, before = await cut_after(server, new_answer(question, options, template), events[:cut])
            after = await server.finish(answer)
            sent = [entry for chunk in before + after for entry in chunk.get("logprobs", ())]
            assert sent == answer.logprobs
            assert "".join(pieces(sent)) == answer.text == expected["content"], cut
            assert pieces(sent) == pieces(whole.logprobs), cut

    run(test)


@pytest.fixture(scope="module")
def real_run(engine: Engine, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a test with a llama-server that has a real model, which wavers between tokens."""
    # Without repacking: some virtual machines announce instructions that they do not have.
    with llama_server(engine, tmp_path_factory.mktemp("real"), "-m", str(smollm2), "--no-repack") as run:
        yield run


@pytest.mark.engine
@pytest.mark.parametrize("recovery", ["fast", "exact"])
def test_those_of_a_real_model_follow_its_text_through_a_cut(real_run: Run, recovery: str) -> None:
    options = {**WANTED, "recovery": recovery, "max_tokens": 30}

    async def test(server: Server) -> None:
        whole = new_answer(LONG, options, PLAIN)
        events, expected = await uncut(server, whole)
        assert "".join(pieces(whole.logprobs)) == expected["content"]
        assert len({entry["logprob"] for entry in whole.logprobs}) > 20
        answer, before = await cut_after(server, new_answer(LONG, options, PLAIN), events[: len(events) // 2])
        after = await server.finish(answer)
        sent = [entry for chunk in before + after for entry in chunk.get("logprobs", ())]
        assert "".join(pieces(sent)) == answer.text
        assert len(sent) == answer.token_count == 30
        if recovery == "exact":
            assert pieces(sent) == pieces(whole.logprobs)

    real_run(test)
