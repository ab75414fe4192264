"""What tokens took is remembered by layout, from answers that ran alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sollol_nb.layers.plan import plan_from_counts
from sollol_nb.layers.token_time import predict, worker_parts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.measurements import LAYOUTS_KEPT, TokenMeasurements
from sollol_nb.runtime.events import EventBus, EventKind
from tests.support.layer_plans import GB, TWELVE, workers

PATH = Path("model.gguf")
ROUND_TRIPS = dict.fromkeys(("w0:1", "w1:1", "w2:1"), 0.5)


def coordinator(*counts: int, seconds_per_token: float | None = None, port: int = 18080) -> Coordinator:
    values: dict[str, Any] = {
        "base_url": f"http://127.0.0.1:{port}",
        "plan": plan_from_counts(TWELVE, workers(*[20 * GB] * len(counts)), counts),
        "pace": SimpleNamespace(seconds_per_token=seconds_per_token),
        "settings": SimpleNamespace(model_path=PATH, facts=TWELVE),
    }
    return cast(Coordinator, SimpleNamespace(**values))


def answer(bus: EventBus, tokens_per_s: float | None, place: str = "http://127.0.0.1:18080") -> None:
    bus.publish(EventKind.REQUEST_STARTED, "big", "asking big")
    bus.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", status="ok", place=place, tokens_per_s=tokens_per_s)


def test_the_pace_stands_in_until_an_answer_was_measured() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, seconds_per_token=0.04)

    assert measured.token_ms(coordinator(7, 6)) is None
    assert measured.token_ms(running) == 40
    for tokens_per_s in (50, 20, 40, None):
        answer(bus, tokens_per_s)
    assert measured.token_ms(running) == 25, "the median of the answers"


def test_answers_that_ran_side_by_side_measure_nothing() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, seconds_per_token=0.04)
    bus.publish(EventKind.REQUEST_STARTED, "big", "asking big")
    answer(bus, 10)
    bus.publish(EventKind.REQUEST_FINISHED, "big", "big: ok", place=running.base_url, tokens_per_s=10)
    assert measured.token_ms(running) == 40

    answer(bus, 50)
    assert measured.token_ms(running) == 20, "alone again"


def test_a_layout_that_has_ended_helps_to_predict_the_next() -> None:
    bus = EventBus()
    measured, before = TokenMeasurements(bus), coordinator(7, 6, 0)
    assert measured.speeds(PATH, [], ROUND_TRIPS) is None
    answer(bus, 40)
    measured.keep(before, ROUND_TRIPS)

    new_parts = worker_parts(coordinator(5, 4, 4).plan, ROUND_TRIPS)  # type: ignore[arg-type]
    assert predict(measured.speeds(PATH, [], ROUND_TRIPS), new_parts).token_ms == pytest.approx(25.5, rel=0.01)
    assert measured.speeds(Path("other.gguf"), [], ROUND_TRIPS) is None, "of that model only"
    assert measured.token_ms(coordinator(5, 4, 4)) is None, "another at its address is unmeasured"


def test_the_running_layout_counts_with_its_time_now() -> None:
    bus = EventBus()
    measured, running = TokenMeasurements(bus), coordinator(7, 6, 0)
    answer(bus, 10)
    measured.keep(running, ROUND_TRIPS)
    answer(bus, 40)

    parts = worker_parts(running.plan, ROUND_TRIPS)  # type: ignore[arg-type]
    assert predict(measured.speeds(PATH, [running], ROUND_TRIPS), parts).token_ms == pytest.approx(25, rel=0.01)


def test_only_the_last_layouts_are_kept() -> None:
    bus = EventBus()
    measured = TokenMeasurements(bus)
    for first in range(13):
        for second in range(13 - first + 1):
            counts = (first, second, 13 - first - second)
            if min(counts) >= 0:
                answer(bus, 40)
                measured.keep(coordinator(*counts), ROUND_TRIPS)
    assert len(measured._kept[PATH]) == LAYOUTS_KEPT
