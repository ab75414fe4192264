"""A frame of the latency log as a file: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import contextlib
import importlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def check_format(path: Path) -> None:
    """Whether a file of this suffix can be written, before any row is read.

    Raises:
        ConfigError: the suffix is unknown, or what writes it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path.name!r} does not end in {' or '.join(SUFFIXES)}; the suffix tells the format")
    if suffix == ".parquet":
        try:
            importlib.import_module("pyarrow")
        except ImportError as error:
            words = "writing Parquet needs pyarrow; pip install 'sollol_nb[parquet]', or write a .csv file"
            raise ConfigError(f"{words} ({error})") from error


def write_frame(frame: pd.DataFrame, path: Path) -> Path:
    """Write the frame in the format of the path's suffix; a file that was there stays until the new one is whole.

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
    """A new file beside `path` that takes its place in the end; in case of an error it is gone."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
