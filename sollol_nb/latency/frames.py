"""Rows of the latency log as a pandas frame, a frame in brief, and a frame as a file.

Pandas is heavy to import, so this module is imported on first use.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sollol_nb.errors import ConfigError
from sollol_nb.latency.schema import COLUMNS, INTEGER, TEXT, TIME
from sollol_nb.text.short_names import short_names

SUFFIXES = (".csv", ".parquet")
ROWS_AT_ONCE = 10_000
"""So many rows at a time are turned into columns; as Python objects, a million would fill a gigabyte."""


def frame_of(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """A frame of rows as SQLite gives them, values in the order of `COLUMNS`, with the dtypes of `COLUMNS`.

    Of models that were requested by path it has the short names; `frame.attrs["model_paths"]` has their paths.
    """
    left = iter(rows)
    shared: dict[str, str] = {}  # equal texts become one object
    pieces = [_columns(list(islice(left, ROWS_AT_ONCE)), shared)]
    while more := list(islice(left, ROWS_AT_ONCE)):
        pieces.append(_columns(more, shared))
    joined: dict[str, Any] = {}
    for column, arrays in zip(COLUMNS, zip(*pieces, strict=True), strict=True):
        if column.dtype == TEXT:
            joined[column.name] = pd.array(np.concatenate(arrays), dtype=pd.StringDtype("python"))
        elif column.dtype == INTEGER:
            joined[column.name] = pd.concat([pd.Series(array) for array in arrays], ignore_index=True)
        elif column.dtype == TIME:
            milliseconds = np.round(np.concatenate(arrays) * 1000).astype("int64").astype("datetime64[ms]")
            joined[column.name] = pd.Series(milliseconds).dt.tz_localize("UTC")
        else:
            joined[column.name] = np.concatenate(arrays)
    frame = pd.DataFrame(joined, copy=False)
    names = short_names(frame["model"].unique())
    paths = {name: model for model, name in names.items() if name != model}
    if paths:
        frame["model"] = frame["model"].map(names).astype(pd.StringDtype("python"))
        frame.attrs["model_paths"] = paths
    return frame


def _columns(rows: Sequence[tuple[Any, ...]], shared: dict[str, str]) -> list[Any]:
    """One array for each of `COLUMNS`: texts as objects, integers nullable, all else as floats."""
    cells_by_column = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    arrays: list[Any] = []
    for column, cells in zip(COLUMNS, cells_by_column, strict=True):
        if column.dtype == TEXT:
            arrays.append(np.array([shared.setdefault(text, text) for text in cells], dtype=object))
        elif column.dtype == INTEGER:
            arrays.append(pd.array(cells, dtype="Int64"))
        else:
            arrays.append(np.array(cells, dtype=float))  # None becomes NaN
    return arrays


# --- on a screen ------------------------------------------------------------------------------


class BriefFrame(pd.DataFrame):
    """Rows of the log with all columns; shown are those that people look at, rounded, in local time.

    What is made of it (a selection, a copy) is a plain frame.
    """

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        return pd.DataFrame

    def __repr__(self) -> str:
        return f"{_brief(self).to_string(max_rows=60)}\n{self._note()}"

    def _repr_html_(self) -> str:
        return f"{_brief(self).to_html(max_rows=60, notebook=True)}<small>{self._note()}</small>"

    def _note(self) -> str:
        return f"times in ms, started in local time; the frame has all {len(self.columns)} columns"


def _brief(frame: pd.DataFrame) -> pd.DataFrame:
    started = frame["started_at"].dt.tz_convert(datetime.now().astimezone().tzinfo)
    columns = {
        "started": started.dt.strftime("%Y-%m-%d %H:%M:%S"),
        "model": frame["model"],
        **{name: frame[name] for name in ("backend", "layout", "status")},
        **{name: frame[name].round().astype("Int64") for name in ("queue_ms", "load_ms", "ttft_ms", "total_ms")},
        "tokens": frame["completion_tokens"],
        "tokens/s": frame["tokens_per_s"].round(1),
        "failovers": frame["failovers"],
    }
    return pd.DataFrame(columns)


# --- as a file --------------------------------------------------------------------------------


def check_format(path: Path) -> None:
    """Check that a file with this suffix can be written, before any row is read.

    Raises:
        ConfigError: the suffix is unknown, or pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"cannot export to {path.name!r}: the name must end in {' or '.join(SUFFIXES)}")
    if suffix == ".parquet":
        try:
            importlib.import_module("pyarrow")
        except ImportError as error:
            raise ConfigError(
                f"writing Parquet needs pyarrow: pip install pyarrow, or export to a .csv file ({error})"
            ) from error


def write_frame(frame: pd.DataFrame, path: Path) -> Path:
    """Write the frame in the format of the path's suffix; an existing file is replaced once the new one is whole.

    CSV has a header, times in ISO 8601, and empty cells for what does not apply. Parquet keeps all dtypes.

    Raises:
        OSError: the file cannot be written.
    """
    with _replacing(path) as unfinished:
        if path.suffix.lower() == ".parquet":
            frame.to_parquet(unfinished, engine="pyarrow", index=False)
        else:
            frame.to_csv(unfinished, index=False, encoding="utf-8", date_format="%Y-%m-%dT%H:%M:%S.%f%z")
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that replaces it at the end; after an error it is deleted."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
