"""What a starting coordinator drafts: chosen from costs, and from what drafts brought before."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.answers.drafts import DraftCounter
from sollol_nb.llama_cpp.coordinators import draft_memory
from sollol_nb.llama_cpp.coordinators.draft_memory import TOKENS_KEPT, DraftMemory
from sollol_nb.llama_cpp.coordinators.pace import Pace
from sollol_nb.llama_cpp.coordinators.speculation import (
    LONGEST,
    SHORTEST,
    Costs,
    DraftResults,
    Speculation,
    choose,
)
from sollol_nb.models.draft_models import draft_problem, find_draft_model, keeps_a_state
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.settings import config
from tests.support.gguf_files import write_keys, write_llama

NEAR = Costs(token_ms=25.0, wait_ms=0.3, further_ms=11.0)
FAR = Costs(token_ms=33.0, wait_ms=30.0, further_ms=0.4)
SMALL = Path("small.gguf")
PAID = DraftResults(tokens=1000, ms=10_000, drafted=500, accepted=400, single_tokens=500, single_ms=10_000)
LOST = DraftResults(tokens=1000, ms=21_200, drafted=500, accepted=20, single_tokens=500, single_ms=10_000)


def test_drafts_are_longer_the_more_of_a_token_is_waiting() -> None:
    near, far = choose("auto", NEAR, {}), choose("auto", FAR, {})

    assert (near.kind, far.kind) == ("ngram", "ngram")
    assert (near.max_tokens, far.max_tokens) == (SHORTEST, LONGEST)
    assert far.describe() == f"n-gram drafts of up to {LONGEST} tokens (round trips take 91% of a token's time)"


def test_drafts_that_did_not_pay_are_off_and_the_reason_says_what_they_cost() -> None:
    off = choose("auto", NEAR, {"ngram": LOST})

    assert not off.is_on
    assert off.why == "n-gram drafts were accepted at 4% and cost 6.0%"
    assert choose("auto", NEAR, {"ngram": PAID}).is_on
    assert choose("ngram", NEAR, {"ngram": LOST}).is_on, "as requested"
    assert not choose("off", FAR, {"ngram": PAID}).is_on


def test_too_few_answers_decide_nothing() -> None:
    few = DraftResults(tokens=50, ms=5000, drafted=50, accepted=0, single_tokens=50, single_ms=500)

    assert few.speed is None
    assert choose("auto", NEAR, {"ngram": few}).kind == "ngram"


@pytest.mark.parametrize(
    ("draft_ms", "results", "is_given", "kind"),
    [
        (2.0, {}, False, "draft"),
        (30.0, {}, False, "ngram"),
        (None, {}, False, "ngram"),
        (None, {}, True, "draft"),
        (2.0, {"draft": LOST}, True, "ngram"),
        (2.0, {"draft": LOST, "ngram": LOST}, True, "off"),
    ],
)
def test_a_draft_model_is_used_where_it_is_fast_or_named_and_has_not_been_slower(
    draft_ms: float | None, results: dict[str, DraftResults], is_given: bool, kind: str
) -> None:
    costs = Costs(token_ms=FAR.token_ms, wait_ms=FAR.wait_ms, further_ms=FAR.further_ms, draft_ms=draft_ms)
    assert choose("auto", costs, results, draft_model=SMALL, is_given=is_given).kind == kind


def test_a_build_without_the_flags_starts_without_drafts_and_the_reason_names_the_flag() -> None:
    wanted = choose("ngram", FAR, {})
    flags = frozenset(flag for flag in wanted.flags() if flag.startswith("--"))

    assert wanted.with_known(flags) == wanted
    old = wanted.with_known(flags - {"--spec-type"})
    assert not old.is_on
    assert old.why == "this llama-server has no --spec-type; update llama.cpp"
    assert Speculation.from_dict(json.loads(json.dumps(wanted.as_dict()))) == wanted


# --- what drafts brought ----------------------------------------------------------------------


def test_results_outlive_a_process_and_fade(alone: None) -> None:
    key = ("model 1 2", "5/4/4 at 2^0 ms", "ngram")

    async def learn() -> dict[str, DraftResults]:
        first = DraftMemory()
        first.add(key, LOST)
        await first.save()
        first.add(key, LOST)
        second = DraftMemory()
        await first.save()
        for _ in range(30):
            second.add(key, PAID)
        return await second.of(*key[:2])

    found = asyncio.run(learn())["ngram"]

    assert found.tokens <= TOKENS_KEPT
    assert found.speed is not None
    assert found.speed > 1.5, "the newer answers count more"
    path = config.state_file("drafts.json")
    assert os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o600
    for damaged in ("{", "[1]", '[{"model": "m"}]', path.read_text().replace('"tokens": ', '"tokens": -')):
        path.write_text(damaged)
        assert asyncio.run(DraftMemory().of(*key[:2])) == {}


def test_results_that_come_while_others_are_written_are_written_a_second_later(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, key, written = DraftMemory(), ("model 1 2", "5/4/4 at 2^0 ms", "ngram"), list[float]()
    loops: list[asyncio.AbstractEventLoop] = []

    def write(new: Mapping[Any, DraftResults]) -> None:
        written.extend(results.tokens for results in new.values())
        if len(written) == 1:
            loops[0].call_soon_threadsafe(memory.add, key, PAID)

    async def answer() -> None:
        loops.append(asyncio.get_running_loop())
        memory.add(key, LOST)
        assert memory._saving is not None
        await memory._saving

    monkeypatch.setattr(draft_memory, "SAVED_AFTER_S", 0.01)
    monkeypatch.setattr(draft_memory, "_write", write)
    asyncio.run(answer())
    assert written == [LOST.tokens, PAID.tokens]


def test_tokens_that_were_computed_alone_are_counted_apart_from_drafted_ones() -> None:
    counter = DraftCounter()
    for tokens, ms, drafted, accepted in (
        *((1, 0.1, 0, 0), (2, 10.1, 0, 0), (3, 20.1, 0, 0)),  # two alone
        *((4, 50.1, 8, 2), (5, 50.1, 8, 2), (6, 50.1, 8, 2)),  # a draft
        (7, 60.1, 8, 2),  # alone
    ):
        timings = {"predicted_n": tokens, "predicted_ms": ms, "draft_n": drafted, "draft_n_accepted": accepted}
        counter.read(timings)
    assert counter.total == {"drafted": 8, "accepted": 2, "single_tokens": 3, "single_ms": pytest.approx(30.0)}

    continued = DraftCounter(counter.total)
    continued.next_engine()
    continued.read({"predicted_n": 1, "predicted_ms": 0.1, "draft_n": 4, "draft_n_accepted": 1})
    assert (continued.total["drafted"], continued.total["accepted"]) == (12, 3)


def test_drafted_tokens_that_arrive_together_do_not_make_a_slow_engine_look_dead() -> None:
    class Answer:
        waiting_prompt_tokens = 0

    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    stream = pace.open(Answer())
    for step in range(20):
        now[0] += 5.0
        for _ in range(17):
            stream.on_event({"timings": {"predicted_ms": 5000.0 * step}})
    assert pace.seconds_per_token == pytest.approx(5.0)


# --- draft models -----------------------------------------------------------------------------


def test_a_draft_model_has_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model.gguf", vocabulary=400)
    longer = write_llama(tmp_path / "longer.gguf", vocabulary=420, blocks=1)
    longest = write_llama(tmp_path / "longest.gguf", vocabulary=600, blocks=1)

    assert draft_problem(model, model) == ""
    assert draft_problem(model, longer) == "", "a few more tokens at the end are no difference"
    assert draft_problem(model, longest) == "its vocabulary has 600 tokens instead of 400"
    assert "tokenizer is of another kind" in draft_problem(model, DEMO_MODEL_PATH)


def test_the_smallest_model_at_hand_that_fits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path / "model.gguf", blocks=40, embedding=128, feed_forward=512)
    files = {
        "small": write_llama(tmp_path / "small.gguf", blocks=2),
        "smallest": write_llama(tmp_path / "smallest.gguf", blocks=1),
        "other": write_llama(tmp_path / "other.gguf", blocks=1, vocabulary=640),
        "same": model,
    }
    assert find_draft_model(model, read_facts(model)) is None

    monkeypatch.setenv("SOLLOL_MODELS", ",".join(f"{name}={path}" for name, path in files.items()))

    assert find_draft_model(model, read_facts(model)) == files["smallest"]


def test_models_that_keep_a_state_are_known(tmp_path: Path) -> None:
    keys = {"mamba.block_count": 1, "mamba.ssm.state_size": 16}
    assert keeps_a_state(write_keys(tmp_path / "mamba.gguf", "mamba", keys))
    assert not keeps_a_state(DEMO_MODEL_PATH)
