"""What a benchmark asks: layouts, cases, their order and names, and prompts that no cache knows."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from sollol_nb.bench.plan import (
    PROMPTS,
    BenchCase,
    BenchTarget,
    Layout,
    bench_cases,
    bench_settings,
    case_labels,
    check_counts,
    client_prompts,
    fits_side_by_side,
    parse_layout,
)
from sollol_nb.errors import ConfigError
from sollol_nb.models.routing import DISTRIBUTED, LOCAL, OLLAMA

# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "layout", "description"),
    [
        ("auto", Layout(), "auto"),
        ("local", Layout(0), "local"),
        (1, Layout(1), "1 worker"),
        ("3", Layout(3), "3 workers"),
        (" 5/4/4 ", Layout(3, (5, 4, 4)), "layers 5/4/4"),
    ],
)
def test_a_layout_reads_as_it_is_written(written: str | int, layout: Layout, description: str) -> None:
    assert parse_layout(written) == layout
    assert str(layout) == str(written).strip()
    assert layout.description == description


@pytest.mark.parametrize("written", ["", "0", 0, -1, 1.5, True, "5/", "5/0/4", "5/4x", "two", "٣"])
def test_what_is_not_a_layout_is_refused_with_examples(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a layout; write auto, local, a number of workers"):
        parse_layout(written)


@pytest.mark.parametrize("layout", ["auto", 3, "5/4/4", "13/", "12/1"])
def test_exact_counts_must_place_every_unit(layout: str | int) -> None:
    parsed = parse_layout(str(layout).rstrip("/"))
    check_counts(parsed, "m", 12)
    if parsed.unit_counts:
        with pytest.raises(ConfigError, match=r"places 13 units, but m has 14 \(13 layers and the output layer\)"):
            check_counts(parsed, "m", 13)


@pytest.mark.parametrize(
    ("needs", "available", "fits"),
    [([1, 2, 3], 6, True), ([1, 2, 3], 5, False), ([3], 3, True), ([0, 0], 0, True)],
)
def test_coordinators_are_loaded_side_by_side_where_workers_suffice(
    needs: list[int], available: int, fits: bool
) -> None:
    assert fits_side_by_side(needs, available) is fits


# --- settings ---------------------------------------------------------------------------------


def test_lists_may_be_written_as_one_text_or_as_one_value() -> None:
    by_text = bench_settings("a,b", layouts="auto, 2,5/4/4", strategies="even,memory_aware", concurrency="1,4")
    by_list = bench_settings(
        ["a", "b"], layouts=["auto", 2, "5/4/4"], strategies=["even", "memory_aware"], concurrency=[1, 4]
    )
    assert by_text == by_list
    assert bench_settings("a", layouts=2).layouts == (Layout(2),)
    assert bench_settings("a", prompts="Hello!").prompts == ("Hello!",)
    assert bench_settings("a", prompts=2).prompts == PROMPTS[:2]


def test_answers_are_greedy_and_short_unless_said_otherwise() -> None:
    assert bench_settings("a").options == {"temperature": 0.0, "max_tokens": 64}
    assert bench_settings("a", max_tokens=8, temperature=None, seed=1).options == {
        "temperature": 0.0,
        "max_tokens": 8,
        "seed": 1,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": []}, "models="),
        ({"models": [""]}, "models="),
        ({"layouts": []}, "layouts is empty"),
        ({"strategies": [1]}, "strategies="),
        ({"concurrency": 0}, "concurrency=0 must be whole numbers of at least 1"),
        ({"concurrency": "1,x"}, "concurrency='1,x'"),
        ({"concurrency": []}, "concurrency=.* is empty"),
        ({"repeat": 0}, "repeat=0"),
        ({"repeat": True}, "repeat=True"),
        ({"warmup": -1}, "warmup=-1 must be whole numbers of at least 0"),
        ({"prompts": 0}, f"choose between 1 and {len(PROMPTS)} built-in prompts"),
        ({"prompts": len(PROMPTS) + 1}, f"choose between 1 and {len(PROMPTS)} built-in prompts"),
        ({"prompts": []}, "prompts must be a number or a list of texts"),
        ({"prompts": ["a", ""]}, "prompts must be a number or a list of texts"),
        ({"prompts": [1]}, "prompts must be a number or a list of texts"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_settings(**{"models": "demo", **given})


# --- cases ------------------------------------------------------------------------------------


def cases(backends: dict[str, str], **settings: Any) -> list[tuple[str, str, str, int]]:
    found = bench_cases(bench_settings(list(backends), **settings), backends)
    return [(case.target.model, str(case.target.layout), case.target.strategy, case.concurrency) for case in found]


def test_cases_are_every_combination_and_those_of_one_coordinator_follow_each_other() -> None:
    assert cases({"a": DISTRIBUTED, "b": DISTRIBUTED}, layouts="1,2", concurrency="1,4") == [
        (model, layout, "", concurrency) for model in "ab" for layout in "12" for concurrency in (1, 4)
    ]


def test_strategies_apply_where_they_decide_something() -> None:
    wanted = {"layouts": "auto,local,2,5/4/4", "strategies": "even,memory_aware"}
    assert cases({"a": DISTRIBUTED}, **wanted) == [
        ("a", "auto", "even", 1),
        ("a", "auto", "memory_aware", 1),
        ("a", "local", "", 1),
        ("a", "2", "even", 1),
        ("a", "2", "memory_aware", 1),
        ("a", "5/4/4", "", 1),
    ]
    assert cases({"a": OLLAMA}, **wanted)[:2] == [("a", "auto", "", 1), ("a", "local", "", 1)]


def test_the_same_coordinator_is_measured_once() -> None:
    assert cases({"a": LOCAL}, layouts="auto,local,2") == [("a", "auto", "", 1), ("a", "2", "", 1)]
    assert cases({"a": LOCAL}, layouts="local,auto") == [("a", "local", "", 1)]
    assert cases({"a": DISTRIBUTED}, layouts="2,2", concurrency="4,4") == [("a", "2", "", 4)]


def test_labels_name_only_what_differs() -> None:
    def labels(*given: tuple[str, str, str, int]) -> tuple[str, ...]:
        return case_labels([BenchCase(BenchTarget(m, parse_layout(layout), s), c) for m, layout, s, c in given])

    assert labels(("a", "2", "even", 1)) == ("a",)
    assert labels(("a", "1", "", 1), ("a", "2", "", 1)) == ("1 worker", "2 workers")
    assert labels(("a", "auto", "", 1), ("a", "2", "even", 4)) == ("auto, 1 client", "2 workers, even, 4 clients")
    assert labels(("a", "2", "", 1), ("b", "2", "", 1)) == ("a", "b")


# --- prompts ----------------------------------------------------------------------------------


def test_no_two_prompts_of_a_coordinator_begin_alike_and_all_targets_get_the_same() -> None:
    settings = bench_settings("a", prompts=3, repeat=4, concurrency=[1, 2, 4])
    texts = [
        text
        for round_number in range(settings.repeat)
        for concurrency in settings.concurrency
        for client in range(concurrency)
        for _, text in client_prompts(settings, concurrency, client, round_number, run_mark=17)
    ]
    assert len(set(texts)) == len(texts) == 4 * (1 + 2 + 4) * 3
    assert len({text.partition("]")[0] for text in texts}) == len(texts)
    case_count = [BenchCase(BenchTarget("a", Layout()), concurrency) for concurrency in settings.concurrency]
    assert settings.requests_of(case_count) == len(texts)


def test_each_client_sends_every_prompt_and_each_starts_with_a_different_one() -> None:
    settings = bench_settings("a", prompts=["x", "y", "z"], concurrency=3)
    sent = [client_prompts(settings, 3, client, 0, run_mark=0) for client in range(3)]
    assert [[number for number, _ in prompts] for prompts in sent] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    for number, text in chain(*sent):
        assert text.endswith(f"] {settings.prompts[number]}")
