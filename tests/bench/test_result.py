"""What a benchmark's rows come to: rounds, summary, table, plots, and a file that brings it all back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from sollol_nb.bench.result import BenchResult
from sollol_nb.bench.rows import METRICS, BenchRow, measurements_of
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError

PROMPTS = ("one", "two")


def row(case: str, round_number: int, prompt: int, **values: Any) -> BenchRow:
    """A request that took 100 ms for 10 tokens, by default."""
    usual = {
        "concurrency": 1,
        "client": 0,
        "start_s": round_number + prompt * 0.1,
        "total_ms": 100.0,
        "ttft_ms": 20.0,
        "tokens_per_s": 50.0,
        "completion_tokens": 10,
    }
    known = {"case": case, "model": "m", "layout": "2", "strategy": "", "round": round_number, "prompt": prompt}
    return BenchRow(**{**known, **usual, **values})


def result(*rows: BenchRow, cases: tuple[str, ...] = ("a", "b"), **others: Any) -> BenchResult:
    return BenchResult(cases, rows, {"prompts": PROMPTS}, **others)


@pytest.fixture
def two_cases() -> BenchResult:
    """Case b writes twice as fast as case a, on a machine that grows slower."""
    drift = (1.0, 0.5, 0.25)
    return result(
        *(
            row(case, number, prompt, tokens_per_s=speed * drift[number] + prompt)
            for number in range(3)
            for case, speed in (("a", 100.0), ("b", 200.0))
            for prompt in range(2)
        )
    )


def of(summary: Any, case: str, metric: str) -> dict[str, float]:
    return dict(summary.loc[(case, metric)])


def test_a_round_counts_by_the_median_of_its_requests_and_cases_by_the_median_of_their_rounds(
    two_cases: BenchResult,
) -> None:
    rounds = two_cases.rounds()
    speeds = rounds[(rounds["case"] == "a") & (rounds["metric"] == "tokens_per_s")]
    assert list(speeds["value"]) == [100.5, 50.5, 25.5]
    line = of(two_cases.summary(), "a", "tokens_per_s")
    assert (line["median"], line["n"], line["requests"], line["errors"]) == (50.5, 3, 6, 0)
    assert 25.5 <= line["lower"] <= 50.5 <= line["upper"] <= 100.5


def test_the_ratio_is_to_the_first_case_round_by_round(two_cases: BenchResult) -> None:
    line = of(two_cases.summary(), "b", "tokens_per_s")
    assert line["ratio"] == pytest.approx(100.5 / 50.5)
    assert line["ratio_upper"] - line["ratio_lower"] < 0.05, "the drift, fourfold, cancels"
    assert of(two_cases.summary(), "a", "tokens_per_s")["ratio"] == 1.0


def test_throughput_is_of_all_requests_of_a_round_together() -> None:
    both = result(
        row("a", 0, 0, concurrency=2, start_s=5.0, total_ms=400.0, completion_tokens=30),
        row("a", 0, 1, concurrency=2, start_s=5.1, total_ms=400.0, completion_tokens=20),
        row("a", 0, 0, concurrency=2, start_s=5.0, total_ms=100.0, completion_tokens=0, client=1),
        row("a", 0, 1, concurrency=2, start_s=5.0, total_ms=100.0, completion_tokens=0, client=1),
        cases=("a",),
    )
    assert of(both.summary(), "a", "throughput_tokens_per_s")["median"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    "spoilt", [{"error": "gone", "tokens_per_s": None}, {"load_ms": 900.0, "tokens_per_s": 1.0}]
)
def test_what_failed_or_waited_for_a_load_is_not_a_measurement(spoilt: dict[str, Any]) -> None:
    some = result(row("a", 0, 0, tokens_per_s=40.0), row("a", 0, 1, **spoilt), cases=("a",))
    summary = some.summary()
    assert of(summary, "a", "tokens_per_s")["median"] == 40.0
    assert of(summary, "a", "throughput_tokens_per_s")["n"] == 0, "its round is incomplete"
    assert len(some.frame) == 2, "the row is there all the same"


def test_an_incomplete_round_does_not_count_beside_complete_ones() -> None:
    stopped = result(
        *(row(case, 0, prompt, ttft_ms=10.0 + 90 * prompt) for case in "ab" for prompt in range(2)),
        *(row("a", 1, prompt, ttft_ms=10.0 + 90 * prompt) for prompt in range(2)),
        row("b", 1, 0, ttft_ms=10.0),  # the stop button: its long prompt was not asked any more
        complete=False,
    )
    line = of(stopped.summary(), "b", "ttft_ms")
    assert (line["median"], line["n"], line["ratio"], line["requests"]) == (55.0, 1, 1.0, 3)
    assert len(stopped.frame) == 7
    assert "medians over 2 rounds, each case in turn; [range] (intervals need 5 rounds); 7 requests" in str(
        stopped
    )
    first_only = result(*(row for row in stopped.rows if row.round == 0 or row.prompt == 0), complete=False)
    assert "one round: no intervals; 6 requests" in str(first_only)


def test_a_case_without_measurements_is_shown_as_such() -> None:
    some = result(row("a", 0, 0), row("a", 0, 1), row("b", 0, 0, error="too small", total_ms=None))
    line = of(some.summary(), "b", "ttft_ms")
    assert (line["n"], line["errors"]) == (0, 1)
    assert math.isnan(line["median"])
    assert str(some).splitlines()[0].rstrip().endswith("errors")


def test_a_table_without_any_measurement_says_why() -> None:
    remark = "no request was measured: all failed or waited for a model load"
    assert remark in str(result(row("a", 0, 0, load_ms=900.0), cases=("a",)))
    assert remark not in str(result(row("a", 0, 0), cases=("a",)))


def test_the_frame_is_typed_also_without_rows() -> None:
    for some in (result(row("a", 0, 0)), result()):
        types = some.frame.dtypes.astype(str)
        assert (types["case"], types["round"], types["ttft_ms"]) == ("string", "Int64", "float64")
    assert result(cases=()).summary().empty


def test_it_is_shown_as_a_table_with_its_remarks(two_cases: BenchResult) -> None:
    bundle = result(*two_cases.rows, notes=("<alike>",), complete=False)._repr_mimebundle_()
    for text in bundle.values():
        assert "generation, tokens/s" in text
        assert "50.5 [25.5, 100.5]" in text
        assert "incomplete: stopped before the end" in text
        assert "queue" not in text, "nobody waited"
    assert "&lt;alike&gt;" in bundle["text/html"]
    assert repr(two_cases) == "<BenchResult: 2 cases, 12 requests>"


def test_a_saved_result_comes_back_whole(two_cases: BenchResult, tmp_path: Path) -> None:
    path = two_cases.save(tmp_path / "result.json")
    back = BenchResult.load(path)
    assert back.rows == two_cases.rows
    assert back.frame.equals(two_cases.frame)
    assert back.summary().equals(two_cases.summary())
    assert str(back) == str(two_cases)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read .*: No such file"),
        ("nonsense", "is not a saved benchmark"),
        ("[]", "is not a saved benchmark"),
        ('{"format": 99}', "has format 99; this version reads format 1"),
        ('{"format": 1, "rows": [{"nosuch": 1}]}', "is not a saved benchmark"),
    ],
)
def test_another_file_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        BenchResult.load(path)


def test_a_plot_has_a_line_for_each_case(two_cases: BenchResult) -> None:
    figure, ax = plt.subplots()
    drawn = two_cases.plot(ax, metric="ttft_ms")
    assert drawn is ax
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["a", "b"]
    assert drawn.get_xlabel() == "first token, ms (lower is better)"
    plt.close(figure)
    own = two_cases.plot()
    assert own.get_xlabel() == "generation, tokens/s (higher is better)"
    plt.close()
    with pytest.raises(ConfigError, match=f"choose one of: {', '.join(METRICS)}"):
        two_cases.plot(metric="speed")


def test_the_overview_shows_throughput_only_for_concurrent_requests(two_cases: BenchResult) -> None:
    assert len(two_cases.overview().axes) == 3
    assert len(result(row("a", 0, 0, concurrency=2), cases=("a",)).overview().axes) == 4
    assert len(result(row("a", 0, 0, error="gone"), cases=("a",)).overview().axes) == 3


def test_a_completion_carries_its_measurements() -> None:
    completion = Completion(
        prompt_eval_count=30,
        prompt_eval_duration=10**8,
        eval_count=8,
        _routing={
            "backend": "llama.cpp-distributed",
            "layout": "7/6",
            "plan": {"shards": [{"endpoint": "a:1"}, {"endpoint": "b:2"}]},
            "duration_ms": 250.0,
            "failovers": [{}],
        },
    )
    found = measurements_of(completion)
    assert (found["layers"], found["workers"], found["total_ms"]) == ("7/6", "a:1 b:2", 250.0)
    assert (found["prompt_tokens_per_s"], found["completion_tokens"], found["failovers"]) == (300.0, 8, 1)
    assert measurements_of(Completion(eval_count=0))["prompt_tokens_per_s"] is None
