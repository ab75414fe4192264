"""The latency log as a file: the same rows, and never half of one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.latency.frames import BriefFrame
from sollol_nb.latency.log import LatencyLog
from sollol_nb.latency.schema import COLUMNS, INTEGER, TEXT
from tests.support.latency_rows import FULL, HOURLY, REFUSED


@pytest.fixture
def log(tmp_path: Path) -> LatencyLog:
    log = LatencyLog(tmp_path / "latency.sqlite")
    log.record(FULL, replace(REFUSED, partial_text='half, "an\nanswer'), *HOURLY)
    return log


def read_csv(path: Path) -> pd.DataFrame:
    """An exported CSV file with the dtypes of the log, as its readers would give them."""
    texts = {column.name: pd.StringDtype("python") for column in COLUMNS if column.dtype == TEXT}
    integers = {column.name: "Int64" for column in COLUMNS if column.dtype == INTEGER}
    frame = pd.read_csv(path, dtype=texts | integers, parse_dates=["started_at"])
    frame[list(texts)] = frame[list(texts)].fillna("")
    return frame.astype({"started_at": "datetime64[ms, UTC]"})


def test_csv_has_the_same_rows(log: LatencyLog, tmp_path: Path) -> None:
    path = log.export(tmp_path / "log.csv")

    pd.testing.assert_frame_equal(read_csv(path), log.frame())
    assert (
        path.read_text(encoding="utf-8")
        .splitlines()[1]
        .startswith("2026-03-01T12:00:00.000000+0000,llama3.1:70b,")
    )


def test_parquet_has_the_same_rows_and_types(log: LatencyLog, tmp_path: Path) -> None:
    path = log.export(str(tmp_path / "log.PARQUET"))

    read = pd.read_parquet(path).astype(
        {column.name: pd.StringDtype("python") for column in COLUMNS if column.dtype == TEXT}
    )
    pd.testing.assert_frame_equal(read, log.frame())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_empty_log_and_a_filtered_one_are_exported_too(log: LatencyLog, tmp_path: Path, suffix: str) -> None:
    read = pd.read_csv if suffix == "csv" else pd.read_parquet

    none = read(log.export(tmp_path / f"none.{suffix}", model="unknown"))
    some = read(log.export(tmp_path / f"some.{suffix}", model="m1", last=2))

    assert list(none.columns) == list(some.columns) == [column.name for column in COLUMNS]
    assert len(none) == 0
    assert some["total_ms"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize("name", ["log", "log.xlsx", "log.csv.gz"])
def test_an_unknown_suffix_is_named(log: LatencyLog, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.csv or \.parquet"):
        log.export(tmp_path / name)


def test_without_pyarrow_one_line_says_what_to_install(
    log: LatencyLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(ConfigError, match="pip install pyarrow"):
        log.export(tmp_path / "log.parquet")
    assert log.export(tmp_path / "log.csv").exists()


def test_an_export_that_fails_leaves_the_file_before_it(
    log: LatencyLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log.export(tmp_path / "log.csv", last=1)
    before = path.read_bytes()

    def full_disk(_: pd.DataFrame, unfinished: Path, **__: object) -> None:
        unfinished.write_text("started_at,mod")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full_disk)
    with pytest.raises(OSError, match="No space left"):
        log.export(path)

    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} - {"log.csv"} == {
        file.name for file in tmp_path.glob("latency.sqlite*")
    }


def test_a_brief_frame_shows_what_people_look_at_and_has_everything(log: LatencyLog) -> None:
    log.record(replace(FULL, model="/home/me/models/a-model.gguf", ttft_ms=1234.5678, tokens_per_s=40.123456))
    whole = log.frame()
    brief = BriefFrame(whole)

    assert repr(brief).splitlines()[0].split() == [
        *("started", "model", "backend", "layout", "status", "queue_ms", "load_ms", "ttft_ms", "total_ms"),
        *("tokens", "tokens/s", "failovers"),
    ]
    for shown in (repr(brief), brief._repr_html_()):
        assert "/home/me" not in shown
        for text in ("a-model", "1235", "40.1", "the frame has all 25 columns"):
            assert text in shown
    assert "+00:00" not in repr(brief)
    pd.testing.assert_frame_equal(pd.DataFrame(brief), whole)
    for made in (brief[["model"]], brief.head(1), brief.copy()):
        assert type(made) is pd.DataFrame
    assert "the frame has all" in repr(BriefFrame(log.frame(model="nosuch"))), "also without rows"
