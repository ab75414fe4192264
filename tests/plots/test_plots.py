"""The plots: what they show and say, and that they look like their reference pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from sollol_nb import plots
from sollol_nb.errors import ConfigError
from sollol_nb.text import palette
from tests.support.plot_pictures import (
    DRAWINGS,
    NOON_S,
    PICTURES,
    busy_frame,
    cluster,
    coordinator_status,
    draw,
    empty_frame,
    faults,
    frame_with,
    pinned_style,
)

AVERAGED_PX = 12  # fonts and lines are a fraction of a pixel elsewhere in other versions of matplotlib
TOLERANCE_RMS = 3.5  # of 255, between averages; 3.1 is what matplotlib 3.8 and 3.11 differ by
OF_FRAMES: list[Callable[..., Axes]] = [
    plots.ttft_ecdf,
    plots.total_ecdf,
    plots.tokens_per_s_by_layout,
    plots.timeline,
    plots.predicted_vs_measured,
    plots.queue_wait_by_priority,
]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with pinned_style():
        yield
    plt.close("all")


@pytest.fixture
def ax() -> Axes:
    return Figure(layout="constrained").subplots()


def labels(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def rows(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_yticklabels()]


# --- reference pictures ----------------------------------------------------------------------------


def difference_rms(first: Path, second: Path) -> float:
    """Root mean square of the difference of two pictures, of 255, after averaging squares of pixels."""
    averages = []
    for path in (first, second):
        pixels = imread(path)[:, :, :3]
        height, width = (length // AVERAGED_PX for length in pixels.shape[:2])
        squares = pixels[: height * AVERAGED_PX, : width * AVERAGED_PX]
        averages.append(squares.reshape(height, AVERAGED_PX, width, AVERAGED_PX, 3).mean((1, 3)))
    return float(np.sqrt(np.mean((averages[0] - averages[1]) ** 2)) * 255)


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_looks_like_its_picture(name: str, tmp_path: Path) -> None:
    draw(DRAWINGS[name], tmp_path / f"{name}.png")

    assert difference_rms(PICTURES / f"{name}.png", tmp_path / f"{name}.png") <= TOLERANCE_RMS


@pytest.mark.parametrize(
    ("name", "drawing"),
    [
        ("ttft_ecdf", lambda ax: plots.ttft_ecdf(busy_frame().query("backend != 'ollama-pool'"), ax)),
        ("layer_map", lambda ax: plots.layer_map(coordinator_status("llama3.1:70b", [27, 27, 27]), ax)),
        ("timeline", lambda ax: plots.timeline(busy_frame(60).assign(failover_details=""), None, ax)),
        ("no_requests", lambda ax: plots.ttft_ecdf(busy_frame(1), ax)),
    ],
    ids=["a line is missing", "a model is missing", "faults are missing", "there is a request"],
)
def test_the_tolerance_is_less_than_what_matters(
    name: str, drawing: Callable[[Axes], Axes], tmp_path: Path
) -> None:
    draw(drawing, tmp_path / "drawn.png")

    assert difference_rms(PICTURES / f"{name}.png", tmp_path / "drawn.png") > TOLERANCE_RMS


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("background", ["default", "dark_background"])
def test_texts_stand_out_from_the_background_and_legends_beside_the_data(
    name: str, background: str, tmp_path: Path
) -> None:
    ax = draw(DRAWINGS[name], tmp_path / "picture.png", background=background)

    ax.figure.draw_without_rendering()

    legend = ax.get_legend()
    texts = [ax.xaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *(legend.get_texts() if legend else ())]
    assert {to_hex(text.get_color()) for text in texts} == {"#ffffff" if background != "default" else "#000000"}
    assert ax.get_title(loc="left")
    if legend is not None:
        figure = ax.figure
        shown = legend.get_window_extent()
        assert shown.y1 < ax.xaxis.label.get_window_extent().y0
        assert shown.y0 >= 0
        assert shown.x1 <= figure.bbox.x1


def test_drawing_changes_no_settings_and_makes_a_figure_only_if_none_is_given() -> None:
    before = dict(mpl.rcParams)

    for drawing in DRAWINGS.values():
        ax = Figure().subplots()
        assert drawing(ax) is ax
    assert plt.get_fignums() == []
    new = plots.total_ecdf(busy_frame(20))

    assert dict(mpl.rcParams) == before
    assert new.figure.get_size_inches().tolist() == mpl.rcParams["figure.figsize"]
    assert plt.get_fignums() == [new.figure.number]


# --- frames that have nothing to show ---------------------------------------------------------


@pytest.mark.parametrize("draw_frame", OF_FRAMES)
def test_an_empty_log_gives_a_message(draw_frame: Callable[..., Axes], ax: Axes) -> None:
    draw_frame(empty_frame(), ax=ax)

    assert [text.get_text() for text in ax.texts] == ["no requests yet"]
    assert ax.get_title(loc="left")


def test_a_log_without_predictions_and_a_cluster_without_coordinators_give_messages(ax: Axes) -> None:
    plots.predicted_vs_measured(frame_with(model=["m"], tokens_per_s=[10.0]), ax)
    assert [text.get_text() for text in ax.texts] == ["no request with a prediction yet"]

    layer_map = plots.layer_map(cluster())
    assert [text.get_text() for text in layer_map.texts] == ["no model is sharded"]


@pytest.mark.parametrize("draw_frame", OF_FRAMES)
def test_a_missing_column_is_named_before_anything_is_drawn(draw_frame: Callable[..., Axes]) -> None:
    with pytest.raises(ConfigError, match=r"the frame has no column '\w+'; pass router\.latency\.frame\(\)"):
        draw_frame(pd.DataFrame({"backend": [], "started_at": []}))
    with pytest.raises(ConfigError, match="a plot takes a DataFrame, not list"):
        draw_frame([1, 2])
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw_frame", OF_FRAMES)
@pytest.mark.parametrize("count", [1, 2, 5000])
def test_one_request_or_thousands_are_drawn(draw_frame: Callable[..., Axes], count: int, ax: Axes) -> None:
    frame = busy_frame(count, models=7, places=9).assign(predicted_ms_per_token=30.0)

    draw_frame(frame, ax=ax)
    ax.figure.draw_without_rendering()

    assert ax.get_xlabel()
    assert all(math.isfinite(limit) for limit in (*ax.get_xlim(), *ax.get_ylim()))


# --- what each shows --------------------------------------------------------------------------


def test_layer_map_has_a_segment_for_each_worker_planned_and_actual(ax: Axes) -> None:
    plots.layer_map(cluster(coordinator_status("big", [5, 4, 4], [5, 5, 3]), coordinator_status("b", [2])), ax)

    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [
        *((0, 5), (0, 5), (5, 4), (5, 5), (9, 4), (10, 3)),
        (0, 2),
    ]
    assert [to_hex(bar.get_facecolor()) for bar in bars[:6:2]] == list(palette.SEGMENTS[:3])
    assert rows(ax) == ["big", "b"]
    assert labels(ax)[:2] == ["10.0.0.1:50052: 0-4, 2.4 GiB", "10.0.0.2:50052: 5-8, 1.9 GiB"]
    assert "output layer" in ax.get_xlabel()


@pytest.mark.parametrize(("draw_frame", "column"), [(plots.ttft_ecdf, "ttft_ms"), (plots.total_ecdf, "total_ms")])
def test_ecdf_rises_by_one_share_at_each_request(draw_frame: Callable[..., Axes], column: str, ax: Axes) -> None:
    times_ms = [30.0, 10.0, 20.0, 40.0, 5.0]
    frame = frame_with(backend=["ollama-pool"] * 4 + ["llama.cpp-local"], **{column: times_ms})

    draw_frame(frame, ax=ax)

    local, pool = ax.get_lines()
    assert pool.get_xdata().tolist() == [10, 10, 20, 30, 40]
    assert pool.get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert local.get_ydata().tolist() == [0, 1]
    assert labels(ax) == ["llama.cpp-local: median 5.00 ms, n = 1", "ollama-pool: median 25 ms, n = 4"]
    assert "(ms)" in ax.get_xlabel()


def test_total_ecdf_is_of_whole_answers_only(ax: Axes) -> None:
    frame = frame_with(backend=["ollama-pool"] * 3, status=["ok", "error", "timeout"], total_ms=[9.0, 1.0, 2.0])

    plots.total_ecdf(frame, ax)

    assert ax.get_lines()[0].get_xdata().tolist() == [9.0, 9.0]


def test_a_long_ecdf_is_thinned_but_keeps_its_ends(ax: Axes) -> None:
    values = np.arange(1.0, 100_001.0)

    plots.total_ecdf(frame_with_totals(values), ax)

    drawn = ax.get_lines()[0]
    assert len(drawn.get_xdata()) < 2100
    assert (drawn.get_xdata()[0], drawn.get_xdata()[-1], drawn.get_ydata()[-1]) == (1.0, 100_000.0, 1.0)
    assert ax.get_xscale() == "log"


def frame_with_totals(totals_ms: np.ndarray[Any, Any]) -> pd.DataFrame:
    return pd.DataFrame({"backend": "ollama-pool", "status": "ok", "total_ms": totals_ms})


def test_speed_is_grouped_by_layout_and_by_model_if_there_are_several(ax: Axes) -> None:
    about: dict[str, Any] = {
        "backend": ["llama.cpp-distributed", "llama.cpp-distributed", "ollama-pool"],
        "layout": ["5/4/4", "5/4/4", ""],
        "tokens_per_s": [10.0, 20.0, 30.0],
    }

    plots.tokens_per_s_by_layout(frame_with(model=["m", "m", "m"], **about), ax)
    assert rows(ax) == ["ollama-pool  (n = 1)", "5/4/4  (n = 2)"]

    several = plots.tokens_per_s_by_layout(frame_with(model=["m", "long" * 9, "m"], **about))
    assert rows(several) == [
        *("m, ollama-pool  (n = 1)", "longlonglong…onglonglong, 5/4/4  (n = 1)", "m, 5/4/4  (n = 1)"),
    ]


def test_a_layout_on_one_worker_is_named_as_such(ax: Axes) -> None:
    frame = frame_with(model=["m"], backend=["llama.cpp-distributed"], layout=["31"], tokens_per_s=[10.0])
    plots.tokens_per_s_by_layout(frame, ax)
    assert rows(ax) == ["1 worker (31 units)  (n = 1)"]


def test_queue_waits_are_grouped_by_priority_the_highest_on_top(ax: Axes) -> None:
    plots.queue_wait_by_priority(frame_with(priority=[5, 10, 1, 5, None], queue_ms=[1.0, 0.0, 9.0, 3.0, 7.0]), ax)

    assert rows(ax) == ["10 critical  (n = 1)", "5 normal  (n = 2)", "1 batch  (n = 1)"]
    points = [points for points in ax.collections if isinstance(points, PathCollection)]
    assert [sorted(group.get_offsets()[:, 0].tolist()) for group in points] == [[0.0], [1.0, 3.0], [9.0]]


def test_predictions_lie_on_the_line_if_they_were_right(ax: Axes) -> None:
    plots.predicted_vs_measured(
        frame_with(model=["a", "b"], tokens_per_s=[50.0, 100.0], predicted_ms_per_token=[20.0, 20.0]), ax
    )

    points = {tuple(group.get_offsets()[0]) for group in ax.collections if isinstance(group, PathCollection)}
    assert points == {(20.0, 20.0), (20.0, 10.0)}
    assert labels(ax) == ["a, n = 1", "b, n = 1", "measured as predicted"]


def test_predictions_are_not_compared_with_answers_of_drafts_or_of_several_layouts(ax: Axes) -> None:
    plots.predicted_vs_measured(
        frame_with(
            model=["a"] * 4,
            tokens_per_s=[50.0, 100.0, 25.0, 40.0],
            predicted_ms_per_token=[20.0, 40.0, 20.0, 20.0],
            drafted_tokens=[None, 0, 8, None],
            accepted_tokens=[None, 0, 0, None],
            failovers=[0, 0, 0, 1],
        ),
        ax,
    )

    (points,) = [group.get_offsets().tolist() for group in ax.collections if isinstance(group, PathCollection)]
    assert points == [[20.0, 20.0], [40.0, 10.0]], "each with the prediction for its own layout"


def seconds_of(days: float) -> float:
    """A position on the time axis as seconds after noon."""
    return round(float(days - NOON_S / 86400) * 86400, 3)


def test_timeline_has_a_lane_for_each_request_that_a_server_ran_at_the_same_time(ax: Axes) -> None:
    frame = frame_with(
        started_at=[NOON_S, NOON_S + 1, NOON_S + 12, NOON_S],
        place=["http://a:1", "http://a:1", "http://a:1", ""],
        total_ms=[10_000.0, 2000.0, 1000.0, 5.0],
        ttft_ms=[1000.0, None, 10.0, None],
        status=["ok", "error", "ok", "timeout"],
        failover_details=[f'[{{"what": "lost", "when": {NOON_S + 4}}}]', "", "", ""],
    )

    plots.timeline(frame, faults(), ax)

    assert rows(ax) == ["a:1", "no server\nreached"]
    pale, solid = (bars for bars in ax.collections if isinstance(bars, PolyCollection))
    spans = [sorted({seconds_of(x) for x in path.vertices[:, 0]}) for path in solid.get_paths()]
    heights = [path.vertices[:, 1].mean().round() for path in pale.get_paths()]
    assert spans == [[1.0, 10.0], [0.005], [3.0], [12.01, 13.0]]
    assert len({heights[0], heights[2]}) == 2
    assert heights[3] == heights[0]
    assert labels(ax) == ["ok", "error", "timeout", "before the first token", "failover"]
    crosses = next(line for line in ax.get_lines() if line.get_marker() == "X")
    assert [seconds_of(x) for x in crosses.get_xdata()] == [4.0]


def test_timeline_marks_faults_of_the_time_that_is_shown(ax: Axes) -> None:
    plots.timeline(busy_frame(30), faults(), ax)

    assert "fault in the cluster" in labels(ax)
    dotted = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert [seconds_of(line.get_xdata()[0]) for line in dotted] == [451.0]


def test_timeline_of_many_requests_shows_the_newest(ax: Axes) -> None:
    plots.timeline(busy_frame(2500), ax=ax)

    assert [text.get_text() for text in ax.texts] == ["2,000 requests, the newest of 2,500"]
